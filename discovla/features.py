"""Features of training clips, computed once by a frozen vision tower or its first blocks, for training.

The clips are encoded in the order in which the first epoch reads them, in parts of one training batch each,
so that every feature has the bits that it would have in training.  In one process of plain torch a part is
computed when a step reads it, else all parts are computed before the first step.  A part is two files in the
folder of the run, `features/KEY/NUMBER.npy` (clips f d, or clips f l w tokens of the last frozen block) and
`NUMBER.json`, written atomically; an interrupted run continues with the parts that are missing.  KEY depends
on the weights and the number of these blocks, on the frames, and on the clips and their order.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from discovla import terminal
from discovla.config import RunConfig
from discovla.data.config import DataConfig
from discovla.data.dataset import ClipDataset, ClipReader, Frames, frame_origin
from discovla.data.loader import TrainLoader, readable_batches
from discovla.data.manifest import Clip
from discovla.data.video.errors import DecodeError
from discovla.engine.config import choose_strategy
from discovla.engine.distributed import World, barrier, gather_objects
from discovla.engine.strategy import trained_size
from discovla.files import remove_unfinished, replacing
from discovla.methods.base import Method
from discovla.retrieval.embed import evaluating

logger = logging.getLogger(__name__)

FIXED_SAMPLING = ("discovla", "clip4clip")  # samplings that read the same frames of a clip in every epoch


def why_not_frozen(config: RunConfig, method: Method, loader: TrainLoader) -> str:
    """Return why a run cannot read features in place of frames, or why it would not pay; empty if it can."""
    data, dataset = config.data, loader.dataset
    if config.engine.frozen_features == "off":
        return "engine.frozen_features = 'off'"
    if not isinstance(dataset, ClipDataset):
        return "data.stills shows every still once"
    whole = method.frozen_frames
    if not whole and not method.frozen_blocks:
        return _why_no_block(method)
    if method.reads_padding:
        return "the method reads the black frames that follow those of a short clip"
    views = config.engine.frozen_views
    if data.augment != "none" and not views:
        return f"data.augment = {data.augment!r} changes the frames, and engine.frozen_views = 0"
    if data.sampling not in FIXED_SAMPLING:
        return f"data.sampling = {data.sampling!r} reads other frames in each epoch"
    if whole and method.sees_frame_order and (data.reversed_pairs or method.config.reversed_negatives):
        return "the vision tower sees the order of frames, which are also read backwards"
    steps = config.steps or config.epochs * loader.steps_per_epoch
    encoded = (views if data.augment != "none" else 1) * len(dataset.clips)
    if steps * config.batch_size < 2 * encoded:
        return f"{steps} steps read fewer than two times the {encoded} clips or their views"
    return "" if whole else _why_too_large(config, method, encoded)


def _why_no_block(method: Method) -> str:
    """Return what changes the tokens of every block of a vision tower that is not frozen."""
    config = method.config
    if config.merge != "none":
        return f"method.merge = {config.merge!r} merges tokens in a vision tower that trains"
    if config.tune in ("full", "lora"):
        blocks = "method.frozen_vision_blocks = 0"
        return f"method.tune = {config.tune!r} trains the vision tower from its start ({blocks})"
    return f"a part of the method {config.name!r} trains in the vision tower"


def _why_too_large(config: RunConfig, method: Method, clips: int) -> str:
    """Return why the tokens of so many clips do not fit the disk; empty if they do, or are there."""
    folder, architecture = config.directory / "features", method.architecture
    if folder.is_dir() and any(folder.iterdir()):
        return ""
    tokens = architecture.patches + int(architecture.frames.class_row)
    size = 4 if method.compute_dtype == torch.float32 else 2
    need = clips * config.data.frames * tokens * architecture.vision.width * size
    parent = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(parent).free
    if need <= free:
        return ""
    return f"tokens of {clips} clips take {need / 1e9:.1f} GB, and {parent} has {free / 1e9:.1f} GB free"


def encode_alike(one: Method, other: Method) -> bool:
    """Return True if two methods give the same features of frames, bit for bit, as long as none trains."""

    def options(method: Method) -> tuple:
        types = [type(module) for module in method.vision.modules()]
        return (
            type(method).encode_frames,
            method.compute_dtype,
            method.vision.impl,
            method.config.merging,
            types,
        )

    states = one.vision.state_dict(), other.vision.state_dict()
    return (
        options(one) == options(other)
        and states[0].keys() == states[1].keys()
        and all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    )


def frozen_loader(config: RunConfig, method: Method, loader: TrainLoader, world: World) -> TrainLoader:
    """Return the loader of a run with features in place of frames, or the loader itself if that cannot be.

    Features that no earlier start has computed are computed when they are read, or here if the strategy
    changes the vision tower or several processes share the work.
    """
    reason = gather_objects(why_not_frozen(config, method, loader), world)[0]  # disks may differ
    if reason:
        logger.info("frames are encoded in every step: %s", reason)
        return loader
    dataset = loader.dataset
    assert isinstance(dataset, ClipDataset)
    share = config.batch_size // world.size
    lazy = world.size == 1 and choose_strategy(config.engine, trained_size(method), world.size)[0] == "torch"
    clips = [dataset.clips[i] for i in dict.fromkeys(dataset.pairs[i].clip for i in loader.order(0))]
    stores = []
    for view in range(config.engine.frozen_views if config.data.augment != "none" else 1):
        folder = config.directory / "features" / _key(config, method, clips, share, view)
        store = FeatureStore(folder, clips, share)
        augmented = None
        if config.data.augment != "none":
            augmented = ViewReader(config=config.data, reader=dataset.reader, name=f"{config.seed}/{view}")
        if lazy:
            store.encode_when_read(config, method, augmented)
        else:
            write_features(store, config, method, world, augmented)
        stores.append(store)
    places = {clip.id: i for i, clip in enumerate(clips)}
    reader = FeatureReader(config=config.data, stores=tuple(stores), places=places)
    data = config.data.model_copy(update={"workers": 0})  # reading a row takes less than sending it
    return TrainLoader(replace(dataset, reader=reader), data, loader.spec)


class FeatureStore:
    """Parts of `size` clips in a folder; part i holds the clips from i size on."""

    def __init__(self, folder: Path, clips: Sequence[Clip], size: int) -> None:
        self.folder, self.clips, self.size = folder, clips, size
        self._opened: dict[int, tuple[np.ndarray, dict[str, list]]] = {}
        self._encoding: Iterator[int] = iter(())

    @property
    def parts(self) -> int:
        """Return the number of parts."""
        return -(-len(self.clips) // self.size)

    def paths(self, part: int) -> tuple[Path, Path]:
        """Return the files of a part: features, and numbers of frames with the reasons of bad clips."""
        return self.folder / f"{part:06d}.npy", self.folder / f"{part:06d}.json"

    def missing(self) -> list[int]:
        """Return the parts that are not written yet; the JSON file of a part is written last."""
        return [part for part in range(self.parts) if not self.paths(part)[1].is_file()]

    def write(self, part: int, features: np.ndarray, facts: dict[str, list]) -> None:
        """Write a part atomically."""
        array, described = self.paths(part)
        for path, save in ((array, lambda file: np.save(file, features)), (described, None)):
            with replacing(path) as file:
                file.write(json.dumps(facts).encode()) if save is None else save(file)

    def encode_when_read(self, config: RunConfig, method: Method, reader: ClipReader | None) -> None:
        """Compute missing parts, in order, when `part` is called for one of them."""
        if missing := self.missing():
            logger.info("%s: %d clips are encoded when they are read first", self.folder, len(self.clips))
            self._encoding = encode_parts(self, missing, config, method, reader)

    def part(self, number: int) -> tuple[np.ndarray, dict[str, list]]:
        """Return features and facts of a part."""
        if number not in self._opened:
            array, described = self.paths(number)
            while not described.is_file():
                next(self._encoding)
            self._opened[number] = np.load(array, mmap_mode="r"), json.loads(described.read_text())
        return self._opened[number]


@dataclass(frozen=True)
class FeatureReader:
    """`ClipReader` that returns the features of a clip's frames, f d, or tokens, f l w, in place of pixels.

    stores: one for each view of the clips; the seed of a sample chooses.
    places: id of a clip to its place in a store.
    """

    config: DataConfig
    stores: tuple[FeatureStore, ...]
    places: dict[str, int]

    def read(self, clip: Clip, seed: str | None = None) -> np.ndarray:
        """See `ClipReader`."""
        store = self.stores[zlib.crc32((seed or "").encode()) % len(self.stores)]
        part, row = divmod(self.places[clip.id], store.size)
        features, facts = store.part(part)
        if facts["bad"][row] is not None:
            raise DecodeError(clip.video, facts["bad"][row])
        return features[row, : facts["frames"][row]].astype(np.float32, copy=False)


@dataclass(kw_only=True)
class ViewReader:
    """`ClipReader` that augments every clip as its id and the name of the view decide."""

    config: DataConfig
    reader: ClipReader
    name: str

    def read(self, clip: Clip, seed: str | None = None) -> Frames:
        """See `ClipReader`."""
        return self.reader.read(clip, f"{self.name}/{clip.id}")


def write_features(
    store: FeatureStore, config: RunConfig, method: Method, world: World, reader: ClipReader | None = None
) -> None:
    """Compute the parts of a store that are missing, rank r every world.size-th of them.

    Args:
        reader: of the frames; by default that of the config without augmentation.
    """
    missing = store.missing()
    barrier(world)  # before any rank writes
    own = missing[world.rank :: world.size]
    if missing:
        logger.info("%s: encoding %d clips once, in %d parts", store.folder, len(store.clips), len(missing))
    began = time.perf_counter()
    with terminal.progress("features", len(own) * store.size, "clips") as bar:
        for _ in encode_parts(store, own, config, method, reader):
            bar.advance(store.size)
    barrier(world)
    if unseen := store.missing():
        raise ValueError(
            f"engine.frozen_features: expected {store.folder} on a file system that all processes share, "
            f"found {len(unseen)} of {store.parts} parts missing; 'off' needs none"
        )
    if missing:
        logger.info("clips are encoded, in %.1f s", time.perf_counter() - began)


def encode_parts(
    store: FeatureStore,
    parts: Sequence[int],
    config: RunConfig,
    method: Method,
    reader: ClipReader | None = None,
) -> Iterator[int]:
    """Compute parts of a store in order, and yield the number of each once it is written."""
    store.folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(store.folder)
    # a last part of fewer clips is filled up, because the bits of a product depend on its size
    rows = [i % len(store.clips) for part in parts for i in range(part * store.size, (part + 1) * store.size)]
    clips, side = [store.clips[i] for i in rows], method.architecture.image_size
    batches = readable_batches(clips, config.data, side, store.size, reader=reader)
    device, whole = next(method.vision.parameters()).device, method.frozen_frames
    for part, (batch, bad) in zip(parts, batches, strict=True):
        frames, mask = batch.frames.to(device), batch.frame_mask.to(device)
        with evaluating(method):
            encoded = method.encode_frames(frames, mask) if whole else method.encode_tokens(frames)
        features = _narrowed(encoded, method.compute_dtype).cpu()
        count = min(store.size, len(store.clips) - part * store.size)
        facts = {"frames": batch.frame_mask.sum(1).tolist()[:count], "bad": bad[:count]}
        store.write(part, features[:count].numpy(), facts)
        yield part


def _narrowed(features: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Return features in the dtype of the files: float32, or float16 for what was computed in bf16.

    Raises:
        ValueError: a feature is beyond the range of float16.
    """
    if compute_dtype == torch.float32:
        return features
    narrow = features.half()
    if not narrow.isfinite().all():
        raise ValueError(
            "engine.frozen_features: expected features below 65,504 to store in float16, found "
            f"{features.abs().max().item():g}; use engine.frozen_features=off"
        )
    return narrow


