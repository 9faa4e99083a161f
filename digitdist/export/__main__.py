"""The command ``python -m digitdist.export``: a run's model as one file.

python -m digitdist.export RUN --format onnx
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
from pathlib import Path

from digitdist.config import Parser, shown
from digitdist.distributed import make_expendable, run_command
from digitdist.errors import UserError
from digitdist.export.card_folder import check_card_folder, export_card
from digitdist.export.formats import FORMATS
from digitdist.export.hub import check_push, push
from digitdist.export.parity import export
from digitdist.runs import StoredRun, load_run
from digitdist.world import print_main, read_world

CARD = "card"
HELP = "safetensors holds the weights alone; card: a folder for the Hugging Face Hub, with a model card"


def check_possible(form: str, file: Path) -> None:
    """Refuses, before any work is done, a format that is not installed and a file that cannot be written.

    Raises:
        UserError: naming which.
    """
    try:
        for name in ("onnx", "onnxscript", "onnxruntime") if form == "onnx" else ():
            importlib.import_module(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(file.parent, os.W_OK | os.X_OK)
        reason = "is a folder" if file.is_dir() else None if writable else "no permission to write there"
    except ImportError as error:
        raise UserError(f"--format onnx is not possible ({error}); pip install 'digitdist[export]'") from None
    except OSError as error:
        reason = error.strerror
    if reason:
        raise UserError(f"--output {file}: {reason}; give a file in a folder you can write to")


def check_card_options(arguments: argparse.Namespace) -> None:
    """Refuses, before any work is done, options of a card that cannot be had.

    Raises:
        UserError: naming which.
    """
    if arguments.format != CARD and (arguments.push or arguments.license != "mit"):
        raise UserError("--push and --license need --format card")
    if arguments.public and not arguments.push:
        raise UserError("--public needs --push USER/NAME, what it makes public")
    if not re.fullmatch(r"[a-z0-9.-]{1,60}", arguments.license):
        raise UserError(
            f"--license {shown(arguments.license)} is not allowed; it takes an identifier of the Hub's, such as mit"
        )
    if arguments.push:
        check_push(arguments.push)


def make_card(run: StoredRun, arguments: argparse.Namespace) -> str:
    """Writes the run's model with its card, sends it if that is asked for, and returns what has come of it."""
    folder = Path(arguments.output or run.folder / "export" / CARD)
    if not arguments.output and folder.parent.is_symlink():
        raise UserError(f"{folder.parent} is a link out of the run's folder; give --output FOLDER")
    check_card_folder(folder)
    print_main(export_card(run, arguments.checkpoint, folder, arguments.license))
    return push(folder, arguments.push, arguments.public) if arguments.push else f"to load it: digitdist.load({str(folder)!r})"


def main() -> None:
    """The command."""
    make_expendable("stdout")  # since its product is a file
    parser = Parser(
        "python -m digitdist.export",
        "A run's model as one file, from raw images to probabilities, and a parity check against the run.",
        "runs/quick --format onnx",
    )
    parser.add_run()
    parser.add_overrides("configuration, such as data.root=data; trust=true executes the network that a received run names")
    parser.add_argument("--format", required=True, choices=(*FORMATS, CARD), help=HELP)
    parser.add_argument(
        "--output", metavar="FILE", help="default: export/model.onnx, .pt2, .safetensors or card in the run's folder"
    )
    parser.add_argument(
        "--push", metavar="USER/NAME", help="card: send it to the Hugging Face Hub; private, if it is new there"
    )
    parser.add_argument("--public", action="store_true", help="with --push: for everybody to see")
    parser.add_argument("--license", default="mit", metavar="ID", help="card: of the model, as the Hub names it (default: mit)")
    arguments = parser.parse_args()

    if read_world().size > 1:
        raise UserError("an export is the work of one process; start it with python -m digitdist.export")
    check_card_options(arguments)
    run = load_run(arguments.run, arguments.overrides)
    if arguments.format == CARD:
        print_main(make_card(run, arguments))
        return
    file = Path(arguments.output or run.folder / "export" / f"model.{FORMATS[arguments.format].suffix}")
    check_possible(arguments.format, file)
    if not arguments.output and file.parent.is_symlink():
        raise UserError(f"{file.parent} is a link out of the run's folder; give --output FILE")
    print_main(export(run, arguments.checkpoint, arguments.format, file))


if __name__ == "__main__":
    run_command(main)
