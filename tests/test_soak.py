"""A short soak: kills, failures of the disk, flipped bits. `scripts/soak` runs a long one."""

import subprocess
import sys


def test_a_short_soak_loses_nothing() -> None:
    options = ["--kills", "2", "--failures", "3", "--flips", "30", "--layers", "2", "--seed", "7"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *options], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "flipped: 30 bits over 8 files, each refused by name" in done.stdout
