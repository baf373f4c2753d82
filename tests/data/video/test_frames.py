"""Sampled frames of video files, and the reasons of files that give none."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from discovla.data.sampling import Sampling
from discovla.data.video import frames
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import DecodedFrames, read_frames, write_frames
from discovla.data.video.index import FrameIndexStore
from discovla.data.video.pyav import index_video, is_cut_off, open_video
from tests.data.conftest import movie, numbers
from tests.data.odd_clips import KINDS, odd_clip, picture

TEN = Sampling(frames=10, sample_rate=10.0)


def decode(path: Path, count: int, *, damaged: str = "refuse", **options) -> DecodedFrames:
    """Read `count` frames as on a first visit."""
    return read_frames(path, Sampling(frames=count, **options), damaged=damaged)


def verdict(path: Path) -> tuple[str, str, int]:
    """Return "ok", "damaged" or "refused", the reason, and how many frames decode."""
    try:
        index = index_video(path)
    except DecodeError as error:
        return "refused", error.reason, 0
    kind = "refused" if index.count == 0 else "damaged" if index.problem else "ok"
    return kind, index.fault(), index.count


def same(found: DecodedFrames, wanted: DecodedFrames) -> bool:
    """Return True if two readings agree in everything."""
    facts = [(d.indices, d.seconds, d.count, d.rate, d.problem) for d in (found, wanted)]
    return facts[0] == facts[1] and np.array_equal(found.frames, wanted.frames)


def test_frames_come_at_the_sampled_indices_in_presentation_order(counting):
    decoded = decode(counting, 5, sample_rate=10.0)
    assert decoded.indices == (0, 4, 9, 14, 19)
    assert numbers(decoded.frames) == [0, 4, 9, 14, 19]
    assert decoded.seconds == pytest.approx((0, 0.4, 0.9, 1.4, 1.9))


def test_frames_are_uint8_rgb_of_the_displayed_size(tmp_path):
    def red(_, height, width):
        return np.broadcast_to(np.uint8([250, 10, 10]), (height, width, 3))

    frames = decode(movie(tmp_path / "red.mp4", 4, size=(48, 80), draw=red), 2).frames
    assert frames.shape == (2, 48, 80, 3)
    assert frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - [250, 10, 10]).max() < 12


def test_a_short_clip_repeats_frames(tmp_path):
    decoded = decode(movie(tmp_path / "short.mp4", 3), 6)
    assert numbers(decoded.frames) == [0, 0, 0, 1, 1, 2]


def test_a_span_is_taken_in_seconds(counting):
    assert decode(counting, 3, sample_rate=10.0, start=0.5, end=0.9).indices == (5, 7, 9)


def test_sizes_that_are_odd_decode_whole(tmp_path):
    assert decode(movie(tmp_path / "odd.mp4", 3, size=(33, 47)), 1).frames.shape == (1, 33, 47, 3)


def corner(_, height, width):
    """White in the top left quarter, black elsewhere."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2] = 255
    return frame


@pytest.mark.parametrize(
    ("rotation", "row", "column"), [(0, 0, 0), (90, -1, 0), (180, -1, -1), (-90, 0, -1)], ids=str
)
def test_rotation_in_the_file_is_applied(tmp_path, rotation, row, column):
    path = movie(tmp_path / "turned.mp4", 3, size=(32, 64), draw=corner, rotation=rotation)
    frame = decode(path, 1).frames[0]
    assert frame.shape[:2] == ((64, 32) if rotation % 180 else (32, 64))
    corners = {(r, c): int(frame[r, c].mean()) for r in (0, -1) for c in (0, -1)}
    assert max(corners, key=corners.__getitem__) == (row, column)
    assert index_video(path).size == (frame.shape[1], frame.shape[0])


def test_the_header_count_is_a_guess_only(tmp_path, monkeypatch):
    path = movie(tmp_path / "clip.mp4", 20)
    for wrong in ({0}, {0, 2, 4, 6}, {30, 32}):
        monkeypatch.setattr("discovla.data.video.pyav._expected_frames", lambda *_, wrong=wrong: wrong)
        decoded = decode(path, 4, sample_rate=10.0)
        assert (decoded.count, decoded.indices) == (20, (0, 6, 12, 19))
        assert numbers(decoded.frames) == [0, 6, 12, 19]


