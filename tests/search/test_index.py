"""An index holds the moments of videos, follows their files, and loses nothing that it has acknowledged."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import discovla
from discovla.data.manifest import Clip, write_manifest
from discovla.data.sampling import Sampling
from discovla.data.video.frames import read_frames
from discovla.lock import LockHeld, WriterLock
from discovla.retrieval.embeddings import Embeddings
from discovla.search import store
from discovla.search.index import Index
from discovla.search.records import ImageQuery, LikeQuery, TextQuery, VideoQuery
from tests.search.videos import write_video


def spans(index: Index, name: str) -> list[tuple[float, float]]:
    """Return the moments of a video by its file's name."""
    contents = index._current().contents
    own = [i for i, row in contents.videos.items() if Path(row.video).name == name]
    rows = np.isin(contents.video_id, own)
    times = contents.start[rows].round(6).tolist(), contents.end[rows].round(6).tolist()
    return list(zip(*times, strict=True))


def moment_at(index: Index, name: str, start: float) -> int:
    """Return the id of the moment of a video that begins at a time."""
    contents = index._current().contents
    for place, video_id in enumerate(contents.video_id.tolist()):
        row = contents.videos[video_id]
        if Path(row.video).name == name and contents.start[place] == start:
            return int(contents.moment_id[place])
    raise AssertionError("no such moment")


def test_files_are_cut_into_moments(read_only):
    assert spans(read_only, "one.mp4") == [(0, 3)]
    assert spans(read_only, "three.mp4") == [(0, 4), (4, 9), (9, 12)]
    assert spans(read_only, "long.mp4") == [(0, 10), (8, 18), (16, 21)]


def test_an_image_finds_the_moment_that_shows_it(read_only, folder):
    frames = read_frames(folder / "three.mp4", Sampling(frames=12))
    shown = next(i for i, seconds in zip(frames.indices, frames.seconds, strict=True) if 5 < seconds < 8)
    path = read_only.path.parent / "shown.png"
    Image.fromarray(frames.images[shown]).save(path)
    for image in (path, path.read_bytes()):
        best = read_only.search(ImageQuery(image=image), k=1).hits[0]
        assert (Path(best.video).name, best.start, best.end) == ("three.mp4", 4, 9)
        assert 4 <= best.best_frame < 9


def test_a_clip_of_a_video_finds_its_moment(read_only, folder):
    best = read_only.search(VideoQuery(path=folder / "three.mp4", start=9, end=12), k=1).hits[0]
    assert (Path(best.video).name, best.start) == ("three.mp4", 9)


def test_like_this_leaves_the_moment_itself_out(read_only):
    moment = moment_at(read_only, "three.mp4", 4)
    hits = read_only.search(LikeQuery(moment_id=moment), k=50, merge=False).hits
    assert len(hits) == 6
    assert moment not in [hit.moment_id for hit in hits]


def test_neighbouring_moments_answer_once(read_only):
    moment = moment_at(read_only, "long.mp4", 0)
    picture = ImageQuery(image=read_only.thumbnail(moment))
    apart = read_only.search(picture, k=3, merge=False).hits
    assert {Path(hit.video).name for hit in apart} == {"long.mp4"}  # all three look the same
    merged = read_only.search(picture, k=3).hits
    assert [Path(hit.video).name for hit in merged].count("long.mp4") == 1
    best = merged[0]
    assert (Path(best.video).name, best.start, best.end) == ("long.mp4", 0, pytest.approx(21))


def test_a_text_is_scored_by_the_method(read_only, model):
    text = "a red circle moves to the left"
    result = read_only.search(text, k=50, merge=False)
    rows = read_only._current().embedding(np.arange(7))
    matrix = model.similarity(model.embed_texts([text]), Embeddings.of(rows))[0]
    ids = read_only._current().contents.moment_id
    assert [hit.moment_id for hit in result.hits] == ids[
        matrix.argsort(descending=True, stable=True)
    ].tolist()
    scores = torch.tensor([hit.score for hit in result.hits])
    torch.testing.assert_close(scores, matrix.sort(descending=True).values, rtol=1e-5, atol=1e-5)
    assert result.seconds > 0
    known = TextQuery(text=text, embedding=read_only.embed_texts([text]))
    assert [hit.moment_id for hit in read_only.search(known, k=3).hits] == [
        hit.moment_id for hit in read_only.search(text, k=3).hits
    ]


