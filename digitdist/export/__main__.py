"""The command ``python -m digitdist.export``: the model of a run, or of several as one ensemble, as one file.

python -m digitdist.export RUN... --format onnx
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from digitdist.config import Parser
from digitdist.distributed import make_expendable, run_command
from digitdist.errors import UserError
from digitdist.export.card_command import CARD, add_card_options, check_card_options, make_card
from digitdist.export.ensembles import export_ensemble
from digitdist.export.formats import FORMATS
from digitdist.export.parity import export
from digitdist.runs import load_runs, split_overrides
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
        "The model of a run, or of several as one ensemble, as one file, or of a run as a folder with a model card; compared.",
        "runs/quick --format onnx",
    )
    parser.add_runs()
    parser.add_run_overrides()
    parser.add_argument(
        "--format", required=True, choices=(*FORMATS, CARD), help="safetensors: the weights alone; card: a folder for the Hub"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="default: export/model.onnx, .pt2, .safetensors or card in the run's folder; of an ensemble, ensemble.onnx or .pt2"
        " here",
    )
    add_card_options(parser)
    arguments = parser.parse_args()

    if read_world().size > 1:
        raise UserError("an export is the work of one process; start it with python -m digitdist.export")
    check_card_options(arguments)
    runs = load_runs(*split_overrides(arguments.runs))
    single = len(runs) == 1
    if not single and arguments.format in (CARD, "safetensors"):
        raise UserError(f"--format {arguments.format} is of one run alone; export each by itself, or choose onnx or torch")
    if arguments.format == CARD:
        print_main(make_card(runs[0], arguments))
        return
    suffix = FORMATS[arguments.format].suffix
    file = Path(arguments.output or (runs[0].folder / "export" / f"model.{suffix}" if single else f"ensemble.{suffix}"))
    check_possible(arguments.format, file)
    if single and not arguments.output and file.parent.is_symlink():
        raise UserError(f"{file.parent} is a link out of the run's folder; give --output FILE")
    if single:
        print_main(export(runs[0], arguments.checkpoint, arguments.format, file))
    else:
        print_main(export_ensemble(runs, arguments.checkpoint, arguments.format, file))


if __name__ == "__main__":
    run_command(main)
