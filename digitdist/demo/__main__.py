"""The command ``python -m digitdist.demo``: a page to draw a digit on, which shows what a run's network says of it.

It is served to this machine alone, and needs no network. Beside the run's folder it takes the training images, of which it
shows those nearest to the drawing; without them it shows the rest.

    python -m digitdist.demo RUN
"""

from __future__ import annotations

import dataclasses
import signal
import sys

from digitdist.config import Parser
from digitdist.data import load_splits
from digitdist.demo.answer import NUM_NEIGHBOURS, Answerer
from digitdist.demo.features import FeatureModel, TrainingFeatures
from digitdist.demo.page import render_page
from digitdist.demo.server import Content, DemoServer
from digitdist.distributed import make_expendable, run_command
from digitdist.errors import UserError, in_one_line
from digitdist.runs import StoredRun, load_run
from digitdist.world import print_main, read_world

PORT = 8000


def training_features(run: StoredRun, model: FeatureModel) -> TrainingFeatures:
    """The features of the run's training images.

    Raises:
        UserError: those images are not there.
    """
    splits = load_splits(run.config.data, run.config.seed)
    if dataclasses.replace(splits.info, name=run.info.name) != run.info:
        raise UserError(
            f"data.root={run.config.data.root} has {splits.info.name}, which the run was not trained on; give its data.root,"
            " and data.target if it has one"
        )
    return TrainingFeatures(model, splits.train)


def serve_until_interrupt(server: DemoServer, pages: dict[str, Content], answer: Answerer) -> None:
    """Serves until ^C, which is no fault here but the way to end it."""
    kills = signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # as in a command until here
    if kills:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        print_main(f"{server.url} shows the page, to this machine alone; ^C ends it")
        server.serve(pages, answer)
    except KeyboardInterrupt:
        print_main("\nthe page is not served any more")
    finally:
        if kills:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """The command."""
    make_expendable("stdout")  # since its product is a page
    parser = Parser(
        "python -m digitdist.demo",
        "A page to draw a digit on: what a run's network says of it, and the training images nearest to it.",
        "runs/quick",
    )
    parser.add_run()
    parser.add_run_overrides()
    parser.add_argument("--port", type=int, default=PORT, help=f"of 127.0.0.1; 0 takes any that is free (default: {PORT})")
    arguments = parser.parse_args()
    if read_world().size > 1:
        raise UserError("the page is served by one process; start it with python -m digitdist.demo")

    run = load_run(arguments.run, arguments.overrides, needs_data=False)
    stored = run.checkpoint(arguments.checkpoint)
    precision = run.precision(stored, "cpu")
    model = FeatureModel(run.model(stored).eval(), run.info, precision)
    with DemoServer(arguments.port) as server:  # which finds out before the work is done whether it can have the port
        training, note = None, ""
        try:
            training = training_features(run, model)
            note = f"Of {len(training):,} training images, those nearest by the cosine of the {model.description}."
        except UserError as error:
            note = f"No training images: {in_one_line(error)}."
            print(note, file=sys.stderr, flush=True)
        about = f"{run.folder} at step {stored.step:,}, trained on {run.info.name}; computed in {precision} on this machine."
        pages = render_page(run.folder.resolve().name, about, note, run.info, NUM_NEIGHBOURS if training else 0)
        serve_until_interrupt(server, pages, Answerer(model, training))


if __name__ == "__main__":
    run_command(main)
