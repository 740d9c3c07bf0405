"""The site builds without a warning, and nothing in it is fetched from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    home, views = ((tmp_path / "site" / name).read_text() for name in ("index.html", "api/views.html"))
    assert "ssl_geo.views.multicrop.MultiCrop" in views
    assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?://', home)
