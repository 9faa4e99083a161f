"""Where runs are trained side by side: one a GPU, or on CPUs with their share of the cores."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from digitdist.config import Config
from digitdist.distributed import cpu_quota, num_cores, planned_device

VISIBLE = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
}  # by which a process sees some devices alone; ROCm hears it


@dataclass(frozen=True)
class Slot:
    """A place for one run at a time: what its process finds in its environment, and its threads; None: what it takes itself."""

    environment: dict[str, str]
    threads: int | None


def make_slots(jobs: int | None, config: Config, num_runs: int) -> list[Slot]:
    """As many places as `jobs` says, at most `num_runs`; by default one a GPU, and on CPUs one a core with one thread each, or
    as many as have room for ``train.threads``. The threads of a run do not depend on `num_runs`: neither do its bits."""
    device, cores = planned_device(), num_cores(cpu_quota())
    environments: list[dict[str, str]] = [{}]
    if device in VISIBLE:
        variable = VISIBLE[device]
        shown = [name for name in os.environ.get(variable, "").split(",") if name]
        environments = [{variable: name} for name in shown or map(str, range(torch.accelerator.device_count()))]
    default = len(environments) if device != "cpu" else max(1, cores // (config.train.threads or 1))
    count = jobs or default
    # In exact mode the number of threads alters the result, so it is not for the machine to say.
    threads = None if config.train.threads or config.sync.mode == "exact" else max(1, cores // count)
    return [Slot(environments[number % len(environments)], threads) for number in range(min(count, num_runs))]
