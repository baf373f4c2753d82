"""Measure the search: selection, searches of large indexes, kills, and probabilities.

    python benchmarks/search.py select       top 10 beside faiss-cpu flat, ranks beside counting in NumPy
    python benchmarks/search.py query [N]    one query among N vectors (default 200,000) in memory
    python benchmarks/search.py large [N]    an index of N random moments x 512 (default 200,000): bytes, time
                                             to open, a search beside the product, LanceDB's own and faiss
    python benchmarks/search.py kills [N]    indexing killed N times (default 20) while it writes
    python benchmarks/search.py calibrate    how often hits of a probability are right, on drawn clips

One thread.  What is compared takes turns; ratios are medians of those of one round, in process CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script starts with its own folder there

from benchmarks.measure import machine, results_file, write_row
from discovla.data.manifest import Clip, read_manifest, write_manifest
from discovla.drawn_world.synthetic import WorldSizes, draw_world
from discovla.model import load
from discovla.ops.rank_of_positive import rank_of_positive
from discovla.ops.top_k import top_k, top_of_scores
from discovla.retrieval.embeddings import Embeddings
from discovla.search import indexing
from discovla.search.index import Index
from discovla.search.query import Correction
from discovla.search.records import TextQuery
from discovla.search.store import MomentRow, Store, VideoRow

ROUNDS = 9
WIDTH = 512
THUMBNAIL = 4096  # bytes of a stand-in for a JPEG
CORRECTIONS: tuple[Correction, ...] = ("none", "dual-softmax", "qb-norm")


def rounds(calls: dict[str, Callable[[], object]], count: int = ROUNDS) -> dict[str, list[float]]:
    """Return the CPU milliseconds of calls that take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(count + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if number:  # the first round warms up
                times[name].append(1000 * (time.process_time() - began))
    return times


def row_of(name: str, times: dict[str, list[float]], ours: str, **facts: Any) -> dict[str, Any]:
    """Return a row with median times, and ratios of ours to each other of the same round."""
    ratios = {
        f"ratio_to_{other}": round(
            statistics.median(a / b for a, b in zip(times[ours], values, strict=True)), 3
        )
        for other, values in times.items()
        if other != ours
    }
    medians = {f"cpu_ms_{key}": round(statistics.median(values), 3) for key, values in times.items()}
    return {"measure": name, **facts, **medians, **ratios}


def select() -> list[dict[str, Any]]:
    """Compare the selection of the best items, and ranks, with other libraries."""
    faiss = import_module("faiss")
    faiss.omp_set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(20_000, WIDTH, generator=generator)
    items = torch.randn(1_000, WIDTH, generator=generator)
    positive = torch.randint(0, 1_000, (20_000,), generator=generator)
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(_unit(items))

    def count() -> tuple[np.ndarray, np.ndarray]:
        scores = _unit(query) @ _unit(items).T
        target = scores[np.arange(len(scores)), positive.numpy()][:, None]
        return (scores >= target).sum(1), 1 + (scores > target).sum(1)

    shape = {"queries": 20_000, "items": 1_000, "width": WIDTH}
    product: Callable[[], object] = lambda: query @ items.T  # noqa: E731
    best = rounds(
        {
            "ours": lambda: top_k(query, items, 10),
            "faiss": lambda: flat.search(_unit(query), 10),
            "product": product,
        }
    )
    ranks = rounds(
        {"ours": lambda: rank_of_positive(query, items, positive), "numpy": count, "product": product}
    )
    same = (top_k(query, items, 10)[1].numpy() == flat.search(_unit(query), 10)[1]).mean()
    equal = float((rank_of_positive(query, items, positive)[0].numpy() == count()[0]).mean())
    return [
        row_of("top 10", best, "ours", **shape, same_as_faiss=float(same)),
        row_of("ranks", ranks, "ours", **shape, same_as_numpy=equal),
    ]


def query(count: int) -> list[dict[str, Any]]:
    """Compare the top 10 of one query among vectors that an index holds in memory, as columns."""
    faiss = import_module("faiss")
    faiss.omp_set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, WIDTH, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    one = torch.randn(WIDTH, generator=generator)
    columns, flat = rows.T.contiguous(), faiss.IndexFlatIP(WIDTH)
    flat.add(rows.numpy())

    def search() -> np.ndarray:
        return top_of_scores((one @ columns)[None], 10)[1][0].numpy()

    times = rounds(
        {
            "ours": search,
            "numpy": lambda: rows.numpy() @ one.numpy(),
            "faiss": lambda: flat.search(one.numpy()[None], 10),
        }
    )
    same = bool((search() == flat.search(one.numpy()[None], 10)[1][0]).all())
    return [row_of("one query", times, "ours", vectors=count, width=WIDTH, same_as_faiss=same)]


def _unit(rows: torch.Tensor) -> np.ndarray:
    return rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True)


