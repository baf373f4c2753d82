"""Rendezvous of processes, and the ranks that are missing from it."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage], it is documented

from discovla.engine.lifecycle.peers import Peers, _format_ranks, find_peers
from tests.engine.launch import free_port


@pytest.fixture
def port(monkeypatch) -> int:
    """The port at which the processes of a test find each other."""
    number = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return number


def join(ranks: list[int], size: int, timeout: float, pause: float = 0) -> dict[int, Any]:
    """Start these ranks one after the other, each in a thread; return the peers or the error of each."""
    results: dict[int, Any] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = find_peers(rank, size, timeout)
        except (TimeoutError, ValueError) as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
        time.sleep(pause)
    for thread in threads:
        thread.join(30)
    return results


def test_every_rank_knows_all_ranks(port):
    for peers in join([2, 0, 1], 3, 20).values():
        assert isinstance(peers, Peers), peers
        assert [(peer.rank, peer.host, peer.pid) for peer in peers.members] == [
            (rank, socket.gethostname(), os.getpid()) for rank in range(3)
        ]


def test_present_ranks_name_the_missing_ones(port):
    errors = join([0, 1, 3], 6, 1)
    line = "expected 6 processes to join within 1 s, found 3: ranks 2, 4-5 missing"
    assert {rank: str(error) for rank, error in errors.items()} == dict.fromkeys((0, 1, 3), line)


def test_a_missing_rank_0_is_named_if_torchrun_listens_in_its_place(port, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    agent = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    errors = join([1, 2], 3, 1)
    line = "expected 3 processes to join within 1 s, found 2: rank 0 missing"
    assert {rank: str(error) for rank, error in errors.items()} == {1: line, 2: line}
    del agent


def test_restarted_processes_do_not_join_those_of_an_earlier_start(port, monkeypatch):
    """torchrun keeps its store, with the keys that earlier processes wrote."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    agent = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    stores = []
    for attempt, ranks in enumerate([[0, 1, 2], [0, 2], [1, 2, 0], [2, 1, 0]]):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        complete = len(ranks) == 3
        results = join(ranks, 3, 20 if complete else 1, pause=0.3)
        if not complete:
            assert ["rank 1 missing" in str(error) for error in results.values()] == [True, True]
            continue
        assert all(isinstance(peers, Peers) for peers in results.values()), results
        for rank in (0, 1, 2):
            results[rank].store.set(f"from {rank}", "")
        assert all(results[0].store.check([f"from {rank}"]) for rank in (0, 1, 2))
        results[0].store.set(f"only {attempt}", "")
        assert not any(store.check([f"only {attempt}"]) for store in stores), "seen by an earlier start"
        stores.append(results[0].store)
    assert len(stores) == 3
    del agent


def test_an_address_without_a_listener_is_named(port):
    (error,) = join([1], 2, 0.3).values()
    assert f"found no listener at 127.0.0.1:{port} (Connection refused): rank 0 missing" in str(error)


def test_a_port_in_use_is_one_line(port, monkeypatch):
    with socket.create_server(("127.0.0.1", port)):
        (error,) = join([0], 2, 0.3).values()
    assert str(error).startswith(f"MASTER_PORT: expected a free port at 127.0.0.1:{port}, found: ")
    assert "EADDRINUSE" in str(error) and "\n" not in str(error)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ValueError, match=f"MASTER_ADDR and MASTER_PORT, found no address and {port}"):
        find_peers(0, 2, 1)


def test_consecutive_ranks_are_named_as_spans():
    assert _format_ranks([3]) == "rank 3"
    assert _format_ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
