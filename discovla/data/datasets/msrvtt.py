"""MSR-VTT: 10,000 clips with 20 captions each, split in four ways."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from discovla.data.datasets.annotations import Annotations
from discovla.data.datasets.files import (
    VideoFolder,
    optional_file,
    read_captions,
    read_json,
    required_file,
)
from discovla.data.datasets.protocol import Dataset, ExpectedSplit
from discovla.data.datasets.tables import read_ids, read_table
from discovla.data.manifest import Clip
from discovla.foreign import read_plain_pickle

logger = logging.getLogger(__name__)

# Folders of the archives in circulation.
_FOLDERS = ("", "annotation", "structured-symlinks", "high-quality/structured-symlinks")
_CAPTIONS = ("MSRVTT_data.json", "MSR_VTT.json", "raw-captions.pkl")
_TEST_PAIRS = ("MSRVTT_JSFUSION_test.csv", "msrvtt_ret_test1k.json", "jsfusion_val_caption_idx.pkl")
_LISTS = {  # protocol -> split -> files of its ids
    "1k-A-9k": {"train": ("MSRVTT_train.9k.csv", "train_list_jsfusion.txt")},
    "1k-A-7k": {"train": ("MSRVTT_train.7k.csv",)},
    "1k-B": {"train": ("train_list_miech.txt",), "test": ("test_list_miech.txt",)},
    "full": {
        "train": ("MSRVTT_train.full.csv", "train_list_full.txt"),
        "val": ("MSRVTT_val.full.csv", "val_list_full.txt"),
        "test": ("MSRVTT_test.full.csv", "test_list_full.txt"),
    },
}
_SPLIT_NAMES = {"train": "train", "validate": "val", "test": "test"}  # in MSRVTT_data.json -> ours

_Sentences = list[tuple[str, str]]  # video id and caption


def read_msrvtt(root: Path, videos: str | Path, protocol: str) -> Annotations:
    """Read MSR-VTT.

    1k-A-9k, 1k-A-7k: 1,000 test pairs in the order of their list; 9,000 or 7,010 training clips with all
    captions, ordered by their first caption in the captions file.  1k-B: 6,656 training clips and 1,000 test
    clips, each of these with its first caption.  full: 6,513 / 497 / 2,990 clips, every caption a query.

    Captions are read from MSRVTT_data.json, MSR_VTT.json or raw-captions.pkl; the test pairs of 1k-A from
    MSRVTT_JSFUSION_test.csv, msrvtt_ret_test1k.json or jsfusion_val_caption_idx.pkl; id lists from tables
    (.csv) or lists (.txt).  Videos are `<video id>.mp4`.
    """
    captions_file = required_file(root, *_CAPTIONS, folders=_FOLDERS)
    sentences = _read_sentences(captions_file)
    test_pairs: dict[str, str] | None = None
    files = _LISTS[protocol]
    if protocol == "full" and not any(optional_file(root, *n, folders=_FOLDERS) for n in files.values()):
        logger.info("no list of the full splits in %s: using the splits in %s", root, captions_file.name)
        lists = _splits_of_annotations(captions_file)
    else:
        lists = {
            split: read_ids(required_file(root, *names, folders=_FOLDERS)) for split, names in files.items()
        }
    if protocol == "1k-B":
        first = dict(reversed(sentences))
        test_pairs = {video_id: first[video_id] for video_id in lists["test"] if video_id in first}
    elif protocol != "full":
        test_pairs = _read_test_pairs(root, sentences, set(lists["train"]))
        lists["test"] = list(test_pairs)
    return _clips(sentences, lists, VideoFolder(videos), test_pairs)


def _clips(
    sentences: _Sentences,
    lists: Mapping[str, Sequence[str]],
    videos: VideoFolder,
    test_pairs: Mapping[str, str] | None,
) -> Annotations:
    """Make clips with all their sentences, in the order of the sentences; test clips with one, if given."""
    listed = {video_id for names in lists.values() for video_id in names}
    splits = {
        video_id: split
        for split, names in lists.items()
        if test_pairs is None or split != "test"
        for video_id in names
    }
    captions: dict[str, list[str]] = {}
    order: dict[str, list[int]] = {}
    used = (sentence for sentence in sentences if sentence[0] in splits)
    for place, (video_id, caption) in enumerate(used):
        captions.setdefault(video_id, []).append(caption)
        order.setdefault(video_id, []).append(place)
    if not captions:
        raise ValueError(f"msrvtt: expected sentences of the {len(splits)} videos of the splits, found none")
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
        for video_id, caption in (test_pairs or {}).items()
    ]
    unlisted = list(dict.fromkeys(video_id for video_id, _ in sentences if video_id not in listed))
    return Annotations(clips=clips, listed=lists, unlisted=unlisted)


def _read_sentences(path: Path) -> _Sentences:
    """Read video id and caption of every sentence, in file order."""
    if path.suffix == ".pkl":
        return [(video_id, text) for video_id, texts in read_captions(path).items() for text in texts]
    content = read_json(path)
    key, video = ("annotations", "image_id") if path.name == "MSR_VTT.json" else ("sentences", "video_id")
    try:
        return [(sentence[video], sentence["caption"]) for sentence in content[key]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected `{key}`, a list of objects with {video} and caption") from error


def _read_test_pairs(root: Path, sentences: _Sentences, train: set[str]) -> dict[str, str]:
    """Read the test pairs of 1k-A in order; none may be a training video."""
    path = required_file(root, *_TEST_PAIRS, folders=_FOLDERS)
    if path.suffix == ".pkl":
        return _pairs_by_caption_number(path, sentences)
    if path.suffix == ".csv":
        table = read_table(path, required=("video_id", "sentence"))
        rows = [(f"{path}:{line}", row["video_id"], row["sentence"]) for line, row in table]
    else:
        try:
            rows = [
                (f"{path}[{i}]", str(row["video"]).removesuffix(".mp4"), str(row["caption"]))
                for i, row in enumerate(read_json(path))
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a list of objects with video and caption") from error
    pairs: dict[str, str] = {}
    for where, video_id, caption in rows:
        if video_id in train:
            raise ValueError(f"{where}: the test video {video_id} is a training video too")
        if video_id in pairs:
            raise ValueError(f"{where}: expected one sentence a test video, found {video_id} again")
        pairs[video_id] = caption
    return pairs


def _pairs_by_caption_number(path: Path, sentences: _Sentences) -> dict[str, str]:
    """Read a pickle of caption numbers by test video, and return the captions they select."""
    numbers = read_plain_pickle(path)
    items = numbers.items() if isinstance(numbers, dict) else ()
    if not items or not all(isinstance(name, str) and isinstance(number, int) for name, number in items):
        raise ValueError(f"{path}: expected the number of a caption by video")
    captions: dict[str, list[str]] = {video_id: [] for video_id in numbers}
    for video_id, caption in sentences:
        if video_id in captions:
            captions[video_id].append(caption)
    for video_id, number in items:
        count = len(captions[video_id])
        if not 0 <= number < count:
            raise ValueError(
                f"{path}: {video_id}: expected the number of one of its {count} captions, found {number}"
            )
    return {video_id: captions[video_id][number] for video_id, number in items}


def _splits_of_annotations(path: Path) -> dict[str, list[str]]:
    """Read the ids of each split from `videos` in MSRVTT_data.json."""
    content = read_json(path) if path.suffix == ".json" else {}
    try:
        splits = [(video["video_id"], _SPLIT_NAMES[video["split"]]) for video in content["videos"]]
    except (KeyError, TypeError) as error:
        known = ", ".join(_SPLIT_NAMES)
        raise ValueError(f"{path}: expected `videos` with video_id and split, one of {known}") from error
    return {split: [video_id for video_id, s in splits if s == split] for split in _LISTS["full"]}


_1K_A_TEST = ExpectedSplit(
    videos=1000,
    captions=1000,
    ids="64462f74c95235d602a0a231e7f2125640ebbf3de0e226fbdd5e64f621c46d83",
    pairs="967ebcd615cc4c06d079f3d160bbde9f327e0dde06f5a383b35c8e9fc999253f",
)

# https://github.com/albanie/collaborative-experts describes 1k-A, 1k-B and full.  Counts and checksums are
# those of the lists themselves; the counts of 1k-B are reported ones.
MSRVTT = Dataset(
    name="msrvtt",
    title="MSR-VTT",
    reader=read_msrvtt,
    protocols={
        "1k-A-9k": {
            "train": ExpectedSplit(
                videos=9000,
                captions=180000,
                ids="12e456ceab25905ffc585c4dfdf1d2972f563b63c317effdee7943bc84075ace",
                numbers=range(10000),
                excluding="test",
            ),
            "test": _1K_A_TEST,
        },
        "1k-A-7k": {
            "train": ExpectedSplit(
                videos=7010,
                captions=140200,
                ids="e63825a66cb7194c0502b86c4178dc1dc4b0e84bd47337b563d9f4cd58890596",
                numbers=range(7010),
            ),
            "test": _1K_A_TEST,
        },
        "1k-B": {
            "train": ExpectedSplit(videos=6656, captions=133120),
            "test": ExpectedSplit(videos=1000, captions=1000),
        },
        "full": {
            "train": ExpectedSplit(
                videos=6513,
                captions=130260,
                ids="3824b98b962a59653d7191fee6b92eef5954374ae97ef284ed9a1f777c7e1825",
                numbers=range(6513),
            ),
            "val": ExpectedSplit(
                videos=497,
                captions=9940,
                ids="e58250844311d2323f43865e51e84f42b2862099f0df726d5a0df59f17f97f12",
                numbers=range(6513, 7010),
            ),
            "test": ExpectedSplit(
                videos=2990,
                captions=59800,
                ids="e033df45731e025a1b7b4731ee3eddc400b6040c93fffd4ab3eb45a551f0526e",
                numbers=range(7010, 10000),
            ),
        },
    },
)
