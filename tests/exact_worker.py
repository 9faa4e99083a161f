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

from digitdist import models, sync
from digitdist.checkpoint import weights_sha256
from digitdist.config import load
from digitdist.data import ImageSet, Order, load_splits, permutation
from digitdist.runtime import Fault, run_command

torch.use_deterministic_algorithms(True)
accelerator = Accelerator(cpu=True)
torch.set_num_threads(1)  # after Accelerate, which sets its own
rank = accelerator.process_index
splits = load_splits(load((), [f"data.root={sys.argv[1]}"]).data, 0)


def hash_of_steps(images: int, batch: int, shards: int, accumulate: int, model_name: str, seed: int) -> str:
    """Two epochs' ends and beginnings: the gradients and buffers of some steps around a tail batch, as one hash."""
    options = [f"sync.shards={shards}", f"train.accumulate={accumulate}", f"model.name={model_name}", f"seed={seed}"]
    config = load((), ["sync.mode=exact", "augment.rotate=10", "augment.shift=1.5", *options])
    model = models.build(config.model, config.seed)
    how = sync.build(config, accelerator, model, lambda *_: None)
    order, few = Order(images, batch, seed), ImageSet(splits.train.images[:images], splits.train.labels[:images])
    found: dict[str, torch.Tensor] = {}
    for step in range(max(0, order.steps_per_epoch - 2), order.steps_per_epoch + 1):
        share = next(iter(order.batches(few, step, how.sharding)))
        found[f"{step}.told"] = how.gradients(share, order.batch_count(step), step, stop=False)
        found |= {f"{step}.{name}": parameter.grad for name, parameter in model.named_parameters()}
        found |= {f"{step}.{name}": buffer.clone() for name, buffer in model.named_buffers()}
    return weights_sha256(found)


def cases() -> list[tuple[int, int, int, int, str, int]]:
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


def mutated(monkeypatch: pytest.MonkeyPatch, mutation: str) -> str:
    if mutation == "seed":
        monkeypatch.setattr(sync, "key_of", lambda *parts: hash((*parts, rank)) & 2**62 - 1)
    elif mutation == "order":
        monkeypatch.setattr("digitdist.data.permutation", lambda count, *parts: permutation(count, *parts, rank))
    elif mutation == "tree":
        monkeypatch.setattr(sync.Tree, "add", add_regardless_of_place)
    with monkeypatch.context():
        return hash_of_steps(70, 30, 8, 1, "cnn", 0)


def add_regardless_of_place(tree: sync.Tree, start: int, size: int, value: torch.Tensor) -> None:
    """Merges neighbours of equal size wherever they stand."""
    while tree.nodes and tree.nodes[-1][1] == size:
        start, _, left = tree.nodes.pop()
        value, size = left.add_(value), 2 * size
    tree.nodes.append((start, size, value))


def sentinel(weights: dict[str, torch.Tensor]) -> str:
    try:
        sync.check_equal(weights, step=5)
    except Fault as fault:
        return str(fault)
    return "equal"


def main() -> None:
    results = {f"case {case}": hash_of_steps(*case) for case in cases()}
    for name in ("seed", "order", "tree"):
        with pytest.MonkeyPatch.context() as patch:
            results[f"mutation {name}"] = mutated(patch, name)
    same = {"a": torch.ones(3), "b": torch.zeros(2)}
    results["sentinel equal"] = sentinel(same)
    results["sentinel different"] = sentinel(same | {"b": torch.full((2,), float(rank == 1))})
    if accelerator.is_main_process:
        print(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
