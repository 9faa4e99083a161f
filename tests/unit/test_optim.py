from __future__ import annotations

import math

import pytest
import torch

from digitdist import optim
from digitdist.config import OptimConfig, ScheduleConfig

OPTIMIZERS = ("adam", "adamw", "sgd")


def rates(name: str, total: int = 100, **options: float) -> list[float]:
    schedule = ScheduleConfig(name=name, **options)  # type: ignore[arg-type]
    return [optim.learning_rate(step, total, 10, schedule, 0.1) for step in range(total)]


def test_constant_is_constant():
    assert set(rates("constant")) == {0.1}


def test_warm_up_is_linear():
    assert rates("constant", warmup_steps=4)[:6] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


def test_step_drops_after_epochs():
    assert rates("step", step_epochs=2, gamma=0.5)[18:42:1] == pytest.approx([0.1] * 2 + [0.05] * 20 + [0.025] * 2)


def test_cosine_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=0.001)
    for ours in rates("cosine", final=0.01):
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_onecycle_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=101, pct_start=0.3 + 0.7 / 101, final_div_factor=1e9
    )
    for ours in rates("onecycle", total=101, peak=0.3):
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-3)
        optimizer.step()
        theirs.step()
    ours = rates("onecycle", total=101, peak=0.3)
    assert ours[0] == pytest.approx(0.1 / 25)
    assert max(ours) == ours[30] == pytest.approx(0.1)
    assert ours[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_that_is_a_view_with_gaps_takes_the_updates_of_a_dense_one(name: str):
    numbers = torch.randn(4, 6)
    updated = []
    for weights in (numbers.clone()[:, ::2], numbers[:, ::2].clone()):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(weights)
        optimizer = optim.build_optimizer(model, OptimConfig(name=name))  # type: ignore[arg-type]
        for step in range(3):
            model.weight.grad = torch.full((4, 3), 0.1 * (step + 1))
            optimizer.step()
        updated.append(model.weight)
    assert torch.equal(*updated)


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "onecycle"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_a_short_training_has_rates_too(name: str, total: int):
    assert all(math.isfinite(rate) and 0 <= rate <= 0.1 for rate in rates(name, total=total))


def gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(3, 2)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_torchs_own(name: str):
    ours, theirs = network(), network()
    options = {"lr": 0.1, "weight_decay": 0.01}
    plain = {
        "adam": lambda p: torch.optim.Adam(p, betas=(0.8, 0.9), **options),
        "adamw": lambda p: torch.optim.AdamW(p, betas=(0.8, 0.9), **options),
        "sgd": lambda p: torch.optim.SGD(p, momentum=0.7, nesterov=True, **options),
    }[name](theirs.parameters())
    built = optim.build_optimizer(ours, OptimConfig(name, 0.1, 0.01, momentum=0.7, beta1=0.8, beta2=0.9))  # type: ignore[arg-type]
    for seed in range(3):
        for model, optimizer in ((ours, built), (theirs, plain)):
            gradients(model, seed)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
        assert a.grad is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_first_step_that_overflows_in_fp16_leaves_weights_and_momentum_as_they_were(name: str):
    skipping, plain = network(), network()
    config = OptimConfig(name, 0.1, 0.01)  # type: ignore[arg-type]
    optimizer, usual = (optim.build_optimizer(model, config) for model in (skipping, plain))
    scaler = torch.amp.GradScaler("cpu")
    for seed, overflow in ((0, True), (1, False), (2, False)):
        gradients(skipping, seed)
        for parameter in skipping.parameters():
            parameter.grad *= math.inf if overflow else scaler.get_scale()
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
    for seed in (1, 2):
        gradients(plain, seed)
        usual.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(skipping.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_state_leads_to_the_same_bits(name: str):
    model, config = network(), OptimConfig(name, 0.1)  # type: ignore[arg-type]
    optimizer = optim.build_optimizer(model, config)
    gradients(model, 0)
    optimizer.step()
    stored = {key: value.contiguous().clone() for key, value in optim.state_tensors(optimizer).items()}
    assert stored
    other = network()
    other.load_state_dict(model.state_dict())
    restored = optim.build_optimizer(other, config)
    optim.load_state_tensors(restored, stored)
    for m, o in ((model, optimizer), (other, restored)):
        for seed in (1, 2):
            gradients(m, seed)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_norm_is_that_of_all_floating_point_numbers_together():
    mixed = [
        torch.full((4,), 2.0),
        torch.full((9,), 1.0, dtype=torch.float64),
        torch.arange(5),
        torch.full((3,), 2.0).bfloat16(),
    ]
    assert optim.norm(mixed) == pytest.approx(math.sqrt(16 + 9 + 12), rel=1e-6)
    ones = [torch.randn(7), torch.randn(5)]
    assert optim.norm(ones) == float(torch.nn.utils.get_total_norm(ones))
    assert optim.norm([]) == 0
