"""Trains one run after another in the same process, or on the same processes: ``python -m helpers.several_runs FILE``.

FILE is a JSON list of command lines, each a list of ``key=value`` with a ``run.name``. Where SIMULATED_TRANSFERS is set, each
run has its transfers in a file of its name beside FILE.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from digitdist.distributed import run_command
from digitdist.train import train


def main() -> None:
    file = Path(sys.argv[1])
    for arguments in json.loads(file.read_text()):
        (name,) = (argument.removeprefix("run.name=") for argument in arguments if argument.startswith("run.name="))
        if "SIMULATED_TRANSFERS" in os.environ:
            os.environ["SIMULATED_TRANSFERS"] = str(file.with_name(name))
        train(arguments)


if __name__ == "__main__":
    run_command(main)
