"""Which rank is named when none has answered: the one whose device, then whose host, is behind."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from digitdist.distributed import LEFT, NOTICED, RAISED, Heartbeat, failures, find_failed_rank, is_collective_failure
from digitdist.distributed.failures import has_failed
from digitdist.world import World


class LaggingEvent:
    """An event of a device that has done nothing yet of what a test does not allow."""

    allowed = 0
    recorded = 0

    def record(self) -> None:
        type(self).recorded += 1
        self.number = self.recorded

    def query(self) -> bool:
        return self.number <= self.allowed


@pytest.fixture(autouse=True)
def _no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "SEARCH_S", 0.1)


def ranks(tmp_path: Path, world_size: int, of_host: int | None = None, device: torch.device | None = None) -> list[Heartbeat]:
    return [
        Heartbeat(tmp_path / "beats", World(rank, world_size, rank, of_host or world_size), device)
        for rank in range(of_host or world_size)
    ]


def test_the_host_that_is_behind_is_named_once(tmp_path: Path):
    beats = ranks(tmp_path, 3)
    for rank, (step, phase) in enumerate([(7, "data"), (8, "forward"), (7, "sync")]):
        beats[rank].step = step
        beats[rank].phase(phase)
    found = [find_failed_rank(beat) for beat in beats]
    assert {failed.description for failed in found} == {"rank 2 did not answer, last seen at step 7, phase sync"}
    assert [failed.reported_here for failed in found] == [True, False, False]


def test_a_host_ahead_of_a_device_that_is_behind_does_not_save_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kinds = [type(f"Event{rank}", (LaggingEvent,), {}) for rank in range(3)]
    modules = iter([SimpleNamespace(Event=kind) for kind in kinds])
    monkeypatch.setattr(torch, "get_device_module", lambda device: next(modules))
    beats = ranks(tmp_path, 3, device=torch.device("cuda", 0))
    for rank, last_step in enumerate((20, 22, 21)):
        for step in range(1, last_step + 1):
            beats[rank].phase("data")
            beats[rank].step = step
            for phase in ("forward", "backward", "sync", "update"):
                beats[rank].phase(phase)
    for kind, allowed in zip(kinds, (36, 35, 36), strict=True):  # two marks a step: data and backward
        kind.allowed = allowed
    for beat in beats:
        beat.write_reached()
    assert [beat.reached[0] for beat in beats[0].beats()] == [18, 18, 18]
    assert find_failed_rank(beats[0]).description == "rank 1 did not answer, last seen at step 22, phase update"
    kinds[1].allowed = 40
    beats[1].write_reached()
    beats[1].phase("log")  # the main thread's writes keep what the device has reached
    assert [beat.reached[0] for beat in beats[0].beats()] == [18, 20, 18]
    assert "rank 0 did not answer" in find_failed_rank(beats[1]).description, "of two equal devices, the host behind"


def test_ranks_that_all_wait_at_one_place_blame_none_of_this_host(tmp_path: Path):
    for beats, whose in (
        (ranks(tmp_path, 4, of_host=2), "a rank of another host did not answer"),
        (ranks(tmp_path, 2), "the ranks"),
    ):
        for beat in beats:
            beat.step = 3
            beat.phase("sync")
        found = [find_failed_rank(beat) for beat in beats]
        assert all(failed.description.startswith(whose) for failed in found)
        assert [failed.reported_here for failed in found] == [True, False]


def test_a_rank_that_has_left_with_all_others_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    beats = ranks(tmp_path, 3)
    assert not any(map(has_failed, beats[0].beats()))
    for state, failed in ((LEFT, False), (NOTICED, True), (RAISED, True)):
        beats[1].mark(state)
        assert [has_failed(beat) for beat in beats[0].beats()] == [False, failed, False]
    pid = os.getpid()
    monkeypatch.setattr("os.getpid", lambda: 2**22 + 1)  # more than Linux gives
    beats[1].mark(LEFT)
    beats[2].phase("data")
    monkeypatch.setattr("os.getpid", lambda: pid)
    assert [has_failed(beat) for beat in beats[0].beats()] == [False, False, True]


LATE = "Application timeout caused pair closure"
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection closed by peer [127.0.0.1]:3507"


def raised_by(module: str, error: BaseException) -> BaseException:
    """`error` as it comes out of a function of that module."""
    names = {"__name__": module, "error": error}
    exec("def call(): raise error", names)
    with pytest.raises(type(error)) as caught:
        names["call"]()
    return caught.value


@pytest.mark.parametrize(
    ("module", "error", "is_anothers"),
    [
        ("torch.distributed.distributed_c10d", RuntimeError(GLOO), True),
        ("torch.autograd.graph", RuntimeError(GLOO), True),  # of a backward pass in which gradients are reduced
        ("torch.autograd.graph", RuntimeError(f"Got the following error when running the callback: {LATE}"), True),
        ("digitdist.sync.tree", RuntimeError("Gloo connectFullMesh failed with " + GLOO), True),
        ("digitdist.sync.tree", torch.distributed.DistBackendError("NCCL error"), True),
        ("torch.nn.modules.linear", RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        ("digitdist.data.reading", FileNotFoundError(2, "No such file or directory", "/home/igloo/digits"), False),
        ("digitdist.data.reading", RuntimeError("/home/gloo/data.cc: cut short"), False),
        ("mine", RuntimeError("gloo: I know that name"), False),
        ("mine", RuntimeError(GLOO), False),
        ("mine", torch.distributed.DistStoreError("of a store of my own"), False),
    ],
)
def test_another_ranks_failure_is_told_by_type_and_origin(module: str, error: BaseException, is_anothers: bool):
    assert is_collective_failure(raised_by(module, error)) == is_anothers
