"""What the command ``python -m digitdist.export`` does with ``--format card``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from digitdist.config import Parser, shown
from digitdist.errors import UserError
from digitdist.export.card_folder import check_card_folder, export_card
from digitdist.export.hub import check_push, push
from digitdist.runs import StoredRun
from digitdist.world import print_main

CARD = "card"  # as the value of --format
LICENCE = "mit"


def add_card_options(parser: Parser) -> None:
    """Adds the options that a card alone has."""
    parser.add_argument(
        "--push", metavar="USER/NAME", help="card: send it to the Hugging Face Hub; private, if it is new there"
    )
    parser.add_argument("--public", action="store_true", help="with --push: for everybody to see")
    parser.add_argument(
        "--license", default=LICENCE, metavar="ID", help="card: of the model, as the Hub names it (default: mit)"
    )


def check_card_options(arguments: argparse.Namespace) -> None:
    """Refuses, before any work is done, options of a card that cannot be had.

    Raises:
        UserError: naming which.
    """
    if arguments.format != CARD and (arguments.push or arguments.license != LICENCE):
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
    if arguments.push:
        return push(folder, arguments.push, arguments.public)
    return f"to load it: digitdist.load({str(folder)!r}{', trust=True' if run.config.model.target else ''})"
