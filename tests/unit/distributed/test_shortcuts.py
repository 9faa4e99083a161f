"""Each shortcut gives what torch gives without it, and has its off switch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.launching import CLEAN

from digitdist.distributed import SHORTCUTS, eager_optimizer
from digitdist.distributed.shortcuts import shortcut_enabled

OPTIMIZERS = {"Adam": {}, "AdamW": {}, "SGD": {"momentum": 0.9, "nesterov": True}}
TRAIN = """
import sys, torch
from digitdist.distributed import eager_optimizer, use_deterministic_algorithms
use_deterministic_algorithms(True, warn_only=True)
assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
use_deterministic_algorithms(False)
assert not torch.are_deterministic_algorithms_enabled()
weight = torch.nn.Parameter(torch.ones(3))
optimizer = eager_optimizer(torch.optim.Adam, [weight], lr=0.1, fused=True)
weight.square().sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
import torch._inductor.config as told
use_deterministic_algorithms(True)
assert told.deterministic, "a compiler that is there is told"
"""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_eager_optimizer_takes_torchs_steps_to_the_bit(name: str):
    kind, weights = getattr(torch.optim, name), [torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2)]
    options = {"lr": 0.1, "weight_decay": 0.1, "fused": True, **OPTIMIZERS[name]}
    optimizers = [kind([weights[0]], **options), eager_optimizer(kind, [weights[1]], **options)]
    for step in range(5):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            optimizer.zero_grad()
            (weight.sin() * (step + 1)).sum().backward()
            optimizer.step()
        assert torch.equal(*weights)
    states = [optimizer.state_dict()["state"][0] for optimizer in optimizers]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0] if states[0][key] is not None)
    assert isinstance(optimizers[1], kind)


@pytest.mark.parametrize(("without", "imported"), [("", "False"), ("compiler", "True"), ("allocator,compiler", "True")])
def test_neither_an_optimizer_nor_deterministic_algorithms_import_torchs_compiler(without: str, imported: str):
    env = CLEAN | {"DIGITDIST_WITHOUT": without}
    done = subprocess.run([sys.executable, "-c", TRAIN], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == imported


@pytest.mark.parametrize("name", SHORTCUTS)
def test_each_has_an_off_switch(monkeypatch: pytest.MonkeyPatch, name: str):
    assert shortcut_enabled(name)
    monkeypatch.setenv("DIGITDIST_WITHOUT", name)
    assert [other for other in SHORTCUTS if not shortcut_enabled(other)] == [name]
