"""The command ``digitdist COMMAND …``: each command is also ``python -m digitdist.COMMAND …``."""

from __future__ import annotations

import importlib
import sys

from digitdist.process_start import prepare_process

COMMANDS = {
    "train": "train a network on whatever the launcher gives",
    "data": "what a data set is",
    "evaluate": "the exact accuracy of a run, or of several as one ensemble",
    "predict": "the digit in each image file",
    "report": "plots and pages of runs",
    "export": "the model of a run, or of an ensemble, as one file",
    "study": "the same training over many seeds, compared",
    "demo": "a page to draw a digit on",
    "bench": "speed on this machine",
    "checkpoint": "verify a run's checkpoints",
}


def main() -> None:
    """Runs the command that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        lines = (f"  {command:12} {meaning}" for command, meaning in COMMANDS.items())
        print("usage: digitdist COMMAND …, such as: digitdist train --config quick\n", *lines, sep="\n")
        print("\ndigitdist COMMAND --help says more; on several processes: accelerate launch -m digitdist.COMMAND …")
        return
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    prepare_process()
    from digitdist.distributed import run_command  # imports torch, which --help can do without

    module = "digitdist.checkpoint" if name == "checkpoint" else f"digitdist.{name}.__main__"
    sys.argv = [f"digitdist {name}", *arguments]
    run_command(importlib.import_module(module).main)


if __name__ == "__main__":
    main()
