from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.launching import python

SERVER = """
import json, multiprocessing.forkserver
from pathlib import Path
from digitdist.data.workers import STOP_SIGNALS, loader_options

loader_options(1)
status = Path(f"/proc/{multiprocessing.forkserver._forkserver._forkserver_pid}/status").read_text()
blocked = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)
print(json.dumps([number.name for number in STOP_SIGNALS if not blocked >> (number - 1) & 1]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux, which tells what a process blocks")
def test_the_server_of_workers_hears_no_request_to_stop(tmp_path: Path):
    """Else one to the whole job would end it, and with it a training that is about to start workers."""
    done = python("-c", SERVER, cwd=tmp_path)
    assert (done.code, json.loads(done.out)) == (0, [])
