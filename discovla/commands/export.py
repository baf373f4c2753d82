"""`discovla export`: write a trained run for other programs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from discovla.card import base_model
from discovla.checkpoints import RESULTS
from discovla.export import (
    export,
    export_drawn,
    export_open_clip,
    export_programs,
    measure_loss,
    push_to_hub,
)
from discovla.model import load_run
from discovla.peft_format import write_peft


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "Write the trained parameters of a run, which discovla.load(OUT) opens, and a CLIP for open_clip."
    parser = commands.add_parser("export", help=text, description=text)
    parser.add_argument("run_path", type=Path, metavar="RUN", help="run directory or one checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder; with --drawn the output file")
    open_clip = (
        "also write the CLIP inside, with LoRA merged in, as open_clip loads it by the name local-dir:OUT; "
        "refused if the run has parts that a plain CLIP cannot hold"
    )
    parser.add_argument("--open-clip", action="store_true", help=open_clip)
    lossy = "write that CLIP without those parts; R@1 of both on the run's val split is printed"
    parser.add_argument("--lossy", action="store_true", help=lossy)
    programs = "also write both encoders as video_encoder.pt2 and text_encoder.pt2 for torch.export.load"
    parser.add_argument("--torch-export", action="store_true", help=programs)
    peft = "also write LoRA as peft.PeftModel loads it: OUT/peft_open_clip, or OUT/peft_transformers"
    parser.add_argument("--peft", choices=("open_clip", "transformers"), help=peft)
    hub = "also upload the export, with a model card, to this repository of Hugging Face's hub"
    parser.add_argument("--hub", metavar="USER/NAME", help=hub)
    drawn = "write a CLIP trained on the drawn world as the small file that discovla ships"
    parser.add_argument("--drawn", action="store_true", help=drawn)
    devices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", default="auto", choices=devices, help="default: %(default)s")
    parser.add_argument("--merge", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    if arguments.merge:
        raise ValueError("export: --merge: renamed; use --open-clip")
    if arguments.lossy and not arguments.open_clip:
        raise ValueError("export: expected --lossy with --open-clip, found it alone")
    run = load_run(arguments.run_path)
    if arguments.drawn:
        print(f"wrote {export_drawn(run, arguments.out)}")
        return
    loss = None
    if arguments.open_clip:
        loss = measure_loss(run, arguments.device)
        if loss.parts and not arguments.lossy:
            raise ValueError(
                f"export: a plain CLIP cannot hold {loss}; --lossy writes it without, and discovla.load(OUT) "
                "needs no --open-clip"
            )
        if loss.parts:
            sys.stderr.write(f"discovla: WARNING: the plain CLIP lacks {loss}\n")
    written = [export(run, arguments.out)]
    if arguments.open_clip:
        written += export_open_clip(run, arguments.out, loss)
    if arguments.torch_export:
        written += export_programs(run, arguments.out)
    if arguments.peft:
        folder = arguments.out / f"peft_{arguments.peft}"
        written += write_peft(run.method, folder, arguments.peft, base_model(run.config))
    if arguments.hub:
        results = arguments.run_path / RESULTS
        url = push_to_hub(run, arguments.out, arguments.hub, results if results.is_file() else None)
        print(f"uploaded {url}")
    print("\n".join(f"wrote {path}" for path in written))
