"""The model card: what a model is, how well it does and how that is known, how it was made, and what it is not for.

Its first part is the metadata that the Hugging Face Hub reads (https://huggingface.co/docs/hub/model-cards). What comes from a
run, which may be anybody's, is escaped: in the metadata as YAML, in the text as Markdown, in the command for a shell.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import cache
from typing import Any

import jinja2
import numpy as np
from torch import nn

import digitdist
from digitdist.checkpoint import Checkpoint, weights_sha256
from digitdist.config import ENDS, KEYS, as_overrides, printable, shown
from digitdist.data import DATA_SETS, DataSetInfo
from digitdist.evaluate import Evaluation, calibration, share_in_words, wilson_interval
from digitdist.export.parity import run_name
from digitdist.model_state import model_state
from digitdist.runs import StoredRun, read_attempts

HUB_DATA_SETS = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "svhn": "ufldl-stanford/svhn",
    "cifar10": "uoft-cs/cifar10",
}
NUM_BINS, NUM_PAIRS = 10, 10  # of the calibration; confusions that are named
MAX_CLASSES = 20  # of a matrix of confusions
MAX_NAMES = 100  # of classes that are listed


class Plain(str):
    """Text that is Markdown already."""


def card_text(run: StoredRun, stored: Checkpoint, network: nn.Module, result: Evaluation, licence: str) -> str:
    """The card of checkpoint `stored`: Markdown after YAML.

    Its weights are in `network` and give `result` on the test images; `licence` is an identifier of the Hub's, such as ``mit``.
    """
    info, config, state = run.info, run.config, stored.state
    was, environment = state.get("config"), _environment(run, stored)
    return _template().render(
        metadata=Plain(_metadata(run, result, licence)),
        name=_name(run),
        digits=_holds_digits(info),
        network=type(network).__name__,
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        info=info,
        classes=Plain(", ".join(map(markdown, info.classes[:MAX_NAMES])) + (", …" if info.num_classes > MAX_NAMES else "")),
        version=environment["digitdist"] or digitdist.__version__,
        target=config.model.target,
        result=result,
        accuracy=Plain(share_in_words(result.correct, result.total)),
        **_calibration(result),
        **_confusion(info.classes, result),
        step=stored.step,
        batch_size=config.data.batch_size,
        precision=run.trained_precision(stored),
        mode=config.sync.mode,
        world_size=_world_size(stored),
        seed=Plain(config.seed),
        **environment,
        weights=Plain(weights_sha256(model_state(network))),
        command=Plain(_command(run, stored, environment["threads"])),
        resumed=isinstance(was, dict) and was.get("checkpoint.resume", "auto") not in ("auto", "never"),
    )


def markdown(text: object) -> str:
    """`text` as itself in a line of Markdown: all punctuation is escaped, so that nothing in it is a link, HTML or a cell."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", printable(str(text)))


