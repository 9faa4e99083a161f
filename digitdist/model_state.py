"""What a network holds beside its code, parameters, buffers and extra state, as plain tensors and back.

Extra state is what a module's `get_extra_state` returns. A tensor is kept as it is. Any other value ``NAME`` becomes
``NAME.json``, the bytes of a JSON text (uint8), with the tensors inside it as ``NAME.0``, ``NAME.1`` and so on.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import torch
from torch import Tensor, nn

from digitdist.checkpoint import Tensors
from digitdist.errors import UserError

EXTRA_STATE = "_extra_state"  # how torch names it in a `state_dict`


def model_state(model: nn.Module) -> Tensors:
    """Parameters, persistent buffers and extra state of `model` by name.

    Raises:
        UserError: an extra state holds something that cannot be stored without pickling it.
    """
    state: Tensors = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            state[name] = value
        else:
            tensors: list[Tensor] = []
            text = json.dumps(_encode(value, tensors, name)).encode()
            state |= {f"{name}.{number}": tensor for number, tensor in enumerate(tensors)}
            state[f"{name}.json"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return state


def load_model_state(model: nn.Module, tensors: Tensors) -> None:
    """Loads what `model_state` returned.

    Raises:
        RuntimeError: it does not fit `model`.
    """
    state: dict[str, Any] = dict(tensors)
    for name in (name for name in tensors if name.endswith(f"{EXTRA_STATE}.json")):
        whole = name.removesuffix(".json")
        parts = [state.pop(key) for key in _numbered(whole, tensors)]
        state[whole] = _decode(json.loads(bytes(state.pop(name).cpu().numpy())), parts)
    model.load_state_dict(state)


def transient_buffers(model: nn.Module) -> Tensors:
    """The buffers that a `state_dict` leaves out (``persistent=False``), by name."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name not in kept}


def load_transient_buffers(model: nn.Module, tensors: Tensors) -> None:
    """Loads what `transient_buffers` returned; a buffer that is not among `tensors` stays as it is."""
    for name, buffer in transient_buffers(model).items():
        if name in tensors:
            buffer.copy_(tensors[name])


class SavedBuffers:
    """Buffers of `model`, to be put back after forward passes that change them; `without` names tensors to leave alone."""

    def __init__(self, model: nn.Module, without: list[Tensor] | None = None):
        left_alone = {id(tensor) for tensor in without or ()}
        self.places = [
            (module, name)
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if id(buffer) not in left_alone
        ]
        self.save()

    def current(self) -> list[Tensor]:
        """The buffers themselves; a forward pass may change them, or put others in their place."""
        return [getattr(module, name) for module, name in self.places]

    def save(self) -> None:
        """Remembers the buffers and their values."""
        self.tensors = self.current()
        self.values = [tensor.clone() for tensor in self.tensors]

    @torch.no_grad()
    def restore(self, values: list[Tensor] | None = None) -> None:
        """Puts the remembered buffers back, with `values` or with the remembered ones."""
        for (module, name), tensor, value in zip(self.places, self.tensors, values or self.values, strict=True):
            setattr(module, name, tensor)
            tensor.copy_(value)


def _numbered(name: str, tensors: Tensors) -> list[str]:
    keys: list[str] = []
    while (key := f"{name}.{len(keys)}") in tensors:
        keys.append(key)
    return keys


def _encode(value: Any, tensors: list[Tensor], name: str) -> Any:
    """`value` in JSON's types, each container as ``{kind: content}``; tensors are appended to `tensors`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": base64.b64encode(value).decode()}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(item, tensors, name) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(key, tensors, name), _encode(item, tensors, name)] for key, item in value.items()]}
    raise UserError(
        f"the extra state {name} holds a {type(value).__name__}, which a checkpoint cannot hold without pickling it; let"
        " get_extra_state return tensors, None, numbers, text, bytes, or lists, tuples and dicts of them"
    )


def _decode(value: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
