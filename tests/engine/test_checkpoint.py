import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from discovla.engine import checkpoint
from discovla.engine.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    best,
    check_fingerprint,
    latest,
    load,
    prune,
    reselect_best,
    save,
    set_best,
)
from tests.engine.launch import ROOT

TENSORS = {
    "trained": {"a.weight": torch.arange(6.0).view(2, 3), "scale": torch.tensor(1.3)},
    "optimizer": {"exp_avg/a.weight": torch.full((2, 3), 0.1), "step": torch.tensor(7)},
}


def _save(folder: Path, step: int = 120, **changes) -> Path:
    return save(folder, **{"step": step, "tensors": TENSORS, "meta": {"epoch": 2, "seed": 42}, **changes})


def test_a_saved_checkpoint_loads(tmp_path):
    path = _save(tmp_path)
    loaded = load(path)
    assert (path.name, loaded.step, loaded.meta) == ("step-00000120", 120, {"epoch": 2, "seed": 42})
    assert loaded.tensors.keys() == TENSORS.keys()
    for part, named in TENSORS.items():
        assert loaded.tensors[part].keys() == named.keys()
        assert all(torch.equal(loaded.tensors[part][name], named[name]) for name in named)


def test_an_empty_part_is_kept(tmp_path):
    assert load(_save(tmp_path, tensors={"trained": {}})).tensors == {"trained": {}}


def test_a_missing_folder_has_no_latest_checkpoint(tmp_path):
    assert latest(tmp_path / "absent") is None


def test_the_latest_is_the_highest_step(tmp_path):
    for step in (9, 100, 20):
        _save(tmp_path, step)
    loaded = latest(tmp_path)
    assert loaded is not None and loaded.step == 100


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _edit_meta(path: Path) -> None:
    path.write_text(path.read_text().replace('"epoch": 2', '"epoch": 3'))


BREAKS = {
    "flipped byte": ("trained.safetensors", _flip, "trained.safetensors: expected sha256"),
    "cut off": (
        "optimizer.safetensors",
        lambda p: os.truncate(p, 20),
        "optimizer.safetensors: expected bytes",
    ),
    "missing file": ("trained.safetensors", Path.unlink, "trained.safetensors: expected a readable file"),
    "missing state": ("state.json", Path.unlink, "state.json: expected a readable file, found: No such file"),
    "cut state": ("state.json", lambda p: os.truncate(p, 30), "state.json: expected JSON"),
    "changed state": ("state.json", _edit_meta, "state.json: expected sha256"),
    "empty state": ("state.json", lambda p: p.write_text("{}"), "state.json: expected format 1, found None"),
}


@pytest.mark.parametrize(("name", "damage", "message"), BREAKS.values(), ids=BREAKS.keys())
def test_a_broken_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, name, damage, message):
    _save(tmp_path, 1)
    damage(_save(tmp_path, 2) / name)
    loaded = latest(tmp_path)
    assert loaded is not None and loaded.step == 1
    assert message in caplog.text and "step-00000002" in caplog.text


@pytest.mark.parametrize(("name", "damage", "message"), BREAKS.values(), ids=BREAKS.keys())
def test_loading_a_broken_checkpoint_is_an_error(tmp_path, name, damage, message):
    path = _save(tmp_path)
    damage(path / name)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_folder_being_written_is_not_a_checkpoint(tmp_path):
    complete = _save(tmp_path, 1)
    shutil.copytree(complete, tmp_path / ".writing-step-00000002")
    loaded = latest(tmp_path)
    assert loaded is not None and loaded.step == 1


