"""What a person sees while runs are trained: one bar over all of them on a terminal, a line for each elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from digitdist.config import Config
from digitdist.runs import last_event

FORMAT = "{desc} {percentage:3.0f} %|{bar}| {elapsed}<{remaining}"


class Progress:
    """Shows on `stream` how much of `num_runs` runs is done, `num_done` of them from the start."""

    def __init__(self, title: str, num_runs: int, num_done: int, stream: TextIO):
        self.title, self.num_runs, self.num_done, self.stream = title, num_runs, num_done, stream
        self.bar: Any = None
        if stream.isatty():
            columns, rows = shutil.get_terminal_size()
            size = {"ncols": columns, "nrows": rows}  # tqdm itself draws nothing on a terminal that tells no size
            start = {"total": num_runs, "initial": num_done, "file": stream, "leave": False}
            self.bar = tqdm(desc=self._heading(), bar_format=FORMAT, smoothing=0, **start, **size)

    def print(self, text: str) -> None:
        """Prints a line, above the bar if there is one; any thread may call it."""
        if self.bar is not None:
            tqdm.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def ended(self, text: str) -> None:
        """Prints a line about a run that is done."""
        self.num_done += 1
        self.print(f"{text} ({self.num_done} of {self.num_runs} runs)")

    def show(self, shares: list[float]) -> None:
        """Moves the bar to what is done with these shares of the runs that are being trained."""
        if self.bar is not None:
            self.bar.set_description_str(self._heading(), refresh=False)
            self.bar.n = self.num_done + sum(shares)
            self.bar.refresh()

    def _heading(self) -> str:
        return f"{self.title}: {self.num_done}/{self.num_runs} runs,"

    def close(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.close()


def share_done(folder: Path, config: Config) -> float:
    """The share of a training that its last logged event tells as done, in 0..1."""
    event = last_event(folder)
    if event is None:
        return 0.0
    steps = event["step"] / config.train.max_steps if config.train.max_steps else 0.0
    return float(min(1.0, max(steps, event["epoch"] / config.train.epochs)))
