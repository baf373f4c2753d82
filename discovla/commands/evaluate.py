"""`discovla evaluate`: retrieval figures of a run or of any similarity matrix."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
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
    from discovla.engine.distributed import join_world
    from discovla.evaluate import EvalOptions, evaluate_manifest
    from discovla.load import load_run

    world = join_world(arguments.device)
    run = load_run(arguments.run_path)
    data = run.config.data
    how = EvalOptions(data=data, device=world.device, batch_size=run.config.eval_batch_size, rerank=True)
    return evaluate_manifest(run.method.to(world.device), arguments.manifest, arguments.split, how)
