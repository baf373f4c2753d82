"""What the named protocols hold, so that a copy which differs is told apart before it is trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from discovla.data.manifest import Clip

_SHOWN = 5  # ids named in one line


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of one split of a protocol; None of what is not.

    videos: ids of its list.  captions: of all its clips.  rows: rows or sentences, where several make one
    caption.  ids: checksum of the ids.  pairs: checksum of ids and captions, in their order.  numbers: where
    the ids are `video<number>`, all numbers; `but` takes away those of another split.
    """

    videos: int | None = None
    captions: int | None = None
    rows: int | None = None
    ids: str | None = None
    pairs: str | None = None
    numbers: range | None = None
    but: str | None = None


_1K_A_TEST = Known(
    videos=1000,
    captions=1000,
    ids="64462f74c95235d602a0a231e7f2125640ebbf3de0e226fbdd5e64f621c46d83",
    pairs="967ebcd615cc4c06d079f3d160bbde9f327e0dde06f5a383b35c8e9fc999253f",
)
_VATEX_TRAIN = Known(videos=25991, captions=259910)
_DIDEMO = {"val": Known(videos=1094, rows=4180), "test": Known(videos=1037, rows=4021)}
_ACTIVITYNET_TRAIN = Known(videos=10009, rows=37421)

# Counts and checksums were taken from the lists themselves, but for 1k-B, VATEX's training split and
# paragraph-listed, whose counts are those the field reports.  https://github.com/albanie/collaborative-experts
# describes 1k-A, 1k-B and full.
PROTOCOLS: Mapping[str, Mapping[str, Known]] = {
    "msrvtt 1k-A-9k": {
        "train": Known(
            videos=9000,
            captions=180000,
            ids="12e456ceab25905ffc585c4dfdf1d2972f563b63c317effdee7943bc84075ace",
            numbers=range(10000),
            but="test",
        ),
        "test": _1K_A_TEST,
    },
    "msrvtt 1k-A-7k": {
        "train": Known(
            videos=7010,
            captions=140200,
            ids="e63825a66cb7194c0502b86c4178dc1dc4b0e84bd47337b563d9f4cd58890596",
            numbers=range(7010),
        ),
        "test": _1K_A_TEST,
    },
    "msrvtt 1k-B": {
        "train": Known(videos=6656, captions=133120),
        "test": Known(videos=1000, captions=1000),
    },
    "msrvtt full": {
        "train": Known(
            videos=6513,
            captions=130260,
            ids="3824b98b962a59653d7191fee6b92eef5954374ae97ef284ed9a1f777c7e1825",
            numbers=range(6513),
        ),
        "val": Known(
            videos=497,
            captions=9940,
            ids="e58250844311d2323f43865e51e84f42b2862099f0df726d5a0df59f17f97f12",
            numbers=range(6513, 7010),
        ),
        "test": Known(
            videos=2990,
            captions=59800,
            ids="e033df45731e025a1b7b4731ee3eddc400b6040c93fffd4ab3eb45a551f0526e",
            numbers=range(7010, 10000),
        ),
    },
    "msvd standard": {
        "train": Known(
            videos=1200,
            captions=48774,
            ids="abfb8ab5660b464cf547d63a37a369920ff92c5f547af80f07aedd709df335d3",
        ),
        "val": Known(
            videos=100,
            captions=4290,
            ids="9527cf1ef6c8fe2fb1ecfda0e1856acc563fecef5ff0a409b5d908b65c1e6ed4",
        ),
        "test": Known(
            videos=670,
            captions=27763,
            ids="95eacd1fddb1d88cd7144267913ef02d0ecb8cc94a88bc484035433a2d8f9c7a",
        ),
    },
    "vatex hgr": {
        "train": _VATEX_TRAIN,
        "val": Known(
            videos=1500,
            captions=15000,
            ids="77fde2983497b56959246411452a9c4587c66956449deafd12ab3e678bc85d21",
        ),
        "test": Known(
            videos=1500,
            captions=15000,
            ids="efc26b559080d66fa7c8d694e6b3b051378322a051ef35f22c8312c117849d8d",
        ),
    },
    "vatex mixed-1k5": {
        "train": _VATEX_TRAIN,
        "val": Known(videos=724, captions=7240),
        "test": Known(
            videos=1500,
            captions=15000,
            ids="6ecb94ff2f4ca1a501a5488f551f5e28f3fbb8f7c8aadb04164772854b913556",
        ),
    },
    "didemo paragraph": _DIDEMO,
    "didemo paragraph-listed": {
        "train": Known(videos=8395),
        "val": Known(videos=1065),
        "test": Known(videos=1004),
    },
    "activitynet paragraph": {"train": _ACTIVITYNET_TRAIN, "test": Known(videos=4917, rows=17505)},
    "activitynet paragraph-val_2": {"train": _ACTIVITYNET_TRAIN, "test": Known(videos=4885, rows=17031)},
    "lsmdc standard": {"test": Known(videos=1000, captions=1000)},
}


def id_checksum(ids: Iterable[str]) -> str:
    """SHA-256 of ids, one a line, in alphabetical order: copies of a list differ in theirs."""
    return _checksum(f"{name}\n" for name in sorted(ids))


def pair_checksum(clips: Iterable[Clip]) -> str:
    """SHA-256 of ids and captions by tab, one a line, in their order."""
    return _checksum(f"{clip.id}\t{caption}\n" for clip in clips for caption in clip.captions)


def differences(
    protocol: str, clips: Sequence[Clip], listed: Mapping[str, Sequence[str]], rows: Mapping[str, int]
) -> list[str]:
    """What differs from a named protocol, a line each; nothing where all that is known agrees.

    Args:
        protocol: a key of `PROTOCOLS`.
        clips: of all splits.
        listed: by split the ids of its list, those without a caption too.
        rows: by split the rows read, where several make one caption.
    """
    found = []
    for split, known in PROTOCOLS[protocol].items():
        chosen = [clip for clip in clips if clip.split == split]
        captions = sum(len(clip.captions) for clip in chosen)
        counts = (
            ("videos", known.videos, len(chosen)),
            ("captions", known.captions, captions),
            ("rows", known.rows, rows.get(split, captions)),
        )
        told = [
            f"expected {wanted} {name}, found {n}" for name, wanted, n in counts if wanted not in (None, n)
        ]
        told += _other_ids(known, listed.get(split, ()), listed)
        if known.pairs is not None and not told and pair_checksum(chosen) != known.pairs:
            told.append("the videos are the protocol's, their captions or their order are not")
        found += [f"{split}: {line}" for line in told]
    return found


def _other_ids(known: Known, given: Iterable[str], listed: Mapping[str, Sequence[str]]) -> list[str]:
    """Ids that differ from the protocol's, by name where they can be told."""
    ids = set(given)
    if known.ids is None or id_checksum(ids) == known.ids:
        return []
    if known.numbers is None:
        return ["the ids are not those of the protocol (SHA-256 of the sorted list differs)"]
    expected = {f"video{number}" for number in known.numbers} - set(listed.get(known.but or "", ()))
    faults = (("missing", expected - ids), ("extra", ids - expected))
    return [f"{len(names)} ids {kind}: {_shown(names)}" for kind, names in faults if names]


def _shown(names: Iterable[str]) -> str:
    """The first of some ids."""
    names = sorted(names, key=lambda name: (len(name), name))
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _checksum(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
    return digest.hexdigest()
