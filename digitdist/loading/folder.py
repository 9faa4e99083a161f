"""The folder in which a model is passed on, in the form that the Hugging Face Hub takes.

``model.safetensors`` has the weights, named as in the run's checkpoints; ``config.json`` the network and its classes;
``preprocessor_config.json`` how pictures are brought to the form of its images; ``README.md`` is the model card. What is in it
may be anybody's: it is read as data, and no code that it names is executed unless that is asked for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

import digitdist
from digitdist.checkpoint import Checkpoint, Tensors
from digitdist.config import Config, ModelConfig, shown
from digitdist.data import DataSetInfo
from digitdist.errors import UserError, in_one_line
from digitdist.files import MIB, parse_json, read_plain
from digitdist.loading.trained import TrainedModel
from digitdist.model_state import model_state
from digitdist.runs import StoredRun

README, WEIGHTS, CONFIG, PREPROCESSOR = "README.md", "model.safetensors", "config.json", "preprocessor_config.json"
CARD_FILES = {README: MIB, WEIGHTS: 4096 * MIB, CONFIG: MIB, PREPROCESSOR: MIB}  # with the most bytes that are read
ReadFile = Callable[[str], bytes]


def card_content(run: StoredRun, stored: Checkpoint, network: nn.Module, card: str) -> dict[str, bytes]:
    """The content of each file of the folder for checkpoint `stored` of `run`, whose weights are in `network`.

    `card`: the text of the model card.

    Raises:
        UserError: the weights hold NaN or infinity.
    """
    _check_weights(run.folder, network)
    model, info = run.config.model, run.info
    config = {
        "library_name": "digitdist",
        "digitdist_version": digitdist.__version__,
        "architectures": [type(network).__name__],
        "model": dataclasses.asdict(model),
        "data_set": info.name,
        "id2label": {str(number): name for number, name in enumerate(info.classes)},
        "num_labels": info.num_classes,
        "precision": run.trained_precision(stored),
        "step": stored.step,
    }
    # The names are those of the Hub's image processors. What `digitdist.load` needs beside them is `digitdist_image`.
    preprocessor = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(info.mean),
        "image_std": list(info.std),
        "do_resize": True,
        "size": {"height": info.height, "width": info.width},
        "num_channels": info.channels,
        "digitdist_image": info.image,
    }
    # Clones, since safetensors refuses tensors that share memory, as tied weights do.
    weights = {name: tensor.contiguous().clone() for name, tensor in model_state(network).items()}
    return {
        README: card.encode(),
        WEIGHTS: safetensors.torch.save(weights, {"format": "pt"}),
        CONFIG: json.dumps(config, indent=1).encode() + b"\n",
        PREPROCESSOR: json.dumps(preprocessor, indent=1).encode() + b"\n",
    }


def load_folder(folder: Path, trust: bool, read: ReadFile | None = None) -> TrainedModel:
    """The model in a folder of that form; `read` gives the content of a file of it, if it does not lie there as it is.

    Raises:
        UserError: a file other than the card is missing, or one is damaged or not of this form; or a network that is no part of
            this package is named, and not to be executed without `trust`.
    """

    def content(name: str) -> bytes:
        try:
            return read(name) if read else read_plain(folder / name, CARD_FILES[name])
        except OSError as error:
            if name == README and isinstance(error, FileNotFoundError):
                return b""
            raise UserError(f"{folder / name}: {error.strerror or in_one_line(error)}; export the model again") from None

    try:
        config, preprocessor = (_mapping(parse_json(content(name))) for name in (CONFIG, PREPROCESSOR))
        model, info = _model_config(config), _info(config, preprocessor)
        tensors = safetensors.torch.load(content(WEIGHTS))
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else in_one_line(error)
        raise UserError(f"{shown(folder)} is not a model that digitdist has exported: {shown(reason)}") from None
    if model.target and not trust:
        raise UserError(
            f"{shown(folder)} would execute model.target={shown(model.target)} with model.args={shown(model.args)}; if you"
            " trust it, and have its code on PYTHONPATH, say so with trust=True"
        )
    run = StoredRun(folder, dataclasses.replace(Config(), model=model), info, made_here=False)
    stored = Checkpoint({"model": tensors}, {"precision": config.get("precision")}, folder)
    card = content(README).decode(errors="replace") or None
    network = run.model(stored)
    _check_weights(folder, network, tensors)
    return TrainedModel(network, info, run.precision(stored, "cpu"), card)


def _check_weights(folder: Path, network: nn.Module, tensors: Tensors | None = None) -> None:
    """Refuses a `network` whose weights are not finite, or were cast from complex `tensors`. A buffer may hold infinity, as a
    mask does.

    Raises:
        UserError: naming a tensor.
    """
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    for name, tensor in model_state(network).items():
        reason = None
        if tensors and name in tensors and tensors[name].is_complex() and not tensor.is_complex():
            reason = "is complex, and the network's is not"
        elif tensor.isnan().any() or (name in parameters and tensor.isinf().any()):
            reason = "holds NaN or infinity"
        if reason:
            raise UserError(f"{shown(folder)} is damaged: {shown(name)} {reason}; export a good checkpoint")


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("its JSON is not a mapping")
    return value


def _model_config(config: Mapping[str, Any]) -> ModelConfig:
    """The network that ``config.json`` names."""
    model = _mapping(config["model"])
    name, target, args = model["name"], model["target"], dict(_mapping(model["args"]))
    if not (isinstance(name, str) and isinstance(target, str | None)):
        raise ValueError("the name of its network is not text")
    return ModelConfig(name, target, args)


def _info(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> DataSetInfo:
    """The form of the model's images, checked."""
    labels, size = _mapping(config["id2label"]), _mapping(preprocessor["size"])
    values = {
        "name": config["data_set"],
        "mean": preprocessor["image_mean"],
        "std": preprocessor["image_std"],
        "classes": [labels[str(number)] for number in range(len(labels))],
        "height": size["height"],
        "width": size["width"],
        "image": preprocessor["digitdist_image"],
    }
    return DataSetInfo.from_json(json.dumps(values))
