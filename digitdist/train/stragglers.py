"""Which rank is slower than the others."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from accelerate import Accelerator

STRAGGLER_THRESHOLD = 0.2  # a rank is named that takes more than this fraction longer than the others


class StragglerWatch:
    """Compares at each line of the log how long each rank takes for its own part of a step."""

    def __init__(self, accelerator: Accelerator, num_micro_batches: int, report: Callable[[str], None]):
        self.accelerator, self.num_micro_batches, self.report = accelerator, max(1, num_micro_batches), report
        self.slowest: list[int | None] = [None]  # the straggler at each line

    def metrics(self, times: dict[str, float]) -> dict[str, float]:
        """The slowest rank, if there is a straggler; it is reported once where it is one at two lines in a row.

        `times`: this rank's seconds since the line before, of ``data`` and ``compute``. Collective: every rank must call it.
        """
        if self.accelerator.num_processes == 1:
            return {}
        # A rank may have more micro-batches than another.
        rank, excess = slowest_rank(self.accelerator, (times["data"] + times["compute"]) / self.num_micro_batches)
        if excess <= STRAGGLER_THRESHOLD:
            self.slowest.append(None)
            return {}
        already_reported = (rank, rank) in zip(self.slowest, self.slowest[1:], strict=False)
        if self.slowest[-1] == rank and not already_reported:
            self.report(
                f"rank {rank} is slow: its own part of a step takes {100 * excess:.0f} % longer than that of the others"
            )
        self.slowest.append(rank)
        return {"time/slowest_rank": rank}


def slowest_rank(accelerator: Accelerator, seconds: float) -> tuple[int, float]:
    """The rank with most `seconds`, and by which fraction it exceeds the median of the others. Collective."""
    own = accelerator.gather(torch.tensor([seconds], device=accelerator.device)).tolist()
    slowest = own.index(max(own))
    others = statistics.median(own[:slowest] + own[slowest + 1 :])
    return slowest, own[slowest] / others - 1 if others else 0.0
