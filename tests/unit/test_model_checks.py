from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import awkward
from torch import nn

from digitdist.config import ModelConfig
from digitdist.data import DATA_SETS
from digitdist.errors import UserError
from digitdist.model_checks import Parts, Traits, inspect_model
from digitdist.model_parts import check_scalable
from digitdist.models import MODELS, build_model

MNIST = DATA_SETS["mnist"]

PIXELS, LABELS = torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 10


def inspect(build: Callable[[], nn.Module], smallest: int = 12, mode: str = "ddp", evaluated: int = 1) -> Traits:
    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return build()

    def images(count: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return PIXELS[:count], LABELS[:count], 10

    return inspect_model(seeded, images, Parts(smallest, len(PIXELS), evaluated), bf16=False, mode=mode)


@pytest.mark.parametrize("name", MODELS)
def test_the_networks_of_the_package_take_channels_last_and_have_one_graph(name: str):
    assert inspect(lambda: build_model(ModelConfig(name), 0, MNIST)) == Traits()


def test_a_network_that_takes_no_channels_last_has_the_reason():
    traits = inspect(awkward.Convolution)
    assert "view size is not compatible" in traits.layout_problem
    assert traits.layout == torch.contiguous_format
    assert inspect(awkward.Volume).layout == torch.contiguous_format


class InPlace(awkward.Base):
    """It scales its images where they are."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.mul_(0.5))


def test_a_network_that_changes_its_images_in_place_keeps_nothing_between_two_trials():
    before = PIXELS.clone()
    inspect(InPlace, mode="exact")
    assert torch.equal(PIXELS, before)


class Strided(awkward.Base):
    """It reads memory as if it knew its order."""

    def __init__(self) -> None:
        super().__init__(20)
        self.conv = nn.Conv2d(1, 20, 28)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(self.conv(images), (0, 1, 0, 1), value=9.0)
        return self.head(x.as_strided((len(x), 20), (80, 4)))


def test_a_network_that_gives_other_logits_in_channels_last_does_not_take_it():
    assert inspect(Strided).layout_problem == "its logits differ in that layout"


def test_gradients_of_a_backward_pass_inside_the_backward_pass_are_noticed():
    assert not inspect(awkward.ReentrantlyCheckpointed).one_graph
    assert inspect(awkward.Checkpointed).one_graph


def test_a_trial_takes_more_images_only_where_the_network_needs_them():
    assert inspect(awkward.GhostNorm, smallest=12) == Traits()
    with pytest.raises(UserError, match="cannot be trained on 5 images at once"):
        inspect(awkward.GhostNorm, smallest=5)
    with pytest.raises(UserError, match="cannot be trained on 1 image at once"):
        inspect(awkward.DoubleNorm, smallest=1)


def test_initial_weights_of_a_generator_of_ones_own_are_refused_by_name():
    with pytest.raises(UserError, match=r"initial values of head\.bias are not a function of the seed"):
        inspect(awkward.OwnGenerator)


def test_layers_that_a_mode_cannot_have_are_refused_by_name():
    with pytest.raises(UserError, match="norm has momentum=None"):
        inspect(awkward.WithoutMomentum, mode="exact")
    for mode in ("exact", "local"):
        with pytest.raises(UserError, match="1 is a SyncBatchNorm"):
            inspect(lambda: nn.Sequential(nn.Flatten(), nn.SyncBatchNorm(784), nn.Linear(784, 10)), mode=mode)


def test_parameters_whose_gradients_are_not_scaled_back_are_refused_in_fp16():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())
    check_scalable(network, clip_norm=0)
    with pytest.raises(UserError, match=r"1\.weight is torch\.float16.*with optim\.clip_norm=1;"):
        check_scalable(network, clip_norm=1)
    with pytest.raises(UserError, match=r"1\.weight is torch\.bfloat16"):
        check_scalable(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()), clip_norm=0)


def test_a_trial_leaves_the_generators_as_they_were():
    def states() -> list[object]:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]

    before = states()
    inspect(awkward.AlwaysDropout)
    assert states() == before


def test_numpys_and_pythons_generators_follow_the_seed():
    config = ModelConfig(target="helpers.awkward.OtherGenerators")
    first, again, other = (build_model(config, seed, MNIST).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (awkward.ChangedParameter, "mean changes in forward; sync.mode=exact can have that in buffers alone"),
        (awkward.ChangedExtraState, "_extra_state.json changes in forward; sync.mode=exact can have that in buffers alone"),
        (awkward.HiddenState, "in mean.*; sync.mode=exact can have that in buffers alone"),
        (awkward.HiddenCounter, "in count.*; sync.mode=exact can have that in buffers alone"),
    ],
)
def test_what_a_forward_pass_changes_outside_of_buffers_is_refused_in_exact_mode(network: type[nn.Module], reason: str):
    with pytest.raises(UserError, match=reason):
        inspect(network, mode="exact")
    assert inspect(network, mode="ddp").one_graph


@pytest.mark.parametrize("name", ["Remembers", "RunningMean", "OwnNorm", "NormsNowAndThen", "Renorm", "Spectral"])
def test_what_it_changes_in_buffers_or_only_remembers_is_taken(name: str):
    assert inspect(getattr(awkward, name), mode="exact").one_graph


@pytest.mark.parametrize("mode", ["ddp", "exact", "local"])
def test_what_counts_passes_outside_of_buffers_is_named_also_where_no_logits_show_it_yet(mode: str):
    assert inspect(awkward.LateCounter, mode=mode).counting == ("seen",)
    assert inspect(awkward.Remembers, mode=mode).counting == ()


def test_the_smallest_part_of_an_evaluation_is_tried_too():
    assert inspect(awkward.PairsInEvaluation, evaluated=2).one_graph
    with pytest.raises(UserError, match=r"cannot be evaluated on 3 images at once .*choose another data\.eval_batch_size"):
        inspect(awkward.PairsInEvaluation, evaluated=3)
