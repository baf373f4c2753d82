"""`discovla prepare`: turn annotations into a manifest and a report."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from discovla.data.datasets import DATASETS, OWN_CLIPS, Annotations, Dataset
from discovla.data.datasets.annotations import (
    hold_out_videos,
    read_frame_captions,
    with_frame_captions,
)
from discovla.data.datasets.report import prepare

_USES = {"val": "select the best step on", "test": "measure the final figures on"}
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
        for split, use in _USES.items():
            held = (
                f"training clips to move to the split `{split}`, to {use}: a number, or a share such as 10%%;"
                " all clips of a video file stay together; default: 0"
            )
            own.add_argument(f"--{split}", type=_size, default=0, metavar="N", help=held)
        own.add_argument("--seed", type=int, default=0, help="seed of that choice; default: %(default)s")
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
        held = "training clips to move to the split `val`, to select without the test clips; default: 0"
        named.add_argument("--val", type=int, default=0, metavar="N", help=held)
        named.set_defaults(run=partial(_run_dataset, dataset))
        _add_common(named)


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Declare the options of every dataset."""
    out = "manifest to write (.jsonl), or a folder for manifest.jsonl; the report is written beside it"
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help=out)
    parser.add_argument("--out", type=Path, dest="out_option", metavar="OUT", help="the same")
    captions = "captions of the sampled frames of the training clips, `<clip id>_<caption>` to a list"
    parser.add_argument("--frame-captions", type=Path, metavar="JSON", help=captions)


def _size(text: str) -> int | float:
    """Return a number of clips, or a share of them as a float."""
    number = text.removesuffix("%")
    if text.endswith("%") and number.replace(".", "", 1).isdigit() and 0 < float(number) < 100:
        return float(number) / 100
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number of clips or a share such as 10%, found {text!r}")


def _run_own(read: Callable[[str | Path], Annotations], arguments: argparse.Namespace) -> None:
    annotations = read(arguments.root)
    sizes = {"val": arguments.val, "test": arguments.test}
    clips = hold_out_videos(annotations.clips, sizes, seed=arguments.seed)
    _write(replace(annotations, clips=clips), arguments)


def _run_dataset(dataset: Dataset, arguments: argparse.Namespace) -> None:
    annotations = dataset.read(arguments.root, videos=arguments.videos, protocol=arguments.protocol)
    _write(annotations, arguments, val=arguments.val)


def _write(annotations: Annotations, arguments: argparse.Namespace, *, val: int = 0) -> None:
    """Write the manifest and the report, and print the report."""
    outs = [out for out in (arguments.out, arguments.out_option) if out is not None]
    if len(outs) != 1:
        raise ValueError(f"OUT: expected one place to write to, found {len(outs)}")
    out: Path = outs[0] if outs[0].suffix == ".jsonl" else outs[0] / "manifest.jsonl"
    if arguments.frame_captions is not None:
        lists = read_frame_captions(arguments.frame_captions)
        annotations = replace(annotations, clips=with_frame_captions(annotations.clips, lists))
    report = prepare(annotations, out, val=val, strict=arguments.strict)
    print("\n".join(report.lines()))
    if annotations.protocol is None:
        missing = [split for split in ("val", "test") if split not in report.splits]
        if missing:
            print(
                f"no clips to {' and '.join(_USES[split] for split in missing)}: "
                + " ".join(f"--{split} 10%" for split in missing)
                + " holds some out"
            )
