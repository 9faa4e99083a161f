"""The formats: what makes a file's content from a model, and what loads the file again.

A model in a file takes raw images, uint8 [n, h, w] for any n, or [n, 3, h, w] in colour, and gives probabilities, float32
[n, classes]: the normalisation is inside. ``onnx`` needs an ONNX runtime, ``torch`` needs PyTorch, neither needs this package.
``safetensors`` holds the weights alone; the mean and deviation to normalise by are in its metadata.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from digitdist.config import Config
from digitdist.data import DataSetInfo, normalise
from digitdist.errors import UserError, in_one_line
from digitdist.model_state import load_model_state, model_state
from digitdist.models import build_model

INPUT, OUTPUT = "images", "probabilities"
MAX_REASON = 300  # characters of a message of torch's, which goes on with its internals
Metadata = dict[str, Any]
Classify = Callable[[Tensor], Tensor]  # uint8 [n, h, w] or [n, 3, h, w] to float32 [n, classes]


class Classifier(nn.Module):
    """Raw images, uint8 [n, h, w] or [n, 3, h, w], to probabilities, float32 [n, classes], by a network in evaluation mode.

    `name`: what a message calls it.
    """

    def __init__(self, network: nn.Module, info: DataSetInfo, name: str = "the model"):
        super().__init__()
        self.network, self.info, self.name = network, info, name
        self.eval().requires_grad_(False)  # or what a file gives could not be turned into an array as it is

    def forward(self, images: Tensor) -> Tensor:
        return self.network(normalise(images, self.info)).float().softmax(1)


class EnsembleClassifier(nn.Module):
    """Raw images as a `Classifier` takes them to the mean of the probabilities that several give, float32 [n, classes]."""

    def __init__(self, members: Sequence[Classifier]):
        super().__init__()
        self.members, self.info, self.name = nn.ModuleList(members), members[0].info, "the ensemble"
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images) for member in self.members]).mean(0)


AnyClassifier = Classifier | EnsembleClassifier


def trace(classifier: AnyClassifier) -> torch.export.ExportedProgram:
    """The classifier as a graph that takes any number of images.

    Raises:
        UserError: what the model does depends on the values, or on the number, of its images.
    """
    example = torch.zeros(2, *classifier.info.raw_shape, dtype=torch.uint8)  # 2, since sizes 0 and 1 are taken as fixed
    try:
        program = torch.export.export(classifier, (example,), dynamic_shapes={INPUT: {0: torch.export.Dim("n")}}, strict=False)
    except Exception as error:  # a user's network may raise anything
        for member in classifier.members if isinstance(classifier, EnsembleClassifier) else ():
            assert isinstance(member, Classifier)
            trace(member)  # which names the one that cannot be
        advice = "--format safetensors takes any model, of one run at a time"
        raise UserError(f"{classifier.name} cannot be traced; {advice}: {in_one_line(error)[:MAX_REASON]}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which concern nobody else
    return program


def to_torch(classifier: AnyClassifier, metadata: Metadata) -> bytes:
    """A `torch.export` archive, with the metadata as one JSON object in its extra file ``metadata.json``."""
    file = io.BytesIO()
    torch.export.save(trace(classifier), file, extra_files={"metadata.json": json.dumps(metadata)})
    return file.getvalue()


def to_onnx(classifier: AnyClassifier, metadata: Metadata) -> bytes:
    """An ONNX model, its weights inside, from ``images`` to ``probabilities``, with the metadata in `metadata_props`.

    Raises:
        UserError: ONNX has no equivalent of an operation of the model.
    """
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "dynamic_shapes": {INPUT: {0: "n"}}}
    try:
        program = torch.onnx.export(trace(classifier), dynamo=True, verbose=False, **names)
    except torch.onnx.OnnxExporterError as error:
        reason = in_one_line(error.__cause__ or error)[:MAX_REASON]  # the error itself is mostly advice to PyTorch's developers
        raise UserError(f"ONNX cannot hold the model; --format torch may: {reason}") from error
    assert program is not None
    program.model.metadata_props.update(_as_text(metadata))
    return program.model_proto.SerializeToString()


def to_safetensors(classifier: AnyClassifier, metadata: Metadata) -> bytes:
    """The weights alone of one run, named as in its checkpoints, with the metadata as text."""
    assert isinstance(classifier, Classifier)
    # Clones, since safetensors refuses tensors that share memory, as tied weights do.
    weights = {name: tensor.contiguous().clone() for name, tensor in model_state(classifier.network).items()}
    return safetensors.torch.save(weights, _as_text(metadata))


def from_torch(file: Path, config: Config, info: DataSetInfo) -> Classify:
    """Loads what `to_torch` made."""
    with file.open("rb") as opened:
        return torch.export.load(opened).module()


def from_onnx(file: Path, config: Config, info: DataSetInfo) -> Classify:
    """Loads what `to_onnx` made, for the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def from_safetensors(file: Path, config: Config, info: DataSetInfo) -> Classify:
    """Loads what `to_safetensors` made into the network that `config` names."""
    network = build_model(config.model, config.seed, info)
    load_model_state(network, safetensors.torch.load_file(file))
    return Classifier(network, info)


class Format(NamedTuple):
    """The suffix of a file, what makes its content, and what loads the file."""

    suffix: str
    write: Callable[[AnyClassifier, Metadata], bytes]
    read: Callable[[Path, Config, DataSetInfo], Classify]


FORMATS = {
    "onnx": Format("onnx", to_onnx, from_onnx),
    "torch": Format("pt2", to_torch, from_torch),
    "safetensors": Format("safetensors", to_safetensors, from_safetensors),
}


def _as_text(metadata: Metadata) -> dict[str, str]:
    """Texts as they are, everything else as JSON: the formats' own metadata are text."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
