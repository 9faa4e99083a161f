from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from digitdist.config import ModelConfig
from digitdist.data import DATA_SETS, ImageSet, Splits, normalise
from digitdist.demo import features
from digitdist.demo.features import FeatureModel, TrainingFeatures
from digitdist.models import build_model
from digitdist.predict import predict

MNIST = DATA_SETS["mnist"]


def network(name: str, **arguments: object) -> nn.Module:
    return build_model(ModelConfig(name=name, args=arguments), seed=0, info=MNIST).eval()


@pytest.fixture
def images(splits: Splits) -> ImageSet:
    return splits.train.subset(torch.arange(1000, 1300))


def test_features_are_what_the_last_linear_layer_is_given_and_probabilities_are_those_of_predict(images: ImageSet):
    model = network("cnn")
    whole = FeatureModel(model, MNIST, "fp32")
    probabilities, found = whole(images.images)
    assert torch.equal(probabilities, predict(network("cnn"), images.images, MNIST))
    body = nn.Sequential(model.conv1, nn.MaxPool2d(2), nn.ReLU(), model.conv2, nn.MaxPool2d(2), nn.ReLU(), nn.Flatten())
    with torch.inference_mode():
        wanted = F.relu(model.linear1(body(normalise(images.images, MNIST))))
    assert torch.allclose(found, F.normalize(wanted), atol=1e-6)
    assert whole.description == "50 features before the last linear layer"


def test_columns_give_the_features_of_each(images: ImageSet):
    model = network("columns", columns=3)
    _, found = FeatureModel(model, MNIST, "fp32")(images.images[:9])
    each = [FeatureModel(column, MNIST, "fp32") for column in network("columns", columns=3).columns]
    assert found.shape == (9, sum(one.size for one in each))
    with torch.inference_mode():
        parts = [column.layers(normalise(images.images[:9], MNIST)[:, :, 2:-2, 2:-2]) for column in model.columns]
    wanted = torch.cat([part.permute(0, 2, 3, 1).flatten(1) for part in parts], 1)
    assert torch.allclose(found, F.normalize(wanted), atol=1e-6)


class Convolutional(nn.Sequential):
    """No linear layer gives its classes."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 10, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ByRow(nn.Module):
    """Its linear layer is called once for each row of each image, with as many rows as an image has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(28, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.flatten(0, 2)).unflatten(0, (len(images), 28)).mean(1)


@pytest.mark.parametrize("kind", [Convolutional, ByRow])
def test_of_a_network_without_such_a_layer_logits_take_the_place_of_features(kind: type[nn.Module], images: ImageSet):
    torch.manual_seed(0)
    model = kind().eval()
    whole = FeatureModel(model, MNIST, "fp32")
    with torch.inference_mode():
        wanted = F.normalize(model(normalise(images.images, MNIST)))
    assert torch.equal(whole(images.images)[1], wanted)
    assert whole.description == "10 logits, as no linear layer gives its classes"


def test_the_images_nearest_to_a_training_image_begin_with_itself_and_are_those_with_the_greatest_cosines(images: ImageSet):
    whole = FeatureModel(network("convnet"), MNIST, "fp32")
    training = TrainingFeatures(whole, images)
    _, query = whole(images.images[17:18])
    found = training.nearest(query[0], 5)
    assert (found[0].index, found[0].label, found[0].cosine) == (1017, images.labels[17].item(), pytest.approx(1, abs=1e-5))
    assert torch.equal(found[0].image, images.images[17])
    every = whole(images.images)[1] @ query[0]
    assert [one.cosine for one in found] == pytest.approx(every.sort(descending=True).values[:5].tolist(), abs=1e-5)
    assert len(training.nearest(query[0], 1000)) == 300, "no more than there are"


def test_of_many_images_some_that_are_evenly_spread_are_compared(images: ImageSet, monkeypatch: pytest.MonkeyPatch):
    whole = FeatureModel(network("cnn"), MNIST, "fp32")
    monkeypatch.setattr(features, "MAX_IMAGES", 3)
    training = TrainingFeatures(whole, images)
    assert sorted(one.index for one in training.nearest(whole(images.images[:1])[1][0], 5)) == [1000, 1100, 1200]
    monkeypatch.setattr(features, "MAX_BYTES", 2 * 4 * 50)
    assert len(TrainingFeatures(whole, images)) == 2