def test_remains_of_an_interrupted_write_are_removed(tmp_path):
    (tmp_path / ".writing-step-00000001").mkdir()
    (tmp_path / ".writing-step-00000001/trained.safetensors").write_text("half")
    _save(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    _save(tmp_path, 3)
    _save(tmp_path, 3, meta={"epoch": 9})
    loaded = latest(tmp_path)
    assert loaded is not None and loaded.meta == {"epoch": 9}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_checkpoint_that_was_moved_aside_is_still_found(tmp_path):
    path = _save(tmp_path, 3)
    path.rename(tmp_path / ".old-step-00000003")
    loaded = latest(tmp_path)
    assert loaded is not None and loaded.step == 3
    _save(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


WRITER = """
import sys, torch
from discovla.engine import checkpoint
for step in range(1, 100000):
    x = torch.full((20000,), float(step))
    checkpoint.save(sys.argv[1], step=step, tensors={"trained": {"x": x}}, meta={})
    checkpoint.prune(sys.argv[1], 2)
    print(step, flush=True)
"""


def test_a_killed_writer_leaves_a_complete_checkpoint(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], env=env, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(3 + 4 * attempt):
            announced = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        announced = max([announced, *map(int, rest)])
        loaded = latest(folder)
        assert loaded is not None and loaded.step >= announced
        assert torch.equal(loaded.tensors["trained"]["x"], torch.full((20000,), float(loaded.step)))


@pytest.mark.parametrize("stage", ["tensors", "state", "rename"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, stage):
    _save(tmp_path, 1)

    def refuse(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    name = {"tensors": "_write_tensors", "state": "_write_text", "rename": "_put_in_place"}[stage]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, name, refuse)
        with pytest.raises(CheckpointError) as caught:
            _save(tmp_path, 2)
    message = str(caught.value)
    assert "step-00000002: expected to write it, found: No space left on device: the disk is full" in message
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load(tmp_path / "step-00000001").step == 1


def test_a_full_device_is_named(tmp_path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a small file system here")
    try:
        _save(tmp_path, 1)
        with pytest.raises(CheckpointError, match="the disk is full, earlier checkpoints are untouched"):
            _save(tmp_path, 2, tensors={"trained": {"x": torch.zeros(10**6)}})
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        CheckpointError, match="file/run/step-00000120: expected to write it, found: Not a dir"
    ):
        _save(tmp_path / "file" / "run")


def test_missing_permission_is_named(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        CheckpointError, match="step-00000120: expected to write it, found: Permission denied"
    ):
        _save(tmp_path)


def test_the_best_is_remembered(tmp_path):
    assert best(tmp_path) is None
    set_best(tmp_path, _save(tmp_path, 1), 41.5)
    set_best(tmp_path, _save(tmp_path, 2), 43.25)
    assert best(tmp_path) == (tmp_path / "step-00000002", 43.25)


def test_a_broken_record_of_the_best_is_an_error(tmp_path):
    (tmp_path / "best.json").write_text('{"checkpoint": "step-0')
    with pytest.raises(CheckpointError, match=r"best.json: expected a checkpoint and its score"):
        best(tmp_path)


def test_a_missing_best_checkpoint_is_an_error(tmp_path):
    (tmp_path / "best.json").write_text(json.dumps({"checkpoint": "step-00000005", "score": 1.0}))
    with pytest.raises(CheckpointError, match="expected the folder step-00000005, found none"):
        best(tmp_path)


def test_prune_removes_the_oldest_but_never_the_best(tmp_path):
    paths = [_save(tmp_path, step) for step in range(1, 6)]
    set_best(tmp_path, paths[1], 1.0)
    prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [paths[i].name for i in (1, 3, 4)]


def test_prune_never_removes_the_last_complete_checkpoint(tmp_path):
    paths = [_save(tmp_path, step) for step in range(1, 5)]
    for path in paths[2:]:
        _flip(path / "trained.safetensors")
    prune(tmp_path, 1)
    loaded = latest(tmp_path)
    assert loaded is not None and loaded.step == 2
    assert not paths[0].exists()


def test_a_checkpoint_of_another_architecture_names_the_keys():
    loaded = {"method": "discovla", "vision": {"width": 768, "layers": 12}}
    expected = {"method": "discovla", "vision": {"width": 1024, "layers": 24}, "rank": 8}
    with pytest.raises(CheckpointError) as caught:
        check_fingerprint(loaded, expected, "run/step-00000001")
    assert str(caught.value) == (
        "run/step-00000001: another architecture: rank: expected 8, found None; "
        "vision.layers: expected 24, found 12; vision.width: expected 1024, found 768"
    )


def test_the_same_architecture_passes():
    check_fingerprint({"a": [1, 2]}, {"a": (1, 2)})


def test_a_broken_best_is_replaced_by_the_best_before_it(tmp_path, caplog):
    paths = [_save(tmp_path, step) for step in range(1, 6)]
    for place, score in ((0, 3.0), (1, 4.0), (3, 5.0)):
        set_best(tmp_path, paths[place], score)
    reselect_best(tmp_path, 5)
    assert best(tmp_path) == (paths[3], 5.0)
    _flip(paths[3] / "trained.safetensors")
    reselect_best(tmp_path, 5)
    assert best(tmp_path) == (paths[1], 4.0)
    assert "step-00000004 is broken or newer than step 5" in caplog.text


def test_a_best_newer_than_the_resumed_step_is_forgotten(tmp_path):
    paths = [_save(tmp_path, step) for step in (2, 4)]
    set_best(tmp_path, paths[1], 5.0)
    reselect_best(tmp_path, 2)
    assert best(tmp_path) is None


def test_a_step_that_is_validated_again_is_recorded_once(tmp_path):
    path = _save(tmp_path, 1)
    for _ in range(2):
        set_best(tmp_path, path, 5.0)
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "checkpoint": "step-00000001",
        "score": 5.0,
        "earlier": [],
    }


def test_a_writer_runs_one_write_at_a_time_and_raises_its_error_at_the_next_call():
    writer, going, order = CheckpointWriter(), threading.Event(), []

    def first() -> None:
        going.wait(10)
        order.append("first")

    def broken() -> None:
        raise CheckpointError("no room")

    writer.start(first)
    writer.check()  # in progress
    assert order == []
    threading.Timer(0.05, going.set).start()
    writer.start(lambda: order.append("second"))
    writer.wait()
    assert order == ["first", "second"]
    writer.start(broken)
    with pytest.raises(CheckpointError, match="no room"):
        for _ in range(1000):
            writer.check()
            time.sleep(0.005)
    writer.wait()  # raised once only


def test_finish_within_gives_a_write_its_time_and_no_more():
    writer, going, done = CheckpointWriter(), threading.Event(), []

    def slow() -> None:
        going.wait(10)
        done.append(True)

    writer.finish_within(10)  # nothing to wait for
    writer.start(slow)
    writer.finish_within(0.05)
    assert not done
    threading.Timer(0.05, going.set).start()
    writer.finish_within(10)
    assert done


def test_finish_within_works_while_another_thread_waits():
    writer, going, done = CheckpointWriter(), threading.Event(), []

    def slow() -> None:
        going.wait(10)
        done.append(True)

    writer.start(slow)
    waiting = threading.Thread(target=writer.wait)
    waiting.start()
    time.sleep(0.05)  # until it waits
    threading.Timer(0.05, going.set).start()
    writer.finish_within(10)
    assert done
    waiting.join()


def test_a_write_that_does_not_end_is_an_error_after_its_limit(monkeypatch):
    monkeypatch.setattr("discovla.engine.checkpoint.WRITE_LIMIT", 0.1)
    writer, going = CheckpointWriter(), threading.Event()
    writer.start(lambda: going.wait(10) and None)
    with pytest.raises(CheckpointError, match=r"written within 0\.1 s, found the write still in progress"):
        writer.wait()
    going.set()


def test_the_interpreter_waits_for_a_write_when_it_exits(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from discovla.engine.checkpoint import CheckpointWriter\n"
        "writer = CheckpointWriter()\n"
        "writer.start(lambda: (time.sleep(0.5), Path(sys.argv[1]).touch()) and None)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "written"], check=True, timeout=60)
    assert (tmp_path / "written").exists()
