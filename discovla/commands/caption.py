"""`discovla caption`: captions of the sampled frames of clips, by a model of the user's choice."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

import torch
from tqdm import tqdm

from discovla.data.captions.captioners import Asking, Captioner, CoCaCaptioner, HuggingFaceCaptioner
from discovla.data.captions.captioning import (
    CaptionedClips,
    CaptionSettings,
    CaptionStore,
    caption_clips,
    with_captions,
)
from discovla.data.captions.endpoint import EndpointCaptioner, Server
from discovla.data.datasets.frame_captions import (
    read_frame_captions,
    with_frame_captions,
    write_frame_captions,
)
from discovla.data.manifest import Clip, read_manifest, write_manifest
from discovla.data.video.frames import Damaged

_MODELS = "coca:ARCHITECTURE@WEIGHTS (open_clip), hf:NAME (transformers) or openai:NAME (with --url)"


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "caption the sampled frames of clips, and put the captions into a manifest or DiscoVLA's JSON"
    parser = commands.add_parser("caption", help=text, description=text)
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    out = "a manifest with the frame captions (.jsonl), or DiscoVLA's form of them alone (.json)"
    parser.add_argument("out", type=Path, metavar="OUT", help=out)
    parser.add_argument("--model", required=True, metavar="KIND:NAME", help=_MODELS)
    parser.add_argument("--prompt", help="default: the model's own way")
    parser.add_argument("--max-tokens", type=int, default=30, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--url", metavar="URL", help="of a server with OpenAI's protocol, up to /v1")
    key = "environment variable that holds its key; default: %(default)s"
    parser.add_argument("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help=key)
    parser.add_argument(
        "--tries", type=int, default=5, metavar="N", help="of a request; default: %(default)s"
    )
    parser.add_argument("--split", default="train", metavar="NAME", help="default: %(default)s")
    known = "captions in DiscoVLA's form that need not be made again"
    parser.add_argument("--known", type=Path, metavar="JSON", help=known)
    parser.add_argument("--frames", type=int, default=12, metavar="N", help="a clip; default: %(default)s")
    parser.add_argument("--sample-rate", type=float, default=1.0, metavar="R", help="frames a second")
    parser.add_argument("--damaged", choices=get_args(Damaged), default="refuse")
    parser.add_argument("--side", type=int, default=768, metavar="PIXELS", help="of the longer side, at most")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that decode")
    parser.add_argument("--seconds", type=float, default=300.0, metavar="S", help="that decoding may take")
    cache = "where captions are kept as they are made; default: <OUT>.cache beside it"
    parser.add_argument("--cache", type=Path, metavar="DIR", help=cache)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    if out.suffix not in (".jsonl", ".json"):
        raise ValueError(f"OUT: expected a .jsonl or a .json, found {out}")
    clips = _known(read_manifest(arguments.manifest), arguments)
    left = [clip for clip in clips if clip.split == arguments.split and _bare(clip)]
    if not any(clip.split == arguments.split for clip in clips):
        raise ValueError(f"{arguments.manifest}: no clip of the split {arguments.split!r}")
    found = CaptionedClips(texts={}, bad={}, failed={}, frames=0, asked=0)
    if left:
        found = _captioned(left, arguments)
        clips = with_captions(clips, found.texts)
    if out.suffix == ".jsonl":
        write_manifest(out, clips)
    else:
        write_frame_captions(out, clips)
    print("\n".join([*found.lines(), f"wrote {out}"]))
    if found.failed:
        raise ValueError(
            f"{out}: {len(found.failed)} clips lack a caption; the same command tries them again"
        )


def _known(clips: list[Clip], arguments: argparse.Namespace) -> list[Clip]:
    """Clips with the captions that are known from a file in DiscoVLA's form."""
    if arguments.known is None:
        return clips
    known = with_frame_captions(clips, read_frame_captions(arguments.known), arguments.split)
    return [new if any(new.frame_captions or ()) else old for old, new in zip(clips, known, strict=True)]


def _bare(clip: Clip) -> bool:
    """Whether a caption of the clip has no frame captions."""
    return clip.frame_captions is None or None in clip.frame_captions


def _captioned(clips: list[Clip], arguments: argparse.Namespace) -> CaptionedClips:
    """Clips captioned by the model asked for."""
    for name in ("frames", "batch_size", "workers", "side", "max_tokens", "tries"):
        if getattr(arguments, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')}: expected at least 1, got {getattr(arguments, name)}"
            )
    settings = CaptionSettings(
        frames=arguments.frames,
        sample_rate=arguments.sample_rate,
        damaged=arguments.damaged,
        side=arguments.side,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        seconds=arguments.seconds,
    )
    captioner = _captioner(arguments)
    cache = arguments.cache or arguments.out.with_name(f"{arguments.out.name}.cache")
    store = CaptionStore(cache, captioner.identity)
    with tqdm(unit="clip", disable=None) as bar:

        def told(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return caption_clips(clips, captioner, store, settings, told=told)


def _captioner(arguments: argparse.Namespace) -> Captioner:
    """The model asked for."""
    kind, _, name = arguments.model.partition(":")
    asking = Asking(prompt=arguments.prompt, max_tokens=arguments.max_tokens, device=arguments.device)
    if not name or kind not in ("coca", "hf", "openai"):
        raise ValueError(f"--model: expected {_MODELS}, found {arguments.model!r}")
    if (kind == "openai") != (arguments.url is not None):
        raise ValueError(f"--url: expected with --model openai:NAME and with no other, found {arguments.url}")
    if kind == "openai":
        key = os.environ.get(arguments.key_variable)
        server = Server(url=arguments.url, key=key, tries=arguments.tries, parallel=arguments.batch_size)
        return EndpointCaptioner(name, asking, server)
    return CoCaCaptioner(name, asking) if kind == "coca" else HuggingFaceCaptioner(name, asking)
