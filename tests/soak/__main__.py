"""``PYTHONPATH=tests python -m soak --seed 7 --faults 20``: a soak that was seen to fail, again, or a longer one."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from helpers.disk import small_disk

from soak.driver import Soak
from soak.launches import TRAININGS

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--faults", type=int, default=15)
    parser.add_argument("--place", type=Path, help="an empty folder; default: a temporary one, which stays")
    parser.add_argument("--training", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--without", nargs="+", default=[], help="kinds of faults and damage, or signals, to leave out")
    parser.add_argument("--keep-going", action="store_true")
    given = parser.parse_args()
    place = given.place or Path(tempfile.mkdtemp(prefix="soak-"))
    place.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through what ends processes and file system
    with small_disk(place / "runs"):
        out = partial(print, flush=True)
        soak = Soak(place, given.seed, tuple(given.training), frozenset(given.without), out)
        print(f"seed {soak.seed}, in {place}, process {os.getpid()}", flush=True)
        broken = soak.run(given.faults, given.keep_going)
    seconds = time.monotonic() - began
    print(f"seed {soak.seed}: {soak.num_survived} of {soak.num_done} faults survived, {soak.num_runs} runs, {seconds:.0f} s")
    sys.exit(bool(broken))
