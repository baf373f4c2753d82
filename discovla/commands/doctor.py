"""`discovla doctor`: examine every video of a manifest before training."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from discovla.config import read_config
from discovla.data.doctor import ExamineOptions, diagnose
from discovla.data.manifest import read_manifest
from discovla.data.sampling import Sampler, Sampling, clip_sampling
from discovla.data.video.frames import Damaged, FileDecoder, check_decoder


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "decode every video of a manifest, summarize them, and list the broken clips with reasons"
    parser = commands.add_parser("doctor", help=text, description=text)
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    out = "folder for files.jsonl and quarantine.jsonl; default: <manifest>.doctor beside the manifest"
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help=out)
    parser.add_argument("--split", metavar="NAME", help="split of the manifest; default: all")
    config = "config of a run, which replaces the options of sampling, --damaged and --index-dir"
    parser.add_argument("--config", type=Path, metavar="TOML", help=config)
    parser.add_argument("--frames", type=int, default=12, metavar="N", help="of a clip; default: %(default)s")
    parser.add_argument("--sampling", choices=get_args(Sampler), default="discovla")
    parser.add_argument("--sample-rate", type=float, default=1.0, metavar="R", help="frames a second")
    damaged = "refuse files that break off, or use their frames up to there; default: %(default)s"
    parser.add_argument("--damaged", choices=get_args(Damaged), default="refuse", help=damaged)
    decoder = "compare the frames of this decoder with those of PyAV, and list clips where they differ"
    parser.add_argument("--decoder", choices=get_args(FileDecoder), default="pyav", help=decoder)
    index_dir = (
        "folder of frame indices, which training then finds (data.index_dir); default: the user's own, "
        "$XDG_CACHE_HOME/discovla/frame_index"
    )
    parser.add_argument("--index-dir", type=Path, metavar="DIR", help=index_dir)
    seconds = "limit for a file, after which its process is replaced; default: %(default)g"
    parser.add_argument("--seconds", type=float, default=300.0, metavar="S", help=seconds)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--strict", action="store_true", help="exit with an error if a clip is broken")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    manifest: Path = arguments.manifest
    clips = read_manifest(manifest, split=arguments.split)
    out = arguments.out or manifest.with_name(f"{manifest.stem}.doctor")
    with tqdm(unit="file", disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        diagnosis = diagnose(clips, out, _options(arguments), report=report)
    print("\n".join(diagnosis.lines()))
    if diagnosis.broken and arguments.strict:
        raise ValueError(f"{manifest}: {len(diagnosis.broken)} of {diagnosis.clips} clips give no frames")


def _options(arguments: argparse.Namespace) -> ExamineOptions:
    """Return the options of the command line, or those of a run's config."""
    if arguments.workers < 1:
        raise ValueError(f"--workers: expected at least 1, found {arguments.workers}")
    check_decoder(arguments.decoder)
    sampling = Sampling(
        frames=arguments.frames, sampler=arguments.sampling, sample_rate=arguments.sample_rate
    )
    damaged, index_dir = arguments.damaged, arguments.index_dir
    if arguments.config is not None:
        data = read_config(arguments.config).data
        damaged, index_dir = data.damaged, index_dir or data.index_dir
        sampling = clip_sampling(data)
    return ExamineOptions(
        sampling=sampling,
        damaged=damaged,
        decoder=arguments.decoder,
        seconds=arguments.seconds,
        workers=arguments.workers,
        index_dir=index_dir,
    )
