"""`discovla doctor`: examine every video of a manifest before training, or measure the decoders."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from discovla import terminal
from discovla.config import read_config
from discovla.data.config import DataConfig
from discovla.data.doctor import Diagnosis, ExamineOptions, add_broken, diagnose
from discovla.data.manifest import Clip, read_manifest
from discovla.data.sampling import Sampler, clip_sampling
from discovla.data.video.frames import Damaged, DecoderName, Hdr, check_decoder

_CLIPS = 32  # clips that --bench reads


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "decode every video of a manifest, summarize them, and list the broken clips with reasons"
    parser = commands.add_parser("doctor", help=text, description=text)
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    out = "folder for files.jsonl and quarantine.jsonl; default: <manifest>.doctor beside the manifest"
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help=out)
    parser.add_argument("--split", metavar="NAME", help="split of the manifest; default: all")
    config = "config of a run, which replaces the options of sampling, --damaged, --hdr and --index-dir"
    parser.add_argument("--config", type=Path, metavar="TOML", help=config)
    parser.add_argument("--frames", type=int, default=12, metavar="N", help="of a clip; default: %(default)s")
    parser.add_argument("--sampling", choices=get_args(Sampler), default="discovla")
    parser.add_argument("--sample-rate", type=float, default=1.0, metavar="R", help="frames a second")
    damaged = "refuse files that break off, or use their frames up to there; default: %(default)s"
    parser.add_argument("--damaged", choices=get_args(Damaged), default="refuse", help=damaged)
    hdr = "refuse HDR videos, or map their frames to SDR; default: %(default)s"
    parser.add_argument("--hdr", choices=get_args(Hdr), default="refuse", help=hdr)
    decoder = "compare the frames of this decoder with those of PyAV, and list clips where they differ"
    parser.add_argument("--decoder", choices=get_args(DecoderName), default="pyav", help=decoder)
    index_dir = (
        "folder of frame indices, which training then finds (data.index_dir); default: the user's own, "
        "$XDG_CACHE_HOME/discovla/frame_index"
    )
    parser.add_argument("--index-dir", type=Path, metavar="DIR", help=index_dir)
    seconds = "limit for a file, after which its process is replaced; default: %(default)g"
    parser.add_argument("--seconds", type=float, default=300.0, metavar="S", help=seconds)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    parser.add_argument("--strict", action="store_true", help="exit with an error if a clip is broken")
    size = "pixels of a side of the frames, for --bench and --decoder dali; default: %(default)s"
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help=size)
    bench = (
        f"instead measure the decoders that are installed on {_CLIPS} clips, evenly spaced in the manifest"
    )
    parser.add_argument("--bench", action="store_true", help=bench)
    shards = "with --bench: shards of the manifest to measure too; may be repeated"
    parser.add_argument("--shards", metavar="DIR", action="append", default=[], help=shards)
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --bench: write the figures as JSONL")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    for name in ("workers", "image_size"):
        if getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: expected at least 1, found {getattr(arguments, name)}")
    clips = read_manifest(arguments.manifest, split=arguments.split)
    if arguments.bench:
        _bench(clips, arguments)
        return
    diagnosis = _diagnose(clips, arguments)
    print("\n".join(diagnosis.lines()))
    if diagnosis.broken and arguments.strict:
        raise ValueError(
            f"{arguments.manifest}: {len(diagnosis.broken)} of {diagnosis.clips} clips give no frames"
        )


def _bench(clips: list[Clip], arguments: argparse.Namespace) -> None:
    from discovla.data.decoders import bench, bench_table  # torch takes seconds to import

    config = _config(arguments)
    shards = arguments.shards or ([] if config.shards is None else [config.shards])
    some = clips[:: max(1, len(clips) // _CLIPS)][:_CLIPS]
    rows = list(bench(some, config, arguments.image_size, shards=shards))
    print(bench_table(rows))
    if arguments.json is not None:
        lines = [json.dumps(asdict(row) | {"rate": row.rate}) + "\n" for row in rows]
        arguments.json.write_text("".join(lines), encoding="utf-8")


def _diagnose(clips: list[Clip], arguments: argparse.Namespace) -> Diagnosis:
    config, manifest = _config(arguments), arguments.manifest
    check_decoder(arguments.decoder)
    options = ExamineOptions(
        sampling=clip_sampling(config),
        damaged=config.damaged,
        hdr=config.hdr,
        decoder="pyav" if arguments.decoder == "dali" else arguments.decoder,
        seconds=arguments.seconds,
        workers=arguments.workers,
        index_dir=config.index_dir,
    )
    out = arguments.out or manifest.with_name(f"{manifest.stem}.doctor")
    with terminal.progress("examining", None, "files") as bar:
        diagnosis = diagnose(clips, out, options, report=bar.update)
    if arguments.decoder == "dali":
        from discovla.data.decoders import differing_from_pyav  # torch takes seconds to import

        broken = {name for name, _, _ in diagnosis.broken}
        whole = [clip for clip in clips if clip.id not in broken]
        diagnosis = add_broken(diagnosis, clips, differing_from_pyav(whole, config, arguments.image_size))
    return diagnosis


def _config(arguments: argparse.Namespace) -> DataConfig:
    """Return the data options of a run's config, else those of the command line."""
    if arguments.config is not None:
        config = read_config(arguments.config).data
    else:
        try:
            config = DataConfig(
                manifest=arguments.manifest,
                frames=arguments.frames,
                sampling=arguments.sampling,
                sample_rate=arguments.sample_rate,
                damaged=arguments.damaged,
                hdr=arguments.hdr,
            )
        except ValidationError as error:
            first = error.errors()[0]
            option = str(first["loc"][0]).replace("_", "-")
            text = first.get("ctx", {}).get("error", first["msg"])
            raise ValueError(f"--{option}: {text}, found {first['input']!r}") from None
    changes = {"workers": arguments.workers, "decode_seconds": arguments.seconds}
    if arguments.index_dir is not None:
        changes["index_dir"] = arguments.index_dir
    return config.model_copy(update=changes)
