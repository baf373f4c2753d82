"""The clips a run uses: read, checked, never the same for two purposes, and made to training batches."""

from __future__ import annotations

from discovla.config import RunConfig
from discovla.data.dataset import check_captions, read_clips
from discovla.data.loader import BatchSpec, TrainLoader
from discovla.data.manifest import Clip, check_clips
from discovla.data.quarantine import without_quarantined
from discovla.drawn_world.stills import Stills
from discovla.engine.distributed import World
from discovla.methods.base import Method


def read_splits(config: RunConfig) -> dict[str, list[Clip]]:
    """Checked clips of the splits a run uses; the test split is never trained on nor selected by."""
    data = config.data
    names = {"train": data.train_split, "val": data.val_split, "test": data.test_split}
    if data.stills is not None:
        del names["train"]
    splits = {use: read_clips(data, name) for use, name in names.items() if name}
    chosen = list(names.values())
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"data: expected different splits to train, select and test on, found {chosen}")
    if data.quarantine is not None and "train" in splits:
        splits["train"] = without_quarantined(splits["train"], data.quarantine)
    for use in ("val", "test"):
        if use in splits:
            check_clips(splits[use], files=data.shards is None)
            check_captions(splits[use], data.context_length, long=data.long_captions)
    return splits


def train_loader(
    config: RunConfig, method: Method, splits: dict[str, list[Clip]], world: World
) -> TrainLoader:
    """Training batches, once the clips they come from have been checked."""
    data, longest = config.data, method.architecture.context_length
    if data.context_length > longest:
        raise ValueError(f"data.context_length: expected at most {longest}, found {data.context_length}")
    shape = BatchSpec(
        batch_size=config.batch_size,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        image_size=method.architecture.image_size,
        context_length=data.context_length,
        frame_captions=method.needs_frame_captions,
    )
    if data.stills is not None:
        return TrainLoader(Stills(seed=config.seed, **data.stills.model_dump()), data, shape)
    return TrainLoader(splits["train"], data, shape)
