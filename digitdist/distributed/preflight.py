"""Before the process group exists: all ranks meet in a store, and rank 0 compares what each says of itself.

A difference, a mistake of one rank or a rank that is missing ends all of them with the same message.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from digitdist.errors import NotJoined, UserError
from digitdist.world import World, read_world, restart_count, under_torchelastic

MOST_NAMED = 16  # ranks in one line
REFUSAL_TIMEOUT_S = 60.0  # for the other ranks to hear of a mistake

_calls = itertools.count()  # a program may train several times in the same processes
_stores: list[dist.Store] = []  # kept as long as this process lives: the process group meets in the same store


def run_preflight(world: World, fingerprint: dict[str, str], timeout_s: float, mistakes: Sequence[str] = ()) -> None:
    """Waits for every rank and compares their fingerprints, name to value. Collective: every rank must call it, before the
    process group is made, also one that has found `mistakes` of its own.

    Raises:
        NotJoined: a rank is missing after `timeout_s`, or whoever serves the store, the launcher or rank 0, has ended.
        UserError: the same on every rank: two have the same number, two differ in a value, or one has found a mistake.
    """
    if world.size == 1:
        return
    own = {"rank": world.rank, "host": platform.node(), "mistakes": mistakes, "WORLD_SIZE": str(world.size), **fingerprint}
    limit, address = timedelta(seconds=timeout_s), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # then one store serves all restarts
    serves, call = world.rank == 0 and not agent, next(_calls)
    joined = False
    try:
        _stores.append(dist.TCPStore(*address, None, serves, limit, wait_for_workers=False, multi_tenant=True))
        store = dist.PrefixStore(f"preflight {restart_count() if agent else 0}.{call}", _stores[0])
        store.set(f"fingerprint {store.add('fingerprints', 1)}", json.dumps(own))
        joined = True
        if world.rank == 0:
            problem = _compare(store, own, world, timeout_s)
            store.set("verdict", json.dumps([isinstance(problem, NotJoined), problem.mistakes if problem else ()]))
        store.wait(["verdict"], limit + timedelta(seconds=10))
        is_missing, mistakes = json.loads(store.get("verdict"))
    except dist.DistError as error:
        raise NotJoined(_no_answer(world, address, timeout_s, serves, joined, error)) from None
    if mistakes:
        _await_readers(store, world)
        raise (NotJoined if is_missing else UserError)(*mistakes)
    if call or (agent and restart_count()):
        _leave_used_store(store, world)


def raise_on_all_ranks(error: UserError) -> NoReturn:
    """Raises `error` on every rank. Collective: a rank without an error of its own is in `run_preflight`."""
    try:
        world = read_world()
    except UserError:
        raise error from None  # which says so
    with contextlib.suppress(NotJoined):  # which is no news beside its own mistake
        run_preflight(world, {}, REFUSAL_TIMEOUT_S, error.mistakes)
    raise error


def _leave_used_store(store: dist.Store, world: World) -> None:
    """Has restarted workers, or the same at their next training, form their process group in a new store, which rank 0 serves.

    In the old one they would now and then find the addresses of the group before, and wait for those.
    """
    if world.rank == 0:
        served = dist.TCPStore(os.environ["MASTER_ADDR"], 0, None, True, wait_for_workers=False, multi_tenant=True)
        _stores.append(served)
        store.set("port", str(served.port))
    os.environ |= {"MASTER_PORT": store.get("port").decode(), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _compare(store: dist.Store, own: dict[str, Any], world: World, timeout_s: float) -> UserError | None:
    """What is wrong with the fingerprints of all ranks, taken in the order in which they arrive; None if nothing is."""
    if own["mistakes"]:
        return UserError(*_mistakes_of(own, world))
    hosts: dict[int, str] = {}  # of each rank that has arrived
    deadline = time.monotonic() + timeout_s
    for number in itertools.count(1):
        try:
            store.wait([f"fingerprint {number}"], timedelta(seconds=max(0.01, deadline - time.monotonic())))
        except dist.DistError:
            return NotJoined(_missing_ranks(hosts, world, timeout_s))
        other = json.loads(store.get(f"fingerprint {number}"))
        rank, host = other["rank"], other["host"]
        differences = _mistakes_of(other, world) if other["mistakes"] else _differences(own, other)
        if differences:
            return UserError(*differences)
        if rank in hosts and not under_torchelastic():  # torchrun numbers ranks itself, anew at each rendezvous
            return UserError(
                f"two processes say that they are rank {rank}, on {hosts[rank]} and on {host}; give each host its own RANK"
            )
        hosts[rank] = host
        if len(hosts) == world.size:
            return None
    raise AssertionError


def _differences(own: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {own.get(name)} at rank 0 on {own['host']} and {other.get(name)} at rank {other['rank']} on"
        f" {other['host']}; it must be the same everywhere"
        for name in sorted((own.keys() | other.keys()) - {"rank", "host", "mistakes"})
        if own.get(name) != other.get(name)
    ]


def _mistakes_of(fingerprint: dict[str, Any], world: World) -> list[str]:
    """The mistakes of a rank, with its name where they may concern its host alone."""
    prefix = f"rank {fingerprint['rank']} on {fingerprint['host']}: " if world.several_hosts else ""
    return [prefix + mistake for mistake in fingerprint["mistakes"]]


def _missing_ranks(hosts: dict[int, str], world: World, timeout_s: float) -> str:
    missing = [rank for rank in range(world.size) if rank not in hosts]
    names = [f"rank {rank}" + (f" (of host {rank // world.local_size})" if world.several_hosts else "") for rank in missing]
    present = ", ".join(f"rank {rank} on {host}" for rank, host in sorted(hosts.items()))
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return (
        f"{', '.join(names[:MOST_NAMED])}{more} has not come within sync.join_timeout_s={timeout_s:g}; present: {present}:"
        " check that the missing ones were started and can reach MASTER_ADDR and MASTER_PORT"
    )


def _no_answer(world: World, address: tuple[str, int], timeout_s: float, serves: bool, joined: bool, error: Exception) -> str:
    """Why this rank has not reached rank 0, or has lost the store where it had `joined` the others."""
    if joined and isinstance(error, dist.DistNetworkError):
        where = f"{address[0]}:{address[1]}, where the ranks were meeting"
        return f"rank {world.rank} on {platform.node()}: {where}, has closed; start the run again"
    if serves and "EADDRINUSE" in str(error):
        return f"MASTER_PORT={address[1]} is taken on {platform.node()}; give a free port, the same on all hosts"
    return (
        f"rank {world.rank} on {platform.node()}: rank 0 has not answered at {address[0]}:{address[1]} within"
        f" sync.join_timeout_s={timeout_s:g}; check that its host was started, that this is its address, and that the"
        " firewall lets the port through"
    )


def _await_readers(store: dist.Store, world: World) -> None:
    """Has rank 0, which may serve the store, leave last."""
    with contextlib.suppress(dist.DistError):  # the others may be gone, or never come
        if world.rank:
            store.set(f"read {world.rank}", "")
        else:
            store.wait([f"read {rank}" for rank in range(1, world.size)], timedelta(seconds=5))
