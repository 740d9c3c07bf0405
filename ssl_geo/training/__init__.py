"""How a run goes on, ends, is saved and is watched."""
