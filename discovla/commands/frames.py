"""`discovla frames`: what a model sees of a video."""

from __future__ import annotations

import argparse
from pathlib import Path

from discovla.data.video.frames import write_frames


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "write the frames of a video that a model would see, as PNG, with their indices and seconds"
    parser = commands.add_parser("frames", help=text, description=text)
    parser.add_argument("video", type=Path, metavar="VIDEO")
    parser.add_argument("--num-frames", type=int, default=12, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    rate = "frames considered per second of video, default: %(default)s"
    parser.add_argument("--sample-rate", type=float, default=1.0, metavar="HZ", help=rate)
    damaged = "what to do with a video that breaks off after some frames, default: %(default)s"
    parser.add_argument("--damaged", choices=("refuse", "use"), default="refuse", help=damaged)
    parser.set_defaults(run=_frames)


def _frames(arguments: argparse.Namespace) -> None:
    paths = write_frames(
        arguments.video,
        arguments.out,
        arguments.num_frames,
        sample_rate=arguments.sample_rate,
        damaged=arguments.damaged,
    )
    print(f"wrote {len(paths)} frames to {arguments.out}")
