"""Everything that a training needs before its process group exists."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

import digitdist
from digitdist.config import Config, as_dict, nearest_folder, read_config
from digitdist.data import Order, Splits, known_info, load_splits
from digitdist.distributed import Plan, make_plan
from digitdist.errors import UserError
from digitdist.models import build_model
from digitdist.runs import has_wandb_key
from digitdist.world import is_main

LOCAL_KEYS = ("data.root", "run.dir")  # may differ from host to host


@dataclass(frozen=True)
class Setup:
    """The configuration, what it runs on, the data set and the network of a training."""

    config: Config
    plan: Plan
    splits: Splits
    model: nn.Module

    @cached_property
    def order(self) -> Order:
        return Order.of_config(self.config, len(self.splits.train))

    @property
    def last_step(self) -> int:
        """The step after which the training ends."""
        return self.order.last_step(self.config.train.epochs, self.config.train.max_steps)

    def fingerprint(self) -> dict[str, str]:
        """What must be the same on every rank: configuration but for a host's folders, code, device, data and network."""
        return {name: str(value) for name, value in as_dict(self.config).items() if name not in LOCAL_KEYS} | {
            "digitdist": f"version {digitdist.__version__} with sources {code_sha256()[:12]}",
            "torch": f"version {torch.__version__}",
            "device": self.plan.device_type,
            "effective train.precision": self.plan.precision,
            "data": f"{self.splits.info.name} of SHA-256 {self.splits.sha256[:12]}",
            "model": ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.model.state_dict().items()),
        }


def code_sha256() -> str:
    """SHA-256 over the package's Python files, those of its subpackages too, in the order of their names."""
    root = Path(digitdist.__file__).parent
    files = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py"))
    return hashlib.sha256(b"".join(name.encode() + (root / name).read_bytes() for name in files)).hexdigest()


def prepare(files: Sequence[str], overrides: Sequence[str]) -> Setup:
    """Reads the configuration and builds what it names.

    Raises:
        UserError: with every mistake of configuration, launch and network, before anything is made; then that of the data.
    """
    config, mistakes = read_config(files, overrides)
    plan = model = None
    try:
        plan = make_plan(config)
    except UserError as error:
        mistakes += error.mistakes
    info = known_info(config.data)
    try:
        model = build_model(config.model, config.seed, info) if info else None
    except UserError as error:
        mistakes += error.mistakes
    if config.tracking.wandb == "online" and not has_wandb_key():
        mistakes.append("tracking.wandb=online needs a key: run wandb login, or set tracking.wandb=offline")
    if is_main() and not os.access(nearest_folder(Path(config.run.dir)), os.W_OK | os.X_OK):
        mistakes.append(f"run.dir={config.run.dir}: no permission to write there; give a folder that you own")
    if mistakes or plan is None:
        raise UserError(*mistakes)
    splits = load_splits(config.data, config.seed)
    return Setup(config, plan, splits, model or build_model(config.model, config.seed, splits.info))
