"""The `discovla` command: one subcommand a job, each a thin call of the function that does it."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from discovla import __version__
from discovla.data.datasets import csv_clips, hold_out, msrvtt, prepare
from discovla.data.decode import write_frames
from discovla.data.synthetic import WorldSizes, draw_world
from discovla.faults import run_told


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; what is wrong with the input is one line on stderr and exit status 2."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="discovla: %(levelname)s: %(message)s")
    return run_told(lambda: arguments.run(arguments), "discovla")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="discovla", description="Video-text retrieval.")
    parser.add_argument("--version", action="version", version=f"discovla {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_frames(commands)
    _add_prepare(commands)
    _add_draw(commands)
    _add_evaluate(commands)
    _add_export(commands)
    return parser


def _add_frames(commands: argparse._SubParsersAction) -> None:
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


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    text = "turn a dataset's annotation files, or a table of your own, into a manifest"
    parser = commands.add_parser("prepare", help=text, description=text)
    datasets = parser.add_subparsers(required=True, metavar="DATASET")
    table = datasets.add_parser("csv", help="a table with the columns video,caption[,start,end,split]")
    table.add_argument("table", type=Path, metavar="CSV")
    table.set_defaults(run=lambda a: _prepare(a, csv_clips(a.table)))
    vtt = datasets.add_parser("msrvtt", help="MSR-VTT")
    vtt.add_argument("root", type=Path, metavar="ROOT", help="folder of the annotation files")
    vtt.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of <video id>.mp4")
    protocols = ("1k-A-9k", "1k-A-7k", "full")
    vtt.add_argument("--protocol", choices=protocols, default="1k-A-9k", help="default: %(default)s")
    captions = "still captions per sampled frame of the training clips"
    vtt.add_argument("--frame-captions", type=Path, metavar="JSON", help=captions)
    vtt.set_defaults(run=_prepare_msrvtt)
    for dataset in (table, vtt):
        dataset.add_argument("--out", type=Path, required=True, metavar="MANIFEST")
        held = "training clips to move to the split `val`, for selection that never sees the test; default: 0"
        dataset.add_argument("--val", type=int, default=0, metavar="N", help=held)


def _prepare_msrvtt(arguments: argparse.Namespace) -> None:
    clips = msrvtt(
        arguments.root,
        protocol=arguments.protocol,
        videos=arguments.videos,
        frame_captions=arguments.frame_captions,
    )
    _prepare(arguments, clips)


def _prepare(arguments: argparse.Namespace, clips: list) -> None:
    if arguments.val:
        clips = hold_out(clips, arguments.val)
    print("\n".join(prepare(clips, arguments.out).lines()))


def _add_draw(commands: argparse._SubParsersAction) -> None:
    text = "draw the clips of the drawn world and write their manifest; what is there already is kept"
    parser = commands.add_parser("draw", help=text, description=text)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers", type=int, default=cores, metavar="N", help="default: all cores, %(default)s"
    )
    for split, count in asdict(WorldSizes()).items():
        held = f"clips in the split `{split}`, default: %(default)s"
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=held)
    parser.set_defaults(run=_draw)


def _draw(arguments: argparse.Namespace) -> None:
    sizes = WorldSizes(**{field.name: getattr(arguments, field.name) for field in fields(WorldSizes)})
    manifest = draw_world(arguments.out, seed=arguments.seed, sizes=sizes, workers=arguments.workers)
    print(f"{manifest} is ready")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    text = "retrieval figures of a trained run on a manifest, or of a similarity matrix from any model"
    parser = commands.add_parser("evaluate", help=text, description=text)
    run = "run directory (its best checkpoint) or one checkpoint"
    parser.add_argument("run_path", type=Path, nargs="?", metavar="RUN", help=run)
    manifest = "clips to evaluate on; default: those of the run"
    parser.add_argument("--manifest", type=Path, metavar="JSONL", help=manifest)
    parser.add_argument("--split", default="test", help="default: %(default)s")
    matrix = "instead of a run: a similarity matrix, rows texts, columns videos"
    parser.add_argument("--matrix", type=Path, metavar="NPY", help=matrix)
    groups = "JSON list: the video of each text; without it text i describes video i"
    parser.add_argument("--groups", type=Path, metavar="JSON", help=groups)
    devices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", default="auto", choices=devices, help="default: %(default)s")
    as_json = (
        "print one JSON object; percent and ranks from 1, ties against the query, for it in `optimistic`"
    )
    parser.add_argument("--json", action="store_true", help=as_json)
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from discovla.evaluate import evaluate_matrix, results_table  # torch takes seconds to import

    if (arguments.run_path is None) == (arguments.matrix is None):
        raise ValueError("evaluate: expected either a RUN or --matrix")
    if arguments.matrix is not None:
        metrics = evaluate_matrix(arguments.matrix, arguments.groups)
        print(json.dumps(metrics) if arguments.json else results_table({str(arguments.matrix): metrics}))
        return
    rows = _evaluate_run(arguments)
    print(json.dumps(rows) if arguments.json else results_table(rows))


def _evaluate_run(arguments: argparse.Namespace) -> dict:
    """Figures of a run by name: raw, and re-ranked beside them."""
    from discovla.engine.distributed import start
    from discovla.evaluate import Evaluation, evaluate_manifest
    from discovla.runs import open_run

    world = start(arguments.device)
    run = open_run(arguments.run_path)
    data = run.config.data
    how = Evaluation(data=data, device=world.device, batch_size=run.config.eval_batch_size, rerank=True)
    manifest = arguments.manifest or data.manifest
    return evaluate_manifest(run.method.to(world.device), manifest, arguments.split, how)


def _add_export(commands: argparse._SubParsersAction) -> None:
    text = "write what a run trained as files for other programs"
    parser = commands.add_parser("export", help=text, description=text)
    parser.add_argument("run_path", type=Path, metavar="RUN", help="run directory or one checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder; with --drawn the file")
    merge = "also a plain CLIP under open_clip's names, LoRA merged"
    parser.add_argument("--merge", action="store_true", help=merge)
    drawn = "the small file of a CLIP trained on the drawn world, as it ships with discovla"
    parser.add_argument("--drawn", action="store_true", help=drawn)
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    from discovla.runs import export, export_drawn, open_run  # torch takes seconds to import

    run = open_run(arguments.run_path)
    if arguments.drawn:
        written = [export_drawn(run, arguments.out)]
    else:
        written = export(run, arguments.out, merged=arguments.merge)
    print("\n".join(f"wrote {path}" for path in written))
