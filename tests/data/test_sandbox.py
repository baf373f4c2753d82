"""Sandboxed processes: time limits, crashes, replacement, and no process left behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from multiprocessing import connection
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from discovla.data.sandbox import Result, Sandbox, WorkerLost, run_sandboxed
from tests.data.sandbox_tasks import Unsendable, stopped, task


def ended(pid: int, within: float = 5.0) -> bool:
    """Return True if a process ends in time; a zombie without threads has ended."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            threads = os.listdir(f"/proc/{pid}/task")
        except FileNotFoundError:
            return True
        if state == "Z" and len(threads) == 1:
            return True
        time.sleep(0.05)
    return False


def test_every_item_has_its_result_and_a_lost_process_is_replaced():
    items = ["a", "hang", "crash", "b", "raise", "exit", "hang in native code", "c"]
    results = {r.item: r for r in run_sandboxed(task, items, workers=2, limit=0.5)}
    assert sorted(results) == sorted(items)
    assert {i: str(r.error) for i, r in results.items() if r.error} == {
        "hang": "took longer than 0.5 s",
        "hang in native code": "took longer than 0.5 s",
        "crash": "its process died of SIGSEGV",
        "exit": "its process ended with status 3",
        "raise": "not this one",
    }
    assert isinstance(results["raise"].error, ValueError)
    answers = {name: results[name].value or ("", 0) for name in "abc"}
    pids = {name: answers[name][1] for name in "abc"}
    assert {name: answers[name][0] for name in "abc"} == {name: name for name in "abc"}
    assert all(ended(pid) for pid in pids.values())


def test_one_process_serves_many_items_until_it_is_lost():
    with Sandbox(task, limit=5) as worker:
        first, second = worker("a"), worker("b")
        assert first[1] == second[1] != os.getpid()
        with pytest.raises(WorkerLost, match="its process died of SIGSEGV"):
            worker("crash")
        third = worker("c")
        assert third[0] == "c"
        assert third[1] != first[1]
        os.kill(third[1], signal.SIGKILL)
        assert ended(third[1])
        assert worker("d")[0] == "d"
        last = worker("e")[1]
    assert ended(last)


def test_a_process_that_is_suspended_within_its_answer_is_lost_and_replaced(monkeypatch):
    monkeypatch.setattr("discovla.data.sandbox.STALL_LIMIT", 0.5)
    with Sandbox(task, limit=60) as worker:
        pid = worker("a")[1]
        worker.submit("large")  # longer than the buffer of the pipe
        assert connection.wait([worker.pipe], 20)
        os.kill(pid, signal.SIGSTOP)
        _, error = worker.answer()
        assert isinstance(error, WorkerLost) and str(error) == "stopped within its answer for 0.5 s"
        assert ended(pid)
        assert worker("b")[0] == "b"


def kill_before_reading(monkeypatch, pids: list[int]) -> None:
    """Stop processes while they are sent their item, and kill them before they read it."""

    def wait(pipes, timeout):
        while pids:
            os.kill(pids.pop(), signal.SIGKILL)
        return connection.wait(pipes, timeout)

    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr("discovla.data.sandbox.wait", wait)


def test_an_item_that_its_process_has_not_begun_is_sent_to_a_new_one(monkeypatch):
    with Sandbox(task, limit=5) as worker:
        first = worker("a")[1]
        kill_before_reading(monkeypatch, [first])
        name, second = worker("b")
        assert name == "b" and second != first


def test_an_item_is_sent_to_a_new_process_once(monkeypatch):
    started: list[int] = []

    def start(worker: Sandbox) -> None:
        begin(worker)
        assert worker._process is not None
        started.append(worker._process.pid)
        os.kill(started[-1], signal.SIGSTOP)

    begin = Sandbox._start
    with Sandbox(task, limit=5) as worker:
        monkeypatch.setattr(Sandbox, "_start", start)
        worker.submit("a")
        for again in (True, False):
            os.kill(started[-1], signal.SIGKILL)
            assert ended(started[-1])
            answer = worker.receive()
            assert (answer is None) == again
        assert answer is not None and isinstance(answer[1], WorkerLost)
        assert len(started) == 2
        monkeypatch.setattr(Sandbox, "_start", begin)
        assert worker("b")[0] == "b"


def test_several_processes_lose_no_item_that_none_has_begun(monkeypatch):
    for _ in range(5):  # on a busy machine a process may have begun its next item before it is stopped
        results = run_sandboxed(task, iter("abcd"), workers=2, limit=5)
        rows = [next(results), next(results)]
        with monkeypatch.context() as patch:
            kill_before_reading(patch, list({row.value[1] for row in rows if row.value}))
            rows += list(results)
        assert sorted(row.item for row in rows) == list("abcd")
        if all(row.error is None for row in rows):
            return
    pytest.fail("an item was lost in each of five rounds")


