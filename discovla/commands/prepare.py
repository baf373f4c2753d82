"""`discovla prepare`: annotations into a manifest."""

from __future__ import annotations

import argparse
from pathlib import Path

from discovla.data.datasets import csv_clips, hold_out, msrvtt, prepare


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "turn a dataset's annotation files, or a table of your own, into a manifest"
    parser = commands.add_parser("prepare", help=text, description=text)
    datasets = parser.add_subparsers(required=True, metavar="DATASET")
    table = datasets.add_parser("csv", help="a table with the columns video,caption[,start,end,split]")
    table.add_argument("table", type=Path, metavar="CSV")
    table.set_defaults(run=lambda a: _prepare(a, csv_clips(a.table)))
    vtt = datasets.add_parser("msrvtt", help="MSR-VTT")
    vtt.add_argument("root", type=Path, metavar="ROOT", help="folder of the annotation files")
    vtt.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of <video id>.mp4")
    protocols = ("1k-A-9k", "1k-A-7k", "full")
    vtt.add_argument("--protocol", choices=protocols, default="1k-A-9k", help="default: %(default)s")
    captions = "still captions per sampled frame of the training clips"
    vtt.add_argument("--frame-captions", type=Path, metavar="JSON", help=captions)
    vtt.set_defaults(run=_prepare_msrvtt)
    for dataset in (table, vtt):
        dataset.add_argument("--out", type=Path, required=True, metavar="MANIFEST")
        held = "training clips to move to the split `val`, for selection that never sees the test; default: 0"
        dataset.add_argument("--val", type=int, default=0, metavar="N", help=held)


def _prepare_msrvtt(arguments: argparse.Namespace) -> None:
    clips = msrvtt(
        arguments.root,
        protocol=arguments.protocol,
        videos=arguments.videos,
        frame_captions=arguments.frame_captions,
    )
    _prepare(arguments, clips)


def _prepare(arguments: argparse.Namespace, clips: list) -> None:
    if arguments.val:
        clips = hold_out(clips, arguments.val)
    print("\n".join(prepare(clips, arguments.out).lines()))
