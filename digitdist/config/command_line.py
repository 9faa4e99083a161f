"""The command line that all commands share."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from digitdist.errors import UserError
from digitdist.world import is_main


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes options anywhere between ``key=value``, raises `UserError`, and prints its help once.

    `example`: arguments that work, shown at the end of ``--help``.
    """

    def __init__(self, program: str, description: str, example: str, more: str = "") -> None:
        epilog = f"example: {program} {example}"
        super().__init__(
            prog=program,
            description=description,
            epilog=f"{epilog}\n\n{more}" if more else epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_config(self) -> None:
        """Adds ``--config`` and ``key=value``."""
        self.add_argument(
            "--config", action="append", default=[], metavar="FILE", help="a YAML file or a name such as quick; may be repeated"
        )
        self.add_overrides("configuration, such as data.batch_size=256; wins over the files")

    def add_overrides(self, help: str) -> None:
        self.add_argument("overrides", nargs="*", metavar="key=value", help=help)

    def add_run_overrides(self) -> None:
        """Adds the ``key=value`` that changes a run's own configuration."""
        self.add_overrides("configuration, such as data.root=data; trust=true executes the network that a received run names")

    def add_run(self) -> None:
        """Adds a run and which of its checkpoints is meant."""
        self.add_argument("run", metavar="RUN", help="a run's folder, or its name in run.dir")
        self._add_checkpoint()

    def add_runs(self) -> None:
        """Adds runs and which checkpoint of each is meant. Whatever else may come in any number is among them."""
        self.add_argument(
            "runs",
            nargs="+",
            metavar="RUN",
            help="a run's folder, or its name in run.dir; several, or a study, are one ensemble, which averages probabilities",
        )
        self._add_checkpoint()

    def _add_checkpoint(self) -> None:
        self.add_argument("--checkpoint", default="last", metavar="WHICH", help="last, best, or a step (default: last)")

    def parse_args(self, *arguments: Any) -> argparse.Namespace:  # type: ignore[override]
        return self.parse_intermixed_args(*arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows what is allowed")

    def print_help(self, file: Any = None) -> None:
        if is_main():
            super().print_help(file)