def test_files_are_decoded_on_one_thread(counting):
    with open_video(counting) as video:
        context = video.stream.codec_context
        assert (context.thread_type.name, context.thread_count) == ("SLICE", 1)


def test_a_container_without_a_count_is_counted(tmp_path):
    path = movie(tmp_path / "clip.ts", 20)
    assert index_video(path).header_count == 0
    assert numbers(decode(path, 4, sample_rate=10.0).frames) == [0, 6, 12, 19]


def test_only_the_chosen_frames_are_converted(counting):
    seen = []

    def small(image: Image.Image) -> np.ndarray:
        seen.append(image.size)
        return np.asarray(image.resize((8, 8)))

    decoded = read_frames(counting, Sampling(frames=3, sample_rate=10.0), small)
    assert decoded.frames.shape == (3, 8, 8, 3)
    assert len(seen) == 3


def test_a_clip_that_breaks_off_is_refused_and_says_where(cut_off):
    kind, reason, count = verdict(cut_off)
    assert kind == "damaged"
    assert 1 <= count < 20
    assert reason.endswith("(the file is cut off)")
    store = FrameIndexStore()
    for _ in range(2):
        with pytest.raises(DecodeError, match=rf"cut_off.mp4: damaged: {count} frames decode of the 20 its"):
            read_frames(cut_off, TEN, store=store)


def test_a_clip_that_breaks_off_is_used_up_to_there_by_option(cut_off):
    _, _, count = verdict(cut_off)
    decoded = decode(cut_off, 2, sample_rate=10.0, damaged="use")
    assert decoded.indices == (0, count - 1)
    assert decoded.problem is not None
    store = FrameIndexStore()
    for _ in range(2):
        assert same(
            read_frames(cut_off, TEN, damaged="use", store=store),
            decode(cut_off, 10, sample_rate=10.0, damaged="use"),
        )


def test_a_whole_file_is_not_cut_off(counting, tmp_path):
    assert not is_cut_off(counting)
    (tmp_path / "cut.mp4").write_bytes(counting.read_bytes()[:-1])
    assert is_cut_off(tmp_path / "cut.mp4")


def audio_only(folder: Path) -> Path:
    path = folder / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = 16000, Fraction(1, 16000), 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def covered(folder: Path) -> Path:
    """Sound with a picture on its cover, which is no video."""
    path = folder / "covered.mp3"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("libmp3lame", rate=16000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.height = cover.width = 16
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(cover.encode(picture))
        container.mux(cover.encode())
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path


def text(folder: Path) -> Path:
    (folder / "text.mp4").write_text("this is no video")
    return folder / "text.mp4"


def empty(folder: Path) -> Path:
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def beheaded(folder: Path) -> Path:
    """An MP4 cut before its index."""
    whole = movie(folder / "whole.mp4").read_bytes()
    (folder / "beheaded.mp4").write_bytes(whole[:1024])
    return folder / "beheaded.mp4"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.mp4")
    return folder / "pipe.mp4"


def garbled(folder: Path) -> Path:
    """A file whose pictures are all overwritten."""
    content = bytearray(movie(folder / "whole.mp4").read_bytes())
    start = content.index(b"mdat") + 4
    size = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    content[start : start + size] = b"\xff" * size
    (folder / "garbled.mp4").write_bytes(content)
    return folder / "garbled.mp4"


def pointer(folder: Path) -> Path:
    (folder / "lfs.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n")
    return folder / "lfs.mp4"


def page(folder: Path) -> Path:
    (folder / "page.mp4").write_text("<!DOCTYPE html><html>404</html>")
    return folder / "page.mp4"


def playlist(folder: Path) -> Path:
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/a.ts\n#EXT-X-ENDLIST\n")
    return folder / "list.m3u8"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "none.mp4", "there is no such file"),
        (lambda folder: folder, "expected a file, found a folder or a device"),
        (pipe, "expected a file, found a folder or a device"),
        (empty, "the file is empty"),
        (text, "not a video file"),
        (beheaded, "truncated: an MP4 file without its index"),
        (audio_only, "no video stream: audio only"),
        (covered, "no video stream: audio only"),
        (garbled, "no frame decodes: Invalid data"),
        (playlist, "not a video file"),
        (pointer, "not a video file: a Git LFS pointer; fetch the file with `git lfs pull`"),
        (page, "not a video file: a web page, as a failed download leaves it; download the file again"),
    ],
    ids=[
        "missing",
        "folder",
        "pipe",
        "empty",
        "text",
        "beheaded",
        "sound",
        "cover",
        "garbled",
        "playlist",
        "pointer",
        "page",
    ],
)
@pytest.mark.timeout(20)
def test_a_file_without_frames_is_refused_with_its_reason(tmp_path, make, reason):
    path = make(tmp_path)
    kind, why, count = verdict(path)
    assert (kind, count) == ("refused", 0)
    assert why.startswith(reason)
    for damaged in ("refuse", "use"):
        with pytest.raises(DecodeError) as error:
            decode(path, 4, damaged=damaged)
        assert str(error.value).startswith(f"{path}: {reason}")


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = movie(tmp_path / "clip.mp4", 2)
    monkeypatch.setattr("discovla.data.video.pyav.av.open", denied)
    assert verdict(path)[1] == "cannot be read: Permission denied"


