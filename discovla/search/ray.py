"""Read and embed videos on a Ray cluster: actors that decode, and actors with the model, joined by Ray Data.

Ray restarts what is lost and repeats its work.  The process that called writes the index, so that the table
and its guarantees are those of a single machine.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from discovla.data.sandbox import Sandbox
from discovla.model import load
from discovla.search.indexing import ReadVideo, embed_moments, read_all
from discovla.search.reading import MomentFrames, ReadRequest, read_part
from discovla.search.store import MomentRow

DECODE_SECONDS = 300.0  # that one part of a video may take

Finished = tuple[int, list[MomentRow], ReadVideo]  # place among the requests, moments, end


def embed_on_cluster(
    address: str, model: str, device: str, requests: Sequence[ReadRequest], *, merge: int | None = None
) -> Iterator[Finished]:
    """Yield videos as they are finished, in any order.

    Args:
        address: of the cluster, or "auto": that of the environment or, without one, this machine.
        model: path or name that `discovla.load` opens on every machine.
        device: of the model.
        merge: of the model, as in `discovla.load`.

    Raises:
        ValueError: Ray is not installed.
        OSError: no cluster at the address.
    """
    if not requests:
        return
    ray, data = _connect(address)
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    embedders = gpus or max(1, cpus // 2)
    items = [{"place": place, "content": pickle.dumps(one)} for place, one in enumerate(requests)]
    moments = data.from_items(items, override_num_blocks=len(items)).flat_map(
        _Reader, compute=data.ActorPoolStrategy(min_size=1, max_size=max(1, cpus - embedders)), num_cpus=1
    )
    rows = moments.map_batches(
        _Embedder,
        fn_constructor_args=(model, device, merge),
        compute=data.ActorPoolStrategy(size=embedders),
        batch_size=load(model, device="cpu").batch_size,
        batch_format="numpy",
        num_gpus=1 if gpus else 0,
        num_cpus=0 if gpus else 1,
    )
    yield from _finished(rows.iter_rows())


def _connect(address: str) -> tuple[Any, Any]:
    """Connect to a cluster and return the modules `ray` and `ray.data`."""
    try:
        ray, data = import_module("ray"), import_module("ray.data")
    except ImportError:
        raise ValueError("index: --ray: expected Ray, found none: pip install 'discovla[ray]'") from None
    data.DataContext.get_current().enable_progress_bars = False  # `discovla index` shows its own
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        return ray, data
    with warnings.catch_warnings():  # Ray starts its processes by a fork that executes a program at once
        warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            if address != "auto":
                raise OSError(f"--ray: expected a cluster at {address}: {error}"[:300]) from None
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    return ray, data


def _finished(rows: Iterator[dict[str, Any]]) -> Iterator[Finished]:
    """Collect the rows of videos, and yield each once all its moments and its end are there."""
    moments: dict[int, dict[int, MomentRow]] = {}
    ends: dict[int, tuple[int, ReadVideo]] = {}
    for row in rows:
        place, number, value = int(row["place"]), int(row["number"]), pickle.loads(row["content"])
        own = moments.setdefault(place, {})
        if isinstance(value, ReadVideo):
            ends[place] = number, value
        else:
            own[number] = value
        if place in ends and len(own) == ends[place][0]:
            _, end = ends.pop(place)
            yield place, [] if end.reason else [own[i] for i in range(len(own))], end
            del moments[place]


class _Reader:
    """Actor that decodes: a video in, its moments and its end out."""

    def __init__(self) -> None:
        self._sandbox = Sandbox(read_part, limit=DECODE_SECONDS)

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        items = read_all(pickle.loads(row["content"]), self._sandbox)
        return [
            {"place": row["place"], "number": number, "content": pickle.dumps(item)}
            for number, item in enumerate(items)
        ]


class _Embedder:
    """Actor with the model: frames of moments in, their rows out; ends of videos pass through."""

    def __init__(self, model: str, device: str, merge: int | None) -> None:
        self._model = load(model, device=device, merge=merge)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        items = [pickle.loads(content) for content in batch["content"]]
        places = [i for i, item in enumerate(items) if isinstance(item, MomentFrames)]
        contents = list(batch["content"])
        if places:
            rows = embed_moments(self._model, [items[i] for i in places])
            for i, row in zip(places, rows, strict=True):
                contents[i] = pickle.dumps(row)
        return {"place": batch["place"], "number": batch["number"], "content": contents}
