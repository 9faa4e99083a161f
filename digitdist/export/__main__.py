"""The command ``python -m digitdist.export``: a run's model as one file.

python -m digitdist.export RUN --format onnx
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from digitdist.config import Parser
from digitdist.distributed import make_expendable, run_command
from digitdist.errors import UserError
from digitdist.export.card_command import CARD, add_card_options, check_card_options, make_card
from digitdist.export.formats import FORMATS
from digitdist.export.parity import export
from digitdist.runs import load_run
from digitdist.world import print_main, read_world


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


def main() -> None:
    """The command."""
    make_expendable("stdout")  # since its product is a file
    parser = Parser(
        "python -m digitdist.export",
        "A run's model as one file, from raw images to probabilities, or as a folder with a model card; compared with the run.",
        "runs/quick --format onnx",
    )
    parser.add_run()
    parser.add_overrides("configuration, such as data.root=data; trust=true executes the network that a received run names")
    parser.add_argument(
        "--format", required=True, choices=(*FORMATS, CARD), help="safetensors: the weights alone; card: a folder for the Hub"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="default: export/model.onnx, .pt2, .safetensors or card in the run's folder"
    )
    add_card_options(parser)
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
