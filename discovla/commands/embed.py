"""`discovla embed`: write the embeddings of a manifest's videos and captions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from discovla.corpus import embed_manifest
from discovla.model import Precision, load


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = (
        "Write the embeddings of a manifest's videos and captions as safetensors, with a JSONL line for each "
        "row. After an interruption, the same command continues."
    )
    parser = commands.add_parser("embed", help=text, description=text)
    run = "run directory, checkpoint, export, or a CLIP: clip:ARCH@TAG, clip:ARCH@FILE, clip:drawn"
    parser.add_argument("run_path", metavar="RUN", help=run)
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="JSONL of clips")
    out = "folder for videos.safetensors, videos.jsonl, texts.safetensors, texts.jsonl and refused.jsonl"
    parser.add_argument("out", type=Path, metavar="OUT", help=out)
    parser.add_argument("--split", help="embed only clips of this split; default: all")
    devices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", default="auto", choices=devices, help="default: %(default)s")
    precisions = get_args(Precision)
    parser.add_argument("--precision", default="fp32", choices=precisions, help="default: %(default)s")
    size = "videos or captions at once; default: eval_batch_size of the run"
    parser.add_argument("--batch-size", type=int, metavar="N", help=size)
    merge = (
        "tokens of every frame that each block of the vision tower merges, without training; default: none"
    )
    parser.add_argument("--merge", type=int, metavar="R", help=merge)
    parser.set_defaults(run=_embed)


def _embed(arguments: argparse.Namespace) -> None:
    model = load(
        arguments.run_path,
        device=arguments.device,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        merge=arguments.merge,
    )
    corpus = embed_manifest(model, arguments.manifest, arguments.out, split=arguments.split)
    print(f"wrote {arguments.out}/videos.safetensors: {corpus.videos} videos")
    print(f"wrote {arguments.out}/texts.safetensors: {corpus.texts} captions")
    if corpus.refused:
        print(f"refused {len(corpus.refused)} clips, listed with reasons in {arguments.out}/refused.jsonl")
