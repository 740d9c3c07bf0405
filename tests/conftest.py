"""What every test may use: the shared real imagery, skipped with its reason where it is absent."""

import os
from pathlib import Path

import pytest

# Tests are many and small: two processes with a thread each beat one with two. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real imagery beside the checkout (not part of the project)."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real imagery not present: {SHARED_DATA}")
    return SHARED_DATA
