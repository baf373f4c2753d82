"""`discovla caption`: caption the sampled frames of clips with a vision-language model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

import torch

from discovla import terminal
from discovla.data.captions.captioning import (
    CaptionedClips,
    Captioner,
    CaptionSettings,
    CaptionStore,
    caption_clips,
    with_captions,
)
from discovla.data.captions.coca import CoCaCaptioner
from discovla.data.captions.endpoint import EndpointCaptioner, Server
from discovla.data.datasets.annotations import (
    read_frame_captions,
    with_frame_captions,
    write_frame_captions,
)
from discovla.data.manifest import Clip, read_manifest, write_manifest
from discovla.data.video.frames import Damaged, Hdr
from discovla.lock import WriterLock

_MODELS = "openai:NAME (with --url) or coca:ARCHITECTURE@WEIGHTS (open_clip)"
_SERVERS = """models of Hugging Face run behind a server, for example:
  vllm serve Qwen/Qwen2.5-VL-7B-Instruct
  discovla caption m.jsonl out.jsonl --model openai:Qwen/Qwen2.5-VL-7B-Instruct --url http://localhost:8000/v1
or with Ollama:
  ollama pull qwen2.5vl
  discovla caption m.jsonl out.jsonl --model openai:qwen2.5vl --url http://localhost:11434/v1"""


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "caption the sampled frames of clips, and write a manifest or DiscoVLA's JSON with the captions"
    parser = commands.add_parser(
        "caption",
        help=text,
        description=text,
        epilog=_SERVERS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    out = "manifest with the frame captions (.jsonl), or the frame captions alone in DiscoVLA's form (.json)"
    parser.add_argument("out", type=Path, metavar="OUT", help=out)
    parser.add_argument("--model", required=True, metavar="KIND:NAME", help=_MODELS)
    prompt = "instruction to an openai: model; default: one short sentence"
    parser.add_argument("--prompt", help=prompt)
    parser.add_argument("--max-tokens", type=int, default=30, metavar="N", help="default: %(default)s")
    device = "of a coca: model; default: %(default)s"
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=device)
    parser.add_argument("--url", metavar="URL", help="of an OpenAI-compatible server, up to /v1")
    key = "environment variable with the server's key; default: %(default)s"
    parser.add_argument("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help=key)
    attempts = "attempts per picture; default: %(default)s"
    parser.add_argument("--tries", type=int, default=5, metavar="N", help=attempts)
    parser.add_argument("--split", default="train", metavar="NAME", help="default: %(default)s")
    known = "existing captions in DiscoVLA's form, which are kept"
    parser.add_argument("--known", type=Path, metavar="JSON", help=known)
    frames = "frames per clip; default: %(default)s"
    parser.add_argument("--frames", type=int, default=12, metavar="N", help=frames)
    rate = "frames a second; default: %(default)s"
    parser.add_argument("--sample-rate", type=float, default=1.0, metavar="R", help=rate)
    damaged = "treatment of clips that end early, as data.damaged; default: %(default)s"
    parser.add_argument("--damaged", choices=get_args(Damaged), default="refuse", help=damaged)
    hdr = "treatment of HDR clips, as data.hdr; default: %(default)s"
    parser.add_argument("--hdr", choices=get_args(Hdr), default="refuse", help=hdr)
    side = "longest side of a picture; default: %(default)s"
    parser.add_argument("--side", type=int, default=768, metavar="PIXELS", help=side)
    batch = "pictures per call, or requests at once; default: %(default)s"
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help=batch)
    workers = "decoding processes; default: %(default)s"
    parser.add_argument("--workers", type=int, default=2, metavar="N", help=workers)
    seconds = "time limit for decoding a clip; default: %(default)s"
    parser.add_argument("--seconds", type=float, default=300.0, metavar="S", help=seconds)
    cache = "folder that keeps captions as they are made, to resume from; default: <OUT>.cache"
    parser.add_argument("--cache", type=Path, metavar="DIR", help=cache)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    if out.suffix not in (".jsonl", ".json"):
        raise ValueError(f"OUT: expected a .jsonl or a .json, found {out}")
    clips = read_manifest(arguments.manifest)
    if not any(clip.split == arguments.split for clip in clips):
        raise ValueError(f"{arguments.manifest}: expected clips of the split {arguments.split!r}, found none")
    if arguments.known is not None:
        known = with_frame_captions(clips, read_frame_captions(arguments.known), arguments.split)
        clips = [new if any(new.frame_captions or ()) else old for old, new in zip(clips, known, strict=True)]
    pending = [
        clip
        for clip in clips
        if clip.split == arguments.split and (clip.frame_captions is None or None in clip.frame_captions)
    ]
    result = CaptionedClips(texts={}, bad={}, failed={}, frames=0, asked=0)
    if pending:
        result = _caption(pending, arguments)
        clips = with_captions(clips, result.texts)
    if out.suffix == ".jsonl":
        write_manifest(out, clips)
    else:
        write_frame_captions(out, clips)
    print("\n".join([*result.lines(), f"wrote {out}"]))
    if result.failed:
        raise ValueError(f"{out}: {len(result.failed)} clips lack a caption; run the command again to retry")


def _caption(clips: list[Clip], arguments: argparse.Namespace) -> CaptionedClips:
    """Caption clips with the chosen model, showing progress."""
    for name in ("frames", "batch_size", "workers", "side", "max_tokens", "tries"):
        value = getattr(arguments, name)
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    settings = CaptionSettings(
        frames=arguments.frames,
        sample_rate=arguments.sample_rate,
        damaged=arguments.damaged,
        hdr=arguments.hdr,
        side=arguments.side,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        seconds=arguments.seconds,
    )
    captioner = _captioner(arguments)
    cache = arguments.cache or arguments.out.with_name(f"{arguments.out.name}.cache")
    with WriterLock(cache, "discovla caption"), terminal.progress("captioning", len(clips), "clips") as bar:
        store = CaptionStore(cache, captioner.identity)
        return caption_clips(clips, captioner, store, settings, progress=bar.update)


def _captioner(arguments: argparse.Namespace) -> Captioner:
    """Make the captioner of `--model`."""
    kind, _, name = arguments.model.partition(":")
    if kind == "hf":
        raise ValueError(
            f"--model: expected {_MODELS}, found {arguments.model!r}; serve it with `vllm serve {name}` and"
            f" use --model openai:{name} --url http://localhost:8000/v1"
        )
    if not name or kind not in ("coca", "openai"):
        raise ValueError(f"--model: expected {_MODELS}, found {arguments.model!r}")
    if (kind == "openai") != (arguments.url is not None):
        raise ValueError(f"--url: expected with --model openai:NAME and with no other, found {arguments.url}")
    if kind == "coca":
        if arguments.prompt is not None:
            raise ValueError("--prompt: expected none with a CoCa model, which takes no prompt")
        return CoCaCaptioner(name, arguments.max_tokens, arguments.device)
    server = Server(
        url=arguments.url,
        key=os.environ.get(arguments.key_variable),
        attempts=arguments.tries,
        parallel=arguments.batch_size,
    )
    return EndpointCaptioner(name, server, arguments.prompt, arguments.max_tokens)
