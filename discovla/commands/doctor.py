"""`discovla doctor`: open every clip before training does."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from discovla.config import read_config
from discovla.data.doctor import Checks, diagnose
from discovla.data.manifest import read_manifest
from discovla.data.sampling import Sampler, Sampling, clip_sampling
from discovla.data.video.frames import Damaged


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "open every clip of a manifest, say what its videos are, and list the broken ones with reasons"
    parser = commands.add_parser("doctor", help=text, description=text)
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    out = "folder for files.jsonl and quarantine.jsonl; default: <manifest>.doctor beside it"
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help=out)
    parser.add_argument("--split", metavar="NAME", help="of the manifest; default: all")
    config = "take what is sampled from a run's config instead of from the options below"
    parser.add_argument("--config", type=Path, metavar="TOML", help=config)
    parser.add_argument("--frames", type=int, default=12, metavar="N", help="a clip; default: %(default)s")
    parser.add_argument("--sampling", choices=get_args(Sampler), default="discovla")
    parser.add_argument("--sample-rate", type=float, default=1.0, metavar="R", help="frames a second")
    damaged = "whether files that break off are broken; default: %(default)s"
    parser.add_argument("--damaged", choices=get_args(Damaged), default="refuse", help=damaged)
    cache = (
        "data.cache of the run to come, whose first visit of each file is then made already; default: that of"
        " --config"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help=cache)
    seconds = "that a file may take before its process is ended; default: %(default)g"
    parser.add_argument("--seconds", type=float, default=300.0, metavar="S", help=seconds)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    strict = "exit with an error where a clip is broken"
    parser.add_argument("--strict", action="store_true", help=strict)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    manifest: Path = arguments.manifest
    clips = read_manifest(manifest, split=arguments.split)
    out = arguments.out or manifest.with_name(f"{manifest.stem}.doctor")
    with tqdm(unit="file", disable=None) as bar:

        def told(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = diagnose(clips, out, _checks(arguments), told=told)
    print("\n".join(found.lines()))
    if found.broken and arguments.strict:
        raise ValueError(f"{manifest}: {len(found.broken)} of {found.clips} clips give no frames")


def _checks(arguments: argparse.Namespace) -> Checks:
    """How to examine, by the options or by a run's config."""
    if arguments.workers < 1:
        raise ValueError(f"--workers: expected at least 1, got {arguments.workers}")
    sampling = Sampling(
        frames=arguments.frames, sampler=arguments.sampling, sample_rate=arguments.sample_rate
    )
    damaged: Damaged = arguments.damaged
    cache: Path | None = arguments.cache
    if arguments.config is not None:
        data = read_config(arguments.config).data
        damaged, cache = data.damaged, cache or data.cache
        sampling = clip_sampling(data)
    return Checks(
        sampling=sampling,
        damaged=damaged,
        seconds=arguments.seconds,
        workers=arguments.workers,
        cache=cache,
    )
