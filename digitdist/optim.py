"""The optimizer, and the learning rate as a function of the step: there is no scheduler to save, prepare or step twice."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from digitdist.checkpoint import Tensors
from digitdist.config import OptimConfig, ScheduleConfig
from digitdist.distributed import eager_optimizer

TRAINABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # dtypes of parameters


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimizer over all parameters of `model`, in torch's fused form: one pass over the weights a step.

    That takes floating-point parameters alone; others cannot be trained. Each is laid out densely in memory, in place.
    """
    parameters = [p for p in model.parameters() if p.dtype in TRAINABLE]
    for parameter in parameters:
        dense = torch.empty_like(parameter)
        if parameter.stride() != dense.stride():  # a view with gaps, which a fused update on CPUs would take for numbers
            parameter.data = dense.copy_(parameter.detach())
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.name == "sgd":
        kind: type[torch.optim.Optimizer] = torch.optim.SGD
        options |= {"momentum": config.momentum, "nesterov": config.momentum > 0}
    else:
        kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
        options |= {"betas": (config.beta1, config.beta2)}
    optimizer = eager_optimizer(kind, parameters, **options)
    if options.get("momentum"):
        # Or it makes them without values, and leaves them so where fp16 overflows in the first step. The bits are the same.
        for parameter in (p for p in parameters if p.requires_grad):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def norm(tensors: Iterable[Tensor]) -> float:
    """The L2 norm of all values of those `tensors` that hold floating-point numbers. Waits for their device."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in (tensor for tensor in tensors if tensor.is_floating_point()):
        exact = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
        groups.setdefault(exact.dtype, []).append(exact)
    with torch.no_grad():
        norms = [float(torch.nn.utils.get_total_norm(group, foreach=None)) for group in groups.values()]
    return norms[0] if len(norms) == 1 else math.hypot(*norms)


def learning_rate(step: int, total_steps: int, steps_per_epoch: int, schedule: ScheduleConfig, peak: float) -> float:
    """The learning rate of the update that follows `step`, for steps 0..total_steps-1.

    constant, step and cosine begin with a linear warm-up over `warmup_steps`. Then constant keeps `peak`; step has
    ``peak * gamma**k`` after ``k * step_epochs`` epochs; cosine falls in half a cosine from `peak` to ``final * peak``.
    onecycle rises in half a cosine from ``peak / 25`` to `peak`, reached at the fraction ``schedule.peak`` of all steps,
    and falls in another to ``final * peak`` (Smith and Topin, Super-Convergence, 2018, with the cosines of
    torch.optim.lr_scheduler.OneCycleLR).
    """
    if schedule.name == "onecycle":
        top = schedule.peak * (total_steps - 1)
        if step < top:
            return _cosine(peak / 25, peak, step / top)
        return _cosine(peak, schedule.final * peak, (step - top) / max(1, total_steps - 1 - top))
    warmup = min(1.0, (step + 1) / (schedule.warmup_steps + 1))
    if schedule.name == "step":
        return warmup * peak * schedule.gamma ** (step // max(1, round(schedule.step_epochs * steps_per_epoch)))
    if schedule.name == "cosine":
        rest = max(1, total_steps - schedule.warmup_steps)
        return warmup * _cosine(peak, schedule.final * peak, min(1.0, max(0, step - schedule.warmup_steps) / rest))
    return warmup * peak


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state as a flat mapping of ``<parameter number>.<name>`` to tensor; its settings follow from the
    configuration."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value for number, values in state.items() for name, value in values.items() if value is not None
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Restores what `state_tensors` returned, each tensor in the memory layout of its parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, Tensors] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        # A fused update walks parameter and state side by side in memory.
        fits = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
        state.setdefault(int(number), {})[name] = fits
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _cosine(start: float, end: float, fraction: float) -> float:
    """Half a cosine from `start` at fraction 0 to `end` at fraction 1."""
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
