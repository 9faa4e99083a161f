"""Writes the models of several runs as one file, whose probabilities are the mean of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from digitdist.data import load_splits
from digitdist.evaluate import mean_probabilities
from digitdist.export.formats import Classifier, EnsembleClassifier, Metadata
from digitdist.export.parity import counted, describe, probabilities, write_checked
from digitdist.runs import StoredRun

SHARED = ("digitdist_version", "data_set", "classes", "precision")  # of what a file tells of each run


def export_ensemble(runs: Sequence[StoredRun], which: str, form: str, file: Path) -> str:
    """Writes checkpoint `which` of all `runs` as one `file`, as `export` does that of one; returns how it compares with them.

    The file must predict the class with the highest mean of the runs' own probabilities in fp32, as `evaluate` does. `form` is
    one that holds a graph: weights alone say nothing of a mean.

    Raises:
        UserError: there is no such checkpoint or data set, or a model cannot be traced.
        RuntimeError: the file does not predict as the runs' models do. Whatever is raised, `file` is left as it was.
    """
    splits = load_splits(runs[0].config.data, runs[0].config.seed)
    test, data_set, total = splits.test, f"{splits.info.name} test", len(splits.test)
    classifiers, given, lines, members = [], [], [], []
    for run in runs:
        run.check_form(splits.info)
        stored = run.checkpoint(which)
        classifiers.append(Classifier(run.model(stored), run.info, f"the model of {run.folder}"))
        own, labels = probabilities(classifiers[-1], test)
        given.append(own)
        correct = int((own.argmax(1) == labels).sum())
        lines.append(f"{run.folder} at step {stored.step:,}, {data_set}: {counted(correct, total)}")
        members.append(describe(run, stored, classifiers[-1].network, correct, total))
    expected = mean_probabilities(given)
    correct = int((expected.argmax(1) == labels).sum())
    lines.append(f"ensemble of these {len(runs)} runs, {data_set}: {counted(correct, total)}")
    metadata = describe_ensemble(members, correct, total)
    ensemble = EnsembleClassifier(classifiers)
    lines.append(write_checked(ensemble, metadata, form, file, expected.float(), test, runs[0].config))
    return "\n".join(lines)


def describe_ensemble(members: Sequence[Metadata], correct: int, total: int) -> Metadata:
    """What a file tells of itself and, under ``members``, of each of the runs, of which `describe` tells."""
    shared = {name: members[0][name] for name in SHARED}
    counts = {"test_correct": correct, "test_total": total, "test_accuracy": correct / total}
    return shared | counts | {"members": [{n: v for n, v in member.items() if n not in SHARED} for member in members]}
