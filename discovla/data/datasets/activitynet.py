"""ActivityNet Captions: long videos whose sentences are joined into one paragraph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from discovla.data.datasets.annotations import Annotations, listed_clips
from discovla.data.datasets.files import VideoFolder, optional_file, read_json, required_file
from discovla.data.datasets.protocol import Dataset, ExpectedSplit
from discovla.data.datasets.tables import read_ids


def read_activitynet(root: Path, videos: str | Path, protocol: str) -> Annotations:
    """Read ActivityNet Captions, paragraph to video: all sentences of a video joined, the whole video.

    paragraph: 10,009 training videos, and the 4,917 test videos of val_1.json.  paragraph-val_2: the second
    annotation of those, val_2.json, as test.  There is no `val`; hold out training clips to select on.

    Annotations are train.json and val_1.json or val_2.json; the lists train_ids.json and val_ids.json, which
    contain ids without sentences, are used if they exist.  Videos are named by id, with or without `v_`.
    """
    files = {"train": "train.json", "test": "val_2.json" if protocol == "paragraph-val_2" else "val_1.json"}
    sentences = {split: _read_sentences(required_file(root, name)) for split, name in files.items()}
    lists = {}
    for split, name in {"train": "train_ids.json", "test": "val_ids.json"}.items():
        path = optional_file(root, name)
        lists[split] = list(sentences[split]) if path is None else read_ids(path)
    paragraphs = {name: (" ".join(texts),) for split in sentences.values() for name, texts in split.items()}
    folder = VideoFolder(videos)
    annotations = listed_clips(paragraphs, lists, folder)
    return replace(
        annotations,
        clips=[replace(c, video=folder.find(c.id.removeprefix("v_"), c.id)) for c in annotations.clips],
        rows={s: sum(len(sentences[s].get(name, ())) for name in names) for s, names in lists.items()},
    )


def _read_sentences(path: Path) -> dict[str, list[str]]:
    """Read the sentences of each video; most begin with spaces, which are removed."""
    content = read_json(path)
    try:
        texts = {name: [text.strip() for text in row["sentences"]] for name, row in content.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected an object of objects with sentences, by video") from error
    for name, sentences in texts.items():
        if not any(sentences):
            raise ValueError(f"{path}: {name!r}: expected sentences, found none")
    if not texts:
        raise ValueError(f"{path}: expected at least one video, found none")
    return texts


_TRAIN = ExpectedSplit(videos=10009, rows=37421)

ACTIVITYNET = Dataset(
    name="activitynet",
    title="ActivityNet Captions",
    reader=read_activitynet,
    protocols={
        "paragraph": {"train": _TRAIN, "test": ExpectedSplit(videos=4917, rows=17505)},
        "paragraph-val_2": {"train": _TRAIN, "test": ExpectedSplit(videos=4885, rows=17031)},
    },
)
