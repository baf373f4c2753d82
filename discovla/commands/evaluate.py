"""`discovla evaluate`: retrieval metrics of a trained run or of any similarity matrix."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from discovla.data.config import DataConfig
from discovla.data.dataset import read_clips
from discovla.data.quarantine import without_quarantined
from discovla.engine.distributed import join_world
from discovla.evaluate import EvalOptions, evaluate_manifest, evaluate_matrix, results_table
from discovla.model import load_run
from discovla.order import measure_order, order_table
from discovla.report.writer import save_record, write_report
from discovla.retrieval.record import EvaluationRecord


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "Measure retrieval by a trained run on a manifest, or by a similarity matrix of any model."
    parser = commands.add_parser("evaluate", help=text, description=text)
    run = "run directory, whose best checkpoint is evaluated, or one checkpoint"
    parser.add_argument("run_path", type=Path, nargs="?", metavar="RUN", help=run)
    manifest = "clips to evaluate on; default: those of the run"
    parser.add_argument("--manifest", type=Path, metavar="JSONL", help=manifest)
    split = "split to evaluate; default: that of the run's final evaluation"
    parser.add_argument("--split", help=split)
    quarantine = "list of clips to leave out, as `discovla doctor` writes it"
    parser.add_argument("--quarantine", type=Path, metavar="JSONL", help=quarantine)
    plain = "leave out dual softmax and QB-Norm, and with it the training captions it embeds"
    parser.add_argument("--no-rerank", action="store_true", help=plain)
    matrix = (
        "similarity matrix to evaluate instead of a run (.npy, .npz, .pt, .safetensors, .pkl, .json or a "
        "text table); rows are texts, columns videos"
    )
    parser.add_argument("--matrix", type=Path, metavar="FILE", help=matrix)
    groups = "JSON list with the video of each text of the matrix; default: text i describes video i"
    parser.add_argument("--groups", type=Path, metavar="JSON", help=groups)
    devices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", default="auto", choices=devices, help="default: %(default)s")
    as_json = "print one JSON object; ties count against the query, and for it under `optimistic`"
    parser.add_argument("--json", action="store_true", help=as_json)
    report = "also keep the results of every query in the run directory, and write its report.html"
    parser.add_argument("--report", action="store_true", help=report)
    order = "measure instead whether captions that tell order fit a clip better than its reverse"
    parser.add_argument("--order", action="store_true", help=order)
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.report and arguments.run_path is None:
        raise ValueError("evaluate: --report: expected a RUN, found none")
    if (arguments.run_path is None) == (arguments.matrix is None):
        raise ValueError("evaluate: expected either a RUN or --matrix")
    if arguments.order:
        if arguments.matrix is not None or arguments.report:
            raise ValueError("evaluate: --order: expected a RUN without --matrix and --report")
        choices = _evaluate_order(arguments)
        print(json.dumps(choices) if arguments.json else order_table(choices))
        return
    if arguments.matrix is not None:
        metrics = evaluate_matrix(arguments.matrix, arguments.groups)
        print(json.dumps(metrics) if arguments.json else results_table({str(arguments.matrix): metrics}))
    else:
        rows = _evaluate_run(arguments)
        print(json.dumps(rows) if arguments.json else results_table(rows))


def _evaluate_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the metrics of a run, raw and, unless left out, re-ranked; with --report keep every query's."""
    world = join_world(arguments.device)
    run = load_run(arguments.run_path)
    records: list[EvaluationRecord] = []
    options = EvalOptions(
        data=run.config.data,
        device=world.device,
        batch_size=run.config.eval_batch_size,
        rerank=True,
        on_record=records.append if arguments.report else None,
    )
    split = arguments.split or run.config.data.test_split or "test"
    use = _recorded_use(arguments, split, run.config.data) if arguments.report else None
    rows = evaluate_manifest(
        run.method.to(world.device),
        arguments.manifest,
        split,
        options,
        rerank=not arguments.no_rerank,
        quarantine=arguments.quarantine,
    )
    if use is not None:
        path: Path = arguments.run_path
        directory = path if (path / "checkpoints").is_dir() else path.absolute().parents[1]
        title = f"{run.config.method.name}, step {run.step}"
        save_record(directory, use, records[0], title=title, step=run.step)
        write_report(directory)
    return rows


def _evaluate_order(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the choices of a run that the order of frames decides."""
    world = join_world(arguments.device)
    run = load_run(arguments.run_path)
    data = run.config.data
    if arguments.manifest is not None:
        data = data.model_copy(update={"manifest": arguments.manifest, "shards": None})
    clips = read_clips(data, arguments.split or data.test_split or "test")
    if arguments.quarantine is not None:
        clips = without_quarantined(clips, arguments.quarantine)
    options = EvalOptions(data=data, device=world.device, batch_size=run.config.eval_batch_size)
    return measure_order(run.method.to(world.device), clips, options)


def _recorded_use(arguments: argparse.Namespace, split: str, data: DataConfig) -> str:
    """Return the use ("test" or "val") of the split whose results a report shows."""
    uses = {data.val_split: "val", data.test_split: "test"}
    options = ("manifest", "quarantine")
    others = [f" --{name} {value}" for name in options if (value := getattr(arguments, name)) is not None]
    if others or split not in uses:
        raise ValueError(
            "evaluate: --report: expected the test or val split of the run's own clips "
            f"({', '.join(repr(split) for split in uses if split)}), found --split {split}{''.join(others)}"
        )
    return uses[split]
