"""`discovla shard`: decode the clips of a manifest once, so that training reads frames without decoding."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, get_args

from discovla import terminal
from discovla.config import read_config
from discovla.data.config import FULL_SIZE
from discovla.data.sampling import Sampler, Sampling, Slice
from discovla.data.shards.layout import Format, Keep, ShardSettings
from discovla.data.shards.writer import CLIP_SECONDS, write_shards
from discovla.data.video.frames import Damaged, Hdr

# Options that a config replaces; None is the default of `ShardSettings`.
SAMPLING_OPTIONS = (
    "frames",
    "sampling",
    "sample_rate",
    "sampling_divisor",
    "sampling_slice",
    "damaged",
    "hdr",
)


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = (
        "Decode the clips of a manifest once into WebDataset tars, from which runs with data.shards=OUT read"
        " their frames. After an interruption, the same command continues."
    )
    parser = commands.add_parser("shard", help=text, description=text)
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    out = "local folder; a copy of it on a web server, in S3 or in Google Cloud Storage is read the same way"
    parser.add_argument("out", type=Path, metavar="OUT", help=out)
    config = "config of a run, whose sampling and frame size are the defaults of the options below"
    parser.add_argument("--config", type=Path, metavar="TOML", help=config)

    parser.add_argument("--frames", type=int, metavar="N", help="frames of a clip; default: 12")
    parser.add_argument("--sampling", choices=get_args(Sampler), help="default: discovla")
    parser.add_argument("--sample-rate", type=float, metavar="R", help="frames a second; default: 1")
    parser.add_argument("--sampling-divisor", type=int, metavar="N", help="default: 1")
    parser.add_argument("--sampling-slice", choices=get_args(Slice), help="default: even")
    damaged = "refuse videos that break off, or use their frames up to there; default: refuse"
    parser.add_argument("--damaged", choices=get_args(Damaged), help=damaged)
    hdr = "refuse HDR videos, or map their frames to SDR; default: refuse"
    parser.add_argument("--hdr", choices=get_args(Hdr), help=hdr)
    keep = (
        "frames to store: those that evaluation samples, or all that training may sample; default: candidates"
        " if the sampling is random in training, else sampled"
    )
    parser.add_argument("--keep", choices=get_args(Keep), help=keep)
    size = "side of the frames in pixels, or `full`, as randaugment and resized_crop need; default: 224"
    parser.add_argument("--size", metavar="N", help=size)

    parser.add_argument("--format", choices=get_args(Format), default="raw", help="default: %(default)s")
    quality = "JPEG quality, 1 to 100; default: %(default)s"
    parser.add_argument("--quality", type=int, default=90, metavar="Q", help=quality)
    tokens = "most tokens of a stored caption; default: %(default)s"
    parser.add_argument("--context-length", type=int, default=77, metavar="N", help=tokens)
    clips = "clips of a tar; default: %(default)s"
    parser.add_argument("--clips-per-shard", type=int, default=256, metavar="N", help=clips)
    cores = len(os.sched_getaffinity(0))
    workers = "processes; 0 decodes in this one, without a time limit; default: all cores, %(default)s"
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=workers)
    limit = "seconds a clip may take; default: %(default)g"
    parser.add_argument("--limit", type=float, default=CLIP_SECONDS, metavar="S", help=limit)
    verify = "check existing tars by checksum and write those that differ again"
    parser.add_argument("--verify", action="store_true", help=verify)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    with terminal.progress("decoding", None, "clips") as bar:
        report = write_shards(
            arguments.manifest,
            arguments.out,
            _settings(arguments),
            workers=arguments.workers,
            limit=arguments.limit,
            verify=arguments.verify,
            report=bar.update,
        )
    for clip in report.bad[:5]:
        print(f"no frames of {clip.id!r} ({clip.video}): {clip.reason}")
    if report.bad:
        print(f"{len(report.bad)} clips have no frames; all are in {arguments.out / 'quarantine.jsonl'}")
    print(
        f"{arguments.out}: {report.clips} clips in {report.shards} shards, {report.size / 1e6:.1f} MB;"
        f" {report.decoded} decoded in this run"
    )


def _settings(arguments: argparse.Namespace) -> ShardSettings:
    """Return the options of the command line; those left out are of the config, if there is one."""
    options: dict[str, Any] = {}
    if arguments.config is not None:
        config = read_config(arguments.config)
        options = {name: getattr(config.data, name) for name in SAMPLING_OPTIONS}
        cut = (config.data.resize, config.data.interpolation) == ("shortest", "bicubic")  # as shards are cut
        if config.data.augment in FULL_SIZE or not cut:
            options["size"] = None
        elif arguments.size is None:
            from discovla.towers.weights import load_pretrained

            model = config.model
            if model.architecture is not None:  # which tells the size without the weights
                model = model.model_copy(update={"pretrained": "random", "activation": "auto"})
            options["size"] = load_pretrained(model).architecture.image_size
    options |= {name: value for name in SAMPLING_OPTIONS if (value := getattr(arguments, name)) is not None}
    if arguments.size is not None:
        if arguments.size != "full" and not arguments.size.isdecimal():
            raise ValueError(f"--size: expected pixels or 'full', found {arguments.size!r}")
        options["size"] = None if arguments.size == "full" else int(arguments.size)
    sampling = Sampling(frames=1, sampler=options.get("sampling", "discovla"))
    return ShardSettings(
        keep=arguments.keep or ("candidates" if sampling.is_random else "sampled"),
        format=arguments.format,
        quality=arguments.quality,
        context_length=arguments.context_length,
        clips_per_shard=arguments.clips_per_shard,
        **options,
    )
