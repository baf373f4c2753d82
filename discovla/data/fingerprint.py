"""Fingerprints of the clips that a run reads, to notice that it is resumed with others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from discovla.data.config import DataConfig
from discovla.data.manifest import Clip

SplitFingerprint = dict[str, Any]  # number of clips and, by part, a hash in their order
DataFingerprint = dict[str, SplitFingerprint]  # by use: train, val, test

PARTS = {
    "ids": "their ids or their order",
    "captions": "captions",
    "frame captions": "frame captions",
    "spans": "start or end",
    "files": "names or sizes of the files",
    "stills": "data.stills",
}


def data_fingerprint(splits: Mapping[str, Sequence[Clip]], config: DataConfig) -> DataFingerprint:
    """Return the fingerprint of each split.

    Files are told apart by name and size, so that a dataset may be moved; those in shards are not.
    """
    fingerprint = {use: split_fingerprint(clips, config) for use, clips in splits.items()}
    if config.stills is not None:
        stills = config.stills.model_dump(mode="json")
        fingerprint["train"] = {"clips": config.stills.count, "stills": _hash([stills])}
    return fingerprint


def split_fingerprint(clips: Sequence[Clip], config: DataConfig) -> SplitFingerprint:
    """Return the number of clips and a hash of each of their parts."""
    return {
        "clips": len(clips),
        "ids": _hash([clip.id for clip in clips]),
        "captions": _hash([clip.captions, clip.reversed_captions, clip.caption_order] for clip in clips),
        "frame captions": _hash([clip.frame_captions for clip in clips]),
        "spans": _hash([clip.start, clip.end] for clip in clips),
        "files": None if config.shards is not None else _hash(_files(clips)),
    }


def differences(began_with: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return what differs between two fingerprints in words, by split; parts that one lacks do not count."""
    lines = []
    for use in ("train", "val", "test"):
        old, new = began_with.get(use), found.get(use)
        if old is None or new is None:
            continue
        if old["clips"] != new["clips"]:
            lines.append(f"{use}: the run began with {old['clips']} clips, found {new['clips']}")
            continue
        parts = [
            words
            for part, words in PARTS.items()
            if old.get(part) is not None and new.get(part) is not None and old[part] != new[part]
        ]
        if parts:
            lines.append(f"{use}: the {new['clips']} clips differ in {', '.join(parts)}")
    return lines


def _files(clips: Sequence[Clip]) -> Iterator[Any]:
    for clip in clips:
        try:
            size = clip.video.stat().st_size
        except OSError:  # named when the clip is read
            size = None
        yield [clip.video.name, size]


def _hash(values: Any) -> str:
    """Return a hash of JSON values in their order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()[:16]
