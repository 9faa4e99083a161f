from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from digitdist.train import prepare
from digitdist.train.setup import try_model
from digitdist.world import World


@pytest.mark.parametrize(
    ("network", "mode", "world_size", "said"),
    [
        ("cnn_batchnorm", "ddp", 2, True),
        ("cnn_batchnorm", "ddp", 1, False),
        ("cnn_batchnorm", "exact", 2, False),
        ("cnn_batchnorm", "local", 2, False),
        ("cnn", "ddp", 2, False),
    ],
)
def test_it_is_said_where_batchnorm_depends_on_the_world_size(
    mnist_root: Path, network: str, mode: str, world_size: int, said: bool
):
    setup = prepare([], [f"data.root={mnist_root}", f"model.name={network}", f"sync.mode={mode}"])
    world = World(0, world_size, 0, world_size)
    notes = dataclasses.replace(setup, plan=dataclasses.replace(setup.plan, world=world)).notes
    assert any("depends on the world size" in note for note in notes) == said
    assert len(notes) == said


@pytest.mark.parametrize(("network", "layout"), [("cnn_batchnorm", torch.contiguous_format), ("cnn", torch.channels_last)])
def test_a_network_with_batchnorm_is_contiguous_on_mps(mnist_root: Path, network: str, layout: torch.memory_format):
    setup = prepare([], [f"data.root={mnist_root}", f"model.name={network}"])
    on_mps = dataclasses.replace(setup, plan=dataclasses.replace(setup.plan, device_type="mps"))
    assert try_model(on_mps).layout == layout
