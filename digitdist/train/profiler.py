"""A profile of some steps, as a trace that Perfetto and Chrome open."""

from __future__ import annotations

from pathlib import Path

import torch

WARMUP_STEPS = 3


class NullProfiler:
    """Stands in where nothing is profiled."""

    def step(self) -> None:
        pass

    def stop(self) -> None:
        pass


def start_profiler(steps: int, device: torch.device, folder: Path) -> torch.profiler.profile | NullProfiler:
    """Profiles `steps` steps after a warm-up, into ``trace.json`` in `folder`; nothing for 0."""
    if not steps:
        return NullProfiler()
    kinds = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(
        activities={kinds.CPU, getattr(kinds, device.type.upper(), kinds.CPU)},
        schedule=torch.profiler.schedule(wait=0, warmup=WARMUP_STEPS, active=steps, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(str(folder / "trace.json")),
    )
    profiler.start()
    return profiler
