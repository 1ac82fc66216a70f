"""Every unit's smoke preset on two replicas in mixed float16, as its own process: slow, a minute a unit."""

import os
import subprocess
import sys

import pytest

from course.core import catalogue

WORDS = "--preset smoke --strategy mirrored:2 --precision mixed_float16 --runs runs"


@pytest.mark.slow
@pytest.mark.parametrize("name", [unit.name for unit in catalogue.units()])
def test_a_unit_runs_on_two_replicas_in_float16_or_says_why_not(name, tmp_path):
    env = os.environ | {"PYTHONPATH": str(catalogue.ROOT)}
    words = [sys.executable, "-m", f"course.{name}", *WORDS.split()]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    if done.returncode == 2:  # one line, which names a flag that this unit does not take
        assert len(done.stderr.strip().splitlines()) == 1 and (
            "--strategy" in done.stderr or "--precision" in done.stderr
        )
    else:
        assert done.returncode == 0, done.stderr[-2_000:]
        assert list((tmp_path / "runs" / name).glob("smoke*/result.json"))
