"""What is told where ranks do not come to agree."""

from __future__ import annotations

import socket
import threading

import pytest
import torch.distributed as dist

from digitdist.distributed import preflight, raise_on_all_ranks
from digitdist.errors import NotJoined, UserError


@pytest.mark.parametrize("rank", [0, 1])
def test_a_ranks_own_mistake_is_what_it_tells_where_no_other_comes(monkeypatch: pytest.MonkeyPatch, rank: int):
    """And not that it has waited for them in vain, by a limit that nobody has set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in world.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(preflight, "REFUSAL_TIMEOUT_S", 1.0)
    monkeypatch.setattr(preflight, "_stores", [])
    with pytest.raises(UserError) as caught:
        raise_on_all_ranks(UserError("optim.lr=-1 is not allowed"))
    assert caught.value.mistakes == ("optim.lr=-1 is not allowed",)


def test_a_launcher_that_ends_while_ranks_meet_is_told_as_that(monkeypatch: pytest.MonkeyPatch):
    """And not as one that has never answered."""
    served = [dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": served[0].port, "TORCHELASTIC_USE_AGENT_STORE": True}
    for name, value in world.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(preflight, "_stores", [])
    threading.Timer(1, served.clear).start()
    with pytest.raises(NotJoined, match=rf"rank 1 on .*: 127.0.0.1:{world['MASTER_PORT']}, where the ranks .*, has closed"):
        preflight.run_preflight(preflight.World(1, 2, 1, 2), {}, 60)


def test_of_many_ranks_that_are_missing_a_few_are_named():
    text = preflight._missing_ranks({0: "h0"}, preflight.World(0, 2**20, 0, 2**20), 5)
    assert len(text) < 1000
    assert "rank 1, rank 2" in text
    assert f"and {2**20 - 1 - preflight.MOST_NAMED} more" in text