def test_thumbnails_show_the_frame_as_displayed(read_only):
    import io

    content = read_only.thumbnail(moment_at(read_only, "one.mp4", 0))
    assert Image.open(io.BytesIO(content)).size == (96, 64)


def test_frames_of_a_moment_are_scored(read_only):
    moment = moment_at(read_only, "three.mp4", 4)
    scores = read_only.frame_scores(moment, "a red circle")
    times = [time for time, _ in scores]
    assert times == sorted(times) and times[0] >= 4 and times[-1] < 9
    assert all(-1 <= cosine <= 1 for _, cosine in scores)


@pytest.mark.parametrize("moment", [-1, 10**6, "0", None, 1.0, True])
def test_an_id_that_is_none_is_refused(read_only, moment):
    for call in (read_only.thumbnail, read_only.media_path, lambda one: read_only.frame_scores(one, "x")):
        with pytest.raises(KeyError):
            call(moment)


def test_a_query_that_cannot_be_read_is_refused(read_only, tmp_path):
    with pytest.raises(ValueError, match="image: expected an image file"):
        read_only.search(ImageQuery(image=b"no image"))
    with pytest.raises(discovla.data.video.errors.DecodeError, match="there is no such file"):
        read_only.search(VideoQuery(path=tmp_path / "none.mp4"))
    with pytest.raises(ValueError, match="expected a text, found an empty one"):
        read_only.search("  ")
    with pytest.raises(ValueError, match=r"k: expected 1..1000, found 0"):
        read_only.search("a", k=0)


def test_columns_of_a_table_select_moments(folder, model, tmp_path):
    table = tmp_path / "own.csv"
    lines = [
        "video,Year,title,start,end",
        f"{folder / 'one.mp4'},2019,the first,,",
        f"{folder / 'three.mp4'},2021,,4,9",
        f"{folder / 'below/long.mp4'},,third,,",
    ]
    table.write_text("\n".join(lines) + "\n")
    with Index.create(tmp_path / "index", model) as index:
        assert index.add([table]).added == 3
        hits = index.search("a circle", where="year > 2020").hits
        assert [(hit.start, hit.end, hit.columns["year"]) for hit in hits] == [(4, 9, 2021)]
        assert len(index.search("a circle", where="title like 'th%' and duration > 9", merge=False).hits) == 2
        nothing = index.search("a circle", where="year = 1900")
        assert (nothing.hits, nothing.probability_best) == ([], None)
        assert "no moment fulfils" in nothing.note
        assert index.status().columns["year"] == "int"
        table.write_text(table.read_text().replace("2021", "2022"))
        assert index.add([table]).unchanged == 3
        assert len(index.search("a circle", where="year = 2022").hits) == 1


def test_a_clip_of_a_manifest_is_embedded_as_in_evaluation(folder, model, tmp_path):
    clips = [
        Clip(id="whole", video=folder / "three.mp4", captions=("x",), split="test"),
        Clip(id="part", video=folder / "three.mp4", captions=("x",), split="test", start=3.5, end=8.0),
    ]
    write_manifest(tmp_path / "manifest.jsonl", clips)
    with Index.create(tmp_path / "index", model) as index:
        index.add([tmp_path / "manifest.jsonl"])
        embedding = index._current().read_embedding(np.arange(2))
        found = [(hit.start, hit.end) for hit in index.search("x", merge=True).hits]
    expected = model.embed_videos([(clip.video, clip.start, clip.end) for clip in clips])
    assert torch.equal(embedding.pooled, expected.pooled)
    assert sorted(found) == [(0, 12), (3.5, 8)]


