"""The models of several runs, or of one, as one that gives the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from digitdist.evaluate import mean_probabilities
from digitdist.predict.predicting import predict
from digitdist.runs import StoredRun
from digitdist.world import print_main


def open_ensemble(runs: Sequence[StoredRun], which: str) -> Callable[[Tensor], Tensor]:
    """What gives the mean of the probabilities, float32 [n, classes], of checkpoint `which` of each run, for raw images; says
    in what precision they are computed, and, of several runs, which they are.

    Raises:
        UserError: there is no such checkpoint, or its network cannot be built.
    """
    members: list[Callable[[Tensor], Tensor]] = []
    precisions: list[tuple[str, str]] = []
    for run in runs:
        stored = run.checkpoint(which)
        precisions.append((run.precision(stored, "cpu"), run.trained_precision(stored)))
        members.append(partial(predict, run.model(stored).eval(), info=run.info, precision=precisions[-1][0]))
    computed, trained = (", ".join(dict.fromkeys(names)) for names in zip(*precisions, strict=True))
    if len(runs) > 1:
        names = ", ".join(str(run.folder) for run in runs)
        print_main(f"averaged over {len(runs)} runs: {names}; computed in {computed}, trained in {trained}")
    elif (computed, trained) != ("fp32", "fp32"):
        print_main(f"probabilities are computed in {computed}; the run was trained in {trained}")
    return lambda images: mean_probabilities([member(images) for member in members]).float()
