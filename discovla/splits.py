"""The clips a run uses: read, checked, and never the same for two purposes."""

from __future__ import annotations

from discovla.config import RunConfig
from discovla.data.clips import check_captions
from discovla.data.manifest import Clip, check_clips
from discovla.data.quarantine import without_quarantined
from discovla.data.source import read_clips


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
