from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from digitdist.errors import UserError
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("data.batch_size=1111",),
            r"60,000 images in batches of 1,111, one has 6 for 8 parts; set data\.batch_size=1110,",
        ),
        (("data.batch_size=59", "sync.shards=30"), r"batches of 59, one has 56 for 30 parts; set data\.batch_size=60, or"),
        (("data.batch_size=8", "train.max_steps=3"), r"batches of 8, one has 8 for 8 parts; set data\.batch_size=16, or"),
        (
            ("data.batch_size=100", "train.accumulate=7"),
            r"one has 100 for 56 parts; set data\.batch_size=120, or",
        ),
    ],
)
def test_a_part_too_small_for_the_network_is_refused_with_numbers_and_a_way_out(
    mnist_root: Path, options: tuple[str, ...], said: str
):
    own = (f"data.root={mnist_root}", "model.name=cnn_batchnorm", "sync.mode=exact")
    with pytest.raises(UserError, match="cannot be trained on 1 image at once .*, but on 2; .*" + said) as refused:
        prepare([], [*own, *options])
    (line,) = refused.value.mistakes
    way_out = line.rpartition("set ")[2].split(",")[0]
    prepare([], [*own, *options, way_out])


def test_a_small_last_batch_that_is_not_reached_is_none(mnist_root: Path):
    own = (f"data.root={mnist_root}", "model.name=cnn_batchnorm", "sync.mode=exact", "data.batch_size=1111")
    prepare([], [*own, "train.max_steps=54"])
    with pytest.raises(UserError, match="cannot be trained on 1 image at once"):
        prepare([], [*own, "train.max_steps=55"])
