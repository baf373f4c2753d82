"""Batches on their way from reader processes: full shared memory, suspended processes, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.utils.data

from discovla.data import transfer
from discovla.data.loader import _init_worker
from discovla.data.transfer import ReadAhead, check_shared_memory, wait_for_batches
from discovla.errors import one_line

pytestmark = pytest.mark.timeout(60)  # a wait without an end fails soon


class Numbers(torch.utils.data.Dataset):
    """Tensors; item `fails_at` cannot be handed over, and item `sleeps_at` never comes."""

    def __init__(self, fails_at: int = -1, sleeps_at: int = -1) -> None:
        self.fails_at, self.sleeps_at = fails_at, sleeps_at

    def __len__(self) -> int:
        return 8

    def __getitem__(self, item: int) -> dict:
        if item == self.sleeps_at:
            time.sleep(1000)
        return {"x": Unsendable() if item == self.fails_at else torch.full((4,), item)}


class Unsendable:
    """An object whose pickling fails as a tensor's does on a full /dev/shm."""

    def __reduce__(self):
        raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")


def loader(dataset: Numbers, monkeypatch: pytest.MonkeyPatch) -> torch.utils.data.DataLoader:
    monkeypatch.setattr(transfer, "WAIT_SECONDS", 0.2)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        num_workers=1,
        prefetch_factor=transfer.PREFETCH,
        timeout=0.2,
        worker_init_fn=_init_worker,
        multiprocessing_context="fork",
    )


def test_a_batch_that_cannot_be_handed_over_is_one_line(monkeypatch):
    batches = wait_for_batches(loader(Numbers(fails_at=2), monkeypatch), 60, None)
    assert [int(next(batches)["x"][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError) as caught:
        next(batches)
    line = one_line(caught.value)
    assert (
        line.startswith("/dev/shm is short: a batch cannot be handed over")
        and "data.workers=0" in line
        and "No space left" in line
    )
    assert "Traceback" not in line


def test_a_suspended_worker_ends_the_wait_and_is_named(monkeypatch):
    monkeypatch.setattr(transfer, "SUSPENDED_SECONDS", 0.6)
    others = torch.multiprocessing.active_children()
    batches = wait_for_batches(loader(Numbers(sleeps_at=1), monkeypatch), 60, None)
    next(batches)
    (pid,) = (p.pid or 0 for p in torch.multiprocessing.active_children() if p not in others)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(OSError, match=rf"process {pid}: .*suspended"):
        next(batches)
    assert pid not in [p.pid for p in torch.multiprocessing.active_children()]


def test_a_worker_that_delivers_nothing_ends_the_wait_after_its_limit(monkeypatch):
    batches = wait_for_batches(loader(Numbers(sleeps_at=1), monkeypatch), 0.5, None)
    next(batches)
    with pytest.raises(OSError, match=r"expected a batch within 0\.5 s, found none"):
        next(batches)


def test_a_request_to_stop_is_obeyed_while_a_batch_is_awaited_also_of_a_suspended_worker(monkeypatch):
    stop, others = threading.Event(), torch.multiprocessing.active_children()
    batches = wait_for_batches(loader(Numbers(sleeps_at=1), monkeypatch), 60, stop.is_set)
    next(batches)
    (pid,) = (p.pid or 0 for p in torch.multiprocessing.active_children() if p not in others)
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.5, stop.set).start()
    assert list(batches) == [None]


@pytest.mark.slow
def test_the_interpreter_exits_with_a_suspended_worker():
    code = (
        "import os, signal, torch; from tests.data.test_transfer import *\n"
        "batches = wait_for_batches(loader(Numbers(sleeps_at=1), pytest.MonkeyPatch()), 60, None)\n"
        "next(batches); (worker,) = torch.multiprocessing.active_children()\n"
        "os.kill(worker.pid, signal.SIGSTOP); raise SystemExit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 7


def test_batches_that_come_are_unchanged(monkeypatch):
    batches = wait_for_batches(loader(Numbers(), monkeypatch), 60, lambda: True)
    assert [int(batch["x"][0]) for batch in batches] == list(range(8))


@pytest.fixture
def free_200_mib(monkeypatch):
    free = os.statvfs_result((4096, 4096, 0, 0, 200 * 2**20 // 4096, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: free)


def read_ahead(workers: int = 2, steps: int = 100, clips: int = 64) -> ReadAhead:
    return ReadAhead(workers=workers, clips=clips, clip_bytes=12 * 3 * 224**2, steps=steps)


@pytest.mark.parametrize(("workers", "steps"), [(0, 100), (2, 1)], ids=["no workers", "one step"])
def test_batches_for_which_shared_memory_has_room_are_accepted(workers, steps, free_200_mib):
    check_shared_memory(read_ahead(workers, steps))


def test_shared_memory_is_compared_with_the_batches_read_ahead(free_200_mib):
    with pytest.raises(ValueError, match=r"551 MiB free for 1 x 5 batches of 110\.2 MiB \(64") as caught:
        check_shared_memory(read_ahead())
    assert "found 200 MiB; set data.workers=0" in str(caught.value) and "--shm-size=2g" in str(caught.value)


def test_shared_memory_must_hold_training_and_validation_of_all_processes(free_200_mib, monkeypatch):
    small = read_ahead(clips=8)  # 69 MiB in 5 batches
    check_shared_memory(small, small)
    with pytest.raises(ValueError, match=r"expected 207 MiB free for 1 x 5 batches .* and 1 x 5"):
        check_shared_memory(small, small, small)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"expected 276 MiB free for 4 x 5 batches"):
        check_shared_memory(small)
