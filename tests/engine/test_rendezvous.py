"""Processes that come together, and those that do not."""

from __future__ import annotations

import os
import socket
import threading

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage], it is documented

from discovla.engine.rendezvous import Met, _ranks, meet
from tests.engine.launch import free_port


@pytest.fixture
def port(monkeypatch) -> int:
    """Where processes of a test meet."""
    found = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(found))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return found


def met(ranks: list[int], size: int, within: float) -> dict[int, Met | Exception]:
    """What comes of each of these ranks, each in a thread."""
    found: dict[int, Met | Exception] = {}

    def come(rank: int) -> None:
        try:
            found[rank] = meet(rank, size, within)
        except (TimeoutError, ValueError) as error:
            found[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_all_know_all(port):
    found = met([2, 0, 1], 3, 20)
    for one in found.values():
        assert isinstance(one, Met), one
        assert [(p.rank, p.host, p.pid) for p in one.everyone] == [
            (rank, socket.gethostname(), os.getpid()) for rank in range(3)
        ]
        assert one.store.check(["discovla/said"])


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
