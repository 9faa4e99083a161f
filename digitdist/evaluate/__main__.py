"""The command ``python -m digitdist.evaluate``: the exact accuracy of a run, or of several as one ensemble.

python -m digitdist.evaluate RUN...
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from digitdist.checkpoint import weights_sha256
from digitdist.config import Parser, shown
from digitdist.data import load_splits
from digitdist.distributed import run_command
from digitdist.errors import UserError
from digitdist.evaluate.ensemble import Comparison, average, compare_with_best
from digitdist.evaluate.evaluating import Scores
from digitdist.evaluate.members import Member, open_member, start_for
from digitdist.evaluate.result import Evaluation
from digitdist.evaluate.saved import SavedPredictions, saved_predictions
from digitdist.evaluate.statistics import wilson_interval
from digitdist.model_state import model_state
from digitdist.runs import check_held_out, load_runs, split_overrides
from digitdist.world import print_main


def main() -> None:
    """The command. Collective: every rank must call it."""
    parser = Parser(
        "python -m digitdist.evaluate",
        "The exact accuracy of a run's checkpoint, or of several runs as one ensemble, on any number of processes.",
        "runs/quick --split test",
    )
    parser.add_runs()
    parser.add_run_overrides()
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    arguments = parser.parse_args()

    names, overrides = split_overrides(arguments.runs)
    runs = load_runs(names, overrides)
    check_held_out(runs, arguments.split)
    chosen = any(text.startswith("train.precision=") for text in overrides)
    members = [open_member(run, arguments.checkpoint, chosen) for run in runs]
    splits = load_splits(runs[0].config.data, runs[0].config.seed)
    for run in runs:
        run.check_form(splits.info)
    images = getattr(splits, arguments.split)
    if not len(images):
        raise UserError(f"--split {arguments.split}: the run held no images out; set data.validation")
    layouts = [member.layout(images) for member in members]
    single = arguments.split == "test" and len(members) == 1
    saved = saved_predictions(runs[0], weights_sha256(model_state(members[0].model))) if single else None
    accelerator = start_for(members)
    images = images.to(accelerator.device)
    scores = [member.score(accelerator, images, layout) for member, layout in zip(members, layouts, strict=True)]
    outcome = judge(members, scores, arguments.split)
    if arguments.json:
        print_main(json.dumps(as_json(outcome, arguments.split)))
    else:
        for line in as_text(outcome, f"{splits.info.name} {arguments.split}", saved):
            print_main(line)
    accelerator.end_training()


@dataclass(frozen=True)
class Outcome:
    """The result of each run, and that of the `whole`: of a single run its own, of several that of their ensemble, which is
    then `compared` with the best of them."""

    members: Sequence[Member]
    results: Sequence[Evaluation]
    whole: Evaluation
    compared: Comparison | None = None


def judge(members: Sequence[Member], scores: Sequence[Scores], split: str) -> Outcome:
    """The outcome of what the `members` make of the images of `split`."""
    results = [each.evaluation() for each in scores]
    if len(members) == 1:
        return Outcome(members, results, results[0])
    whole = average(scores).evaluation()
    held_out = [member.held_out_accuracy() for member in members] if split == "test" else ()
    return Outcome(members, results, whole, compare_with_best(whole, results, held_out))


def as_json(outcome: Outcome, split: str) -> dict[str, Any]:
    """What ``--json`` prints."""
    whole, compared = outcome.whole, outcome.compared
    classes = {"class_accuracy": whole.class_accuracy, "confusion": whole.confusion.tolist()}
    each: list[dict[str, Any]] = [
        {"run": str(member.run.folder), "step": member.stored.step} | counts | {"precision": member.plan.precision}
        for member, counts in zip(outcome.members, map(_counts, outcome.results), strict=True)
    ]
    if compared is None:
        first = {key: each[0].pop(key) for key in ("run", "step")}
        return first | {"split": split} | each[0] | classes
    best = {"best": each[compared.best]["run"], "best_is_of": "validation" if compared.held_out else split}
    against = {"only_ensemble": compared.only_ensemble, "only_best": compared.only_best, "p_value": compared.p_value}
    interval = {"interval": wilson_interval(whole.correct, whole.total)}
    return {"runs": each, "split": split} | _counts(whole) | interval | best | against | classes


def as_text(outcome: Outcome, images: str, saved: SavedPredictions | None) -> list[str]:
    """The lines that are printed without ``--json``; `images` says in words what was evaluated, and `saved` is what a single
    run's training has predicted."""
    members, whole, compared = outcome.members, outcome.whole, outcome.compared
    lines = [
        f"{member.run.folder} at step {member.stored.step:,}, {images}: {result}, in {member.plan.precision} on"
        f" {member.plan.device_type}"
        for member, result in zip(members, outcome.results, strict=True)
    ]
    if saved:
        lines.append(saved.compare(whole.index, whole.prediction))
    if compared:
        lines.append(f"ensemble of these {len(members)} runs, {images}: {whole}")
        lines.append(f"beside {members[compared.best].run.folder}, {compared}")
    classes = zip(members[0].run.info.classes, whole.class_accuracy, strict=True)
    return [*lines, "of each class: " + ", ".join(f"{shown(n)} {100 * a:.2f} %" for n, a in classes if a is not None)]


def _counts(result: Evaluation) -> dict[str, float]:
    return {"correct": result.correct, "total": result.total, "accuracy": result.accuracy, "loss": result.mean_loss}


if __name__ == "__main__":
    run_command(main)
