"""The lock of a folder: one writer, and holders that have ended."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from discovla import lock as lock_module
from discovla.lock import NAME, LockHeld, WriterLock
from tests import holders, runs


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a folder."""
    with holders.holder(tmp_path, "run") as process:
        yield process


def write_foreign(folder: Path, **changes: Any) -> Path:
    """Write the lock file of a holder on another machine."""
    record = {"purpose": "run", "host": "other", "pid": 7, "process": "7 1", "pids": "elsewhere 1"}
    record |= {"since": "yesterday", "token": "foreign", "beat": 0}
    path = folder / NAME
    path.write_text(json.dumps(record | changes).ljust(511) + "\n")
    return path


def test_a_second_writer_is_refused_and_the_holder_named(tmp_path, holder):
    with pytest.raises(LockHeld, match=rf"another run \(process {holder.pid} on .*writing here; wait"):
        WriterLock(tmp_path, "run").acquire()


def test_the_lock_of_a_killed_process_is_taken_over_at_once_and_said(tmp_path, holder, caplog):
    holder.kill()  # not waited for: it stays as a zombie
    time.sleep(0.2)
    with WriterLock(tmp_path, "run") as lock:
        lock.check()
    assert f"process {holder.pid} on" in caplog.text and "taking it over" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_process_id_that_was_given_to_another_process_does_not_hold_the_lock(tmp_path):
    record = WriterLock(tmp_path, "run")._record
    write_foreign(tmp_path, pids=record["pids"], pid=os.getpid(), process=f"{os.getpid()} 1")
    with WriterLock(tmp_path, "run"):
        pass


@pytest.mark.parametrize("beats", [True, False])
def test_a_holder_of_another_machine_lives_as_long_as_its_counter_changes(
    tmp_path, beats, monkeypatch, caplog
):
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 0.5)
    path = write_foreign(tmp_path)
    os.utime(path, (time.time() + 9999, time.time() + 9999))  # clocks of machines differ
    lock = WriterLock(tmp_path, "run")
    if beats:
        timer = threading.Timer(0.2, write_foreign, [tmp_path], {"beat": 1})
        timer.start()
        with pytest.raises(LockHeld, match="process 7 on other"):
            lock.acquire()
        timer.join()
    else:
        with lock:
            assert "process 7 on other" in caplog.text


def test_file_times_that_go_backwards_do_not_lose_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    lost: list[str] = []
    with WriterLock(tmp_path, "run", on_lost=lost.append) as lock:
        for _ in range(5):
            os.utime(lock.path, (0, 0))
            time.sleep(0.05)
        lock.check()
    assert not lost


def test_a_stale_nfs_handle_is_tried_again_and_named_only_if_it_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 1.0)
    original, failing, lost = Path.open, threading.Event(), []

    def stale(self, *args, **kwargs):
        if failing.is_set() and self.name == NAME:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", stale)
    with WriterLock(tmp_path, "run", on_lost=lost.append):
        failing.set()
        time.sleep(0.3)
        failing.clear()
        time.sleep(0.3)
        assert not lost
        failing.set()
        time.sleep(1.5)
        assert len(lost) == 1 and "cut off from the file system" in lost[0]
        failing.clear()


def test_a_holder_whose_lock_was_taken_notices_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    lost = threading.Event()
    with WriterLock(tmp_path, "run", on_lost=lambda _: lost.set()) as lock:
        write_foreign(tmp_path)
        assert lost.wait(5)
        with pytest.raises(LockHeld, match="found another run"):
            lock.check()
    assert (tmp_path / NAME).exists(), "it removed the lock of the other"


def test_a_stop_signal_ends_the_wait_for_a_holder(tmp_path):
    write_foreign(tmp_path)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        WriterLock(tmp_path, "run", on_wait=stop).acquire()


def test_an_incomplete_lock_file_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 0.3)
    (tmp_path / NAME).touch()
    with WriterLock(tmp_path, "run"):
        pass


def test_of_many_that_find_a_stale_lock_one_takes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 0.3)
    write_foreign(tmp_path)
    taken, refused = [], []

    def take() -> None:
        lock = WriterLock(tmp_path, "run")
        try:
            lock.acquire()
            taken.append(lock)
        except LockHeld:
            refused.append(lock)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and len(refused) == 7
    taken[0].release()


def test_a_second_run_in_a_directory_is_refused_and_leaves_the_first_untouched(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "data.val_split=", "steps=2"]
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)  # of an earlier run, which a new one moves away
    with WriterLock(run, "run"):
        job = runs.start(words)
        assert job.wait() == [2]
    line = job.output().splitlines()[-1]
    assert line.startswith(f"train.py: error: {run}: expected no other writer, found another run"), line
    assert "Traceback" not in job.output()
    assert [path.name for path in run.iterdir()] == ["checkpoints"]
    runs.train(words)
    assert (tmp_path / "run.1").exists() and len(runs.losses(run)) == 2
    assert not (run / NAME).exists() and not (tmp_path / "run.1" / NAME).exists()
