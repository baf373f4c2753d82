"""How the processes of a run come together: within a time, or those that came say which did not."""

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

LINGER = 5.0  # seconds that the first process leaves the others to hear that somebody did not come
_PAUSE = 0.1  # between two looks
_FIRST = "discovla/first"  # key of the room in which the first process waits for the others
_SAID, _HEARD = "said", "heard"  # there: what it says to all, and how many of those that came know


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Who a rank is, for messages."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


@dataclass(frozen=True, kw_only=True)
class Peers:
    """All processes of a run, by rank, and the store that they share with no others."""

    store: Store
    everyone: list[Peer]


@dataclass(frozen=True, kw_only=True)
class _Guest:
    """This process as the others see it; `token` is its own alone."""

    rank: int
    size: int
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def card(self) -> list[Any]:
        return [self.host, self.pid, self.token]


# of each rank its host, process and token; None for one that did not come
_Cards = list[list[Any] | None]


def meet(rank: int, size: int, within: float) -> Peers:
    """Wait until all processes that a launcher started are there.

    They find each other at MASTER_ADDR and MASTER_PORT, where the first one listens, or torchrun does for it.
    The first one opens a room of its own in the store there, waits for all and then tells all; torch itself
    would wait for half an hour, and then not say who is missing.  Torchrun keeps its store when it starts the
    processes again: what those before them left in other rooms counts for nothing.

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
    me = _Guest(rank=rank, size=size)
    try:
        store.set(_came(rank), "")
        room, cards = _say(store, me, within) if rank == 0 else _hear(store, me, within)
    except dist.DistNetworkError:
        raise TimeoutError(f"rank 0 at {host}:{port} ended before all {size} processes had come") from None
    missing = [r for r, card in enumerate(cards) if card is None]
    if missing:
        raise TimeoutError(
            f"expected {size} processes to come together within {within:g} s, "
            f"found {size - len(missing)} of them: {_ranks(missing)} did not come"
        )
    everyone = [Peer(rank=r, host=card[0], pid=card[1]) for r, card in enumerate(cards) if card]
    return Peers(store=room, everyone=everyone)


def until(there: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition comes true in that time; it is looked at once at least."""
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True


def _say(store: Store, me: _Guest, within: float) -> tuple[Store, _Cards]:
    """The first process waits for all, and tells all who has come."""
    room = _room(me.token, store)
    cards: _Cards = [me.card, *[None] * (me.size - 1)]

    def complete() -> bool:
        for rank in (r for r, card in enumerate(cards) if card is None):
            if room.check([_card(rank)]):
                cards[rank] = json.loads(room.get(_card(rank)))
        return None not in cards

    store.set(_FIRST, me.token)
    all_came = until(complete, within)
    room.set(_SAID, json.dumps(cards))
    if not all_came:
        others = me.size - cards.count(None) - 1
        until(lambda: room.add(_HEARD, 0) >= others, LINGER)  # with this process the store may end
    return room, cards


def _hear(store: Store, me: _Guest, within: float) -> tuple[Store, _Cards]:
    """The others leave their card in its room and wait for what it says of them."""
    rooms: dict[str, Store] = {}
    said: list[tuple[Store, _Cards]] = []

    def heard() -> bool:
        if not store.check([_FIRST]):
            return False
        name = store.get(_FIRST).decode()
        if name not in rooms:  # one may be left of those that torchrun started before
            rooms[name] = _room(name, store)
            rooms[name].set(_card(me.rank), json.dumps(me.card))
        room = rooms[name]
        if not room.check([_SAID]):
            return False
        cards: _Cards = json.loads(room.get(_SAID))
        if cards[me.rank] != me.card:
            return False
        room.add(_HEARD, 1)
        said.append((room, cards))
        return True

    if until(heard, within + LINGER):
        return said[0]
    there: _Cards = [me.card if store.check([_came(rank)]) else None for rank in range(me.size)]
    return store, there if None in there else [None, *there[1:]]


def _room(name: str, store: Store) -> Store:
    rooms = dist.PrefixStore  # pyright: ignore[reportPrivateImportUsage], it is documented
    return rooms(f"discovla/{name}", store)


def _card(rank: int) -> str:
    return f"card/{rank}"


def _came(rank: int) -> str:
    """Key that says no more than that a rank has come, at all or since torchrun started all again."""
    return f"discovla/came/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{rank}"


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
