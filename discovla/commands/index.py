"""`discovla index`: make an index of videos, add to it, show and maintain it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from discovla import terminal
from discovla.errors import RunStopped
from discovla.search.index import Index
from discovla.search.reading import GRID
from discovla.search.records import AddReport, IndexProgress, IndexStatus, MomentMode
from discovla.search.segments import LONGEST, OVERLAP

_SHOWN = 20  # refused videos that are printed


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = (
        "Index videos by a trained run, so that `discovla search` finds moments in them. The same command "
        "again indexes what is new or has changed, also after an interruption."
    )
    parser = commands.add_parser("index", help=text, description=text)
    run = (
        "run directory, checkpoint, export, or a CLIP (clip:ARCH@TAG, clip:ARCH@FILE, clip:drawn); the index "
        "itself with --status, --prune, --compact, or --rebuild by the same model"
    )
    parser.add_argument("run_path", metavar="RUN", help=run)
    videos = "files, folders, a .csv with a column video[,start,end,any others], or a manifest .jsonl"
    parser.add_argument("videos", type=Path, nargs="*", metavar="VIDEOS", help=videos)
    out = "folder of the index; made if it does not exist"
    parser.add_argument("--out", type=Path, metavar="INDEX", help=out)
    moments = (
        f"how files are cut: shots, at changes of shot, sought {GRID:g} times a second, and into moments of "
        f"at most {LONGEST:g} s that share {OVERLAP:g} s; windows, into such moments alone; whole, not at "
        "all; clips of a manifest, and rows with a start or end, are one moment; default: shots"
    )
    parser.add_argument("--moments", choices=get_args(MomentMode), help=moments)
    transnet = "find changes of shot by TransNetV2 (extra `transnet`), which decodes each file once more"
    parser.add_argument("--transnet", action="store_true", help=transnet)
    vectors = (
        "type of the stored vectors: float32 keeps the scores of the model to the last digit, float16 halves "
        "the size; default: float32"
    )
    parser.add_argument("--vectors", choices=("float32", "float16"), help=vectors)
    merge = (
        "merge R similar tokens of every frame in each block of the vision tower, without training: later "
        "blocks read fewer tokens, and features differ; default: as the run was trained"
    )
    parser.add_argument("--merge", type=int, metavar="R", help=merge)
    captions = "text file with a caption a line, of other videos, that calibrate probabilities"
    parser.add_argument("--captions", type=Path, metavar="TXT", help=captions)
    ray = "read and embed on a Ray cluster (extra `ray`): its address, or auto"
    parser.add_argument("--ray", metavar="ADDRESS", help=ray)
    devices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", default="auto", choices=devices, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        "--status", action="store_true", help="show what is in the index, and which videos were refused"
    )
    actions.add_argument("--prune", action="store_true", help="remove the videos whose files are gone")
    actions.add_argument(
        "--compact", action="store_true", help="delete replaced moments and old versions from the disk"
    )
    rebuild = (
        "index all videos anew beside the index, then replace it; --moments, --merge and RUN may be others"
    )
    actions.add_argument("--rebuild", action="store_true", help=rebuild)
    parser.set_defaults(run=_index)


def _index(arguments: argparse.Namespace) -> None:
    if arguments.status or arguments.prune or arguments.compact:
        _maintain(arguments)
        return
    if arguments.rebuild:
        path = arguments.out or Path(arguments.run_path)
        with Index.open(path, device=arguments.device) as index:
            model = None if arguments.out is None else arguments.run_path
            with _progress() as show:
                report = index.rebuild(
                    model=model, moments=arguments.moments, merge=arguments.merge, progress=show
                )
        _print_report(report, path, arguments)
        return
    if arguments.out is None:
        raise ValueError("index: expected --out INDEX, found none")
    if not arguments.videos and arguments.captions is None:
        raise ValueError("index: expected at least one video, folder, table or manifest, found none")
    with _opened(arguments) as index:
        report = None
        if arguments.videos:
            try:
                with _progress() as show:
                    report = index.add(arguments.videos, progress=show, ray=arguments.ray)
            except KeyboardInterrupt:
                raise RunStopped("stopped; the same command indexes the rest") from None
        if arguments.captions is not None:
            lines = arguments.captions.read_text(encoding="utf-8").splitlines()
            index.calibrate([line.strip() for line in lines if line.strip()])
    if report is not None:
        _print_report(report, arguments.out, arguments)


def _opened(arguments: argparse.Namespace) -> Index:
    """Open the index, or make it."""
    out, device = arguments.out, arguments.device
    if not out.exists() or not any(out.iterdir()):
        return Index.create(
            out,
            arguments.run_path,
            moments=arguments.moments or "shots",
            transnet=arguments.transnet,
            vectors=arguments.vectors or "float32",
            device=device,
            merge=arguments.merge,
        )
    index = Index.open(out, model=arguments.run_path, device=device)
    chosen = {
        "moments": arguments.moments,
        "dtype": arguments.vectors,
        "transnet": arguments.transnet or None,
        "merge": arguments.merge,
    }
    for name, value in chosen.items():
        if value is not None and value != (stored := index.settings.get(name)):
            option = f"--{'vectors' if name == 'dtype' else name}"
            expected = f"no {option}" if stored is None else f"{option} {stored}"
            raise ValueError(
                f"{out}: expected {expected}, with which the index was made, found {value}; --rebuild makes "
                "it anew"
            )
    return index


def _maintain(arguments: argparse.Namespace) -> None:
    """Show, prune or compact an index."""
    path = arguments.out or Path(arguments.run_path)
    with Index.open(path, read_only=arguments.status) as index:
        if arguments.prune:
            print(f"removed {index.prune()} videos whose files are gone")
        elif arguments.compact:
            before = index.status().size
            index.compact()
            print(f"{before / 1e6:.1f} MB before, {index.status().size / 1e6:.1f} MB now")
        else:
            status = index.status()
            entries = [entry for entry in index.videos() if entry.state != "indexed"]
            if arguments.json:
                rows = [asdict(entry) for entry in entries]
                print(json.dumps({**asdict(status), "not_indexed": rows}, ensure_ascii=False))
                return
            print(_status_text(status))
            _print_refused([(entry.video, entry.reason or "the file is gone") for entry in entries])


def _status_text(status: IndexStatus) -> str:
    columns = ", ".join(f"{name} ({kind})" for name, kind in status.columns.items())
    calibrated = f"by {status.calibrated} captions" if status.calibrated else "no, there are too few moments"
    lines = [
        f"{status.videos} videos, {status.seconds / 3600:.2f} hours, {status.moments} moments "
        f"({status.moment_mode}), {status.size / 1e6:.1f} MB",
        f"model        {status.model} ({status.fingerprint})",
        f"columns      {columns}",
        f"calibrated   {calibrated}",
        f"refused      {status.refused}",
        f"gone         {status.gone}",
    ]
    if status.progress is not None:
        lines.append(f"being written: {status.progress.done} of {status.progress.total} videos")
    return "\n".join(lines)


def _print_report(report: AddReport, path: Path, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(asdict(report), ensure_ascii=False))
        return
    hours = report.seconds / 3600
    print(
        f"{path}: {report.added} videos added, {report.changed} changed ({hours:.2f} hours), "
        f"{report.unchanged} unchanged, {report.gone} gone, {len(report.refused)} refused"
    )
    _print_refused(report.refused)


def _print_refused(refused: list[tuple[str, str]]) -> None:
    for video, reason in refused[:_SHOWN]:
        print(f"  {video}: {reason}")
    if len(refused) > _SHOWN:
        print(f"  and {len(refused) - _SHOWN} more: --status --json lists all")


@contextmanager
def _progress() -> Iterator[Callable[[IndexProgress], None]]:
    """Show the progress of indexing."""
    with terminal.progress("index", None, "videos") as bar:

        def show(state: IndexProgress) -> None:
            bar.update(state.done, state.total)
            bar.advance(0, f"{state.moments} moments written" if state.moments else "")

        yield show
