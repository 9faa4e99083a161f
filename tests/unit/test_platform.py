"""On Windows, which has not what is needed, one line says so before anything is imported that fails there."""

from __future__ import annotations

import subprocess
import sys

import pytest

from digitdist.__main__ import COMMANDS

WINDOWS = """
import runpy, sys
sys.platform = "win32"
sys.modules |= dict.fromkeys(("resource", "fcntl", "torch"))  # importing these fails
"""
STARTS = ["import digitdist", "from digitdist.train import train", "from digitdist.__main__ import main"]
STARTS += [f"runpy.run_module('digitdist.{name}', run_name='__main__')" for name in COMMANDS]


@pytest.mark.parametrize("start", STARTS)
def test_windows_gets_one_line_and_exit_code_2(start: str):
    done = subprocess.run([sys.executable, "-c", WINDOWS + start], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: digitdist does not run on Windows itself; run it on Linux, macOS or WSL\n"
