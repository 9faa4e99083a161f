"""Several processes on one host: the strategies, beside bare loops that synchronise once a step."""

from __future__ import annotations

import json
from functools import partial

from accelerate.utils import gather_object

from digitdist.bench.launching import launch
from digitdist.bench.loops import Loop, Rates, Variant, bare_loop, in_turn, trainer_loop
from digitdist.bench.one_process import TURN_S
from digitdist.distributed import start_accelerator
from digitdist.train import prepare

SYNCHRONISING = "bare loops, a one-number all-reduce each step"
ONE_SHARD_A_RANK = "exact, one shard a rank"


def measure_as_rank(overrides: list[str], repeats: int) -> Rates:
    """What the processes of this world do together. Collective: every rank must call it."""
    setup = prepare([], overrides)
    world = setup.plan.world
    accelerator = start_accelerator(setup.config, setup.plan)
    share = -(-setup.config.data.batch_size // world.size)
    num_weights = sum(p.numel() for p in setup.model.parameters())
    variants = {
        f"{world.size} bare loops": Variant(batch_size=share),
        SYNCHRONISING: Variant(batch_size=share, all_reduce=1),
        "bare loops, gradient-sized all-reduce": Variant(batch_size=share, all_reduce=num_weights),
    }
    single = {name: bare_loop(setup, accelerator, variant) for name, variant in variants.items()}

    def together(loop: Loop, steps: int) -> float:
        accelerator.wait_for_everyone()
        return world.size * min(gather_object([loop(steps)]))

    loops: dict[str, Loop] = {name: partial(together, loop) for name, loop in single.items()}
    loops["ddp"] = partial(trainer_loop, [*overrides, "sync.mode=ddp"], [])
    loops["exact"] = partial(trainer_loop, [*overrides, "sync.mode=exact"], [])
    loops[ONE_SHARD_A_RANK] = partial(trainer_loop, [*overrides, "sync.mode=exact", f"sync.shards={world.size}"], [])
    slowest = min(gather_object([single[f"{world.size} bare loops"](5)]))
    steps = max(5, round(TURN_S * slowest / share))
    return in_turn(loops, dict.fromkeys(loops, steps), repeats)


def measure_world(world_size: int, overrides: list[str], repeats: int) -> Rates:
    """`measure_as_rank` on `world_size` processes, through torchrun.

    Raises:
        Fault: they failed; the message says why.
    """
    output = launch(["-m", "digitdist.bench", "--rank", "--repeats", str(repeats), *overrides], world_size)
    return json.loads(output.splitlines()[-1])
