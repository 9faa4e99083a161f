"""Any network: what one process trains, several train alike in every mode, or it is refused before a run folder exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.launching import QUIET, ROOT, python, torchrun, worlds

MODES = ("ddp", "exact", "local")
TRAINED = (  # and whose loss in ddp mode is that of one process to rounding, on any number of them
    *("Base", "Convolution", "Volume", "UnusedParameter", "Frozen", "NoGradient", "Double", "Integers", "Mask", "ExtraState"),
    *("ExtraTensor", "Spectral", "SpectralHook", "WeightNorm", "InstanceNorm", "Tied", "View", "Recurrent", "Lazy", "Hooked"),
    *("Custom", "Remembers"),
)
RANDOM = (  # whose draws, statistics or precision differ from rank to rank in ddp mode
    *("StochasticDepth", "DoubleNorm", "Half", "OtherGenerators", "AlwaysDropout", "RunningMean", "ListOfParameters"),
    *("Transformer", "Checkpointed", "ReentrantlyCheckpointed", "NormsNowAndThen", "Renorm", "OwnNorm", "LazyNorms"),
)
VARIED = [  # empty shares, and several micro-batches
    *[f"{name}:{mode}:data.batch_size=1" for name in ("StochasticDepth", "UnusedParameter", "RunningMean") for mode in MODES],
    *[f"{name}:{mode}:train.accumulate=3" for name in ("StochasticDepth", "Spectral", "RunningMean") for mode in MODES],
]
REFUSED = {
    "AllFrozen": "nothing to train",
    "NoParameters": "nothing to train",
    "Detached": "nothing to train",
    "Complex": "the parameter phase is torch.complex64",
    "TwoOutputs": "returns a tuple of a tensor (2, 10), a tensor (2, 1, 28, 28); forward must give logits of shape (2, 10)",
    "NamedOutputs": "in training returns a dict",
    "FailsInTraining": "no training today",
    "NotANumber": "gives NaN",
    "UnstorableState": "_extra_state holds a deque",
    "LostState": "state_dict back",
    "Sparse": "the gradient of shift.weight is torch.sparse_coo",
    "Growing": "seen changes its shape",
}
REFUSED_IN_EXACT = {
    "WithoutMomentum": "norm has momentum=None",
    "GhostNorm": "cannot be trained on 2 images at once",
    "HiddenState": "gives other logits for the same images",
    "ChangedParameter": "mean changes in forward",
}


def check(one: dict[str, Any], two: dict[str, Any]) -> None:
    """One process has trained without a break; two have resumed their runs in the middle."""
    for case in one:
        name, mode, *more = case.split(":")
        reason = REFUSED.get(name) or (REFUSED_IN_EXACT.get(name) if mode == "exact" else None)
        if reason:
            assert reason in one[case], case
            assert one[case] == two[case], case
            continue
        for found in (one[case], two[case]):
            assert found["test loss"] == found["test loss again"], case
        if mode == "exact":
            assert one[case] == two[case], case
        elif mode == "ddp" and name in TRAINED and not more:
            assert two[case]["losses"] == pytest.approx(one[case]["losses"], abs=2e-5), case


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_any_network_is_trained_alike_on_one_process_and_on_two_or_refused(tmp_path: Path, mnist_root: Path):
    cases = [f"{name}:{mode}" for name in (*TRAINED, *RANDOM) for mode in MODES] + VARIED
    cases += [f"{name}:{mode}" for name, mode in zip((*REFUSED, "LostState"), 5 * MODES, strict=False)]
    cases += [f"{name}:exact" for name in REFUSED_IN_EXACT]
    done = worlds((1, 2), "helpers.network_worker", str(mnist_root), str(tmp_path), *cases, cwd=tmp_path, timeout=900)
    check(*(json.loads(done[world_size].out.splitlines()[-1]) for world_size in (1, 2)))


@pytest.mark.slow
def test_a_layout_that_a_network_does_not_take_is_not_used_and_said(place: Path):
    options = ("model.target=helpers.awkward.Convolution", "train.max_steps=2", "run.name=a")
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = torchrun(2, "-m", "digitdist.train", *QUIET, *options, cwd=place, env=env)
    assert done.code == 0, done.err
    assert (
        done.out.count("layout     contiguous, since the model does not take channels-last: view size is not compatible") == 1
    )
    evaluated = python("-m", "digitdist.evaluate", "a", cwd=place, env=env)
    assert evaluated.code == 0, evaluated.err


@pytest.mark.slow
def test_initial_weights_that_depend_on_the_rank_are_refused_once(place: Path):
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = torchrun(2, "-m", "digitdist.train", *QUIET, "model.target=helpers.awkward.ByRank", cwd=place, env=env)
    (line,) = done.errors
    assert "the initial state of the model (a function of seed alone) is of SHA-256" in line
    assert not (place / "runs").exists()
