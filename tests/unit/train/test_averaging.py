"""The moving average of the weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from digitdist.train.averaging import MovingAverage


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).double())
    model.register_parameter("steps", nn.Parameter(torch.tensor(0), requires_grad=False))
    return model


@torch.no_grad()
def change(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.add_(torch.randint(1, 9, tensor.shape, generator=generator).to(tensor.dtype))


def test_the_moving_average_is_torchs_own():
    model = network()
    ours, theirs = MovingAverage(model, 0.9), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for seed in range(4):
        change(model, seed)
        ours.update()
        theirs.update_parameters(model)
        pairs = zip(ours.eval_model.state_dict().items(), theirs.module.state_dict().items(), strict=True)
        for (name, own), (_, wanted) in pairs:
            assert torch.equal(own, wanted) or name == "steps"
        assert torch.equal(ours.eval_model.steps, model.steps)


class Calls(TorchDispatchMode):
    """Counts what is asked of the device, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


def test_an_update_reads_no_value():
    model = network()
    average = MovingAverage(model, 0.9)
    for _ in range(2):
        with Calls() as calls:
            average.update()
        assert not {name for name in calls.names if "_local_scalar_dense" in name or "_to_copy" in name}
    assert calls.names.count("aten._foreach_lerp_.Scalar") == 1
