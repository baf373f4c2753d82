"""`discovla shard`: clips decoded once, for training without decoding."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = (
        "decode the clips of a manifest once, into WebDataset tars that train.py reads with data.shards=OUT;"
        " stopped in the middle, the same command goes on"
    )
    parser = commands.add_parser("shard", help="decode clips once, into WebDataset tars", description=text)
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder, or a bucket's copy of it later on")
    config = "a run's TOML: frames, their sampling and size are those of its data and model"
    parser.add_argument("--config", type=Path, metavar="TOML", help=config)
    _add_frames(parser)
    _add_files(parser)
    parser.set_defaults(run=_shard)


def _add_frames(parser: argparse.ArgumentParser) -> None:
    """Options that say which frames are kept; None leaves them to the config or their defaults."""
    from discovla.data.sampling import Sampler, Slice

    parser.add_argument("--frames", type=int, metavar="N", help="of a clip, default: 12")
    parser.add_argument("--sampling", choices=get_args(Sampler), help="default: discovla")
    parser.add_argument("--sample-rate", type=float, metavar="HZ", help="default: 1")
    parser.add_argument("--sampling-divisor", type=int, metavar="N", help="default: 1")
    parser.add_argument("--sampling-slice", choices=get_args(Slice), help="default: even")
    damaged = "what to do with a video that breaks off after some frames, default: refuse"
    parser.add_argument("--damaged", choices=("refuse", "use"), help=damaged)
    keep = (
        "`sampled`: the frames that testing takes; `candidates`: all that training may draw; default: what"
        " the sampling needs to train"
    )
    parser.add_argument("--keep", choices=("sampled", "candidates"), help=keep)
    size = "pixels of a side, or `full`, which augment = randaugment or resized_crop needs; default: 224"
    parser.add_argument("--size", metavar="N", help=size)


def _add_files(parser: argparse.ArgumentParser) -> None:
    """Options that say how they are kept, and how they are made."""
    parser.add_argument("--format", choices=("raw", "jpeg"), default="raw", help="default: %(default)s")
    parser.add_argument("--quality", type=int, default=90, metavar="Q", help="of JPEG, default: %(default)s")
    tokens = "tokens of the longest caption, default: %(default)s"
    parser.add_argument("--context-length", type=int, default=77, metavar="N", help=tokens)
    clips = "clips in a tar, default: %(default)s"
    parser.add_argument("--clips-per-shard", type=int, default=256, metavar="N", help=clips)
    cores = len(os.sched_getaffinity(0))
    workers = "processes; 0 decodes in this one, without a limit; default: all cores, %(default)s"
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=workers)
    limit = "seconds a clip may take, default: %(default)g"
    parser.add_argument("--limit", type=float, default=120.0, metavar="S", help=limit)
    verify = "read what is there again and make anew what differs from its checksum"
    parser.add_argument("--verify", action="store_true", help=verify)


def _shard(arguments: argparse.Namespace) -> None:
    from discovla.data.shards.writer import write_shards  # torch takes seconds to import

    report = write_shards(
        arguments.manifest,
        arguments.out,
        _settings(arguments),
        workers=arguments.workers,
        limit=arguments.limit,
        verify=arguments.verify,
        log=lambda line: print(line, flush=True),
    )
    for clip in report.bad[:5]:
        print(f"no frames of {clip.id!r} ({clip.video}): {clip.reason}")
    if report.bad:
        print(f"{len(report.bad)} clips give no frames; all are in {arguments.out / 'quarantine.jsonl'}")
    print(
        f"{arguments.out}: {report.clips} clips in {report.shards} shards, {report.size / 1e6:.1f} MB;"
        f" {report.decoded} decoded now"
    )


def _settings(arguments: argparse.Namespace):
    """What is kept of each clip: what is asked for, else the config's, else the defaults."""
    from discovla.data.sampling import Sampling
    from discovla.data.shards.layout import ShardSettings

    fields = ("frames", "sampling", "sample_rate", "sampling_divisor", "sampling_slice", "damaged")
    chosen = {} if arguments.config is None else _of_config(arguments, fields)
    chosen |= {name: value for name in fields if (value := getattr(arguments, name)) is not None}
    if arguments.size is not None:
        if arguments.size != "full" and not arguments.size.isdecimal():
            raise ValueError(f"--size: expected pixels or 'full', found {arguments.size!r}")
        chosen["size"] = None if arguments.size == "full" else int(arguments.size)
    sampling = Sampling(frames=1, sampler=chosen.get("sampling", "discovla"))
    keep = arguments.keep or ("candidates" if sampling.is_random else "sampled")
    return ShardSettings(
        keep=keep,
        format=arguments.format,
        quality=arguments.quality,
        context_length=arguments.context_length,
        clips_per_shard=arguments.clips_per_shard,
        **chosen,
    )


def _of_config(arguments: argparse.Namespace, fields: tuple[str, ...]) -> dict:
    """What a run's data and model say of frames."""
    from discovla.config import read_config
    from discovla.data.config import FULL_SIZE
    from discovla.towers.weights import load_pretrained

    config = read_config(arguments.config)
    chosen = {name: getattr(config.data, name) for name in fields}
    if config.data.augment in FULL_SIZE:
        chosen["size"] = None
    elif arguments.size is None:  # the weights may have to be fetched to know it
        chosen["size"] = load_pretrained(config.model).architecture.image_size
    return chosen
