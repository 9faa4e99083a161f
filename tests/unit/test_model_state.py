from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import awkward
from torch import nn

from digitdist.checkpoint import weights_sha256
from digitdist.errors import UserError
from digitdist.model_state import SavedBuffers, load_model_state, load_transient_buffers, model_state, transient_buffers


class Holder(nn.Linear):
    """Its extra state is `value`."""

    def __init__(self, value: Any = None):
        super().__init__(1, 1)
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


VALUES = [
    *(None, 3, 0.1, float("inf"), "text", b"\x00\xff", [], (1, [2]), {}, {"a": {1: (True, None)}, "": b""}),
    {"json": "{}", "tensor": 0},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_extra_state_comes_back_as_it_was(value: Any):
    state = model_state(nn.Sequential(Holder(value)))
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    other = nn.Sequential(Holder("another"))
    load_model_state(other, {name: tensor.clone() for name, tensor in state.items()})
    assert other[0].value == value
    assert type(other[0].value) is type(value)


def test_tensors_in_extra_state_come_back_as_they_were():
    tensors = [torch.arange(3), torch.ones(2, 2, dtype=torch.bfloat16)]
    state = model_state(Holder({"scale": tensors[0], "history": [tensors[1]]}))
    other = Holder()
    load_model_state(other, state)
    assert torch.equal(other.value["scale"], tensors[0])
    assert torch.equal(other.value["history"][0], tensors[1])
    plain = model_state(Holder(tensors[0]))
    assert plain["_extra_state"] is tensors[0], "a tensor is kept as it is"


def test_the_hash_of_the_weights_covers_extra_state():
    first, other = Holder({"steps": 1}), Holder({"steps": 2})
    other.load_state_dict(first.state_dict() | {"_extra_state": {"steps": 2}})
    assert weights_sha256(model_state(first)) != weights_sha256(model_state(other))
    assert weights_sha256(model_state(first)) == weights_sha256(model_state(copy.deepcopy(first)))


def test_extra_state_that_only_pickling_could_hold_is_refused_by_name():
    with pytest.raises(UserError, match=r"the extra state 0\._extra_state holds a set"):
        model_state(nn.Sequential(Holder([{1}])))


def test_a_network_without_extra_state_has_the_state_that_torch_gives_it():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    assert model_state(model).keys() == model.state_dict().keys()


def test_buffers_that_a_state_dict_leaves_out_are_kept_beside_it():
    model, other = awkward.RunningMean(), awkward.RunningMean()
    model(torch.ones(2, 1, 28, 28))
    assert transient_buffers(model).keys() == {"largest"}
    load_transient_buffers(other, transient_buffers(model))
    assert other.largest == model.largest == 1


def test_saved_buffers_undo_a_forward_pass_also_where_it_puts_in_others():
    model = awkward.RunningMean()
    before, homes = copy.deepcopy(dict(model.named_buffers())), dict(model.named_buffers())
    saved = SavedBuffers(model)
    model(torch.ones(2, 1, 28, 28))
    assert not any(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    saved.restore()
    assert all(buffer is homes[name] and torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
