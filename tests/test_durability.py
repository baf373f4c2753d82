"""Files that runs depend on are complete after a kill at any point; checkpoints also after a power cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from discovla import corpus
from discovla.data import quarantine
from discovla.data.shards import writer as shard_writer
from discovla.data.video.index import FrameIndexStore
from discovla.data.video.pyav import index_video
from discovla.engine import checkpoint
from discovla.engine.log import drop_records
from discovla.features import FeatureStore
from discovla.files import write_file
from discovla.retrieval.embeddings import Embeddings
from discovla.retrieval.ranks import Ranks
from discovla.retrieval.record import EvaluationRecord
from discovla.trainer import write_json
from tests.data.odd_clips import odd_clip
from tests.data.shards.world import contents, make_manifest, make_shards
from tests.durability import assert_durable, intercepted, killed_before


def save(folder: Path, step: int, value: float) -> Path:
    tensors = {"trained": {"x": torch.full((100,), value)}, "optimizer": {"m": torch.full((100,), value)}}
    return checkpoint.save(folder, step=step, tensors=tensors, meta={"value": value})


def value_of(loaded: checkpoint.Checkpoint) -> float:
    """Return the value of a checkpoint, whose parts agree."""
    values = {x.unique().item() for part in loaded.tensors.values() for x in part.values()}
    assert values == {loaded.meta["value"]}
    return values.pop()


@pytest.mark.parametrize("step", [1, 2], ids=["replaced", "new"])
def test_a_checkpoint_is_flushed_before_it_is_renamed_and_its_folder_after(step, tmp_path, monkeypatch):
    path = save(tmp_path, 1, 1.0)
    moved = assert_durable(monkeypatch, lambda: save(tmp_path, step, 2.0), folders=True)
    final = str(path.with_name(f"step-{step:08d}"))
    assert moved == ([str(path.with_name(f".old-{path.name}"))] if step == 1 else []) + [final]


def test_the_record_of_the_best_is_flushed_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    paths = [save(tmp_path, step, step) for step in (1, 2)]
    checkpoint.set_best(tmp_path, paths[0], 0.1)
    moved = assert_durable(monkeypatch, lambda: checkpoint.set_best(tmp_path, paths[1], 0.2), folders=True)
    assert moved == [str(tmp_path / "best.json")]


@pytest.mark.parametrize("step", [1, 2], ids=["replaced", "new"])
def test_a_checkpoint_is_complete_after_a_kill_before_any_call(step, tmp_path, monkeypatch):
    path = save(tmp_path / "before", 1, 1.0)
    checkpoint.set_best(path.parent, path, 0.1)
    values = []
    for call in range(100):
        folder = tmp_path / str(call)
        shutil.copytree(path.parent, folder)
        killed = killed_before(monkeypatch, lambda folder=folder: save(folder, step, 2.0), call)
        loaded = checkpoint.latest(folder)
        assert loaded is not None
        values.append(value_of(loaded))
        save(folder, 3, 3.0)  # removes what was left behind, and restores what was moved aside
        assert {p.name for p in folder.iterdir() if p.name.startswith(".")} == set()
        assert checkpoint.best(folder) == (folder / path.name, 0.1)
        if not killed:
            break
    assert call >= 5 and values == sorted(values)
    assert set(values) == {1.0, 2.0}


def test_the_record_of_the_best_is_complete_after_a_kill_before_any_call(tmp_path, monkeypatch):
    paths = [save(tmp_path, step, step) for step in (1, 2)]
    checkpoint.set_best(tmp_path, paths[0], 0.1)
    scores = []
    for call in range(100):
        killed = killed_before(monkeypatch, lambda: checkpoint.set_best(tmp_path, paths[1], 0.2), call)
        best = checkpoint.best(tmp_path)
        assert best is not None
        scores.append(best[1])
        if not killed:
            break
    assert call == 3 and scores == [0.1, 0.1, 0.2, 0.2]


def test_tars_and_indices_of_shards_are_flushed_before_they_are_renamed(tmp_path, monkeypatch):
    manifest = make_manifest(tmp_path / "world")
    flushed, named = {}, []

    def before(name: str, paths: list[str]) -> None:
        if name == "fsync":
            flushed[paths[0]] = Path(paths[0]).read_bytes()
        elif name in ("rename", "replace"):
            named.append(Path(paths[1]).name)
            if Path(paths[0]).parent.name != "parts":  # parts have a checksum and are made again
                assert flushed[paths[0]] == Path(paths[0]).read_bytes()
        elif name == "unlink" and Path(paths[0]).parent.name == "parts" and Path(paths[0]).exists():
            tar, record = named[-2:]
            assert tar.endswith(".tar") and record == tar.replace(".tar", ".json"), "a part is still needed"

    with intercepted(monkeypatch, before):
        make_shards(manifest, tmp_path / "out")
    assert named[-1] == "shards.json"
    files = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert {name for name in files if not name.startswith(".")} <= set(named)


def test_shards_are_complete_after_a_kill_before_any_call(tmp_path, monkeypatch):
    manifest = make_manifest(tmp_path / "world", count=2)
    make_shards(manifest, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    out = tmp_path / "out"
    for call in range(1, 60):
        killed = killed_before(monkeypatch, lambda: make_shards(manifest, out), call)
        finished = out / "shards.json"
        assert not finished.exists() or finished.read_bytes() == expected["shards.json"]
        if not killed:
            break
    assert 3 < call < 59, "no run was killed, or none made progress"
    assert contents(out) == expected, "nothing is left of the runs that were killed"


@dataclass(frozen=True)
class Case:
    """A file that is written at once: `write` puts one of two values, `read` returns it."""

    name: str
    write: Callable[[Path, int], object]
    read: Callable[[Path], int]


def record(value: int) -> EvaluationRecord:
    ranks = Ranks(ties_against=np.array([value]), optimistic=np.array([value]))
    return EvaluationRecord(
        ranks={"raw": {"t2v": ranks.ties_against}},
        groups=np.zeros(1, np.int64),
        top=np.zeros((1, 1), np.int64),
        top_scores=np.zeros((1, 1)),
        positive=np.zeros(1),
        negative=np.zeros(1),
        step=value,
    )


BAD_CLIP = '{"id": "a", "video": "a.mp4", "reason": "x"}\n'

CASES = [
    Case("results.json", lambda p, v: write_json(p, {"v": v}), lambda p: json.loads(p.read_text())["v"]),
    Case("manifest", lambda p, v: write_file(p, f"{v}\n" * 999), lambda p: int(p.read_text()[:1])),
    Case("shards", lambda p, v: shard_writer._write_changed(p, b"%d" % v), lambda p: int(p.read_bytes())),
    Case(
        "metrics.jsonl",
        lambda p, v: p.write_text('{"kind": "train", "step": 1}\n') if v == 1 else drop_records(p, 1),
        lambda p: 1 if p.read_text() else 2,
    ),
    Case(
        "quarantine",
        lambda p, v: p.write_text(BAD_CLIP + BAD_CLIP[:9]) if v == 1 else quarantine._read(p),
        lambda p: 2 if p.read_text() == BAD_CLIP else 1,
    ),
    Case("per_query", lambda p, v: record(v).save(p), lambda p: EvaluationRecord.load(p).step),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_file_has_its_old_or_its_new_content_after_a_kill_before_any_call(case, tmp_path, monkeypatch):
    path = tmp_path / "file.npz"
    case.write(path, 1)
    values = []
    for call in range(20):
        killed = killed_before(monkeypatch, lambda: case.write(path, 2), call)
        values.append(case.read(path))
        if not killed:
            break
    assert values == sorted(values) and values[0] == 1 and values[-1] == 2
    case.write(path, 1)
    named = []
    with intercepted(
        monkeypatch, lambda name, paths: named.extend(paths[1:2] if name in ("rename", "replace") else [])
    ):
        case.write(path, 2)
    assert named == [str(path)], "written in place, where a kill leaves half of it"


def renamed(patch: pytest.MonkeyPatch, write: Callable[[], object]) -> list[str]:
    """Return the names that files were renamed to by `write`."""
    names: list[str] = []
    with intercepted(
        patch, lambda call, paths: names.extend(paths[1:2] if call in ("rename", "replace") else [])
    ):
        write()
    return [Path(name).name for name in names]


def test_the_features_of_a_part_are_complete_once_it_has_its_record(tmp_path, monkeypatch):
    features, facts = np.ones((2, 3)), {"frames": [2]}
    for call in range(10):
        store = FeatureStore(folder=tmp_path / str(call), clips=[], size=1)
        store.folder.mkdir()
        killed = killed_before(monkeypatch, lambda store=store: store.write(0, features, facts), call)
        array, record = store.paths(0)
        if record.exists():
            assert json.loads(record.read_text()) == facts and np.array_equal(np.load(array), features)
        if not killed:
            break
    assert record.exists()
    assert renamed(monkeypatch, lambda: store.write(0, features, facts)) == [array.name, record.name]


def test_embeddings_and_frame_indices_are_renamed_into_place(tmp_path, monkeypatch):
    embeddings = Embeddings(pooled=torch.ones(1, 2), index=torch.zeros(1, dtype=torch.int64))
    names = renamed(monkeypatch, lambda: corpus._write(tmp_path / "video", embeddings, [{"id": "a"}]))
    assert names == ["video.safetensors", "video.jsonl"]
    video = odd_clip(tmp_path, "one-frame")
    index = index_video(video)
    names = renamed(monkeypatch, lambda: FrameIndexStore(tmp_path / "kept").put(video, index))
    assert [path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()] == names
