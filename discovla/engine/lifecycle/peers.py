"""Rendezvous: the processes of a run find each other within a time limit or name the missing ranks."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage], it is documented

ACK_SECONDS = 5.0  # rank 0 waits this long for the others to read that ranks are missing
_POLL_SECONDS = 0.1
_LEADER = "discovla/leader"  # key of the prefix under which rank 0 keeps the keys of this start
_ROSTER, _ACKS = "roster", "acks"  # there: the registrations of all ranks, and how many ranks have read them


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One process of the run."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


@dataclass(frozen=True, kw_only=True)
class Peers:
    """All processes of a run, by rank, and a store that only they share."""

    store: Store
    members: list[Peer]


@dataclass(frozen=True, kw_only=True)
class _Registration:
    """This process's entry at rank 0; the random `token` tells it from processes of an earlier start."""

    rank: int
    size: int
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def record(self) -> list[Any]:
        return [self.host, self.pid, self.token]


_Roster = list[list[Any] | None]  # by rank: its record, None if it has not registered


def find_peers(rank: int, size: int, timeout: float) -> Peers:
    """Wait until all processes that a launcher started have registered.

    Rank 0 (or torchrun's agent) listens at MASTER_ADDR:MASTER_PORT.  Rank 0 collects the registrations under
    a random prefix of the store there and publishes the roster.  The prefix is new at every start, because
    torchrun keeps its store, with the keys of earlier processes, when it restarts them.  torch's own
    rendezvous waits half an hour and does not name missing ranks.

    Args:
        rank: of this process.
        size: number of processes, more than one.
        timeout: seconds to wait for all of them.

    Raises:
        TimeoutError: ranks are missing after `timeout`; names them.
        ValueError: no address from the launcher, or nothing can listen there.
    """
    host, port = _master_address()
    agent_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _connect(host, port, size, timeout, listens=rank == 0 and not agent_listens)
    own = _Registration(rank=rank, size=size)
    try:
        store.set(_arrival_key(rank), "")
        if rank == 0:
            run_store, roster = _collect(store, own, timeout)
        else:
            run_store, roster = _register(store, own, timeout)
    except dist.DistNetworkError:
        raise TimeoutError(f"rank 0 at {host}:{port} ended before all {size} processes had joined") from None
    missing = [rank for rank, record in enumerate(roster) if record is None]
    if missing:
        raise TimeoutError(
            f"expected {size} processes to join within {timeout:g} s, "
            f"found {size - len(missing)}: {_format_ranks(missing)} missing"
        )
    members = [Peer(rank=r, host=record[0], pid=record[1]) for r, record in enumerate(roster) if record]
    return Peers(store=run_store, members=members)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll a condition, at least once; return False if it does not hold within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _collect(store: Store, own: _Registration, timeout: float) -> tuple[Store, _Roster]:
    """Rank 0: collect all registrations and publish the roster."""
    run_store = _prefixed(store, own.token)
    roster: _Roster = [own.record, *[None] * (own.size - 1)]

    def complete() -> bool:
        for rank, record in enumerate(roster):
            if record is None and run_store.check([_record_key(rank)]):
                roster[rank] = json.loads(run_store.get(_record_key(rank)))
        return None not in roster

    store.set(_LEADER, own.token)
    all_joined = wait_until(complete, timeout)
    run_store.set(_ROSTER, json.dumps(roster))
    if not all_joined:  # the store may end with this process: let the others read the roster first
        others = own.size - roster.count(None) - 1
        wait_until(lambda: run_store.add(_ACKS, 0) >= others, ACK_SECONDS)
    return run_store, roster


def _register(store: Store, own: _Registration, timeout: float) -> tuple[Store, _Roster]:
    """Other ranks: register at rank 0 and wait for a roster that holds this process."""
    prefixes: dict[str, Store] = {}
    answers: list[tuple[Store, _Roster]] = []

    def answered() -> bool:
        if not store.check([_LEADER]):
            return False
        prefix = store.get(_LEADER).decode()
        if prefix not in prefixes:  # the first may be that of processes before a restart
            prefixes[prefix] = _prefixed(store, prefix)
            prefixes[prefix].set(_record_key(own.rank), json.dumps(own.record))
        run_store = prefixes[prefix]
        if not run_store.check([_ROSTER]):
            return False
        roster: _Roster = json.loads(run_store.get(_ROSTER))
        if roster[own.rank] != own.record:
            return False
        run_store.add(_ACKS, 1)
        answers.append((run_store, roster))
        return True

    if wait_until(answered, timeout + ACK_SECONDS):
        return answers[0]
    # without an answer rank 0 counts as missing unless another rank has not even arrived
    arrived: _Roster = [own.record if store.check([_arrival_key(rank)]) else None for rank in range(own.size)]
    return store, arrived if None in arrived else [None, *arrived[1:]]


def _prefixed(store: Store, prefix: str) -> Store:
    prefix_store = dist.PrefixStore  # pyright: ignore[reportPrivateImportUsage], it is documented
    return prefix_store(f"discovla/{prefix}", store)


def _record_key(rank: int) -> str:
    return f"record/{rank}"


def _arrival_key(rank: int) -> str:
    """Key that a rank sets once it reaches the store, one for each restart by torchrun."""
    return f"discovla/arrived/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{rank}"


def _format_ranks(ranks: list[int]) -> str:
    """Format as `rank 2` or `ranks 2, 8-15`."""
    runs = [[r for _, r in group] for _, group in groupby(enumerate(ranks), lambda item: item[1] - item[0])]
    spans = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {spans}"


def _master_address() -> tuple[str, int]:
    """Read the rendezvous address from the launcher's variables."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise ValueError(
            "expected a launcher's MASTER_ADDR and MASTER_PORT, found "
            f"{host or 'no address'} and {port or 'no port'}"
        )
    return host, int(port)


def _connect(host: str, port: int, size: int, timeout: float, *, listens: bool) -> Store:
    """Open the store at the address, as its server if `listens`, else once its server answers."""
    refusals: list[str] = []
    if not listens and not wait_until(lambda: _accepts(host, port, refusals), timeout):
        raise TimeoutError(
            f"expected {size} processes to join within {timeout:g} s, found no listener at {host}:{port} "
            f"({refusals[-1]}): rank 0 missing"
        )
    try:
        store_timeout = timedelta(seconds=max(timeout, ACK_SECONDS))
        tcp_store = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage], it is documented
        return tcp_store(host, port, size, listens, store_timeout, wait_for_workers=False, multi_tenant=True)
    except dist.DistNetworkError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"MASTER_PORT: expected a free port at {host}:{port}, found: {reason}") from None


def _accepts(host: str, port: int, refusals: list[str]) -> bool:
    """Return True if the port accepts connections; torch itself would log every failed attempt at length."""
    try:
        socket.create_connection((host, port), timeout=1.0).close()
        return True
    except OSError as error:
        refusals.append(error.strerror or str(error))
        return False
