import json
import re
from pathlib import Path

import pytest
import torch

from discovla import terminal
from discovla.engine.distributed import World
from discovla.engine.log import RunLog, drop_records, flatten, versions


def _world(rank: int = 0) -> World:
    return World(rank=rank, size=2, local_rank=rank, device=torch.device("cpu"))


def _run(folder: Path, first: int, last: int, rank: int = 0) -> None:
    with RunLog(folder, _world(rank), total=6, start=first) as log:
        log.describe('{"seed": 42}')
        for step in range(first, last):
            log.step(
                step, clips=8, seconds=0.5, values={"loss": 1.0 / (step + 1), "lr": 0.1, "grad_norm": 2.0}
            )
            if step % 2:
                log.evaluation(step + 1, "val", {"t2v": {"R@1": 40.0 + step}})


def _records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_one_line_of_values(tmp_path):
    _run(tmp_path, 0, 2)
    first, second, evaluation = _records(tmp_path)
    assert (first["kind"], first["step"], first["loss"], first["lr"], first["grad_norm"]) == (
        "train",
        0,
        1,
        0.1,
        2,
    )
    assert first["clips_per_second"] == 16 and 0 <= first["seconds"] <= second["seconds"]
    assert (evaluation["kind"], evaluation["step"], evaluation["t2v"]) == ("val", 2, {"R@1": 41.0})


def test_a_resumed_run_records_no_step_twice(tmp_path):
    _run(tmp_path, 0, 5)
    _run(tmp_path, 3, 6)
    trained = [record["step"] for record in _records(tmp_path) if record["kind"] == "train"]
    evaluated = [record["step"] for record in _records(tmp_path) if record["kind"] == "val"]
    assert (trained, evaluated) == ([0, 1, 2, 3, 4, 5], [2, 4, 6])


def test_the_evaluation_at_the_resumed_step_stays(tmp_path):
    _run(tmp_path, 0, 4)
    drop_records(tmp_path / "metrics.jsonl", 2)
    assert [(r["kind"], r["step"]) for r in _records(tmp_path)] == [("train", 0), ("train", 1), ("val", 2)]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    _run(tmp_path, 0, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    _run(tmp_path, 2, 3)
    assert [r["step"] for r in _records(tmp_path) if r["kind"] == "train"] == [0, 1, 2]


def test_the_run_keeps_its_config_and_versions(tmp_path):
    _run(tmp_path, 0, 1)
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 42}
    record = json.loads((tmp_path / "versions.json").read_text())
    assert record["torch"] == torch.__version__ and record["processes"] == 2 and "git_commit" in record


def test_tensorboard_has_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _run(tmp_path, 0, 4)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [0, 1, 2, 3]
    assert [event.value for event in board.Scalars("val/t2v/R@1")] == [41.0, 43.0]


def test_other_ranks_write_nothing(tmp_path, capfd):
    _run(tmp_path, 0, 2, rank=1)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_resumed_run_continues_the_count_of_steps_with_loss_and_rate(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(terminal, "DELAY", 0.0)
    monkeypatch.setattr(terminal, "EVERY", 0.0)
    terminal.start()
    with RunLog(tmp_path, _world(), total=4, start=1) as log:
        for step in (1, 2):
            log.step(step, clips=8, seconds=0.5, values={"loss": 0.25})
    terminal.close()
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"training: 3 of 4 steps, \d+:\d\d left, loss 0\.25, [\d.e+]+ clips/s", last), last


def test_json_lines_are_the_records_of_the_run(tmp_path, capfd):
    terminal.start(as_json=True)
    _run(tmp_path, 0, 2)
    terminal.close()
    printed = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line for line in printed if line["kind"] != "progress"] == _records(tmp_path)


def test_a_full_disk_names_the_file(tmp_path):
    with RunLog(tmp_path, _world(), total=1) as log, Path("/dev/full").open("ab", 0) as full:
        log._file.close()
        log._file = full
        with pytest.raises(OSError, match=r"No space left on device: '.*/metrics.jsonl'"):
            log.step(0, clips=8, seconds=0.5, values={"loss": 0.25})


def test_versions_name_a_missing_package(monkeypatch):
    monkeypatch.setattr("discovla.engine.log.PACKAGES", ("torch", "no-such-package"))
    assert versions(_world())["no-such-package"] is None


def test_nested_numbers_get_slashed_names():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1.0, "a/c/d": 2.0, "e": 3.0}


def test_a_run_directory_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"File exists: '.*/file'"):
        RunLog(tmp_path / "file", _world(), total=1)
