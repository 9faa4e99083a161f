"""A run's model as one file, held against the run before it is kept.

The model in the file takes raw images, uint8 [n, 28, 28] for any n, and gives probabilities, float32 [n, 10]: what
normalises the pixels is inside. It needs nothing of this package: ``onnx`` wants an ONNX runtime, ``torch`` wants PyTorch.
``safetensors`` holds the weights alone; the mean and deviation to normalise by are in its metadata.

A file of the final name is whole and has been tried: it was loaded again from the disk, and its prediction is that of the
run's model for each test image. Its metadata tell where it comes from.

    python -m digitdist.export RUN --format onnx
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import digitdist
from digitdist import checkpoint, models, runtime
from digitdist.config import Config, Parser, UserError
from digitdist.data import SPECS, Spec, load_splits, normalise
from digitdist.evaluate import load_weights, open_run, read_checkpoint

INPUT, OUTPUT = "images", "probabilities"
Metadata = dict[str, Any]
Classify = Callable[[Tensor], Tensor]  # uint8 [n, 28, 28] to float32 [n, 10]


class Classifier(nn.Module):
    """Raw images, uint8 [n, 28, 28], to probabilities, float32 [n, 10], by a network in evaluation mode."""

    def __init__(self, network: nn.Module, spec: Spec):
        super().__init__()
        self.network, self.spec = network, spec
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(normalise(images, self.spec)).float().softmax(1)


def trace(classifier: Classifier) -> torch.export.ExportedProgram:
    """The classifier as a graph that takes any number of images.

    Raises:
        UserError: the model does what depends on the values, or on the number, of its images.
    """
    example = torch.zeros(2, 28, 28, dtype=torch.uint8)  # 2, since sizes 0 and 1 are taken as fixed
    try:
        program = torch.export.export(classifier, (example,), dynamic_shapes={INPUT: {0: torch.export.Dim("n")}}, strict=False)
    except Exception as error:  # the model may be anybody's
        raise UserError(f"the model cannot be traced; --format safetensors takes any model: {_in_a_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which are nobody else's business
    return program


def to_torch(classifier: Classifier, metadata: Metadata) -> bytes:
    """A `torch.export` archive, with the metadata as one JSON object in its extra file ``metadata.json``."""
    file = io.BytesIO()
    torch.export.save(trace(classifier), file, extra_files={"metadata.json": json.dumps(metadata)})
    return file.getvalue()


def to_onnx(classifier: Classifier, metadata: Metadata) -> bytes:
    """An ONNX model, its weights inside, from ``images`` to ``probabilities``, with the metadata in `metadata_props`."""
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "dynamic_shapes": {INPUT: {0: "n"}}}
    try:
        program = torch.onnx.export(trace(classifier), dynamo=True, verbose=False, **names)
    except torch.onnx.OnnxExporterError as error:
        reason = _in_a_line(error.__cause__ or error)  # the error itself is mostly advice to PyTorch's developers
        raise UserError(f"ONNX cannot hold the model; --format torch may: {reason}") from error
    assert program is not None
    program.model.metadata_props.update(_as_text(metadata))
    return program.model_proto.SerializeToString()


def to_safetensors(classifier: Classifier, metadata: Metadata) -> bytes:
    """The weights alone, named as in the run's checkpoints, with the metadata as text."""
    # Clones, since safetensors refuses tensors that share memory, as tied weights do.
    weights = {name: tensor.contiguous().clone() for name, tensor in classifier.network.state_dict().items()}
    return safetensors.torch.save(weights, _as_text(metadata))


def from_torch(file: Path, config: Config) -> Classify:
    with file.open("rb") as opened:
        return torch.export.load(opened).module()


def from_onnx(file: Path, config: Config) -> Classify:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def from_safetensors(file: Path, config: Config) -> Classify:
    network = models.build(config.model, config.seed)
    network.load_state_dict(safetensors.torch.load_file(file))
    return Classifier(network, SPECS[config.data.name])


FORMATS = {  # the suffix, what makes the file's content, and what loads the file
    "onnx": ("onnx", to_onnx, from_onnx),
    "torch": ("pt2", to_torch, from_torch),
    "safetensors": ("safetensors", to_safetensors, from_safetensors),
}


