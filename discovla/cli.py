"""The `discovla` command: one subcommand a job, each a file of `commands/`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from discovla import __version__
from discovla.commands import (
    caption,
    data_bench,
    doctor,
    draw,
    evaluate,
    export,
    frames,
    preflight,
    prepare,
    shard,
    zero,
)
from discovla.errors import run_program

COMMANDS = (frames, prepare, doctor, caption, shard, data_bench, draw, evaluate, export, zero, preflight)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; what is wrong with the input is one line on stderr and exit status 2."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="discovla: %(levelname)s: %(message)s")
    return run_program(lambda: arguments.run(arguments), "discovla")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="discovla", description="Video-text retrieval.")
    parser.add_argument("--version", action="version", version=f"discovla {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
