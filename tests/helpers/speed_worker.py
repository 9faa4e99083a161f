"""Run by the tests in gpu/: images a second of the trainer and of the bare loop, in turn, printed as JSON.

python -m helpers.speed_worker STEPS REPEATS key=value...
"""

from __future__ import annotations

import json
import sys
from functools import partial

from digitdist.bench.loops import Variant, bare_loop, in_turn, trainer_loop
from digitdist.distributed import run_command, start_accelerator
from digitdist.train import prepare


def main() -> None:
    steps, repeats, overrides = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    setup = prepare([], overrides)
    accelerator = start_accelerator(setup.config, setup.plan)
    loops = {"bare loop": bare_loop(setup, accelerator, Variant()), "trainer": partial(trainer_loop, overrides, [])}
    for loop in loops.values():
        loop(3)
    print(json.dumps(in_turn(loops, dict.fromkeys(loops, steps), repeats)))


if __name__ == "__main__":
    run_command(main)