def ogg(folder: Path, count: int) -> Path:
    """A VP8 clip at 10 frames a second in Ogg, whose header has no rate and no number of frames."""
    path = folder / f"{count}.ogg"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=10, options={"g": "6", "crf": "4", "b": "2M"})
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        for i in range(count):
            picture = np.full((64, 64, 3), 8 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_file_without_a_rate_is_sampled_by_the_times_of_its_frames(tmp_path):
    path = ogg(tmp_path, 30)
    index = index_video(path)
    assert (index.header_rate, index.count, index.rate) == (None, 30, 10.0)
    store = FrameIndexStore()
    for _ in range(2):
        decoded = read_frames(path, Sampling(frames=3), store=store)
        assert (decoded.rate, decoded.indices, decoded.seconds) == (10.0, (0, 10, 20), (0.0, 1.0, 2.0))
        assert numbers(decoded.frames) == [0, 10, 20]


def test_a_first_visit_of_a_file_without_a_rate_decodes_once(tmp_path, monkeypatch):
    path = ogg(tmp_path, 30)
    calls = []
    decode_through = frames.decode_through
    monkeypatch.setattr(
        frames,
        "decode_through",
        lambda *args, **options: calls.append(args) or decode_through(*args, **options),
    )
    decode(path, 3)
    assert len(calls) == 1


@pytest.mark.parametrize("sampler", ["discovla", "clip4clip", "clip2video", "t2vparser"])
@pytest.mark.parametrize("suffix", ["gif", "ogg"])
def test_a_single_picture_is_a_clip_of_one_frame(tmp_path, suffix, sampler):
    path = tmp_path / f"one.{suffix}"
    if suffix == "gif":
        Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(path)
    else:
        path = ogg(tmp_path, 1)
    decoded = read_frames(path, Sampling(frames=2, sampler=sampler))
    assert decoded.count == 1
    assert set(decoded.indices) == {0}


def test_frames_without_times_and_rate_cannot_be_sampled(counting, tmp_path):
    store = FrameIndexStore()
    store.put(counting, replace(index_video(counting), header_rate=None, times=(None,) * 20))
    with pytest.raises(DecodeError, match=r"counting.mp4: frame rate: expected one in the header or times"):
        read_frames(counting, TEN, store=store)


def test_a_known_file_is_not_decoded_to_its_end_again(counting, monkeypatch):
    store = FrameIndexStore()
    read_frames(counting, TEN, store=store)
    monkeypatch.setattr(frames, "decode_through", None)
    moved = read_frames(counting, Sampling(frames=3, sample_rate=10.0), store=store)
    assert numbers(moved.frames) == [0, 9, 19]


def test_a_changed_file_is_decoded_to_its_end_again(tmp_path):
    store = FrameIndexStore()
    path = movie(tmp_path / "clip.mp4", 20)
    assert read_frames(path, TEN, store=store).count == 20
    assert read_frames(movie(path, 12), TEN, store=store).count == 12


def test_a_file_in_which_a_frame_is_not_found_is_decoded_from_its_start(counting, caplog):
    store = FrameIndexStore()
    wanted = read_frames(counting, TEN, store=store)
    index = store.get(counting)
    assert index is not None
    moved = (*index.times[:4], index.times[4] + 1, *index.times[5:])
    store.put(counting, replace(index, times=moved))
    for _ in range(3):
        assert np.array_equal(read_frames(counting, TEN, store=store).frames, wanted.frames)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    expected = f"{counting}: decoded from its start on each visit: from a keyframe on, frame 4 is not found"
    assert expected in caplog.text


def test_a_damaged_file_is_decoded_from_its_start_on_each_visit(counting, monkeypatch):
    store = FrameIndexStore()
    wanted = read_frames(counting, TEN, store=store)
    store.put(counting, replace(index_video(counting), faults=1))
    monkeypatch.setattr(frames.pyav, "decode_frames", None)
    assert same(read_frames(counting, TEN, store=store), wanted)


@pytest.mark.parametrize("name", KINDS)
def test_golden_every_visit_gives_the_same_frames(name, tmp_path):
    path, store = odd_clip(tmp_path, name), FrameIndexStore()
    wanted = read_frames(path, TEN)
    assert all(same(read_frames(path, TEN, store=store), wanted) for _ in range(3))


EDITED = [name for name, kind in KINDS.items() if kind.skipped or kind.delayed]


@pytest.mark.parametrize("name", EDITED)
def test_golden_an_edit_list_leaves_out_and_delays_frames(name, tmp_path):
    kind, shown = KINDS[name], KINDS[name].shown
    seconds = [(kind.times(i) - kind.skipped + kind.delayed) / kind.ticks for i in shown]
    pictures = np.stack([picture(i, *kind.size)[::4, ::4] for i in range(kind.count)]).astype(int)
    path, store = odd_clip(tmp_path, name), FrameIndexStore()
    for start in (0, 0, 9, 14):  # to its end, then from keyframes on
        sampling = Sampling(frames=len(shown) - start, sample_rate=10.0, start=start / 10)
        decoded = read_frames(path, sampling, store=store)
        assert (decoded.count, decoded.indices) == (len(shown), tuple(range(start, len(shown))))
        assert decoded.seconds == pytest.approx(seconds[start:], abs=1e-4)
        small = decoded.frames[:, ::4, ::4]
        nearest = [int(np.abs(pictures - frame).mean((1, 2, 3)).argmin()) for frame in small]
        assert nearest == shown[start:]


def test_a_sample_rate_too_fine_names_the_file(tmp_path):
    path = movie(tmp_path / "slow.mp4", 3, rate=Fraction(1, 4))
    with pytest.raises(DecodeError, match=r"slow.mp4: sample_rate: .* stride of 0 frames"):
        decode(path, 2)


def test_a_span_after_the_end_names_the_file(counting):
    with pytest.raises(
        DecodeError, match=r"counting.mp4: start: expected a time before the end of the clip \(2.000 s"
    ):
        decode(counting, 2, start=9.0)


def test_an_error_survives_the_way_out_of_a_worker(tmp_path):
    error = pickle.loads(pickle.dumps(DecodeError(tmp_path, "why")))
    assert str(error) == f"{tmp_path}: why"


def test_frames_are_written_as_the_model_sees_them(counting, tmp_path):
    files = write_frames(counting, tmp_path / "out", Sampling(frames=4, sample_rate=10.0))
    assert [file.name for file in files] == [
        "00_frame000000.png",
        "01_frame000006.png",
        "02_frame000012.png",
        "03_frame000019.png",
    ]
    assert numbers(np.stack([np.asarray(Image.open(file)) for file in files])) == [0, 6, 12, 19]
    record = json.loads((tmp_path / "out/frames.json").read_text())
    assert [(row["index"], row["seconds"]) for row in record["frames"]] == [
        (0, 0),
        (6, 0.6),
        (12, 1.2),
        (19, 1.9),
    ]
    assert (record["count"], record["width"], record["height"]) == (20, 64, 64)


def realdata_videos(folder: Path) -> list[tuple[Path, dict]]:
    """Every video of the folder and the facts its manifest gives."""
    files = json.loads((folder / "MANIFEST.json").read_text())["files"]
    chosen = [(folder / f["file"], f["facts"]) for f in files if f["file"].startswith("videos/")]
    assert chosen
    return chosen


def expected_verdict(facts: dict) -> str:
    """The verdict that follows from the facts."""
    video = facts.get("video") or {}
    if "open_error" in facts or not video.get("decoded_frames"):
        return "refused"
    return "damaged" if video.get("decode_error") or facts.get("demux_error") else "ok"


def header_rate(facts: dict) -> float:
    """Return the frames per second that the facts give, 0 where they give none."""
    number, _, divisor = ((facts.get("video") or {}).get("avg_rate") or "0").partition("/")
    return float(number) / float(divisor or 1) if float(divisor or 1) else 0.0


def test_realdata_every_file_gets_its_verdict_and_count(realdata):
    for path, facts in realdata_videos(realdata):
        kind, reason, count = verdict(path)
        decoded = (facts.get("video") or {}).get("decoded_frames") or 0
        assert (kind, count) == (expected_verdict(facts), decoded), path
        assert bool(reason) == (kind != "ok"), path


def test_realdata_every_file_decodes_or_names_itself(realdata):
    for path, facts in realdata_videos(realdata):
        wanted = expected_verdict(facts)
        if wanted != "refused":
            rate = index_video(path).rate
            sampling = Sampling(frames=12, sample_rate=min(rate or 1.0, 1.0))
            decoded = read_frames(
                path, sampling, lambda image: np.asarray(image.resize((8, 8))), damaged="use"
            )
            assert decoded.count == facts["video"]["decoded_frames"], path
            assert list(decoded.indices) == sampling.indices(decoded.count, decoded.rate or 1.0), path
            assert decoded.frames.shape == (12, 8, 8, 3), path
        if wanted != "ok":
            with pytest.raises(DecodeError) as error:
                decode(path, 2)
            assert str(error.value).startswith(f"{path}: "), path


@pytest.fixture(scope="module")
def first_frames(realdata) -> list[tuple[Path, dict, np.ndarray]]:
    """Every video that gives frames, its facts and its first frame."""
    rows = []
    for path, facts in realdata_videos(realdata):
        if expected_verdict(facts) != "refused":
            rate = index_video(path).rate or 1.0
            decoded = decode(path, 1, sample_rate=min(rate, 1.0), damaged="use")
            rows.append((path, facts["video"], decoded.frames[0]))
    return rows


def test_realdata_frames_have_the_displayed_shape(first_frames):
    for path, video, frame in first_frames:
        turned = round(video["rotation_deg"] / 90) % 2 == 1
        sizes = {(w, h) if turned else (h, w) for w, h in video["decoded_sizes"]}
        assert frame.shape[:2] in sizes, path


def test_realdata_a_landscape_turned_a_quarter_is_shown_as_portrait(first_frames):
    turned = 0
    for path, video, frame in first_frames:
        if abs(video["rotation_deg"]) == 90 and video["coded_width"] > video["coded_height"]:
            assert frame.shape[0] > frame.shape[1], path
            turned += 1
    if not turned:
        pytest.skip("no landscape video turned a quarter among the real files")


def test_realdata_first_frame_has_the_recorded_mean(first_frames):
    for path, video, frame in first_frames:
        assert frame.mean() == pytest.approx(video["first_frame_rgb24_mean"], abs=0.6), path
