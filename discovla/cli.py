"""The `discovla` command. Each subcommand is a file of `commands/`, imported only when it is called."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from discovla import __version__, cpu, terminal
from discovla.errors import run_program

COMMANDS = {
    "train": "Train a config, and measure retrieval before and after.",
    "prepare": "Turn a dataset, or videos of your own, into a manifest.",
    "doctor": "Check every clip of a manifest and list the broken ones, or measure the decoders.",
    "frames": "Write the frames of a video that a model would see as PNG files.",
    "caption": "Caption the sampled frames of clips with an image captioner.",
    "shard": "Decode the clips of a manifest once and store their frames as tar shards.",
    "draw": "Draw the synthetic clips that the quickstart trains on.",
    "config": "Print every config key with its value, default, type and meaning.",
    "models": "List open_clip's models: taken, or refused and why; licence, size, operations.",
    "zero": "Print a run's DeepSpeed settings and its predicted memory per GPU.",
    "tune": "Check and time the implementations of each op on this GPU, and print the choices.",
    "preflight": "Check every machine of a run before it starts.",
    "evaluate": "Measure retrieval by a trained run, or by a similarity matrix of any model.",
    "report": "Write the HTML report of a run, or of several side by side.",
    "embed": "Write the embeddings of a manifest's videos and captions.",
    "index": "Index videos of your own, so that moments in them are found.",
    "search": "Find moments in an index by a text, an image, a video or another moment.",
    "serve": "Serve an index: a page to search it in a browser, and an HTTP API.",
    "export": "Write the trained parameters of a run for other programs.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Wrong input is one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    cpu.let_threads_sleep()  # before a subcommand imports torch
    arguments = _parser(argv[0] if argv else None).parse_args(argv)
    terminal.start(level=logging.WARNING)
    return run_program(lambda: arguments.run(arguments), "discovla")


def _parser(called: str | None) -> argparse.ArgumentParser:
    """Make the parser; only the called subcommand is imported, so that --help is quick."""
    parser = argparse.ArgumentParser(
        prog="discovla", description="Text-video retrieval: data, training, evaluation."
    )
    parser.add_argument("--version", action="version", version=f"discovla {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, sentence in COMMANDS.items():
        if name == called:
            import_module(f"discovla.commands.{name.replace('-', '_')}").add(commands)
        else:
            commands.add_parser(name, help=sentence)
    return parser


if __name__ == "__main__":  # launch/ starts `discovla preflight` as a module
    sys.exit(main())
