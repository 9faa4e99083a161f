"""An ensemble: its probabilities are the mean of its members', each of which is computed as by itself."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.stored_runs import MNIST, made

from digitdist.data import AnySet, Splits
from digitdist.evaluate import Evaluation, mean_probabilities
from digitdist.evaluate.ensemble import average, compare_with_best
from digitdist.evaluate.evaluating import Scores
from digitdist.evaluate.members import Member, open_member
from digitdist.runs import load_run

SHIFTED = dataclasses.replace(MNIST, mean=(0.2,), std=(0.4,))


def by_hand(members: Sequence[Scores]) -> np.ndarray:
    """The class of each image by the mean of the members' probabilities, one after the other, in float64."""
    total = np.zeros(members[0].log_probability.shape)
    for member in members:
        total += np.exp(member.log_probability.double().numpy())
    return (total / len(members)).argmax(1)


def right(*, of: int, only: range) -> Evaluation:
    """The result on so many images of class 1, of which those in `only` are told right."""
    prediction = np.isin(np.arange(of), only).astype(np.int64)
    return Evaluation(np.arange(of), np.ones(of, np.int64), prediction, np.full(of, 0.5), np.full(of, 0.25), num_classes=2)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    """Runs that differ in seed, network, moving average, normalisation, layout, size of chunks and precision."""
    place = tmp_path_factory.mktemp("members")
    runs = [
        made(place / "a", "seed=1")[0],
        made(place / "b", "model.name=convnet", "optim.ema=0.9", ema=True)[0],
        made(place / "c", "seed=2", "data.eval_batch_size=70", "sync.shards=3", info=SHIFTED)[0],
        made(place / "d", "model.name=columns", "seed=3", precision="bf16")[0],
        made(place / "e", "model.target=helpers.awkward.Volume", "seed=4")[0],
    ]
    return [open_member(load_run(str(run), []), "last", chosen=False) for run in runs]


@pytest.fixture(scope="module")
def images(splits: Splits) -> AnySet:
    return splits.test.subset(torch.arange(600).flip(0))


@pytest.fixture(scope="module")
def scores(accelerator: Accelerator, members: list[Member], images: AnySet) -> list[Scores]:
    return [member.score(accelerator, images, member.layout(images)) for member in members]


def test_the_mean_by_hand():
    a, b = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.0, 0.25, 0.75]])
    assert mean_probabilities([a, b]).tolist() == [[0.25, 0.25, 0.5]]