def test_a_process_killed_while_it_answers_is_lost():
    with Sandbox(task, limit=5) as worker:
        pid = worker("a")[1]
        worker.submit("large")  # more than a pipe holds: it waits for a reader
        connection.wait([worker.pipe], 5)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid)
        _, error = worker.answer()
        assert isinstance(error, WorkerLost) and str(error) == "its process died of SIGKILL"
        assert worker("b")[0] == "b"


def test_a_process_that_does_not_end_itself_is_killed(monkeypatch):
    monkeypatch.setattr("discovla.data.sandbox._GRACE", 0.3)
    with Sandbox(stopped, limit=0.3) as worker, pytest.raises(WorkerLost, match=r"took longer than 0.3 s"):
        worker("x")


def test_a_value_or_error_that_does_not_pickle_is_replaced_by_its_text():
    with Sandbox(task, limit=5) as worker:
        with pytest.raises(RuntimeError, match=r"pickle|local object"):
            worker("unsendable value")
        with pytest.raises((RuntimeError, Unsendable), match="no way"):
            worker("unsendable error")
        assert worker("a")[0] == "a"


def test_output_of_the_work_goes_to_standard_error(capfd):
    with Sandbox(task, limit=5) as worker:
        worker("print")
    assert capfd.readouterr() == ("", "to the standard output\n")


def test_closing_the_generator_ends_the_processes():
    before = children()
    results = run_sandboxed(task, ["a", "hang", "b", "hang"], workers=2, limit=30)
    _, pid = next(results).value or (None, 0)
    began = time.monotonic()
    results.close()
    assert ended(pid)
    assert time.monotonic() - began < 5
    assert children() <= before


def children() -> set[int]:
    """Return the running sandboxes of this process."""
    ids = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    ours = {int(pid) for pid in ids}
    return {pid for pid in ours if b"discovla.data.sandbox" in Path(f"/proc/{pid}/cmdline").read_bytes()}


PARENT = """
import sys
sys.path.insert(0, {root!r})
from tests.data.sandbox_tasks import task
from discovla.data.sandbox import Sandbox
idle, busy = Sandbox(task, limit=3), Sandbox(task, limit=3)
print(idle("a")[1], busy("b")[1], flush=True)
busy("hang in native code")
"""


def test_no_process_outlives_a_killed_parent_by_more_than_the_limit():
    program = PARENT.format(root=str(Path(__file__).parents[2]))
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    idle, busy = map(int, parent.stdout.readline().split())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert ended(idle)
    assert ended(busy, within=8)


class Reader(Dataset):
    """Data set whose items a sandbox reads."""

    def __init__(self) -> None:
        self.worker = Sandbox(task, limit=5)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[str, int, int]:
        try:
            name, pid = self.worker("crash" if index == 2 else str(index))
        except WorkerLost:
            name, pid = "lost", 0
        return name, pid, os.getpid()


def test_the_workers_of_a_loader_each_have_their_own_process():
    reader = Reader()
    ours = reader.worker("here")[1]
    rows = list(DataLoader(reader, batch_size=None, num_workers=2))
    assert [name for name, _, _ in rows] == ["0", "1", "lost", "3"]
    owners = {(pid, loader) for _, pid, loader in rows if pid}
    assert len(owners) >= 2
    assert ours not in {pid for pid, _ in owners}
    assert reader.worker("here")[1] == ours
    assert all(ended(pid) for pid, _ in owners)
    reader.worker.close()


def test_a_worker_pickles_without_its_process():
    with Sandbox(task, limit=5) as worker:
        pid = worker("a")[1]
        with pickle.loads(pickle.dumps(worker)) as other:
            assert other("a")[1] != pid
        assert worker("a")[1] == pid


def test_work_that_no_other_process_can_import_is_refused():
    with pytest.raises(ValueError, match="expected a function that other processes can import"):
        Sandbox(lambda item: item, limit=1)


def test_a_process_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr("discovla.data.sandbox._ENTRY", "import sys; sys.exit(1)")
    with pytest.raises(RuntimeError, match="a process for task did not start"):
        list(run_sandboxed(task, ["a"], workers=1, limit=1))


def test_nothing_to_do_starts_nothing():
    before = children()
    assert list(run_sandboxed(task, [], workers=3, limit=1)) == []
    assert children() <= before


def test_items_are_taken_when_a_process_is_free():
    taken = []

    def items():
        for name in "abcdef":
            taken.append(name)
            yield name

    results = run_sandboxed(task, items(), workers=1, limit=5)
    assert isinstance(next(results), Result)
    assert taken == ["a"]
    results.close()
