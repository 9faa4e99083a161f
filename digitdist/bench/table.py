"""The measurements as text."""

from __future__ import annotations

import statistics
from typing import Any

from digitdist.bench.loops import OF_EVALUATION, Rates
from digitdist.bench.one_process import BARE, INDEXED, LOADED, ONE_IMAGE, PLAIN
from digitdist.bench.peer_turns import FAST, ONE_EPOCH, OURS
from digitdist.bench.worlds import SYNCHRONISING


def table(one: dict[str, Any], world_size: int, world: Rates) -> str:
    """The whole measurement, and what it says of this machine."""
    rates: Rates = one["images_per_second"]
    lines = [one["setting"], "", "one process, and its ratio to the bare loop"]
    lines += _rows({name: rates[name] for name in (BARE, INDEXED, LOADED, "trainer", PLAIN)}, BARE)
    lines += _rows({name: rates[name] for name in OF_EVALUATION}, OF_EVALUATION[0])
    lines += [""]
    for name, values in one["start_up"].items():
        lines.append(f"  {name:38} {statistics.median(values['s']):10.2f} s   peak {statistics.median(values['mb']):.0f} MB")
    phases = one["phases"]
    shares = {name: s / phases["total"] for name, s in phases.items() if name != "total" and s / phases["total"] > 0.005}
    parts = ", ".join(f"{name} {100 * share:.0f} %" for name, share in sorted(shares.items(), key=lambda item: -item[1]))
    lines += [f"  {'a step of the trainer':38} {parts}"]
    if world:
        lines += ["", f"{world_size} processes, and their ratio to bare loops that synchronise one number each step"]
        lines += _rows(world, SYNCHRONISING)
        passes, cost = -(-one["shards"] // world_size), 1e3 / statistics.median(rates[ONE_IMAGE])
        lines.append(f"  in exact mode a rank runs {passes} shards one by one; a step of a single image takes {cost:.2f} ms")
    lines += ["", "what would help", *_verdicts(rates, world_size, world)]
    most = max(shares, key=lambda name: shares[name])
    lines.append(f"this machine is limited by {most}: {100 * shares[most]:.0f} % of a step")
    return "\n".join(lines)


def _rows(rates: Rates, base: str) -> list[str]:
    """Each loop's median images a second, and its ratio to `base` in the same turn: median, least and greatest."""
    lines = []
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates[base], strict=True)]
        lines.append(f"  {name:46} {statistics.median(values):>10,.0f} images/s  {_spread(ratios)}")
    return lines


def _verdicts(rates: Rates, world_size: int, world: Rates) -> list[str]:
    """Whether other settings would be faster than the bare loop as configured."""
    known = {ONE_IMAGE, BARE, INDEXED, LOADED, "trainer", PLAIN, *OF_EVALUATION}
    median = {name: statistics.median(values) for name, values in rates.items()}
    gains = {name: value / median[BARE] for name, value in median.items() if name not in known}
    if world:
        gains[f"{world_size} processes (ddp, beside the trainer)"] = statistics.median(world["ddp"]) / median["trainer"]
    lines = []
    for name, gain in sorted(gains.items(), key=lambda item: -item[1]):
        verdict = "helps" if gain > 1.05 else "does not help" if gain > 0.95 else "costs"
        lines.append(f"  {name:44} {gain:5.2f} of the speed: {verdict}")
    return lines


def peers_table(measured: dict[str, Any]) -> str:
    """What `measure_peers` has measured: seconds, and how many times those of the trainer, or of `fast`, of the same turn."""
    setting = measured["setting"]
    images, size = setting["steps"] * setting["batch_size"], setting["batch_size"]
    device = ", ".join(filter(None, (setting["device"], setting["instructions"])))
    turns = len(measured["recipes"][FAST])
    lines = [
        f"{setting['model']}, {images:,} images in batches of {size}, fp32, {device}",
        f"median, least and greatest of {turns} turn{'' if turns == 1 else 's'}",
    ]
    for world, loops in measured["epochs"].items():
        processes = "1 process" if world == "1" else f"{world} processes"
        threads = setting["threads"][world]
        of = f"{threads} thread{'' if threads == 1 else 's'}{'' if world == '1' else ' each'}"
        lines += ["", f"{processes} of {of}: seconds, and times those of {OURS}"]
        seconds = {name: [one["seconds"] for one in values] for name, values in loops.items()}
        lines += [f"  {name:18} {_times(values, seconds[OURS])}" for name, values in seconds.items()]
    fast = measured["recipes"][FAST]
    lines += ["", f"to 99.0 % of the test images, on one process: seconds, times those of {FAST}, and mean accuracy"]
    for name in (ONE_EPOCH, FAST):
        values = measured["recipes"][name]
        accuracy = statistics.mean(one["accuracy"] for one in values)
        precision = values[0].get("precision", "fp32")
        label = name if precision == "fp32" else f"{name} in {precision}"
        seconds_of = _times([one["seconds"] for one in values], [one["seconds"] for one in fast])
        lines.append(f"  {label:18} {seconds_of}   {100 * accuracy:.2f} %{'' if accuracy >= 0.99 else ': not reached'}")
    return "\n".join(lines)


def _times(seconds: list[float], base: list[float]) -> str:
    """Median, least and greatest of seconds, and of their ratios to those of `base` in the same turn."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    return f"{_spread(seconds)} s   {_spread(ratios)}"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):6.2f} ({min(values):.2f} to {max(values):.2f})"
