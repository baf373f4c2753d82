"""Published datasets, and a user's own clips, read into manifests.

A new dataset is one file with a `Dataset`, and one line in `DATASETS`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from discovla.data.datasets.activitynet import ACTIVITYNET
from discovla.data.datasets.annotations import Annotations
from discovla.data.datasets.didemo import DIDEMO
from discovla.data.datasets.generic import csv_clips, folder_clips, jsonl_clips
from discovla.data.datasets.lsmdc import LSMDC
from discovla.data.datasets.msrvtt import MSRVTT
from discovla.data.datasets.msvd import MSVD
from discovla.data.datasets.protocol import Dataset, ExpectedSplit
from discovla.data.datasets.vatex import VATEX

DATASETS: Mapping[str, Dataset] = {
    dataset.name: dataset for dataset in (MSRVTT, MSVD, VATEX, DIDEMO, LSMDC, ACTIVITYNET)
}

PROTOCOLS: Mapping[str, Mapping[str, ExpectedSplit]] = {
    f"{name} {protocol}": splits
    for name, dataset in DATASETS.items()
    for protocol, splits in dataset.protocols.items()
}

OWN_CLIPS: Mapping[str, Callable[[str | Path], Annotations]] = {
    "csv": csv_clips,
    "jsonl": jsonl_clips,
    "folder": folder_clips,
}