def test_only_what_is_new_or_has_changed_is_read(model, tmp_path):
    videos, text = tmp_path / "videos", "a circle"
    for name in ("a", "b", "c"):
        write_video(videos / f"{name}.mp4", [(name, 2)])
    with Index.create(tmp_path / "index", model) as index:
        assert index.add([videos]).added == 3
        before = {hit.video: hit.moment_id for hit in index.search(text).hits}
        report = index.add([videos])
        assert (report.added, report.unchanged, report.changed) == (0, 3, 0)
        os.utime(videos / "a.mp4", (1, 1))  # touched, with the same content
        write_video(videos / "b.mp4", [("other", 2), ("another", 2)])
        (videos / "c.mp4").rename(tmp_path / "c.mp4")
        write_video(videos / "d.mp4", [("d", 2)])
        report = index.add([videos])
        counts = (report.added, report.unchanged, report.changed, report.gone)
        assert counts == (1, 1, 1, 1)
        after = {hit.video: hit.moment_id for hit in index.search(text, merge=False, k=50).hits}
        names = sorted(Path(video).name for video in after)
        assert names == ["a.mp4", "b.mp4", "d.mp4"]  # the gone one answers no more
        assert after[str(videos / "a.mp4")] == before[str(videos / "a.mp4")]
        assert spans(index, "b.mp4") == [(0, 2), (2, 4)]
        assert index.status().gone == 1
        (tmp_path / "c.mp4").rename(videos / "c.mp4")  # back again: its moments were kept
        assert index.add([videos]).unchanged == 4
        assert index.status().gone == 0
        (videos / "c.mp4").unlink()
        index.add([videos])
        assert index.prune() == 1
        assert index.remove([videos / "a.mp4"]) == 1
        assert [Path(entry.video).name for entry in index.videos()] == ["b.mp4", "d.mp4"]
        assert index.status().moments == 3


def test_videos_that_cannot_be_read_are_listed_with_reasons(folder, model, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "empty.mp4").touch()
    (videos / "text.mp4").write_text("not a video")
    (videos / "half.mp4").write_bytes((folder / "one.mp4").read_bytes()[:3000])
    (videos / "bad\udcff.mp4").write_bytes(b"x")
    with Index.create(tmp_path / "index", model) as index:
        report = index.add([videos, folder / "one.mp4", tmp_path / "none.mp4"])
        reasons = {Path(video).name: reason for video, reason in report.refused}
        assert report.added == 1
        assert reasons["empty.mp4"] == "the file is empty (0 bytes)"
        assert reasons["none.mp4"] == "there is no such file"
        assert "not a video file" in reasons["text.mp4"]
        assert len(reasons) == 5 and any("UTF-8" in reason for reason in reasons.values())
        assert {Path(entry.video).name for entry in index.refused()} == set(reasons) - {
            name for name, reason in reasons.items() if "UTF-8" in reason
        }
        again = index.add([videos])
        assert (again.added, len(again.refused)) == (0, 4)
        (videos / "empty.mp4").write_bytes((folder / "one.mp4").read_bytes())
        assert index.add([videos]).added == 1


def test_another_model_is_refused_and_rebuild_replaces_the_index(folder, model, tmp_path):
    path = tmp_path / "index"
    with Index.create(path, model) as index:
        index.add([folder / "one.mp4", (folder / "three.mp4", 4.0, 9.0)])
    other = discovla.load("clip:drawn", data={"frames": 4})
    with pytest.raises(ValueError, match=r"expected the model of the index .* another data; --rebuild"):
        Index.open(path, model=other)
    with Index.open(path) as index:
        assert index.search("a circle").hits  # by the model that it names
        report = index.rebuild(model=other, moments="windows")
    assert report.added == 2
    with Index.open(path, model=other) as index:
        assert index.settings["moments"] == "windows"
        assert spans(index, "three.mp4") == [(4, 9)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]


