"""Pages for a person: one self-contained HTML file a probe or a run."""
