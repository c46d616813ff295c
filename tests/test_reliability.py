"""The trials of `benchmarks/reliability.py` run, and can fail."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "reliability.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the sources alone have the benchmarks")


@pytest.mark.parametrize(
    ("trial", "n"),
    [
        pytest.param("kills", 6, marks=pytest.mark.slow),
        pytest.param("files", 20, marks=pytest.mark.slow),
        ("mosaics", 4),
    ],
)
def test_some_trials(trial, n):
    outcome = subprocess.run(
        [sys.executable, str(SCRIPT), trial, "--n", str(n)], capture_output=True, text=True, timeout=900
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert f"{n} {trial}" in outcome.stdout
    assert "FAILED" not in outcome.stdout
