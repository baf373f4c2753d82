"""`discovla export`: write a trained run for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from discovla.export import export, export_drawn
from discovla.model import load_run


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "Write the trained parameters of a run, and with --merge a plain CLIP, for other programs."
    parser = commands.add_parser("export", help=text, description=text)
    parser.add_argument("run_path", type=Path, metavar="RUN", help="run directory or one checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder; with --drawn the output file")
    merge = "also write a plain CLIP under open_clip's names, with LoRA merged in"
    parser.add_argument("--merge", action="store_true", help=merge)
    drawn = "write a CLIP trained on the drawn world as the small file that discovla ships"
    parser.add_argument("--drawn", action="store_true", help=drawn)
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    run = load_run(arguments.run_path)
    if arguments.drawn:
        written = [export_drawn(run, arguments.out)]
    else:
        written = export(run, arguments.out, merged=arguments.merge)
    print("\n".join(f"wrote {path}" for path in written))
