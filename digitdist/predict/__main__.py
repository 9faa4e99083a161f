"""The command ``python -m digitdist.predict``: the digit in each image file, by the model of a run, or of several runs whose
probabilities are averaged, on one process.

Any picture of one digit will do: of any size and colours, dark on light or light on dark, with or without transparency, in even
light or with a shadow across it. A file that holds no digit, or several side by side, is one ``error:`` line and does not stop
the others. It needs the runs' folders alone.

    python -m digitdist.predict RUN... IMAGE...
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence

from torch import Tensor

from digitdist.config import Parser, shown
from digitdist.data import DataSetInfo, list_pictures, open_picture, picture_form, read_picture
from digitdist.distributed import run_command
from digitdist.errors import EXIT_USER_ERROR, UserError
from digitdist.predict.ensembles import open_ensemble
from digitdist.runs import count_runs, load_runs
from digitdist.world import print_main


def describe(file: str, probabilities: Tensor, top: int, info: DataSetInfo, as_json: bool) -> str:
    """The line about a file whose classes have these `probabilities`, float32 [classes]: the `top` most probable ones."""
    values, digits = (row.tolist() for row in probabilities.topk(top))
    if not as_json:
        return f"{file}: " + ", ".join(f"{shown(info.classes[d])} {100 * p:.2f} %" for d, p in zip(digits, values, strict=True))
    found = [{"digit": d, "class": info.classes[d], "probability": p} for d, p in zip(digits, values, strict=True)]
    return json.dumps({"file": file} | found[0] | {"top": found})


def split_names(names: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names of runs, with which `names` begins, and those of images, which follow; `own` may hold a ``run.dir=``.

    Raises:
        UserError: there is no image, or the first is not there and has no suffix: a run may have been meant.
    """
    count = count_runs(names, own)
    runs, images = list(names[:count]), list(names[count:])
    if not images:
        raise UserError("no IMAGE is given; give a file, a folder, or - for stdin")
    first = images[0]
    if first != "-" and not os.path.lexists(first) and not os.path.splitext(first)[1]:
        raise UserError(f"{first}: neither a file nor a run of that folder or name; runs come first, then images")
    return runs, images


def main() -> None:
    """The command."""
    parser = Parser(
        "python -m digitdist.predict",
        "The digit in each image, with its probability, by the model of a run, or of several runs as one ensemble.",
        "runs/quick digit.png photos --top 3",
    )
    parser.add_runs()
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, a folder, or - for stdin (run.dir=DIR, trust=true)")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="the K most probable (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    arguments = parser.parse_args()
    given = [*arguments.runs, *arguments.images]  # the parser takes all but the last for runs
    own = [name for name in given[1:] if name.startswith(("run.dir=", "trust="))]
    names, images = split_names([given[0], *(name for name in given[1:] if name not in own)], own)

    runs = load_runs(names, ["data.root=.", *own], needs_data=False)
    info = runs[0].info
    if not 1 <= arguments.top <= info.num_classes:
        raise UserError(f"--top {arguments.top} is not allowed; it takes 1 to {info.num_classes}")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for predictions alone
        classify = open_ensemble(runs, arguments.checkpoint)
    num_errors = 0
    for file in list_pictures(images):
        label = file if file.isprintable() else repr(file)
        try:
            form = picture_form(open_picture(read_picture(file)), info)
            probabilities = classify(form[None])[0]
        except UserError as error:
            num_errors += 1
            print(f"error: {label}: {error}", file=sys.stderr, flush=True)
            continue
        except Exception as error:  # a picture may hold anything, and must not cost the others
            num_errors += 1
            print(f"error: {label}: it cannot be predicted: {error!r}", file=sys.stderr, flush=True)
            continue
        print_main(describe(file if arguments.json else label, probabilities, arguments.top, info, arguments.json))
    if num_errors:
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    run_command(main)
