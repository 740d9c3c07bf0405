"""A handful of the kills that ``make soak`` does fifty of."""

import os
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parent / "soak"


def test_a_run_killed_again_and_again_is_the_run_that_was_not(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    imagery = str(tmp_path / "imagery")
    subprocess.run([sys.executable, str(SOAK / "imagery.py"), imagery], check=True, env=environment)
    command = [sys.executable, str(SOAK / "kills.py"), "--data", imagery, "--kills", "4", str(tmp_path / "runs")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "4 kills" in ended.stdout
    assert "identical" in ended.stdout


def test_damaged_files_are_read_or_refused_in_one_line():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SOAK / "mutations.py"), "--count", "30"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("30 inputs") == 19