def large(count: int) -> list[dict[str, Any]]:
    """Search an index of random moments."""
    faiss = import_module("faiss")
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="search-", dir=os.environ.get("TMPDIR")) as folder:
        path = Path(folder) / "large.index"
        model = load("clip:drawn")
        Index.create(path, model).close()
        index = _filled(path, count)
        began = time.perf_counter()
        index = Index.open(path, read_only=True)
        status = index.status()
        opened = time.perf_counter() - began
        payload = count * ((4 + 2) * WIDTH + THUMBNAIL)  # a pooled vector, one of a frame
        generator = torch.Generator().manual_seed(1)
        pooled = torch.randn(1, WIDTH, generator=generator)
        query = TextQuery(
            text="x", embedding=Embeddings(pooled=pooled, index=torch.zeros(1, dtype=torch.int64))
        )
        index._model = model  # scores by cosines; its width plays no part in them
        began = time.perf_counter()
        first = index.search(query, 10)
        loaded = time.perf_counter() - began
        loaded_ = index._current()
        matrix, unit = loaded_.matrix.T.contiguous().numpy(), (pooled[0] / pooled[0].norm()).numpy()
        table = index._store._tables["moments"]
        flat = faiss.IndexFlatIP(WIDTH)
        for part in np.array_split(matrix, max(1, count // 50_000)):
            flat.add(part)
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda: index.search(query, 10, merge=False),
            "numpy": lambda: matrix @ unit,
            "faiss": lambda: flat.search(unit[None], 10),
            "lancedb": lambda: (
                table.search(unit)
                .distance_type("cosine")
                .limit(10)
                .select(["moment_id", "_distance"])
                .to_list()
            ),
        }
        wall: dict[str, list[float]] = {name: [] for name in calls}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(ROUNDS + 1):
            for name, call in calls.items():
                cpu, clock = time.process_time(), time.perf_counter()
                call()
                if number:
                    times[name].append(1000 * (time.process_time() - cpu))
                    wall[name].append(1000 * (time.perf_counter() - clock))
        ids = flat.search(unit[None], 10)[1][0]
        same = [hit.moment_id for hit in index.search(query, 10, merge=False).hits] == [
            int(loaded_.contents.moment_id[i]) for i in ids
        ]
        row = row_of("search of an index", times, "ours", moments=count, width=WIDTH)
        walls = {f"ms_{name}": round(statistics.median(values), 2) for name, values in wall.items()}
        facts = {
            "bytes_per_vectors_and_thumbnails": round(status.size / payload, 3),
            "open_seconds": round(opened, 3),
            "first_search_seconds": round(loaded, 3),
            "same_as_faiss": same,
            "hits": len(first.hits),
        }
        return [{**row, **walls, **facts}]


def _filled(path: Path, count: int) -> Index:
    """Fill an index with random moments, 100 a video, by its own store."""
    settings = json.loads((path / "index.json").read_text())
    settings["dimension"] = WIDTH
    (path / "index.json").write_text(json.dumps(settings))
    shutil.rmtree(path / "tables")
    store = Store(path, WIDTH)
    store.open(create=True)
    rng = np.random.default_rng(0)
    for first in range(0, count, 20_000):
        size = min(20_000, count - first)
        vectors = rng.standard_normal((size, WIDTH), np.float32)
        moments = [
            MomentRow(
                moment_id=first + i,
                video_id=(first + i) // 100,
                start=10.0 * (i % 100),
                end=10.0 * (i % 100) + 10,
                times=np.zeros(1, np.float32),
                best=0,
                thumbnail=rng.bytes(THUMBNAIL),
                pooled=vectors[i],
                tokens=None,
                mask=None,
                frames=vectors[i : i + 1].astype(np.float16),
            )
            for i in range(size)
        ]
        videos = [_video(number) for number in range(first // 100, (first + size) // 100)]
        store.append(moments, videos)
    store.compact(store.contents())
    return Index.open(path)


def _video(number: int) -> VideoRow:
    return VideoRow(
        video_id=number,
        video=f"/videos/{number:06d}.mp4",
        start=None,
        end=None,
        clip=False,
        size=1,
        mtime_ns=1,
        checksum="",
        state="indexed",
        reason="",
        duration=1000.0,
        moments=100,
        columns="{}",
    )


def kills(count: int) -> list[dict[str, Any]]:
    """Kill indexing while it writes, and count what is lost or there twice.

    A kill waits until a random number of moments, 1 to 36, is written since the start, and then up to 0.1 s,
    so that it falls before, within or after the next write, which is of four moments at most.
    """
    indexing.COMMIT_MOMENTS = 1
    generator = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="search-") as name:
        folder = Path(name)
        clips = 40 * count
        sizes = WorldSizes(train=40, val=1, test=1, siblings=0)
        manifest = draw_world(folder / "world", sizes=sizes, workers=1)
        video = next(iter(read_manifest(manifest))).video
        videos = folder / "videos"
        videos.mkdir()
        for number in range(clips):
            os.link(video, videos / f"{number:05d}.mp4")
        model = load("clip:drawn", batch_size=4)
        path = folder / "index"
        _in_child(lambda: Index.create(path, model).close())
        lost = twice = wrong = done = early = 0
        log, report = folder / "acknowledged", folder / "report"
        for _ in range(count):
            log.write_text("0")
            child = os.fork()
            if not child:
                with Index.open(path, model=model) as index:
                    index.add([videos], progress=lambda state: _note(log, state.moments))
                os._exit(0)
            least = generator.randint(1, 36)
            while int(log.read_text()) < least:
                if os.waitpid(child, os.WNOHANG)[0]:
                    raise RuntimeError("indexing ended before it was killed")
                time.sleep(0.001)
            time.sleep(generator.uniform(0.0, 0.1))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            _in_child(lambda: report.write_text(_counts(path, model)))
            moments, unique, known = map(int, report.read_text().split())
            lost += moments < done + int(log.read_text())
            early += moments == done
            twice += moments != unique
            wrong += known != moments
            done = moments
        _in_child(lambda: _finish(path, model, videos, report))
        added, moments, unique, stale = map(int, report.read_text().split())
    return [
        {
            "measure": "kills",
            "kills": count,
            "before_the_first_write": early,
            "videos": clips,
            "with_lost_moments": lost,
            "with_moments_twice": twice,
            "with_another_number_of_videos": wrong,
            "indexed_before_the_last_start": clips - added,
            "complete": moments == unique == clips and not stale,
        }
    ]


def _note(log: Path, moments: int) -> None:
    part = log.with_suffix(".part")
    part.write_text(str(moments))
    part.replace(log)


def _counts(path: Path, model: Any) -> str:
    """Return the moments, different moments, and videos of an index."""
    with Index.open(path, model=model, read_only=True) as index:
        contents = index._current().contents
        videos = sum(row.state == "indexed" for row in contents.videos.values())
        return f"{len(contents)} {len(set(contents.video_id.tolist()))} {videos}"


def _finish(path: Path, model: Any, videos: Path, report: Path) -> None:
    with Index.open(path, model=model) as index:
        added = index.add([videos]).added
        contents = index._current().contents
        unique = len(set(contents.moment_id.tolist()))
        report.write_text(f"{added} {len(contents)} {unique} {contents.stale}")


def _in_child(call: Callable[[], object]) -> None:
    """Call in a fork, so that LanceDB, which does not survive a fork, is never used in this process."""
    child = os.fork()
    if not child:
        call()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"a child ended with status {status}")


def calibration(clips: int = 200) -> list[dict[str, Any]]:
    """Compare probabilities with how often hits are right; half of the queries have no answer there."""
    with tempfile.TemporaryDirectory(prefix="search-") as name:
        folder = Path(name)
        sizes = WorldSizes(train=256, val=1, test=clips, siblings=0)
        manifest = draw_world(folder / "world", sizes=sizes, workers=1)
        every = read_manifest(manifest)
        test = [clip for clip in every if clip.split == "test"]
        there = test[: clips // 2]
        write_manifest(folder / "there.jsonl", there)
        model = load("clip:drawn")
        rows = []
        with Index.create(folder / "index", model) as index:
            index.add([folder / "there.jsonl"])
            captions = [clip.captions[0] for clip in every if clip.split == "train"]
            index.calibrate(captions, recall=_recall(model, every, folder))
            found = []
            for clip in test:
                best = index.search(clip.captions[0], 1).hits[0]
                found.append((best.probability or 0.0, best.columns["id"] == clip.id))
            for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.01)):
                inside = [right for p, right in found if low <= p < high]
                mean = statistics.fmean([p for p, _ in found if low <= p < high]) if inside else None
                rows.append(
                    {
                        "measure": "reliability",
                        "from": low,
                        "to": min(high, 1),
                        "queries": len(inside),
                        "mean_probability": None if mean is None else round(mean, 3),
                        "right": round(sum(inside) / len(inside), 3) if inside else None,
                    }
                )
            for correction in CORRECTIONS:
                hits = [index.search(clip.captions[0], 1, correction=correction).hits[0] for clip in there]
                right = sum(hit.columns["id"] == clip.id for hit, clip in zip(hits, there, strict=True))
                rows.append(
                    {
                        "measure": "R@1",
                        "correction": correction,
                        "clips": len(there),
                        "R@1": 100 * right / len(there),
                    }
                )
        return rows


def _recall(model: Any, clips: Sequence[Clip], folder: Path) -> float:
    """Return the share of training clips that their captions find first in an index of 100 of them."""
    others = [clip for clip in clips if clip.split == "train"][:100]
    write_manifest(folder / "others.jsonl", others)
    with Index.create(folder / "others", model) as index:
        index.add([folder / "others.jsonl"])
        hits = [index.search(clip.captions[0], 1).hits[0] for clip in others]
    return sum(hit.columns["id"] == clip.id for hit, clip in zip(hits, others, strict=True)) / len(others)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("select", "query", "large", "kills", "calibrate"))
    parser.add_argument("count", type=int, nargs="?")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    match arguments.what:
        case "select":
            rows = select()
        case "query":
            rows = query(arguments.count or 200_000)
        case "large":
            rows = large(arguments.count or 200_000)
        case "kills":
            rows = kills(arguments.count or 20)
        case _:
            rows = calibration()
    where = machine("cpu")
    for row in rows:
        print(row)
        write_row(results_file(where, "search"), {**row, **where})


if __name__ == "__main__":
    main()
