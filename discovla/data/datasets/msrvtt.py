"""MSR-VTT: 10,000 clips of 20 captions, and the four ways in which they are split."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

from discovla.data.captions.frame_captions import read_json
from discovla.data.datasets.annotated import Annotated, VideoFolder, check_apart
from discovla.data.datasets.reading import first_of, needed, read_captions, read_ids, read_pickle, rows
from discovla.data.manifest import Clip

logger = logging.getLogger(__name__)

Protocol = Literal["1k-A-9k", "1k-A-7k", "1k-B", "full"]

# The archives that are passed on hold their files in these.
_FOLDERS = ("", "annotation", "structured-symlinks", "high-quality/structured-symlinks")
_CAPTIONS = ("MSRVTT_data.json", "MSR_VTT.json", "raw-captions.pkl")
_TEST = ("MSRVTT_JSFUSION_test.csv", "msrvtt_ret_test1k.json", "jsfusion_val_caption_idx.pkl")
_TRAIN: dict[Protocol, tuple[str, ...]] = {
    "1k-A-9k": ("MSRVTT_train.9k.csv", "train_list_jsfusion.txt"),
    "1k-A-7k": ("MSRVTT_train.7k.csv",),
}
_MIECH = {"train": ("train_list_miech.txt",), "test": ("test_list_miech.txt",)}
_FULL = {
    "train": ("MSRVTT_train.full.csv", "train_list_full.txt"),
    "val": ("MSRVTT_val.full.csv", "val_list_full.txt"),
    "test": ("MSRVTT_test.full.csv", "test_list_full.txt"),
}
_FULL_SPLITS = {"train": "train", "validate": "val", "test": "test"}  # as MSRVTT_data.json names them
_Sentences = list[tuple[str, str]]  # video id and caption


def msrvtt(root: str | Path, *, protocol: Protocol, videos: str | Path) -> Annotated:
    """MSR-VTT by one of its protocols.

    1k-A: 1,000 test pairs in the order of their list, training on 9k or 7k clips with all their captions in
    the order of MSRVTT_data.json.  1k-B: 6,656 clips to train on, 1,000 others with their first caption to
    test on.  full: 6,513 / 497 / 2,990 clips, every caption a query.

    Args:
        root: folder of the annotation files, in any of the layouts that are passed on: captions in
            MSRVTT_data.json, MSR_VTT.json or raw-captions.pkl; 1k-A from MSRVTT_JSFUSION_test.csv,
            msrvtt_ret_test1k.json or jsfusion_val_caption_idx.pkl; tables (.csv) or lists (.txt) of ids.
        videos: folder of `<video id>.mp4`.

    Returns: training clips in the order in which their first caption stands in the file.

    Raises:
        ValueError: a file is missing or not as expected, or a video is in two splits.
    """
    root, folder = Path(root), VideoFolder(videos)
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol: expected {', '.join(get_args(Protocol))}, got {protocol!r}")
    path = needed(root, *_CAPTIONS, folders=_FOLDERS)
    sentences = _sentences(path)
    name = f"msrvtt {protocol}"
    if protocol == "full":
        return _captioned(sentences, _full_lists(root, path), folder, name)
    if protocol == "1k-B":
        lists = {split: read_ids(needed(root, *names, folders=_FOLDERS)) for split, names in _MIECH.items()}
        test = _first(sentences, lists["test"])
    else:
        lists = {"train": read_ids(needed(root, *_TRAIN[protocol], folders=_FOLDERS))}
        test = _jsfusion(root, sentences, set(lists["train"]))
        lists["test"] = list(test)
    return _captioned(sentences, lists, folder, name, test)


def _captioned(
    sentences: _Sentences,
    lists: Mapping[str, Sequence[str]],
    videos: VideoFolder,
    protocol: str,
    test: Mapping[str, str] | None = None,
) -> Annotated:
    """Clips with all their sentences, in the order of those; clips of `test` with that one alone."""
    check_apart(lists)
    splits = {n: split for split, names in lists.items() for n in names if test is None or split != "test"}
    captions: dict[str, list[str]] = {}
    order: dict[str, list[int]] = {}
    places = count()
    for video_id, caption in sentences:
        if video_id in splits:
            captions.setdefault(video_id, []).append(caption)
            order.setdefault(video_id, []).append(next(places))
    if not captions:
        raise ValueError(f"{protocol}: no sentence for any of the {len(splits)} videos of the splits")
    clips = [
        Clip(
            id=video_id,
            video=videos.find(video_id),
            captions=tuple(texts),
            split=splits[video_id],
            caption_order=tuple(order[video_id]),
        )
        for video_id, texts in captions.items()
    ]
    clips += [
        Clip(id=video_id, video=videos.find(video_id), captions=(caption,), split="test")
        for video_id, caption in (test or {}).items()
    ]
    said = {clip.id for clip in clips}
    listed = {n for names in lists.values() for n in names}
    silent = {split: [n for n in names if n not in said] for split, names in lists.items()}
    return Annotated(
        clips=clips,
        protocol=protocol,
        listed=lists,
        silent={split: names for split, names in silent.items() if names},
        # The 7k split leaves most of 1k-A's test range aside, which is no fault of the files.
        unlisted=list(dict.fromkeys(n for n, _ in sentences if n not in listed)),
    )


def _jsfusion(root: Path, sentences: _Sentences, train: set[str]) -> dict[str, str]:
    """The 1k-A test pairs in order, none of them trained on."""
    path = needed(root, *_TEST, folders=_FOLDERS)
    if path.suffix == ".pkl":
        return _by_index(path, sentences)
    pairs: dict[str, str] = {}
    for where, video_id, caption in _csv_pairs(path) if path.suffix == ".csv" else _json_pairs(path):
        if video_id in train:
            raise ValueError(f"{where}: the test video {video_id} is a training video too")
        if video_id in pairs:
            raise ValueError(f"{where}: expected one sentence a test video, found {video_id} again")
        pairs[video_id] = caption
    return pairs


def _csv_pairs(path: Path) -> list[tuple[str, str, str]]:
    """Place, video and sentence of each row of MSRVTT_JSFUSION_test.csv."""
    table = rows(path, required=("video_id", "sentence"))
    return [(f"{path}:{line}", row["video_id"], row["sentence"]) for line, row in table]


def _json_pairs(path: Path) -> list[tuple[str, str, str]]:
    """Place, video and sentence of each object of msrvtt_ret_test1k.json."""
    found = read_json(path)
    try:
        return [
            (f"{path}[{i}]", str(row["video"]).removesuffix(".mp4"), str(row["caption"]))
            for i, row in enumerate(found)
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a list of objects with video and caption") from error


def _by_index(path: Path, sentences: _Sentences) -> dict[str, str]:
    """The caption of each test video that its number in the pickle chooses."""
    chosen = read_pickle(path)
    whole = isinstance(chosen, dict) and all(
        isinstance(k, str) and isinstance(v, int) for k, v in chosen.items()
    )
    if not whole or not chosen:
        raise ValueError(f"{path}: expected the number of a caption by video")
    captions: dict[str, list[str]] = {}
    for video_id, caption in sentences:
        if video_id in chosen:
            captions.setdefault(video_id, []).append(caption)
    for video_id, number in chosen.items():
        if not 0 <= number < len(captions.get(video_id, ())):
            raise ValueError(
                f"{path}: {video_id}: expected the number of one of its {len(captions.get(video_id, ()))}"
                f" captions, found {number}"
            )
    return {video_id: captions[video_id][number] for video_id, number in chosen.items()}


def _first(sentences: _Sentences, ids: Sequence[str]) -> dict[str, str]:
    """The first caption of each video, in the order of the ids; videos without one are left out."""
    captions = dict(reversed(sentences))
    return {video_id: captions[video_id] for video_id in ids if video_id in captions}


def _sentences(path: Path) -> _Sentences:
    """Video id and caption of every sentence, in file order."""
    if path.suffix == ".pkl":
        return [(video_id, text) for video_id, texts in read_captions(path).items() for text in texts]
    found = read_json(path)
    key, video = ("annotations", "image_id") if path.name == "MSR_VTT.json" else ("sentences", "video_id")
    try:
        return [(sentence[video], sentence["caption"]) for sentence in found[key]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected `{key}`, a list of objects with {video} and caption") from error


def _full_lists(root: Path, path: Path) -> dict[str, list[str]]:
    """The videos of each split of the full protocol, from its three tables or else from the annotations."""
    if any(first_of(root, *names, folders=_FOLDERS) for names in _FULL.values()):
        return {split: read_ids(needed(root, *names, folders=_FOLDERS)) for split, names in _FULL.items()}
    logger.info("no list of the full splits in %s: splits are those written in %s", root, path.name)
    annotations: Any = read_json(path) if path.suffix == ".json" else None
    try:
        splits = [(video["video_id"], _FULL_SPLITS[video["split"]]) for video in annotations["videos"]]
    except (KeyError, TypeError) as error:
        known = ", ".join(_FULL_SPLITS)
        raise ValueError(f"{path}: expected `videos` with video_id and split, one of {known}") from error
    return {split: [n for n, s in splits if s == split] for split in _FULL}