def _key(config: RunConfig, method: Method, clips: Sequence[Clip], share: int, view: int) -> str:
    """Return a name that differs if weights, blocks, precision, frames, clips or views differ."""
    digest = hashlib.sha256()
    depth = None if method.frozen_frames else method.frozen_blocks
    for name, x in sorted(method.vision.state_dict().items()):
        if depth is not None and _follows(name, depth):
            continue
        digest.update(name.encode() + str(x.dtype).encode())
        digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    data = config.data
    names = (
        "frames",
        "sampling",
        "sample_rate",
        "sampling_divisor",
        "sampling_slice",
        "damaged",
        "hdr",
        "decoder",
        "resize",
        "interpolation",
    )
    facts = {
        "data": {name: getattr(data, name) for name in names},
        "origin": frame_origin(data),
        "shards": data.shards,
        "method": method.config.model_dump(
            mode="json", include={"name", "mask_padded_frames", "fused_vision_blocks"}
        ),
        "precision": [config.engine.precision, config.engine.residual_dtype, config.engine.impl],
        "clips": [(clip.id, str(clip.video), clip.start, clip.end, _stamp(clip)) for clip in clips],
        "share": share,
    }
    if depth is not None:
        facts["blocks"] = depth
    if method.config.merge != "none":
        facts["merge"] = method.config.model_dump(mode="json", include={"merge", "merging"})
    if data.augment != "none":
        facts["view"] = [data.augment, config.seed, view]
    digest.update(json.dumps(facts, default=str).encode())
    return digest.hexdigest()[:16]


def _follows(name: str, depth: int) -> bool:
    """Return True for a parameter or buffer of the vision tower that the first `depth` blocks do not read."""
    part, *rest = name.split(".")
    return part in ("pool", "ln_post", "projection", "projection_bias") or (
        part == "blocks" and int(rest[0]) >= depth
    )


def _stamp(clip: Clip) -> tuple[int, int] | None:
    """Return size and time of a video file; None of one that is not there, as with shards."""
    try:
        status = clip.video.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
