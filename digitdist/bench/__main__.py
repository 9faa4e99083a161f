"""The command ``python -m digitdist.bench``: speed on this machine, measured in turn in one run.

python -m digitdist.bench [--world N] [--json] [key=value ...]
python -m digitdist.bench --recipes --seeds 20
"""

from __future__ import annotations

import json
import signal

from digitdist.bench.one_process import measure_one_process
from digitdist.bench.recipes import RECIPES, measure_recipes
from digitdist.bench.roofline import measure_roofline
from digitdist.bench.shortcuts import measure_shortcuts
from digitdist.bench.table import table
from digitdist.bench.worlds import measure_as_rank, measure_world
from digitdist.config import Parser
from digitdist.distributed import run_command
from digitdist.errors import UserError
from digitdist.world import is_main


def main() -> None:
    """The command."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # so that what is started here ends with it
    parser = Parser(
        "python -m digitdist.bench",
        "The trainer, its evaluation and its start beside the bare loop, on this machine; and what would help.",
        "--world 2 data.batch_size=1000",
    )
    parser.add_overrides("configuration, such as data.batch_size=1000")
    parser.add_argument("--world", type=int, default=2, metavar="N", help="processes measured together; 1: none (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="how often each is measured (default: 5)")
    parser.add_argument("--json", action="store_true", help="every measurement as one JSON object")
    parser.add_argument("--rank", action="store_true", help="what torchrun starts for --world")
    parser.add_argument("--recipes", action="store_true", help=f"measure the recipes {', '.join(RECIPES)} of configs/ instead")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="of --recipes: seeds 0 to N-1 (default: 20)")
    parser.add_argument("--shortcuts", action="store_true", help="measure instead what each shortcut saves")
    parser.add_argument("--roofline", action="store_true", help="show instead where the time of a step on the CPU goes")
    arguments = parser.parse_args()
    for name in ("world", "repeats", "seeds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)} is not allowed; it takes a whole number from 1 on")
    if arguments.recipes:
        measure_recipes(arguments.seeds, arguments.overrides)
    elif arguments.shortcuts:
        measure_shortcuts(arguments.overrides, arguments.repeats)
    elif arguments.roofline:
        measure_roofline(arguments.overrides, arguments.repeats)
    elif arguments.rank:
        measured = measure_as_rank(arguments.overrides, arguments.repeats)
        if is_main():
            print(json.dumps(measured), flush=True)
    else:
        one = measure_one_process(arguments.overrides, arguments.repeats)
        world = measure_world(arguments.world, arguments.overrides, arguments.repeats) if arguments.world > 1 else {}
        print(json.dumps(one | {"world": world}) if arguments.json else table(one, arguments.world, world), flush=True)


if __name__ == "__main__":
    run_command(main)
