from __future__ import annotations

import pytest
import torch
from helpers.launching import ROOT

from digitdist import models
from digitdist.config import ModelConfig, load_config
from digitdist.data import DATA_SETS, DataSetInfo
from digitdist.errors import UserError
from digitdist.models import build_model

MNIST = DATA_SETS["mnist"]


def test_cnn_is_the_published_network():
    model = build_model(ModelConfig(), seed=0, info=MNIST)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "conv1.weight": (10, 1, 5, 5),
        "conv2.weight": (20, 10, 5, 5),
        "linear1.weight": (50, 320),
        "linear2.weight": (10, 50),
    }
    assert sum(p.numel() for p in model.parameters()) == 21840


def test_it_returns_logits():
    logits = build_model(ModelConfig(), seed=0, info=MNIST).eval()(torch.randn(4, 1, 28, 28))
    assert logits.shape == (4, 10)
    assert not torch.allclose(logits.exp().sum(1), torch.ones(4))
    assert (logits < 0).any()


def test_channel_dropout_drops_whole_channels():
    model = build_model(ModelConfig(), seed=0, info=MNIST).train()
    seen = []
    model.channel_dropout.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(torch.randn(8, 1, 28, 28))
    dropped = (seen[0] == 0).flatten(2).all(2)
    assert 0.2 < dropped.float().mean() < 0.8
    assert torch.equal(dropped, (seen[0] == 0).flatten(2).any(2))


def test_a_convnet_is_as_wide_and_deep_as_its_channels():
    model = build_model(ModelConfig("convnet", args={"channels": [8, 16, 24, 32], "pools": [2]}), seed=0, info=MNIST)
    shapes = [tuple(tensor.shape) for tensor in model.parameters() if tensor.dim() > 1]
    assert shapes == [(8, 1, 4, 4), (16, 8, 3, 3), (24, 16, 3, 3), (32, 24, 3, 3), (10, 32 * 3 * 3)]


def test_a_convnet_with_an_odd_stem_keeps_the_resolution():
    model = build_model(ModelConfig("convnet", args={"channels": [8, 16, 24], "pools": [0, 1], "stem": 3}), seed=0, info=MNIST)
    assert model.layers[0](torch.zeros(1, 1, 24, 24)).shape == (1, 8, 22, 22)
    assert model.linear.in_features == 24 * 3 * 3


@pytest.mark.parametrize("recipe", ["fast", "sharp", "best"])
def test_a_recipe_has_a_network_that_can_be_built(recipe: str):
    kind = models.Columns if recipe == "best" else models.ConvNet
    assert isinstance(build_model(load_config([str(ROOT / f"configs/{recipe}.yaml")]).model, seed=0, info=MNIST), kind)


def test_a_convnet_crops_to_the_middle_of_an_image():
    model = build_model(ModelConfig("convnet"), seed=0, info=MNIST).eval()
    images = torch.randn(2, 1, 28, 28)
    framed = torch.nn.functional.pad(images[:, :, 2:-2, 2:-2], (2, 2, 2, 2), value=5.0)
    assert torch.equal(model(images), model(framed))


def test_the_gradient_of_a_convnet_has_the_layout_of_its_activations():
    model = build_model(ModelConfig("convnet"), seed=0, info=MNIST).to(memory_format=torch.channels_last)
    layouts = []
    for layer in model.layers:
        layer.register_full_backward_hook(
            lambda _, __, out: layouts.append(out[0].is_contiguous(memory_format=torch.channels_last))
        )
    model(torch.rand(4, 1, 28, 28, requires_grad=True)).sum().backward()
    assert layouts == [True] * len(model.layers)


def columns(count: int) -> models.Columns:
    return build_model(ModelConfig("columns", args={"columns": count, "channels": [8, 8], "pools": [0]}), seed=0, info=MNIST)


def test_columns_give_the_mean_of_their_logits():
    model, images = columns(3).eval(), torch.randn(5, 1, 28, 28)
    assert torch.equal(model(images), torch.stack([column(images) for column in model.columns]).mean(0))
    assert not torch.allclose(model.columns[0](images), model.columns[1](images))


def test_in_training_each_column_gets_a_part_of_the_images():
    model, images = columns(3), torch.randn(8, 1, 28, 28)
    by_hand = [column(part) for column, part in zip(model.columns, images.split([3, 3, 2]), strict=True)]
    logits = model(images)
    assert torch.equal(logits, torch.cat(by_hand))
    logits[3:6].sum().backward()
    assert [bool(column.linear.weight.grad.any()) for column in model.columns] == [False, True, False]


def test_every_column_has_a_gradient_from_a_single_image():
    model = columns(3)
    model(torch.randn(1, 1, 28, 28)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", models.MODELS)
def test_initial_weights_depend_on_the_seed_alone(name: str):
    first = build_model(ModelConfig(name), seed=3, info=MNIST).state_dict()
    torch.rand(5)
    again, other = (
        build_model(ModelConfig(name), seed=3, info=MNIST).state_dict(),
        build_model(ModelConfig(name), seed=4, info=MNIST).state_dict(),
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", models.MODELS)
def test_a_network_sizes_itself_by_the_images_or_says_that_they_are_too_small(name: str):
    def form(height: int, width: int) -> DataSetInfo:
        return DataSetInfo("x", (0.5,) * 3, (0.5,) * 3, tuple("abcd"), height, width, "resize")

    model = build_model(ModelConfig(name=name), 0, form(24, 40))
    assert model.eval()(torch.zeros(5, 3, 24, 40)).shape == (5, 4)
    with pytest.raises(UserError, match="images of 8×12 are too small for its layers"):
        build_model(ModelConfig(name=name), 0, form(8, 12))


def test_a_users_own_model_is_taken_with_its_arguments():
    model = build_model(ModelConfig(target="digitdist.models.CnnBatchNorm", args={"width": 4}), seed=0, info=MNIST)
    assert model.linear.in_features == 16


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (ModelConfig(name="resnet"), "one of cnn"),
        (ModelConfig(target="nowhere.Net"), "cannot be imported"),
        (ModelConfig(target="Net"), "cannot be imported"),
        (ModelConfig(target="torch.nn.Nothing"), "cannot be imported"),
        (ModelConfig(args={"width": 3}), "width"),
        (ModelConfig(name="convnet", args={"channels": [8] * 5, "pools": [0, 1, 2]}), "does not work"),
        (ModelConfig(target="torch.nn.Flatten"), r"must give logits of shape \(2, 10\)"),
        (ModelConfig(target="torch.nn.Linear", args={"in_features": 3, "out_features": 10}), "does not work"),
    ],
)
def test_a_model_that_does_not_work_is_the_users_mistake(config: ModelConfig, part: str):
    with pytest.raises(UserError, match=part):
        build_model(config, seed=0, info=MNIST)
