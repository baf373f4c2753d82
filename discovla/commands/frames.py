"""`discovla frames`: write the frames of a video that a model sees."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from discovla.data.sampling import Sampling
from discovla.data.video.frames import Damaged, Hdr, write_frames


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "write the frames of a video that a model would see, as PNG, with their numbers and times"
    parser = commands.add_parser("frames", help=text, description=text)
    parser.add_argument("video", type=Path, metavar="VIDEO")
    parser.add_argument("--num-frames", type=int, default=12, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    rate = "frames considered per second of video; default: %(default)s"
    parser.add_argument("--sample-rate", type=float, default=1.0, metavar="HZ", help=rate)
    damaged = "refuse a video that breaks off, or use its frames up to there; default: %(default)s"
    parser.add_argument("--damaged", choices=get_args(Damaged), default="refuse", help=damaged)
    hdr = "refuse an HDR video, or map its frames to SDR; default: %(default)s"
    parser.add_argument("--hdr", choices=get_args(Hdr), default="refuse", help=hdr)
    parser.set_defaults(run=_frames)


def _frames(arguments: argparse.Namespace) -> None:
    sampling = Sampling(frames=arguments.num_frames, sample_rate=arguments.sample_rate)
    paths = write_frames(
        arguments.video, arguments.out, sampling, damaged=arguments.damaged, hdr=arguments.hdr
    )
    print(f"wrote {len(paths)} frames to {arguments.out}")
