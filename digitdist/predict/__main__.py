"""The command ``python -m digitdist.predict``: the digit in each image file, by the model of a run, on one process.

Any picture of one digit will do: of any size and colours, dark on light or light on dark, with or without transparency, in even
light or with a shadow across it. A file that holds no digit, or several side by side, is one ``error:`` line and does not stop
the others. It needs the run's folder alone.

    python -m digitdist.predict RUN IMAGE...
"""

from __future__ import annotations

import contextlib
import json
import sys

from torch import Tensor

from digitdist.config import Parser, shown
from digitdist.data import DataSetInfo, list_pictures, open_picture, picture_form, read_picture
from digitdist.distributed import run_command
from digitdist.errors import EXIT_USER_ERROR, UserError
from digitdist.predict.predicting import predict
from digitdist.runs import load_run
from digitdist.world import print_main


def describe(file: str, probabilities: Tensor, top: int, info: DataSetInfo, as_json: bool) -> str:
    """The line about a file whose classes have these `probabilities`, float32 [classes]: the `top` most probable ones."""
    values, digits = (row.tolist() for row in probabilities.topk(top))
    if not as_json:
        return f"{file}: " + ", ".join(f"{shown(info.classes[d])} {100 * p:.2f} %" for d, p in zip(digits, values, strict=True))
    found = [{"digit": d, "class": info.classes[d], "probability": p} for d, p in zip(digits, values, strict=True)]
    return json.dumps({"file": file} | found[0] | {"top": found})


def main() -> None:
    """The command."""
    parser = Parser(
        "python -m digitdist.predict",
        "The digit in each image, with its probability, by the model of a run.",
        "runs/quick digit.png photos --top 3",
    )
    parser.add_run()
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, a folder, or - for stdin (run.dir=DIR, trust=true)")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="the K most probable (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    arguments = parser.parse_args()
    own = [name for name in arguments.images if name.startswith(("run.dir=", "trust="))]
    names = [name for name in arguments.images if name not in own]
    if not names:
        raise UserError("no IMAGE is given; give a file, a folder, or - for stdin")

    run = load_run(arguments.run, ["data.root=.", *own], needs_data=False)
    if not 1 <= arguments.top <= run.info.num_classes:
        raise UserError(f"--top {arguments.top} is not allowed; it takes 1 to {run.info.num_classes}")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for predictions alone
        stored = run.checkpoint(arguments.checkpoint)
        model, precision = run.model(stored).eval(), run.precision(stored, "cpu")
        if precision != "fp32" or run.trained_precision(stored) != "fp32":
            print_main(f"probabilities are computed in {precision}; the run was trained in {run.trained_precision(stored)}")
    num_errors = 0
    for file in list_pictures(names):
        label = file if file.isprintable() else repr(file)
        try:
            form = picture_form(open_picture(read_picture(file)), run.info)
            probabilities = predict(model, form[None], run.info, precision)[0]
        except UserError as error:
            num_errors += 1
            print(f"error: {label}: {error}", file=sys.stderr, flush=True)
            continue
        except Exception as error:  # a picture may hold anything, and must not cost the others
            num_errors += 1
            print(f"error: {label}: it cannot be predicted: {error!r}", file=sys.stderr, flush=True)
            continue
        print_main(describe(file if arguments.json else label, probabilities, arguments.top, run.info, arguments.json))
    if num_errors:
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    run_command(main)
