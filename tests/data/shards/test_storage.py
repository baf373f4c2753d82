"""Reads of shard files from folders and servers, good and bad."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from discovla.data.shards import storage
from discovla.data.shards.reader import Shards
from discovla.data.shards.storage import StorageError, open_storage
from discovla.data.video.errors import DecodeError
from tests.data.shards.server import Server, served
from tests.data.shards.world import make_manifest, make_shards, sampling

TAR = "train-000000.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    manifest = make_manifest(tmp_path_factory.mktemp("storage"))
    make_shards(manifest, manifest.parent / "shards")
    return manifest.parent / "shards"


@pytest.fixture
def server(folder) -> Server:
    with served(folder) as (address, server):
        server.address = address
        yield server


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(storage, "PAUSE", 0.0)


@pytest.fixture(params=["file", "memory", "http", "s3", "gs"])
def url(request, folder, monkeypatch):
    """The shards behind each protocol, read by the real client of the protocol."""
    match request.param:
        case "file":
            yield f"file://{folder}"
        case "memory":
            filesystem = fsspec.filesystem("memory")
            filesystem.put(f"{folder}/*", "/bucket/shards/", recursive=False)
            yield "memory://bucket/shards"
            filesystem.rm("/bucket", recursive=True)
        case _:
            if request.param == "s3":
                pytest.importorskip("s3fs", reason="needs the extra `s3`")
            if request.param == "gs":
                pytest.importorskip("gcsfs", reason="needs the extra `gs`")
            fsspec.get_filesystem_class(request.param).clear_instance_cache()  # of another address
            with served(folder) as (address, _):
                for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
                    monkeypatch.setenv(name, address)
                for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                    monkeypatch.setenv(name, "test")
                yield (
                    f"{address}/bucket/shards/"
                    if request.param == "http"
                    else f"{request.param}://bucket/shards"
                )


def frames(shards: Shards) -> list[np.ndarray]:
    """The frames of all good clips."""
    return [shards.frames(clip, sampling(clip), None) for clip in shards.clips if clip.id != "text"]


class Clips(torch.utils.data.Dataset):
    """Frames by the index of a clip, for a `DataLoader`."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(frames(self.shards))

    def __getitem__(self, index: int) -> np.ndarray:
        return frames(self.shards)[index]


def test_every_protocol_gives_the_frames_of_the_folder_before_and_after_a_fork(url, folder):
    local, shards = Shards(folder), Shards(url)
    assert [(c.id, c.captions) for c in shards.clips] == [(c.id, c.captions) for c in local.clips]
    for reader in (shards, pickle.loads(pickle.dumps(shards))):
        assert all(map(np.array_equal, frames(reader), frames(local)))
    workers = torch.utils.data.DataLoader(Clips(shards), batch_size=None, num_workers=2, timeout=60)
    assert all(map(np.array_equal, workers, frames(local)))
    assert all(map(np.array_equal, frames(shards), frames(local))), "the parent goes on after the fork"


def test_a_file_that_does_not_exist_is_named_by_every_protocol(url):
    with pytest.raises(StorageError, match=r"shards/no.json: (no such file|No such file or directory)$"):
        open_storage(url).read("no.json")


def test_a_range_beyond_the_end_of_a_file_is_named_by_every_protocol(url):
    with pytest.raises(StorageError, match=r"shards.json: cut off: expected 100000 bytes at 10, found \d+$"):
        open_storage(url).read_ranges("shards.json", [(0, 5), (10, 100_000)])


def test_adjacent_frames_are_one_request_and_ranges_of_a_clip_come_together(server):
    shards = Shards(f"{server.address}/?token=secret")
    frames(shards)
    assert server.requests[TAR] == 2, "one request for each of its clips"
    assert [len(part) for part in open_storage(server.address).read_ranges(TAR, [(0, 7), (512, 9)])] == [7, 9]


def test_few_files_are_held_open(folder, monkeypatch):
    monkeypatch.setattr(storage, "OPEN_FILES", 2)
    shards = Shards(folder)
    for _ in range(2):
        frames(shards)
    assert len(shards._storage._open) == 2


@pytest.mark.parametrize("fault", ["drop", 503])
def test_a_read_that_fails_transiently_is_repeated(fault, server, folder, no_pause, caplog):
    server.faults = {TAR: [fault, fault, None], "clips.jsonl": [fault, None]}
    shards = Shards(server.address)
    clip = shards.clips[0]
    expected = Shards(folder).frames(clip, sampling(clip), None)
    assert np.array_equal(shards.frames(clip, sampling(clip), None), expected)
    assert server.requests[TAR] == 3
    assert sum("attempt" in record.message for record in caplog.records) == 3


@pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        ("drop", r"not read in 5 attempts: ClientPayloadError: ", 5),
        (503, r"not read in 5 attempts: the server answers HTTP 503", 5),
        ("hang", r"not read in 5 attempts: no complete answer within 0.2 s", 5),
        (404, r"no such file", 1),
        (403, r"the server answers HTTP 403", 1),
        ("short", r"cut off: expected 3072 bytes at \d+, found 3071", 1),
        ("whole", r"expected 3072 bytes at \d+, found 20480: the server does not answer range requests", 1),
    ],
    ids=str,
)
def test_a_read_that_keeps_failing_ends_in_one_line(fault, message, requests, server, no_pause, monkeypatch):
    monkeypatch.setattr(storage, "RANGE_SECONDS", 0.2 if fault == "hang" else 60.0)
    server.faults = {TAR: [fault]}
    shards = Shards(f"{server.address}?token=secret")
    with pytest.raises(DecodeError, match=f"127.0.0.1:\\d+/{TAR}: {message}") as error:
        shards.frames(shards.clips[0], sampling(shards.clips[0]), None)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    assert server.requests[TAR] == requests


def test_a_server_without_ranges_is_refused_before_a_tar_is_read(server):
    server.faults = {"shards.json": ["whole"], TAR: ["whole"]}
    with pytest.raises(ValueError, match=r"shards.json: .*: the server does not answer range requests"):
        Shards(server.address)
    assert not server.requests[TAR]


def test_no_attempt_starts_after_the_deadline(server, monkeypatch):
    monkeypatch.setattr(storage, "DEADLINE", 0.5)
    server.faults = {"shards.json": [503]}
    with pytest.raises(StorageError, match="not read in 2 attempts"):
        open_storage(server.address).read("shards.json")


def test_a_tar_that_is_cut_off_on_the_server_is_named(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "shards"))
    (copy / TAR).write_bytes((copy / TAR).read_bytes()[:3000])
    with served(copy) as (address, _):
        shards = Shards(address)
        with pytest.raises(DecodeError, match=f"{TAR}: cut off"):
            shards.frames(shards.clips[0], sampling(shards.clips[0]), None)


def test_frames_that_change_on_the_server_are_found_at_every_read(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "shards"))
    with served(copy) as (address, _):
        shards = Shards(address)
        clip = shards.clips[0]
        shards.frames(clip, sampling(clip), None)
        (copy / TAR).write_bytes(bytes(len((copy / TAR).read_bytes())))
        with pytest.raises(DecodeError, match=rf"{TAR}: frame \d+ at byte \d+: expected checksum"):
            shards.frames(clip, sampling(clip), None)


def test_a_missing_index_and_a_refused_connection_are_one_line(no_pause, tmp_path):
    with served(tmp_path) as (address, _), pytest.raises(ValueError, match=r"shards.json: no such file; exp"):
        Shards(address)
    with pytest.raises(ValueError, match=r"shards.json: not read in 5 attempts: Connection refused") as error:
        Shards(address)
    assert "\n" not in str(error.value)


def test_an_unknown_protocol_and_a_missing_package_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"nowhere://x: expected a folder, http, https, .* found 'nowhere'"):
        Shards("nowhere://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ValueError, match=r"s3://bucket/x: .*s3fs.*; pip install 'discovla\[s3\]'"):
        Shards("s3://bucket/x")


def test_a_split_with_a_slash_is_read_over_http(tmp_path):
    manifest = make_manifest(tmp_path, count=1, split="dev/a b")
    make_shards(manifest, tmp_path / "shards")
    with served(tmp_path / "shards") as (address, _):
        shards = Shards(address)
        clip = shards.split("dev/a b")[0]
        expected = Shards(tmp_path / "shards").frames(clip, sampling(clip), None)
        assert np.array_equal(shards.frames(clip, sampling(clip), None), expected)


def test_a_signal_interrupts_a_read_that_hangs(server):
    class Interrupted(BaseException):
        pass

    def interrupt(*_):
        raise Interrupted

    server.faults = {"shards.json": ["hang"]}
    reader = open_storage(server.address)
    before = signal.signal(signal.SIGUSR2, interrupt)
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGUSR2])
    started = time.monotonic()
    try:
        timer.start()
        with pytest.raises(Interrupted):
            reader.read("shards.json")
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR2, before)
    assert time.monotonic() - started < 30
