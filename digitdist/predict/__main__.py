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

import torch
from torch import Tensor, nn

from digitdist.config import Parser
from digitdist.data import DataSetInfo, list_pictures, normalise, open_picture, picture_form, read_picture
from digitdist.distributed import run_command
from digitdist.errors import EXIT_USER_ERROR, UserError
from digitdist.runs import load_run
from digitdist.world import print_main


def predict(model: nn.Module, images: Tensor, info: DataSetInfo) -> Tensor:
    """Probability of each class, float32 [n, classes], for raw images; the model must be in `eval` mode."""
    with torch.inference_mode():
        return model(normalise(images, info)).float().softmax(1)


def main() -> None:
    """The command."""
    parser = Parser(
        "python -m digitdist.predict",
        "The digit in each image, with its probability, by the model of a run.",
        "runs/quick digit.png photos --top 3",
    )
    parser.add_run()
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, a folder, or - for stdin (or run.dir=DIR)")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="the K most probable (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    arguments = parser.parse_args()
    run_dir = [name for name in arguments.images if name.startswith("run.dir=")]
    names = [name for name in arguments.images if name not in run_dir]
    if not names:
        raise UserError("no IMAGE is given; give a file, a folder, or - for stdin")

    run = load_run(arguments.run, ["data.root=.", *run_dir])  # the data set need not be here
    if not 1 <= arguments.top <= run.info.num_classes:
        raise UserError(f"--top {arguments.top} is not allowed; it takes 1 to {run.info.num_classes}")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for predictions alone
        model = run.model(run.checkpoint(arguments.checkpoint)).eval()
    num_errors = 0
    for file in list_pictures(names):
        shown = file if file.isprintable() else repr(file)
        try:
            form = picture_form(open_picture(read_picture(file)), run.info)
        except UserError as error:
            num_errors += 1
            print(f"error: {shown}: {error}", file=sys.stderr, flush=True)
            continue
        probabilities, digits = (row.tolist() for row in predict(model, form[None], run.info)[0].topk(arguments.top))
        if arguments.json:
            top = [
                {"digit": d, "class": run.info.classes[d], "probability": p} for d, p in zip(digits, probabilities, strict=True)
            ]
            print_main(json.dumps({"file": file} | top[0] | {"top": top}))
        else:
            words = (f"{run.info.classes[d]} {100 * p:.2f} %" for d, p in zip(digits, probabilities, strict=True))
            print_main(f"{shown}: {', '.join(words)}")
    if num_errors:
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    run_command(main)
