"""What Accelerate is told, where it would be told otherwise on a host with GPUs."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import pytest

from digitdist.config import load_config
from digitdist.distributed import Plan, accelerator
from digitdist.world import World


class Asked(Exception):
    pass


def asked_of_accelerate(monkeypatch: pytest.MonkeyPatch, device_type: str) -> dict[str, Any]:
    """The arguments with which the `Accelerator` of one of two ranks is built on such a device, with a timeout of 20 s."""

    def refuse(**arguments: Any) -> None:
        raise Asked(arguments)

    monkeypatch.setattr(accelerator, "Accelerator", refuse)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    plan = Plan(World(0, 2, 0, 2), device_type == "cpu", device_type, "bf16", 1, ())
    with pytest.raises(Asked) as caught:
        accelerator.start_accelerator(load_config((), ["sync.timeout_s=20"]), plan)
    return caught.value.args[0]


@pytest.mark.parametrize(("device_type", "seconds"), [("cpu", 20), ("cuda", 80)])
def test_nccl_gets_more_time_than_the_watch_that_names_the_rank(
    monkeypatch: pytest.MonkeyPatch, device_type: str, seconds: int
):
    timeouts, _ = asked_of_accelerate(monkeypatch, device_type)["kwargs_handlers"]
    assert timeouts.timeout == timedelta(seconds=seconds)


@pytest.mark.parametrize("supported", [True, False])
def test_cards_that_cannot_talk_to_each_other_train_all_the_same_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, supported: bool
):
    """Accelerate raises where these variables are not set on them."""
    monkeypatch.setattr(accelerator, "check_cuda_p2p_ib_support", lambda: supported)
    asked_of_accelerate(monkeypatch, "cuda")
    assert (os.environ.get("NCCL_P2P_DISABLE"), os.environ.get("NCCL_IB_DISABLE")) == (
        (None, None) if supported else ("1", "1")
    )
