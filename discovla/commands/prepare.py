"""`discovla prepare`: annotations into a manifest and a report."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from discovla.data.captions.frame_captions import read_frame_captions
from discovla.data.datasets import (
    Annotated,
    activitynet,
    csv_clips,
    didemo,
    folder_clips,
    jsonl_clips,
    lsmdc,
    msrvtt,
    msvd,
    prepare,
    vatex,
    with_frame_captions,
)


@dataclass(frozen=True, kw_only=True)
class _Named:
    """A published dataset: what reads it, and the protocols to choose from, the first by default."""

    title: str
    read: Callable[..., Annotated]
    protocols: tuple[str, ...] = ()


_NAMED = {
    "msrvtt": _Named(title="MSR-VTT", read=msrvtt, protocols=("1k-A-9k", "1k-A-7k", "1k-B", "full")),
    "msvd": _Named(title="MSVD", read=msvd),
    "vatex": _Named(title="VATEX in English", read=vatex, protocols=("hgr", "mixed-1k5")),
    "didemo": _Named(title="DiDeMo", read=didemo, protocols=("paragraph", "paragraph-listed")),
    "lsmdc": _Named(title="LSMDC", read=lsmdc),
    "activitynet": _Named(
        title="ActivityNet Captions", read=activitynet, protocols=("paragraph", "paragraph-val_2")
    ),
}
_OWN: dict[str, tuple[str, Callable[[Path], Annotated]]] = {
    "csv": ("a table with the columns video,caption[,start,end,split]", csv_clips),
    "jsonl": ("JSON lines with the keys video, caption or captions[, start, end, split]", jsonl_clips),
    "folder": ("a folder of videos, each with a .txt of its name beside it, a caption a line", folder_clips),
}


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "turn a dataset's annotation files, or clips of your own, into a manifest, and report on them"
    parser = commands.add_parser("prepare", help=text, description=text)
    datasets = parser.add_subparsers(required=True, metavar="NAME")
    for name, (title, read) in _OWN.items():
        own = datasets.add_parser(name, help=title, description=title)
        own.add_argument("root", type=Path, metavar="FILE" if name != "folder" else "DIR")
        own.set_defaults(run=partial(_prepare, _own_reader(read)))
        _add_common(own)
    for name, dataset in _NAMED.items():
        named = datasets.add_parser(name, help=dataset.title, description=_described(dataset))
        named.formatter_class = argparse.RawDescriptionHelpFormatter
        named.add_argument("root", type=Path, metavar="ROOT", help="folder of the annotation files")
        videos = "folder of the videos; default: ROOT/videos/all if it is there, else ROOT/videos"
        named.add_argument("--videos", type=Path, metavar="DIR", help=videos)
        if dataset.protocols:
            first = dataset.protocols[0]
            named.add_argument(
                "--protocol", choices=dataset.protocols, default=first, help="default: %(default)s"
            )
        strict = "refuse a copy that differs from the named protocol instead of saying so"
        named.add_argument("--strict", action="store_true", help=strict)
        named.set_defaults(run=partial(_prepare, _named_reader(dataset)))
        _add_common(named)


def _described(dataset: _Named) -> str:
    """What the reader's docstring says of protocols, files and folders."""
    return (
        inspect.cleandoc(dataset.read.__doc__ or "").partition("\n\nRaises:")[0].partition("\n\nReturns:")[0]
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every dataset."""
    out = "a manifest (.jsonl), or a folder that gets manifest.jsonl; the report goes beside it"
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help=out)
    parser.add_argument("--out", type=Path, dest="out_option", metavar="OUT", help="the same")
    captions = "still captions per sampled frame of the training clips, <clip id>_<caption> to a list"
    parser.add_argument("--frame-captions", type=Path, metavar="JSON", help=captions)
    held = "training clips to move to the split `val`, for selection that never sees the test; default: 0"
    parser.add_argument("--val", type=int, default=0, metavar="N", help=held)


def _own_reader(read: Callable[[Path], Annotated]) -> Callable[[argparse.Namespace], Annotated]:
    return lambda arguments: read(arguments.root)


def _named_reader(dataset: _Named) -> Callable[[argparse.Namespace], Annotated]:
    """What reads a published dataset by the words of the command line."""

    def read(arguments: argparse.Namespace) -> Annotated:
        root: Path = arguments.root
        whole = root / "videos/all"  # as the archive of MSR-VTT unpacks
        videos = arguments.videos or (whole if whole.is_dir() else root / "videos")
        if not dataset.protocols:
            return dataset.read(root, videos=videos)
        return dataset.read(root, protocol=arguments.protocol, videos=videos)

    return read


def _prepare(read: Callable[[argparse.Namespace], Annotated], arguments: argparse.Namespace) -> None:
    found = read(arguments)
    if arguments.frame_captions is not None:
        lists = read_frame_captions(arguments.frame_captions)
        found = replace(found, clips=with_frame_captions(found.clips, lists))
    strict = getattr(arguments, "strict", False)
    told = prepare(found, _manifest(arguments), val=arguments.val, strict=strict)
    print("\n".join(told.lines()))


def _manifest(arguments: argparse.Namespace) -> Path:
    """The manifest to write."""
    given = [out for out in (arguments.out, arguments.out_option) if out is not None]
    if len(given) != 1:
        raise ValueError(f"OUT: expected one place to write to, found {len(given)}")
    return given[0] if given[0].suffix == ".jsonl" else given[0] / "manifest.jsonl"
