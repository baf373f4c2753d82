"""`discovla prepare`: turn annotations into a manifest and a report."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from discovla.data.datasets import DATASETS, OWN_CLIPS, Annotations, Dataset
from discovla.data.datasets.annotations import read_frame_captions, with_frame_captions
from discovla.data.datasets.report import prepare

_OWN_TITLES = {
    "csv": "a table with the columns video,caption[,start,end,split]",
    "jsonl": "JSON lines with the keys video, caption or captions[, start, end, split]",
    "folder": "a folder of videos, each with a .txt of the same name beside it, one caption a line",
}


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "turn a dataset's annotation files, or your own clips, into a manifest and a report"
    parser = commands.add_parser("prepare", help=text, description=text)
    datasets = parser.add_subparsers(required=True, metavar="NAME")
    for name, read in OWN_CLIPS.items():
        title = _OWN_TITLES[name]
        own = datasets.add_parser(name, help=title, description=title)
        own.add_argument("root", type=Path, metavar="FILE" if name != "folder" else "DIR")
        own.set_defaults(run=partial(_run_own, read), strict=False)
        _add_common(own)
    for name, dataset in DATASETS.items():
        named = datasets.add_parser(
            name,
            help=dataset.title,
            description=inspect.cleandoc(dataset.reader.__doc__ or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        named.add_argument("root", type=Path, metavar="ROOT", help="folder of the annotation files")
        videos = "folder of the videos; default: ROOT/videos/all if it exists, else ROOT/videos"
        named.add_argument("--videos", type=Path, metavar="DIR", help=videos)
        protocols = list(dataset.protocols)
        named.add_argument("--protocol", choices=protocols, default=protocols[0], help="default: %(default)s")
        strict = "refuse a copy that differs from the protocol, instead of reporting the differences"
        named.add_argument("--strict", action="store_true", help=strict)
        named.set_defaults(run=partial(_run_dataset, dataset))
        _add_common(named)


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Declare the options of every dataset."""
    out = "manifest to write (.jsonl), or a folder for manifest.jsonl; the report is written beside it"
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help=out)
    parser.add_argument("--out", type=Path, dest="out_option", metavar="OUT", help="the same")
    captions = "captions of the sampled frames of the training clips, `<clip id>_<caption>` to a list"
    parser.add_argument("--frame-captions", type=Path, metavar="JSON", help=captions)
    held = "training clips to move to the split `val`, to select without the test clips; default: 0"
    parser.add_argument("--val", type=int, default=0, metavar="N", help=held)


def _run_own(read: Callable[[str | Path], Annotations], arguments: argparse.Namespace) -> None:
    _write(read(arguments.root), arguments)


def _run_dataset(dataset: Dataset, arguments: argparse.Namespace) -> None:
    _write(dataset.read(arguments.root, videos=arguments.videos, protocol=arguments.protocol), arguments)


def _write(annotations: Annotations, arguments: argparse.Namespace) -> None:
    """Write the manifest and the report, and print the report."""
    outs = [out for out in (arguments.out, arguments.out_option) if out is not None]
    if len(outs) != 1:
        raise ValueError(f"OUT: expected one place to write to, found {len(outs)}")
    out: Path = outs[0] if outs[0].suffix == ".jsonl" else outs[0] / "manifest.jsonl"
    if arguments.frame_captions is not None:
        lists = read_frame_captions(arguments.frame_captions)
        annotations = replace(annotations, clips=with_frame_captions(annotations.clips, lists))
    report = prepare(annotations, out, val=arguments.val, strict=arguments.strict)
    print("\n".join(report.lines()))
