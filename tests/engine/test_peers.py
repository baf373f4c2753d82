"""Processes that come together, and those that do not."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage], it is documented

from discovla.engine.lifecycle.peers import Peers, _ranks, meet
from tests.engine.launch import free_port


@pytest.fixture
def port(monkeypatch) -> int:
    """Where processes of a test meet."""
    found = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(found))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return found


def met(ranks: list[int], size: int, within: float, pause: float = 0) -> dict[int, Any]:
    """What comes of each of these ranks, each in a thread; they start one after the other."""
    found: dict[int, Any] = {}

    def come(rank: int) -> None:
        try:
            found[rank] = meet(rank, size, within)
        except (TimeoutError, ValueError) as error:
            found[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
        time.sleep(pause)
    for thread in threads:
        thread.join(30)
    return found


def test_all_know_all(port):
    found = met([2, 0, 1], 3, 20)
    for one in found.values():
        assert isinstance(one, Peers), one
        assert [(p.rank, p.host, p.pid) for p in one.everyone] == [
            (rank, socket.gethostname(), os.getpid()) for rank in range(3)
        ]


def test_those_that_came_say_who_did_not(port):
    found = met([0, 1, 3], 6, 1)
    line = "expected 6 processes to come together within 1 s, found 3 of them: ranks 2, 4-5 did not come"
    assert {rank: str(error) for rank, error in found.items()} == dict.fromkeys((0, 1, 3), line)


def test_the_first_is_named_where_torchrun_listens_for_it(port, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    agent = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    found = met([1, 2], 3, 1)
    line = "expected 3 processes to come together within 1 s, found 2 of them: rank 0 did not come"
    assert {rank: str(error) for rank, error in found.items()} == {1: line, 2: line}
    del agent


def test_those_that_are_started_again_do_not_meet_those_of_before(port, monkeypatch):
    """torchrun keeps its store, and what the processes of before wrote there."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    agent = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    stores = []
    for attempt, (ranks, comes) in enumerate([([0, 1, 2], 3), ([0, 2], 2), ([1, 2, 0], 3), ([2, 1, 0], 3)]):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        found = met(ranks, 3, 1 if comes < 3 else 20, pause=0.3)
        if comes == 3:
            assert all(isinstance(one, Peers) for one in found.values()), found
            for rank in (0, 1, 2):
                found[rank].store.set(f"from {rank}", "")
            assert all(found[0].store.check([f"from {rank}"]) for rank in (0, 1, 2))
            found[0].store.set(f"only {attempt}", "")
            stores.append(found[0].store)
            for store in stores[:-1]:  # what one attempt writes is not seen in another
                assert not store.check([f"only {attempt}"])
        else:
            assert ["rank 1 did not come" in str(one) for one in found.values()] == [True, True]
    assert len(stores) == 3
    del agent


def test_nobody_at_the_address_is_told_with_it(port):
    (error,) = met([1], 2, 0.3).values()
    assert f"nobody who listens at 127.0.0.1:{port} (Connection refused): rank 0 did not come" in str(error)


def test_an_address_where_nothing_can_listen_is_one_line(port, monkeypatch):
    with socket.create_server(("127.0.0.1", port)):
        (error,) = met([0], 2, 0.3).values()
    assert str(error).startswith(f"MASTER_PORT: expected a meeting at 127.0.0.1:{port}, found: ")
    assert "EADDRINUSE" in str(error) and "\n" not in str(error)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ValueError, match=f"MASTER_ADDR and MASTER_PORT, found no address and {port}"):
        meet(0, 2, 1)


def test_many_ranks_are_named_shortly():
    assert _ranks([3]) == "rank 3"
    assert _ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