def export(run: Path, config: Config, which: str, form: str, file: Path) -> str:
    """Writes checkpoint `which` of `run` as `file`; tells how the file compares with the run on all test images.

    Raises:
        UserError: there is no such checkpoint or data set, or the model cannot be traced.
        RuntimeError: the file does not predict as the run's model does. Whatever is raised, `file` is left as it was.
    """
    _, write, read = FORMATS[form]
    spec, test = SPECS[config.data.name], load_splits(config.data, config.seed).test
    stored = read_checkpoint(run, which)
    network = models.build(config.model, config.seed)
    load_weights(network, stored)
    classifier = Classifier(network, spec)
    wanted = probabilities(classifier, test.images)
    correct, total = int((wanted.argmax(1) == test.labels).sum()), len(test)
    metadata = {
        "digitdist_version": digitdist.__version__,
        "run": run.resolve().name,
        "step": stored.step,
        "weights_sha256": checkpoint.weights_sha256(network.state_dict()),
        "model": config.model.target or config.model.name,
        "model_args": config.model.args,
        "data_set": config.data.name,
        "classes": spec.classes,
        "pixel_mean": 255 * spec.mean,
        "pixel_std": 255 * spec.std,
        "test_correct": correct,
        "test_total": total,
        "test_accuracy": correct / total,
    }
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with quiet():
            _write_synced(temporary, write(classifier, metadata))
            difference = compare(probabilities(read(temporary, config), test.images), wanted)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    counted = f"{correct:,}/{total:,} correct = {100 * correct / total:.2f} %"
    return (
        f"{run} at step {stored.step:,}, {config.data.name} test: {counted}\n{file}: the same prediction on all"
        f" {total:,} images, largest difference of a probability {difference:.2g}"
    )


@torch.no_grad()
def probabilities(classify: Classify, images: Tensor) -> Tensor:
    """float32 [n, 10] for uint8 [n, 28, 28], in batches of 1, of 7, of 1,000 and of the rest, since a graph must take any."""
    return torch.cat([classify(batch) for batch in (*images[:8].split((1, 7)), *images[8:].split(1000))])


def compare(found: Tensor, wanted: Tensor) -> float:
    """The largest difference between two sets of probabilities, float32 [n, 10], that predict the same.

    Raises:
        RuntimeError: they do not predict the same.
    """
    different = int((found.argmax(1) != wanted.argmax(1)).sum())
    difference = (found - wanted).abs().max().item()
    if different:
        raise RuntimeError(
            f"the exported model predicts {different:,} of {len(wanted):,} test images differently than the run's"
            f" (largest difference of a probability {difference:.2g}): it was not kept"
        )
    return difference


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps back the exporters' warnings and progress, about which a user can do nothing; errors are raised and logged."""
    level, heard = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _as_text(metadata: Metadata) -> dict[str, str]:
    """Text as it is, all else as JSON: the formats' own metadata are text."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}


def _write_synced(file: Path, data: bytes) -> None:
    with file.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


def _check(form: str, file: Path) -> None:
    """Refuses, before any work is done, what cannot be had or written."""
    try:
        for name in ("onnx", "onnxscript", "onnxruntime") if form == "onnx" else ():
            importlib.import_module(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(file.parent, os.W_OK | os.X_OK)
        reason = "is a folder" if file.is_dir() else None if writable else "no permission to write there"
    except ImportError as error:
        raise UserError(f"--format onnx cannot be had ({error}); pip install 'digitdist[export]'") from None
    except OSError as error:
        reason = error.strerror
    if reason:
        raise UserError(f"--output {file}: {reason}; give a file in a folder you can write to")


def main() -> None:
    parser = Parser(
        prog="python -m digitdist.export",
        description="A run's model as one file, from raw images to probabilities, and a parity check against the run.",
        epilog="example: python -m digitdist.export runs/quick --format onnx",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its name in run.dir")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, such as data.root=data")
    parser.add_argument("--format", required=True, choices=FORMATS, help="safetensors holds the weights alone")
    parser.add_argument("--output", metavar="FILE", help="default: export/model.onnx, .pt2 or .safetensors in the run's folder")
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="last, best, or a step (default: last)")
    arguments = parser.parse_args()

    if runtime.world().size > 1:
        raise UserError("an export is the work of one process; start it with python -m digitdist.export")
    run, config = open_run(arguments.run, arguments.overrides)
    file = Path(arguments.output or run / "export" / f"model.{FORMATS[arguments.format][0]}")
    _check(arguments.format, file)
    runtime.say(export(run, config, arguments.checkpoint, arguments.format, file))


if __name__ == "__main__":
    runtime.run_command(main)