def test_one_process_writes_at_a_time(folder, model, tmp_path):
    with Index.create(tmp_path / "index", model) as index:
        with WriterLock(index.path, "discovla index"), pytest.raises(LockHeld):
            index.add([folder])
        reader = Index.open(index.path, model=model, read_only=True)
        with pytest.raises(ValueError, match="read_only"):
            reader.add([folder])
        assert len(reader.search("x").hits) == 0
        index.add([folder / "one.mp4"])
        assert reader.refresh()
        assert not reader.refresh()
        hits = reader.search("x").hits
        assert len(hits) == 1
        index.add([folder])  # removes the files from which the reader reads
        assert reader.thumbnail(hits[0].moment_id)


def test_a_full_disk_is_one_line_and_the_index_stays_good(folder, model, tmp_path, monkeypatch):
    with Index.create(tmp_path / "index", model) as index:
        index.add([folder / "one.mp4"])
        table = index._store._tables["moments"]

        class Full:
            def add(self, rows):
                raise RuntimeError("lance error: IO: No space left on device (os error 28), store.rs:1")

            def __getattr__(self, name):
                return getattr(table, name)

        with monkeypatch.context() as patch:
            patch.setitem(index._store._tables, "moments", Full())
            with pytest.raises(OSError, match="no space left on the disk") as error:
                index.add([folder])
        assert "\n" not in str(error.value)
        assert len(index.search("x").hits) == 1
        assert index.add([folder]).added == 2


SCRIPT = """
import sys
from pathlib import Path
from discovla.search import indexing
from discovla.search.index import Index
indexing.COMMIT_MOMENTS = 1  # written after each batch
def show(state):
    print("done", state.done, state.moments, flush=True)
with Index.open(sys.argv[1]) as index:
    index.model.batch_size = 2
    print("start", flush=True)
    print("report", index.add([sys.argv[2]], progress=show).added, flush=True)
"""


def killed(index: Path, videos: Path, seconds: float) -> int:
    """Index in another process and kill it some time after its start; return the moments acknowledged."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(index), str(videos)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "start\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    lines = [line.split() for line in process.stdout.read().splitlines()]
    process.wait()
    return max([int(words[2]) for words in lines if words[0] == "done"], default=0)


def check_after_kills(tmp_path: Path, model, kills: list[float]) -> None:
    """Kill indexing again and again: what was acknowledged stays, and nothing is there twice."""
    videos, path = tmp_path / "videos", tmp_path / "index"
    for number in range(24):
        write_video(videos / f"{number:02d}.mp4", [(f"v{number}", 1.5)], seed=number)
    Index.create(path, "clip:drawn").close()
    known = 0
    for seconds in kills:
        acknowledged = killed(path, videos, seconds)
        with Index.open(path, model=model) as index:
            contents = index._current().contents
            assert len(contents) >= acknowledged and len(contents) >= known
            assert len(set(contents.video_id.tolist())) == len(contents)
            known = len(contents)
    with Index.open(path, model=model) as index:
        report = index.add([videos])
        assert report.added + report.unchanged == 24 and report.unchanged == known
        contents = index._current().contents
        assert sorted(Path(row.video).name for row in contents.videos.values()) == [
            f"{number:02d}.mp4" for number in range(24)
        ]
        assert len(contents) == len(set(contents.moment_id.tolist())) == 24
        assert contents.stale == 0
        hit = index.search(VideoQuery(path=videos / "07.mp4"), k=1).hits[0]
        assert Path(hit.video).name == "07.mp4"


@pytest.mark.slow
def test_indexing_goes_on_after_kills(model, tmp_path):
    check_after_kills(tmp_path, model, [0.7, 0.9])


def test_settings_of_another_version_or_a_missing_index_are_one_line(model, tmp_path):
    with pytest.raises(ValueError, match="expected an index, found nothing"):
        Index.open(tmp_path / "none")
    Index.create(tmp_path / "index", model).close()
    file = tmp_path / "index" / store.SETTINGS
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 99}))
    with pytest.raises(ValueError, match="expected version 1, found 99"):
        Index.open(tmp_path / "index")
    with pytest.raises(ValueError, match="expected an empty folder or none"):
        Index.create(tmp_path, model)
