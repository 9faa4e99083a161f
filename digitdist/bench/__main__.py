"""The command ``python -m digitdist.bench``: speed on this machine, measured in turn in one run.

python -m digitdist.bench [--world N] [--json] [key=value ...]
python -m digitdist.bench --recipes --seeds 20
python -m digitdist.bench --peers [--world N] [--json] [key=value ...]
"""

from __future__ import annotations

import json
import signal

from digitdist.bench.one_process import measure_one_process
from digitdist.bench.peer_turns import ONE_EPOCH, measure_part, measure_peers
from digitdist.bench.peers import PEERS
from digitdist.bench.recipes import RECIPES, measure_recipes
from digitdist.bench.roofline import measure_roofline
from digitdist.bench.shortcuts import measure_shortcuts
from digitdist.bench.table import peers_table, table
from digitdist.bench.worlds import measure_as_rank, measure_world
from digitdist.config import Parser
from digitdist.distributed import run_command
from digitdist.errors import UserError
from digitdist.world import is_main


def main() -> None:
    """The command."""
    arguments = _parser().parse_args()
    overrides, repeats = arguments.overrides, arguments.repeats
    for name in ("world", "repeats", "seeds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)} is not allowed; it takes a whole number from 1 on")
    if not arguments.peer:  # which starts nothing, and may hear ^C in a library that would go on
        signal.signal(signal.SIGINT, signal.default_int_handler)  # so that what is started here ends with it
    if arguments.recipes:
        measure_recipes(arguments.seeds, overrides)
    elif arguments.shortcuts:
        measure_shortcuts(overrides, repeats)
    elif arguments.roofline:
        measure_roofline(overrides, repeats)
    elif arguments.rank or arguments.peer:
        measured = measure_part(arguments.peer, overrides) if arguments.peer else measure_as_rank(overrides, repeats)
        if is_main():
            print(json.dumps(measured), flush=True)
    elif arguments.peers:
        beside = measure_peers(arguments.world, overrides, repeats)
        print(json.dumps(beside) if arguments.json else peers_table(beside), flush=True)
    else:
        one = measure_one_process(overrides, repeats)
        world = measure_world(arguments.world, overrides, repeats) if arguments.world > 1 else {}
        print(json.dumps(one | {"world": world}) if arguments.json else table(one, arguments.world, world), flush=True)


def _parser() -> Parser:
    parser = Parser(
        "python -m digitdist.bench",
        "The trainer, its evaluation and its start beside the bare loop, on this machine; and what would help.",
        "--world 2 data.batch_size=1000",
    )
    parser.add_overrides("configuration, such as data.batch_size=1000")
    parser.add_argument("--world", type=int, default=2, metavar="N", help="processes measured together; 1: none (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="how often each is measured (default: 5)")
    parser.add_argument("--json", action="store_true", help="every measurement as one JSON object")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="of --recipes: seeds 0 to N-1 (default: 20)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--recipes", action="store_true", help=f"measure the recipes {', '.join(RECIPES)} of configs/ instead")
    what.add_argument("--shortcuts", action="store_true", help="measure instead what each shortcut saves")
    what.add_argument("--roofline", action="store_true", help="show instead where the time of a step on the CPU goes")
    what.add_argument(
        "--peers",
        action="store_true",
        help="measure instead an epoch beside plain PyTorch, Accelerate, Lightning and Fabric, and the recipe fast beside a"
        " published one; four minutes a turn",
    )
    what.add_argument("--rank", action="store_true", help="what torchrun starts for --world")
    what.add_argument("--peer", choices=[*PEERS, ONE_EPOCH], help="what --peers starts")
    return parser


if __name__ == "__main__":
    run_command(main)
