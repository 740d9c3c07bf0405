"""What every test may use: the shared real imagery, skipped with its reason where it is absent."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real imagery beside the checkout (not part of the project)."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real imagery not present: {SHARED_DATA}")
    return SHARED_DATA