@cache
def _template() -> jinja2.Template:
    """The card's template, of which each value is escaped unless it is `Plain`, and whole numbers have commas."""

    def escaped(value: Any) -> str:
        return value if isinstance(value, Plain) else f"{value:,}" if type(value) is int else markdown(value)

    loader = jinja2.PackageLoader("digitdist.export")
    environment = jinja2.Environment(
        loader=loader,
        finalize=escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("card.md.j2")


def _metadata(run: StoredRun, result: Evaluation, licence: str) -> str:
    """The metadata in YAML, by the Hub's own library."""
    from huggingface_hub import EvalResult, ModelCardData

    data_set = shown(run.info.name)
    hub_id = HUB_DATA_SETS.get(data_set)
    interval = list(wilson_interval(result.correct, result.total))
    accuracy = EvalResult(
        task_type="image-classification",
        dataset_type=hub_id or data_set,
        dataset_name=data_set,
        dataset_split="test",
        metric_type="accuracy",
        metric_value=result.accuracy,
        metric_name=f"Accuracy, {share_in_words(result.correct, result.total)}",
        metric_args={"correct": result.correct, "total": result.total, "interval_95": interval},
    )
    data = ModelCardData(
        license=licence,
        library_name="digitdist",
        pipeline_tag="image-classification",
        tags=["image-classification", *(["digits"] if _holds_digits(run.info) else []), "pytorch", "digitdist"],
        datasets=[hub_id] if hub_id else None,
        metrics=["accuracy"],
        model_name=_name(run),
        eval_results=[accuracy],
    )
    return data.to_yaml()


def _calibration(result: Evaluation) -> dict[str, Plain]:
    bins = calibration(result.probability, result.label == result.prediction, NUM_BINS)
    rows = [
        (f"{number / NUM_BINS:.1f} to {(number + 1) / NUM_BINS:.1f}", f"{count:,}", f"{probability:.4f}", f"{accuracy:.4f}")
        for number, (count, probability, accuracy) in enumerate(zip(bins.count, bins.probability, bins.accuracy, strict=True))
        if count
    ]
    table = _table(("probability", "images", "mean probability", "accuracy"), rows)
    return {"calibration": table, "calibration_error": Plain(f"{bins.error:.4f}")}


def _confusion(classes: Sequence[str], result: Evaluation) -> dict[str, Plain | None]:
    """The most frequent confusions, and the matrix of all where it is small enough to be read."""
    names, counts = [markdown(name) for name in classes], result.confusion
    mistakes = counts.copy()
    np.fill_diagonal(mistakes, 0)
    frequent = [divmod(int(place), len(names)) for place in np.argsort(-mistakes, axis=None, kind="stable")[:NUM_PAIRS]]
    pairs = [(names[label], names[other], f"{mistakes[label, other]:,}") for label, other in frequent if mistakes[label, other]]
    matrix = [(name, *(f"{count:,}" if count else "" for count in row)) for name, row in zip(names, counts, strict=True)]
    return {
        "pairs": _table(("class", "taken for", "images"), pairs) if pairs else None,
        "matrix": _table(("", *names), matrix) if len(names) <= MAX_CLASSES else None,
    }


def _environment(run: StoredRun, stored: Checkpoint) -> dict[str, Any]:
    """What the weights in `stored` were trained on, by the last attempt of the run that came to them, None where that does not
    tell it; and whether earlier attempts ran on something else (``mixed``)."""
    attempts = [attempt for attempt in read_attempts(run.folder) if attempt["step"] < stored.step]
    last = attempts[-1] if attempts else {}
    texts = ("device", "device_name", "torch", "digitdist")
    told: dict[str, Any] = {name: shown(last[name]) if isinstance(last.get(name), str) else None for name in texts}
    threads, key = last.get("threads"), KEYS["train.threads"]
    told["threads"] = threads if type(threads) is int and key.in_range(threads) else run.config.train.threads
    altering = (*texts, "threads", *(() if run.config.sync.mode == "exact" else ("world_size",)))
    earlier = [attempt for attempt in attempts if attempt["step"] < last["step"]]
    told["mixed"] = any(attempt.get(name) != last.get(name) for attempt in earlier for name in altering)
    return told


def _command(run: StoredRun, stored: Checkpoint, threads: int | None) -> str:
    """The command line that trains the weights in `stored` again, on so many threads a process, for a shell; a folder of the
    user's is ``DIR``."""
    config, size = run.config, _world_size(stored)
    fixed: dict[str, Any] = {"train.precision": run.trained_precision(stored), "train.max_steps": stored.step}
    fixed |= {"train.threads": threads} if threads else {}
    names = [
        name for name, key in KEYS.items() if key.alters_result_in(config.sync.mode) or name in (*ENDS, "train.eval_every")
    ]
    overrides = as_overrides(config, (name for name in names if name not in fixed))
    place = [] if config.data.target is None and config.data.name in DATA_SETS else ["data.root=DIR"]
    launcher = ["accelerate", "launch", *(["--multi_gpu", "--num_processes", str(size)] if size > 1 else [])]
    own = [*overrides, *(f"{name}={value}" for name, value in fixed.items()), *place]
    return printable(shlex.join([*launcher, "-m", "digitdist.train", *own]))


def _name(run: StoredRun) -> str:
    return shown(run_name(run))


def _holds_digits(info: DataSetInfo) -> bool:
    """Whether the classes are digits, or some of them."""
    return {*info.classes} <= {*DATA_SETS["mnist"].classes}


def _world_size(stored: Checkpoint) -> int:
    size = stored.state.get("world_size")
    return size if type(size) is int and 0 < size < 10**6 else 1


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Plain:
    """A table whose cells are Markdown already."""
    return Plain("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)))
