"""Run on every rank of a world by test_worlds.py: hashes of what exact mode computes, printed by the main rank as JSON.

Beside the code as it is, it runs three mutations of it, which the comparison of worlds has to notice.
"""

from __future__ import annotations

import json
import random
import sys

import pytest
import torch
from accelerate import Accelerator

from digitdist.checkpoint import weights_sha256
from digitdist.config import load_config
from digitdist.data import DATA_SETS, NullLossHistory, Order, Share, Splits, load_splits
from digitdist.data.randomness import permutation
from digitdist.distributed import check_equal, make_plan, run_command, start_accelerator
from digitdist.errors import Fault
from digitdist.models import build_model
from digitdist.sync import build_strategy
from digitdist.sync.tree import Tree

MNIST = DATA_SETS["mnist"]

Case = tuple[int, int, int, int, str, int]  # images, batch size, shards, accumulate, network, seed


def hash_of_steps(accelerator: Accelerator, splits: Splits, case: Case) -> str:
    """The gradients and buffers of some steps around the end of an epoch, with its short batch, as one hash."""
    num_images, batch_size, shards, accumulate, name, seed = case
    options = [f"sync.shards={shards}", f"train.accumulate={accumulate}", f"model.name={name}", f"seed={seed}"]
    config = load_config((), ["sync.mode=exact", "augment.rotate=10", "augment.shift=1.5", *options])
    model = build_model(config.model, config.seed, MNIST)
    strategy = build_strategy(config, accelerator, model, MNIST, NullLossHistory(), lambda *_: None)
    order, few = Order(num_images, batch_size, seed), splits.train.subset(torch.arange(num_images))
    found: dict[str, torch.Tensor] = {}
    for step in range(max(0, order.steps_per_epoch - 2), order.steps_per_epoch + 1):
        positions = next(order.global_batches(step, None, torch.device("cpu")))
        first, end = strategy.sharding.share(len(positions))
        batch = few.__getitems__(Share(positions[first:end]))
        found[f"{step}.stats"] = strategy.compute_gradients(batch, len(positions), step, stop=False)
        found |= {f"{step}.{name}": parameter.grad for name, parameter in model.named_parameters()}
        found |= {f"{step}.{name}": buffer.clone() for name, buffer in model.named_buffers()}
    return weights_sha256(found)


def cases() -> list[Case]:
    drawn = random.Random(7)
    return [
        (
            drawn.randint(1, 90),
            drawn.randint(1, 40),
            drawn.randint(4, 9),
            drawn.randint(1, 3),
            "cnn",
            drawn.randint(0, 9),
        )
        for _ in range(8)
    ] + [(150, 64, 8, 1, "cnn_batchnorm", 1), (40, 40, 5, 1, "cnn_batchnorm", 2), (70, 64, 8, 1, "columns", 3)]


def mutate(monkeypatch: pytest.MonkeyPatch, mutation: str, rank: int) -> None:
    if mutation == "seed":
        monkeypatch.setattr("digitdist.sync.loss.derive_seed", lambda *parts: hash((*parts, rank)) & 2**62 - 1)
    elif mutation == "order":
        monkeypatch.setattr("digitdist.data.order.permutation", lambda count, *parts: permutation(count, *parts, rank))
    elif mutation == "tree":
        monkeypatch.setattr(Tree, "add", add_regardless_of_position)


def add_regardless_of_position(tree: Tree, start: int, size: int, value: torch.Tensor) -> None:
    """Merges neighbours of equal size wherever they stand."""
    while tree.nodes and tree.nodes[-1][1] == size:
        start, _, left = tree.nodes.pop()
        value, size = left.add_(value), 2 * size
    tree.nodes.append((start, size, value))


def comparison_of(weights: dict[str, torch.Tensor]) -> str:
    try:
        check_equal(weights, step=5)
    except Fault as fault:
        return str(fault)
    return "equal"


def main() -> None:
    config = load_config((), [f"data.root={sys.argv[1]}", "sync.mode=exact"])
    accelerator = start_accelerator(config, make_plan(config))
    rank, splits = accelerator.process_index, load_splits(config.data, 0)
    results = {f"case {case}": hash_of_steps(accelerator, splits, case) for case in cases()}
    for mutation in ("seed", "order", "tree"):
        with pytest.MonkeyPatch.context() as patch:
            mutate(patch, mutation, rank)
            results[f"mutation {mutation}"] = hash_of_steps(accelerator, splits, (70, 30, 8, 1, "cnn", 0))
    same = {"a": torch.ones(3), "b": torch.zeros(2)}
    results["comparison equal"] = comparison_of(same)
    results["comparison different"] = comparison_of(same | {"b": torch.full((2,), float(rank == 1))})
    if accelerator.is_main_process:
        print(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
