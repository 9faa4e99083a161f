from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from digitdist import evaluate
from digitdist.config import load_config
from digitdist.data import DATA_SETS, ImageSet, Splits, normalise
from digitdist.evaluate import Evaluation, chunked_loader
from digitdist.evaluate.evaluating import check_each_once
from digitdist.models import build_model

MNIST = DATA_SETS["mnist"]


def made(label: list[int], prediction: list[int]) -> Evaluation:
    count = len(label)
    return Evaluation(
        np.arange(count), np.array(label), np.array(prediction), np.full(count, 0.5), np.full(count, 0.25), num_classes=10
    )


@pytest.mark.parametrize("size", [1, 7, 384, 1000, 20000])
def test_each_image_is_predicted_once_for_any_batch_size(accelerator: Accelerator, splits: Splits, size: int):
    config = load_config((), [f"data.eval_batch_size={size}"])
    model = build_model(config.model, 0, MNIST)
    images = splits.test.subset(torch.randperm(10000, generator=torch.Generator().manual_seed(1))[:201])
    result = evaluate.evaluate(accelerator, model, chunked_loader(accelerator, images, config), DATA_SETS["mnist"])
    assert result.index.tolist() == sorted(images.indices.tolist())
    assert model.training, "the model is left as it was"
    with torch.no_grad():
        logits = model.eval()(normalise(splits.test.images[result.index], DATA_SETS["mnist"]))
    assert np.array_equal(result.prediction, logits.argmax(1).numpy())
    assert np.array_equal(result.label, splits.test.labels[result.index].numpy())
    assert np.allclose(result.probability, logits.softmax(1).max(1).values.numpy(), atol=1e-5)
    loss = torch.nn.functional.cross_entropy(logits, splits.test.labels[result.index]).item()
    assert result.mean_loss == pytest.approx(loss, abs=1e-5)
    assert result.correct == int((logits.argmax(1) == splits.test.labels[result.index]).sum())


def test_counts_are_counts():
    result = made([0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 0])
    assert (result.correct, result.total) == (4, 6)
    assert result.class_accuracy[:4] == [0.5, 1.0, pytest.approx(2 / 3), None]
    assert result.confusion.sum() == 6
    assert result.confusion[2, 0] == 1


@pytest.mark.parametrize("index", [[0, 1, 1], [0, 1], [0, 1, 2, 3], [0, 1, 3], [0, 0, 1, 2]])
def test_a_result_in_which_an_image_is_missing_or_twice_is_refused(index: list[int]):
    with pytest.raises(RuntimeError, match="3 are needed, once each"):
        check_each_once(np.array(index), torch.arange(3))
    check_each_once(np.array([0, 1, 2]), torch.tensor([2, 0, 1]))


def test_predictions_are_saved_as_the_readme_says(tmp_path: Path):
    evaluate.save_predictions(made([3, 4], [3, 5]), tmp_path / "p.npz")
    saved = np.load(tmp_path / "p.npz", allow_pickle=False)
    assert set(saved) == {"index", "label", "prediction", "probability"}
    assert saved["prediction"].tolist() == [3, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]


def test_a_single_image_is_fine(accelerator: Accelerator):
    config = load_config()
    one_image = ImageSet(torch.zeros(1, 28, 28, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    loader = chunked_loader(accelerator, one_image, config)
    assert evaluate.evaluate(accelerator, build_model(config.model, 0, MNIST), loader, DATA_SETS["mnist"]).total == 1
