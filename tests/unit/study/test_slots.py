from __future__ import annotations

import pytest

from digitdist.config import load_config
from digitdist.study import Slot, make_slots, slots


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "num_cores", lambda quota: 4)
    monkeypatch.setattr(slots, "planned_device", lambda: "cpu")


@pytest.mark.parametrize(
    ("jobs", "options", "runs", "count", "threads"),
    [
        (None, (), 20, 4, 1),
        (2, (), 20, 2, 2),
        (1, (), 20, 1, 4),
        (None, (), 3, 3, 1),
        (None, (), 1, 1, 1),
        (2, (), 1, 1, 2),
        (8, (), 20, 8, 1),
        (None, ("train.threads=2",), 20, 2, None),
        (None, ("sync.mode=exact",), 20, 4, None),
        (1, ("sync.mode=exact",), 20, 1, None),
    ],
)
def test_runs_share_the_cores(jobs: int | None, options: tuple[str, ...], runs: int, count: int, threads: int | None):
    assert make_slots(jobs, load_config((), options), runs) == [Slot({}, threads)] * count


@pytest.mark.parametrize(
    ("visible", "jobs", "found"),
    [
        (None, None, ["0", "1"]),
        ("5,GPU-ab", None, ["5", "GPU-ab"]),
        ("5,GPU-ab", 3, ["5", "GPU-ab", "5"]),
        ("5,GPU-ab", 1, ["5"]),
    ],
)
def test_each_run_sees_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, jobs: int | None, found: list[str]
):
    monkeypatch.setattr(slots, "planned_device", lambda: "cuda")
    monkeypatch.setattr(slots.torch.accelerator, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    places = make_slots(jobs, load_config(), 20)
    assert [place.environment for place in places] == [{"CUDA_VISIBLE_DEVICES": name} for name in found]
