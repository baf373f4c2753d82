"""How the processes of a run come together: within a time, or those that came say which did not."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby

import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage], it is documented

LINGER = 5.0  # seconds that the first process leaves the others to hear that somebody did not come
_PAUSE = 0.1  # between two looks
_SAID = "discovla/said"  # key of what the first process says to all
_HEARD = "discovla/heard"


@dataclass(frozen=True, kw_only=True)
class Process:
    """Who a rank is, for messages."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


@dataclass(frozen=True, kw_only=True)
class Met:
    """All processes of a run, by rank, and the store that they share."""

    store: Store
    everyone: list[Process]


def meet(rank: int, size: int, within: float) -> Met:
    """Wait until all processes that a launcher started are there.

    They find each other at MASTER_ADDR and MASTER_PORT, where the first one listens, or torchrun does for it.
    The first one waits for all and then tells all; torch itself would wait for half an hour, and then not say
    who is missing.

    Args:
        rank: of this process.
        size: processes, more than one.
        within: seconds for all to come.

    Raises:
        TimeoutError: not all have come in that time; names how many did and which ranks did not.
        ValueError: the launcher gave no address, or nothing can listen there.
    """
    host, port = _address()
    store = _store(host, port, size, within, listens=rank == 0 and not _torchrun_listens())
    try:
        store.set(_key(rank), json.dumps([socket.gethostname(), os.getpid()]))
        missing, everyone = _say(store, size, within) if rank == 0 else _hear(store, size, within)
    except dist.DistNetworkError:
        raise TimeoutError(f"rank 0 at {host}:{port} ended before all {size} processes had come") from None
    if missing:
        raise TimeoutError(
            f"expected {size} processes to come together within {within:g} s, "
            f"found {size - len(missing)} of them: {_ranks(missing)} did not come"
        )
    names = [Process(rank=r, host=name, pid=pid) for r, (name, pid) in enumerate(everyone)]
    return Met(store=store, everyone=names)


def until(there: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition comes true in that time; it is looked at once at least."""
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True


def _say(store: Store, size: int, within: float) -> tuple[list[int], list[tuple[str, int]]]:
    """The first process waits for all, and tells all who is missing and who everyone is."""
    missing = set(range(size))

    def complete() -> bool:
        missing.difference_update([r for r in missing if store.check([_key(r)])])
        return not missing

    everyone = []
    if until(complete, within):
        everyone = [json.loads(told) for told in store.multi_get([_key(r) for r in range(size)])]
    found = sorted(missing), everyone
    store.set(_SAID, json.dumps(found))
    if missing:  # with this process the store ends
        until(lambda: store.add(_HEARD, 0) >= size - len(missing) - 1, LINGER)
    return found


def _hear(store: Store, size: int, within: float) -> tuple[list[int], list[tuple[str, int]]]:
    """The others wait for what it says, or see for themselves who is missing where that is the first."""
    if until(lambda: store.check([_key(0)]), within) and until(lambda: store.check([_SAID]), within + LINGER):
        missing, everyone = json.loads(store.get(_SAID))
        store.add(_HEARD, 1)
        return missing, everyone
    return [r for r in range(size) if not store.check([_key(r)])] or [0], []


def _key(rank: int) -> str:
    return f"discovla/rank/{rank}"


def _ranks(missing: list[int]) -> str:
    """`rank 2`, or `ranks 2, 8-15`."""
    runs = [[r for _, r in group] for _, group in groupby(enumerate(missing), lambda item: item[1] - item[0])]
    told = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(missing) > 1 else ''} {told}"


def _address() -> tuple[str, int]:
    """Where the processes meet, by the launcher's variables."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        found = f"{host or 'no address'} and {port or 'no port'}"
        raise ValueError(f"expected a launcher's MASTER_ADDR and MASTER_PORT, found {found}")
    return host, int(port)


def _torchrun_listens() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(host: str, port: int, size: int, within: float, *, listens: bool) -> Store:
    """The store of all processes, once somebody listens there."""
    why: list[str] = []
    if not listens and not until(lambda: _answers(host, port, why), within):
        raise TimeoutError(
            f"expected {size} processes to come together within {within:g} s, found nobody who listens at "
            f"{host}:{port} ({why[-1]}): rank 0 did not come"
        )
    try:
        wait = timedelta(seconds=max(within, LINGER))
        tcp = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage], it is documented
        return tcp(host, port, size, listens, wait, wait_for_workers=False, multi_tenant=True)
    except dist.DistNetworkError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"MASTER_PORT: expected a meeting at {host}:{port}, found: {reason}") from None


def _answers(host: str, port: int, why: list[str]) -> bool:
    """Whether somebody listens there; torch's own attempts would write pages about each that fails."""
    try:
        socket.create_connection((host, port), timeout=1.0).close()
        return True
    except OSError as error:
        why.append(error.strerror or str(error))
        return False
