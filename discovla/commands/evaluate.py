"""`discovla evaluate`: retrieval metrics of a trained run or of any similarity matrix."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discovla import terminal
from discovla.batch import Embedding
from discovla.data.config import DataConfig
from discovla.data.manifest import Clip
from discovla.engine.distributed import join_world
from discovla.evaluate import (
    EvalOptions,
    evaluate,
    evaluate_matrix,
    evaluation_clips,
    results_table,
    sampling_error,
    training_captions,
)
from discovla.model import LoadedRun, load, load_run
from discovla.order import measure_order, order_table
from discovla.report.writer import save_record, save_reliability, write_report
from discovla.retrieval.record import EvaluationRecord

if TYPE_CHECKING:
    from discovla.search.records import Value
    from discovla.search.reliability import ReliabilityBin


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
    index = (
        "take the embeddings of the clips from an index that `discovla index` made of the manifest, and "
        "compare the probabilities of its hits with how often they are right"
    )
    parser.add_argument("--index", type=Path, metavar="INDEX", help=index)
    order = "measure instead whether captions that tell order fit a clip better than its reverse"
    parser.add_argument("--order", action="store_true", help=order)
    merge = (
        "tokens of every frame that each block of the vision tower merges, without training; default: none"
    )
    parser.add_argument("--merge", type=int, metavar="R", help=merge)
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.merge is not None and (arguments.run_path is None or arguments.report):
        raise ValueError(
            "evaluate: --merge: expected a RUN without --report, whose figures are the run's own"
        )
    if arguments.report and arguments.run_path is None:
        raise ValueError("evaluate: --report: expected a RUN, found none")
    if (arguments.run_path is None) == (arguments.matrix is None):
        raise ValueError("evaluate: expected either a RUN or --matrix")
    if arguments.index is not None and (arguments.matrix is not None or arguments.order):
        raise ValueError("evaluate: --index: expected a RUN without --matrix and --order")
    if arguments.order:
        if arguments.matrix is not None or arguments.report:
            raise ValueError("evaluate: --order: expected a RUN without --matrix and --report")
        choices = _evaluate_order(arguments)
        print(json.dumps(choices) if arguments.json else order_table(choices))
        return
    if arguments.matrix is not None:
        metrics = evaluate_matrix(arguments.matrix, arguments.groups)
        table = results_table({str(arguments.matrix): metrics}, width=terminal.width())
        print(json.dumps(metrics) if arguments.json else table)
    else:
        _evaluate_run(arguments)


def _evaluate_run(arguments: argparse.Namespace) -> None:
    """Print the metrics of a run, raw and, unless left out, re-ranked; with --report keep every query's."""
    run = load_run(arguments.run_path, merge=arguments.merge)
    split = _split(arguments, run)
    use = _recorded_use(arguments, split, run.config.data) if arguments.report else None
    clips, options = _clips_and_options(arguments, run)
    records: list[EvaluationRecord] = []
    rerank = not arguments.no_rerank
    options = replace(
        options,
        rerank=rerank,
        bank=training_captions(options.data, split) if rerank else (),
        on_record=records.append if arguments.report else None,
    )
    videos, reliability = (None, None) if arguments.index is None else _stored(arguments, clips)
    rows = evaluate(run.method.to(options.device), clips, options, videos=videos)
    facts = {
        "run": str(arguments.run_path),
        "method": run.config.method.name,
        "step": run.step,
        "split": split,
        "clips": len(clips),
        "captions": sum(len(clip.captions) for clip in clips),
        **({} if arguments.merge is None else {"merge": arguments.merge}),
    }
    if arguments.json:
        bins = {} if reliability is None else {"reliability": [asdict(one) for one in reliability]}
        print(json.dumps({"evaluation": facts, **rows, **bins}))
    else:
        print(f"{arguments.run_path}: {run.config.method.name}, step {run.step}")
        print(f"{len(clips):,} clips, {facts['captions']:,} captions of split {split!r}\n")
        print(results_table(rows, width=terminal.width()))
        error = sampling_error(rows["raw"], len(clips))
        print(f"\nR@1 of {len(clips):,} clips has a standard error of {error:.1f} points")
        if reliability is not None:
            from discovla.search.reliability import reliability_table

            print(f"\n{reliability_table(reliability)}")
    if use is not None:
        path: Path = arguments.run_path
        directory = path if (path / "checkpoints").is_dir() else path.absolute().parents[1]
        title = f"{run.config.method.name}, step {run.step}"
        save_record(directory, use, records[0], title=title, step=run.step)
        if reliability:
            save_reliability(directory, [asdict(one) for one in reliability])
        write_report(directory)


def _stored(arguments: argparse.Namespace, clips: Sequence[Clip]) -> tuple[Embedding, list[ReliabilityBin]]:
    """Return the embedding of clips from the index, which must be by this run, and its reliability."""
    from discovla.search.index import Index  # LanceDB is an extra
    from discovla.search.reliability import measure_reliability
    from discovla.search.sources import SourceVideo

    model = load(arguments.run_path, device=arguments.device, merge=arguments.merge)
    with Index.open(arguments.index, model=model, read_only=True) as index:
        ids = {entry.columns.get("id"): entry.video for entry in index.videos()}
        sources = [
            SourceVideo(video=_stored_path(clip, ids), start=clip.start, end=clip.end) for clip in clips
        ]
        embedding = index.stored_embedding(sources)
        captions = [
            (text, source) for clip, source in zip(clips, sources, strict=True) for text in clip.captions
        ]
        return embedding, measure_reliability(index, captions)


def _stored_path(clip: Clip, ids: Mapping[Value, str]) -> str:
    """Return the path by which the index knows a clip.

    A clip of shards has the path that it had beside the manifest; the index has the absolute one.
    """
    path, known = str(clip.video), ids.get(clip.id, "")
    return known if not clip.video.is_absolute() and known.endswith(f"/{path}") else path


def _evaluate_order(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the choices of a run that the order of frames decides."""
    run = load_run(arguments.run_path, merge=arguments.merge)
    clips, options = _clips_and_options(arguments, run)
    return measure_order(run.method.to(options.device), clips, options)


def _split(arguments: argparse.Namespace, run: LoadedRun) -> str:
    return arguments.split or run.config.data.test_split or "test"


def _clips_and_options(arguments: argparse.Namespace, run: LoadedRun) -> tuple[list[Clip], EvalOptions]:
    """Return the clips to evaluate, and the options that the run and the arguments decide."""
    data, device = run.config.data, join_world(arguments.device).device
    if arguments.manifest is not None:
        data = data.model_copy(update={"manifest": arguments.manifest, "shards": None})
    clips = evaluation_clips(data, _split(arguments, run), arguments.quarantine)
    return clips, EvalOptions(data=data, device=device, batch_size=run.config.eval_batch_size)


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
