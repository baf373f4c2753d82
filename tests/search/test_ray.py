"""The actors of a Ray cluster make the same index as this process."""

import pickle
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from discovla.search import ray
from discovla.search.index import Index
from tests.search.videos import write_video


def one_after_another(address, model, device, requests, *, merge=None):
    """Run the actors of `embed_on_cluster` in this process, on batches of three."""
    read, embed = ray._Reader(), ray._Embedder(model, device, merge)
    items = [{"place": place, "content": pickle.dumps(one)} for place, one in enumerate(requests)]
    rows = [row for item in items for row in read(item)]
    done = []
    for first in range(0, len(rows), 3):
        batch = {key: [row[key] for row in rows[first : first + 3]] for key in rows[0]}
        out = embed(batch)
        done += [dict(zip(out, values, strict=True)) for values in zip(*out.values(), strict=True)]
    yield from ray._finished(reversed(done))  # rows of a cluster come in any order


@pytest.fixture
def videos(tmp_path) -> Path:
    folder = tmp_path / "videos"
    for number in range(3):
        write_video(folder / f"{number}.mp4", [(f"v{number}", 2), (f"w{number}", 2)], seed=number)
    (folder / "broken.mp4").write_text("no video")
    return folder


class Killer(threading.Thread):
    """Kills one actor of each class with SIGKILL while it runs a task.

    killed: titles of the processes, as in "ray::MapWorker(FlatMap(_Reader)).submit".
    """

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(daemon=True)
        self.wanted, self.killed = list(classes), []
        self.ended = threading.Event()

    def run(self) -> None:
        while self.wanted and not self.ended.wait(0.01):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    self._kill(process, " ".join(process.cmdline()).strip())

    def _kill(self, process: psutil.Process, title: str) -> None:
        for name in self.wanted:
            if title.startswith("ray::") and f"({name})" in title and title.endswith(").submit"):
                process.kill()
                self.killed.append(title)
                self.wanted.remove(name)
                return


def check_equal(index: Index, other: Index) -> None:
    """Require the same moments, vectors and refused videos."""
    stored = []
    for one in (index, other):
        loaded = one._current()
        pooled = loaded.read_embedding(np.arange(len(loaded.contents))).pooled
        keys = zip(loaded.contents.video_id.tolist(), loaded.contents.start.tolist(), strict=True)
        videos = loaded.contents.videos
        stored.append({(videos[v].video, start): row for (v, start), row in zip(keys, pooled, strict=True)})
        assert [(Path(entry.video).name) for entry in one.refused()] == ["broken.mp4"]
    assert len(stored[0]) == 6 and set(stored[0]) == set(stored[1])
    for key, row in stored[0].items():
        torch.testing.assert_close(row, stored[1][key], rtol=1e-5, atol=1e-6)


def test_the_actors_make_the_same_index(videos, model, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "embed_on_cluster", one_after_another)
    with Index.create(tmp_path / "here", model) as here, Index.create(tmp_path / "there", model) as there:
        here.add([videos])
        report = there.add([videos], ray="auto")
        assert (report.added, len(report.refused)) == (3, 1)
        check_equal(here, there)


@pytest.mark.slow
def test_a_cluster_repeats_what_killed_actors_had_begun(videos, tmp_path):
    cluster = pytest.importorskip("ray", reason="Ray is an extra")
    with (
        Index.create(tmp_path / "here", "clip:drawn", device="cpu") as here,
        Index.create(tmp_path / "there", "clip:drawn", device="cpu") as there,
    ):
        here.add([videos])
        cluster.init(num_cpus=4, include_dashboard=False, log_to_driver=False)  # two actors of each class
        killer = Killer(["_Reader", "_Embedder"])
        killer.start()
        try:
            report = there.add([videos], ray="auto")
        finally:
            killer.ended.set()
            killer.join()
            cluster.shutdown()
        assert len(killer.killed) == 2, killer.killed
        assert (report.added, len(report.refused)) == (3, 1)
        check_equal(here, there)