def test_the_order_of_the_members_has_no_influence_on_any_bit(scores: list[Scores]):
    first = average(scores).log_probability
    drawn = torch.rand(5, 40, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(2)
    naive = {torch.stack([drawn[i] for i in order]).sum(0).numpy().tobytes() for order in itertools.permutations(range(5))}
    assert len(naive) > 1, "a plain sum depends on it"
    for order in itertools.permutations(range(5)):
        assert torch.equal(average([scores[i] for i in order]).log_probability, first)
        assert torch.equal(mean_probabilities([drawn[i] for i in order]), mean_probabilities(list(drawn)))


def test_an_ensemble_of_one_is_that_network_bit_for_bit(scores: list[Scores]):
    probabilities = scores[0].log_probability.exp()
    assert torch.equal(mean_probabilities([probabilities]).float(), probabilities)


def test_the_classes_are_those_of_the_members_probabilities_averaged_by_hand(scores: list[Scores]):
    for count in range(2, 6):
        for some in itertools.combinations(scores, count):
            result = average(some).evaluation()
            assert np.array_equal(result.prediction, by_hand(some))
            assert result.correct == int((by_hand(some) == some[0].label.numpy()).sum())
    assert len({each.evaluation().correct for each in scores}) > 1, "the members differ"


def test_loss_and_probability_are_those_of_the_mean(scores: list[Scores]):
    result = average(scores).evaluation()
    mean = np.mean([np.exp(each.log_probability.double().numpy()) for each in scores], 0)
    assert np.allclose(result.probability, mean.max(1), rtol=1e-6)
    assert np.allclose(result.loss, -np.log(mean[np.arange(600), result.label]), rtol=1e-6)
    assert result.probability.dtype == result.loss.dtype == np.float32


def test_a_loss_is_finite_where_all_members_give_a_class_hardly_any_probability():
    logits = torch.tensor([[0.0, -200.0]]).log_softmax(1)
    scores = Scores(torch.tensor([0]), torch.tensor([1]), logits)
    assert average([scores, scores]).evaluation().loss.tolist() == [200.0]


def test_members_are_computed_in_their_own_precision_normalisation_and_chunks(
    accelerator: Accelerator, members: list[Member], images: AnySet, scores: list[Scores]
):
    assert [member.plan.precision for member in members] == ["fp32", "fp32", "fp32", "bf16", "fp32"]
    assert [member.layout(images) for member in members][-1] == torch.contiguous_format
    for member, found in reversed(list(zip(members, scores, strict=True))):
        again = member.score(accelerator, images, member.layout(images))
        assert torch.equal(again.log_probability, found.log_probability)
        assert found.index.tolist() == list(range(600))
    otherwise = [
        dataclasses.replace(members[2], run=dataclasses.replace(members[2].run, info=MNIST)),
        dataclasses.replace(members[3], plan=dataclasses.replace(members[3].plan, precision="fp32")),
    ]
    for member, found in zip(otherwise, scores[2:4], strict=True):
        again = member.score(accelerator, images, member.layout(images))
        assert not torch.equal(again.log_probability, found.log_probability)


def test_networks_of_other_images_are_never_averaged(scores: list[Scores]):
    with pytest.raises(AssertionError):
        average([scores[0], dataclasses.replace(scores[1], index=scores[1].index + 1)])


def test_the_ensemble_beside_its_best_member_by_hand():
    members = [right(of=40, only=range(20)), right(of=40, only=range(10, 32)), right(of=40, only=range(5))]
    compared = compare_with_best(right(of=40, only=range(14, 40)), members)
    assert (compared.best, compared.only_ensemble, compared.only_best) == (1, 8, 4)
    assert compared.p_value == 2 * sum(math.comb(12, k) for k in range(5)) / 2**12
    assert str(compared) == (
        "the best of them on these same images, which favours it: no difference shown, p = 0.39 (McNemar); 8 images only the"
        " ensemble got right, 4 only that run"
    )
    better = compare_with_best(right(of=40, only=range(40)), members)
    assert "the ensemble is better, p < 0.0001 (McNemar); 18 images only" in str(better)
    assert "that run is better, p < 0.0001" in str(compare_with_best(right(of=40, only=range(0)), members))


def test_the_best_member_is_that_of_held_out_images_where_all_have_them():
    members = [right(of=40, only=range(20)), right(of=40, only=range(10, 32)), right(of=40, only=range(5))]
    ensemble = right(of=40, only=range(14, 40))
    compared = compare_with_best(ensemble, members, [0.5, 0.4, 0.9])
    assert (compared.best, compared.only_ensemble, compared.only_best) == (2, 26, 5)
    assert str(compared).startswith("the best of them on held-out images: the ensemble is better, p = 0.")
    assert compare_with_best(ensemble, members, [0.5, None, 0.9]).best == 1


def test_the_accuracy_on_held_out_images_is_that_which_was_logged_at_the_checkpoints_step(members: list[Member]):
    events = ({"step": 5, "train/loss": 2.0}, {"step": 5, "validation/accuracy": 0.5}, {"step": 9, "validation/accuracy": 0.7})
    lines = [json.dumps(event | {"epoch": 1, "time": 1.0}) + "\n" for event in events]
    (members[0].run.folder / "metrics.jsonl").write_text("".join(lines))
    assert members[0].held_out_accuracy() == 0.5
    assert members[1].held_out_accuracy() is None
