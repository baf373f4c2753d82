"""The HTML page of one run or of several: what its template shows, as plain values."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel

from discovla import __version__
from discovla.report.data import RunData
from discovla.report.frames import FrameStrips, montage
from discovla.report.intervals import LEVEL, RESAMPLES, Interval, gains, intervals, values
from discovla.report.plots import (
    Plot,
    appearances,
    curves,
    loss_terms,
    recall_by_depth,
    reliability,
    similarities,
)
from discovla.retrieval.ranks import Array
from discovla.retrieval.record import EvaluatedClip, EvaluationRecord

QUERIES = 10  # best and worst ones that are shown
HUBS = 10
REFUSED = 50  # refused clips that are listed
DIRECTIONS = {"t2v": "text to video", "v2t": "video to text"}
COLUMNS = ("R@1", "R@5", "R@10", "MdR", "MnR")
LOSSES = {  # term -> meaning, key of its weight in the method's options; None: 1
    "video": ("captions and videos of the batch find each other, both ways (InfoNCE)", None),
    "nce": ("captions and videos of the batch find each other, both ways (InfoNCE)", None),
    "frame": ("frames and their captions find each other", "alpha"),
    "distill": ("video-level similarities follow the frame-level ones", "beta"),
    "diversity": ("the views of one caption or video differ from each other", "diversity"),
    "reversed": ("a caption fits its clip better than the clip played backwards", "reversed_negatives"),
    "swapped": ("a clip fits its caption better than one with an exchange", "swapped_captions"),
}


@dataclass(frozen=True)
class Cell:
    """A metric in a table: the value, its interval if per-query results exist, and if it is the best."""

    text: str
    interval: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table of results."""

    name: str
    cells: tuple[Cell, ...]
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The page of a run, its plots, and the queries that it shows: title to captions with their strips."""

    page: str
    plots: list[Plot]
    queries: dict[str, list[tuple[str, list[tuple[bytes | None, bool]]]]]

    def pictures(self) -> dict[str, np.ndarray]:
        """Return plots and queries as pixels, y x 3 uint8."""
        plots = {plot.title: plot.pixels for plot in self.plots}
        return plots | {title: montage(rows) for title, rows in self.queries.items()}


def render_run(run: RunData, strips: FrameStrips | None) -> Report:
    """Return the report of a run.

    Args:
        strips: of frames; None shows the ids of clips alone.
    """
    record = shown_record(run)
    training = curves([run])
    evaluation: list[Plot] = []
    if record is not None:
        evaluation = [similarities(record), recall_by_depth(_depth_rows(run)), appearances(record)]
    if run.reliability:
        evaluation.append(reliability(run.reliability))
    best, worst, hubs = ([], [], []) if record is None else (*_queries(record), _hubs(record))
    pictures: dict[str, bytes] = {}
    if record is not None and strips is not None:
        pictures = strips.read(_shown_clips(record, [*best, *worst], hubs))
    numbers = {clip: i for i, clip in enumerate(pictures)}
    page = (
        _environment()
        .get_template("run.html")
        .render(
            title=run.name,
            run=run,
            version=__version__,
            status=_status(run),
            tiles=_tiles(run),
            tables=_tables(run),
            gains=_gain_rows(run),
            columns=COLUMNS,
            directions=DIRECTIONS,
            training=_svgs(training),
            evaluation=_svgs(evaluation),
            record=record,
            best=best,
            worst=worst,
            hubs=hubs,
            hub_sentence="" if record is None else _hub_sentence(record),
            numbers=numbers,
            pictures=_picture_rules(pictures),
            frame_note=_frame_note(run, record, strips),
            splits=_splits(run),
            protocol=_protocol(run),
            refused=[*run.quarantined, *run.bad_clips][:REFUSED],
            refused_count=len(run.quarantined) + len(run.bad_clips),
            losses=_losses(run),
            changed=_changed(run),
            config=_flat(_config(run)),
            machine=_machine(run),
            speed=_speed(run),
            notes=run.notes,
        )
    )
    shown = {
        title: [
            (
                f"{query['caption']} (rank {query['rank']})",
                [(pictures.get(result["clip"].id), result["own"]) for result in query["results"]],
            )
            for query in queries
        ]
        for title, queries in (("Best queries", best), ("Worst queries", worst))
        if queries
    }
    return Report(page=page, plots=[*training, *evaluation], queries=shown)


def render_comparison(runs: Sequence[RunData]) -> str:
    """Return the page of several runs side by side."""
    flats = [dict(_flat(_config(run))) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    differences = [
        (key, [_value(flat.get(key, "-")) for flat in flats])
        for key in keys
        if key != "directory" and len({repr(flat.get(key)) for flat in flats}) > 1
    ]
    depth: dict[str, Array] = {}
    for run in runs:
        record = shown_record(run)
        if record is not None:
            depth[run.name] = record.ranks["raw"]["t2v"]
    plots = [*curves(runs), *([recall_by_depth(depth)] if depth else [])]
    return (
        _environment()
        .get_template("comparison.html")
        .render(
            title=f"{len(runs)} runs",
            version=__version__,
            runs=runs,
            statuses=[_status(run) for run in runs],
            tables=_comparison_tables(runs),
            gains=_comparison_gains(runs),
            columns=COLUMNS,
            directions=DIRECTIONS,
            plots=_svgs(plots),
            differences=differences,
            facts=[_machine(run) + _speed(run) for run in runs],
            notes=[f"{run.name}: {note}" for run in runs for note in run.notes],
            pictures=Markup(""),
        )
    )


def shown_record(run: RunData) -> EvaluationRecord | None:
    """Return the per-query results that examples are from: of the trained model if there are any."""
    return next(
        (run.records[n] for n in ("test", "val", "test-untrained", "test-plain") if n in run.records), None
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("discovla", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["value"] = _value
    return environment


def _svgs(plots: Iterable[Plot]) -> list[tuple[Plot, Markup]]:
    return [(plot, Markup(plot.svg)) for plot in plots]


def _status(run: RunData) -> str:
    total = "" if run.total_steps is None else f" of {run.total_steps:,}"
    if run.complete:
        return f"Finished: {run.steps:,}{total} steps."
    if not run.train:
        return "No step taken yet, or none recorded."
    steps = f"{run.steps:,}{total} steps"
    return f"Not finished: {steps} recorded; resume=true continues from the newest checkpoint."


def _rows(records: Iterable[EvaluationRecord]) -> dict[str, tuple[Mapping[str, Array], Array]]:
    """Return the name of each row of results to its ranks, and the groups of its captions."""
    return {
        record.title if setting == "raw" else f"{record.title} + {setting}": (ranks, record.groups)
        for record in records
        for setting, ranks in record.ranks.items()
    }


def _cells(ranks: Mapping[str, Array], groups: Array) -> tuple[Cell, ...]:
    cells = []
    for direction in DIRECTIONS:
        if direction not in ranks:
            cells += [Cell("-")] * len(COLUMNS)
            continue
        found = intervals(ranks[direction], groups if direction == "t2v" else None)
        cells += [Cell(_number(found[name]), _range(found[name])) for name in COLUMNS]
    return tuple(cells)


def _tables(run: RunData) -> list[tuple[str, list[Row]]]:
    """Return tables of results: of the test split, and of validation."""
    tables = []
    tests = [run.records[name] for name in ("test-plain", "test-untrained", "test") if name in run.records]
    known = _rows(tests)
    names = list(dict.fromkeys([*run.results, *known]))
    rows = []
    for name in names:
        kind = "strong" if _is_trained(name) else ""
        if name in known:
            rows.append(Row(name, _cells(*known[name]), kind))
        else:
            rows.append(Row(name, _plain_cells(run.results[name]), kind))
    if rows:
        tables.append((f"Test split{_count(tests)}", rows))
    vals = [run.records[name] for name in ("val-start", "val") if name in run.records]
    if vals:
        rows = [
            Row(f"step {record.step}", _cells(record.ranks["raw"], record.groups))
            for record in {record.step: record for record in vals}.values()
        ]
        tables.append((f"Validation split{_count(vals)}", rows))
    elif run.validations:
        first, last = run.validations[0], run.validations[-1]
        rows = [
            Row(f"step {line['step']}", _plain_cells(line))
            for line in {0: first, last["step"]: last}.values()
        ]
        tables.append(("Validation split", rows))
    return tables


def _plain_cells(metrics: Mapping[str, Any]) -> tuple[Cell, ...]:
    return tuple(
        Cell(f"{metrics[direction][column]:.1f}" if direction in metrics else "-")
        for direction in DIRECTIONS
        for column in COLUMNS
    )


def _count(records: Sequence[EvaluationRecord]) -> str:
    return f": {len(records[-1].groups):,} captions, {len(records[-1].clips):,} clips" if records else ""


def _before_after(run: RunData) -> tuple[str, str, EvaluationRecord, EvaluationRecord] | None:
    """Return the split, the row compared with, and both records."""
    for split, first, last in (("test", "test-untrained", "test"), ("val", "val-start", "val")):
        if first in run.records and last in run.records and run.records[last].step > run.records[first].step:
            before, after = run.records[first], run.records[last]
            if [clip.id for clip in before.clips] == [clip.id for clip in after.clips]:
                return split, before.title, before, after
    return None


def _gain_rows(run: RunData) -> list[Row]:
    """Return the gains of training over the same queries, with paired intervals."""
    rows = []
    pair = _before_after(run)
    if pair is None:
        return []
    split, _, before, after = pair
    rows.append(Row(f"training, {split}: {after.title} minus {before.title}", _gain_cells(before, after)))
    plain = run.records.get("test-plain")
    if split == "test" and plain is not None and len(plain.groups) == len(after.groups):
        rows.append(
            Row(f"method and training, test: {after.title} minus {plain.title}", _gain_cells(plain, after))
        )
    return rows


def _gain_cells(before: EvaluationRecord, after: EvaluationRecord) -> tuple[Cell, ...]:
    cells = []
    for direction in DIRECTIONS:
        groups = after.groups if direction == "t2v" else None
        found = gains(before.ranks["raw"][direction], after.ranks["raw"][direction], groups)
        cells += [Cell(_signed(found[name].value), _range(found[name], sign=True)) for name in COLUMNS]
    return tuple(cells)


def _tiles(run: RunData) -> list[dict[str, str]]:
    """Return the headline figures, each with its value before training and its gain."""
    shown = (("t2v", "R@1"), ("t2v", "R@5"), ("v2t", "R@1"), ("t2v", "MdR"))
    pair = _before_after(run)
    if pair is None:
        before = next((row for name, row in run.results.items() if name.endswith(" untrained")), None)
        after = next((row for name, row in run.results.items() if _is_trained(name)), None)
        if before is None or after is None:
            return []
        return [
            {
                "label": f"{name}, {DIRECTIONS[direction]}, test",
                "value": f"{after[direction][name]:.1f}",
                "before": f"{before[direction][name]:.1f} before training",
                "gain": f"{after[direction][name] - before[direction][name]:+.1f}",
                "kind": "muted",
                "verdict": "without interval",
            }
            for direction, name in shown
        ]
    split, _, first, last = pair
    found = {
        direction: gains(
            first.ranks["raw"][direction],
            last.ranks["raw"][direction],
            last.groups if direction == "t2v" else None,
        )
        for direction in DIRECTIONS
    }
    tiles = []
    for direction, name in shown:
        old, new = (values(record.ranks["raw"][direction])[name] for record in (first, last))
        gain = found[direction][name]
        low, high = (gain.low, gain.high) if name.startswith("R@") else (-gain.high, -gain.low)
        kind, verdict = "muted", "within sampling error"
        if low > 0 or high < 0:
            kind, verdict = ("good", "better") if low > 0 else ("bad", "worse")
        tiles.append(
            {
                "label": f"{name}, {DIRECTIONS[direction]}, {split}",
                "value": f"{new:.1f}",
                "before": f"{old:.1f} before training",
                "gain": f"{_signed(gain.value)} ({_range(gain, sign=True)})",
                "kind": kind,
                "verdict": verdict,
            }
        )
    return tiles


def _is_trained(name: str) -> bool:
    """Return True for the row of results of the trained model without re-ranking."""
    return ", step " in name and "+" not in name


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\u2212")


def _number(interval: Interval) -> str:
    return f"{interval.value:.1f}"


def _range(interval: Interval, *, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    return f"{interval.low:{form}} to {interval.high:{form}}".replace("-", "\u2212")


def _depth_rows(run: RunData) -> dict[str, Array]:
    """Return named ranks of the split whose examples are shown, before and after training."""
    if "val" in run.records and "test" not in run.records:
        names = ["val-start", "val"]
    else:
        names = ["test-plain", "test-untrained", "test"]
    records = [run.records[name] for name in names if name in run.records]
    return {_short_title(record): record.ranks["raw"]["t2v"] for record in records}


def _short_title(record: EvaluationRecord) -> str:
    return record.title or f"step {record.step}"


def _queries(record: EvaluationRecord) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the best and the worst captions, at most one of each clip, with the first five clips.

    The best have rank 1 and the largest lead over the next clip; the worst have the last ranks.
    """
    ranks = record.ranks["raw"]["t2v"]
    columns = np.arange(record.top.shape[1])
    others = np.where(record.top == record.groups[:, None], -np.inf, record.top_scores)
    rival = others.max(axis=1) if len(columns) > 1 else np.full(len(ranks), -np.inf)
    lead = record.positive - rival
    order = np.lexsort((-lead, ranks))
    captions = record.captions

    def chosen(texts: Iterable[int]) -> list[dict[str, Any]]:
        seen: dict[int, int] = {}
        for text in texts:
            seen.setdefault(int(record.groups[text]), int(text))
            if len(seen) == QUERIES:
                break
        return [_query(record, text, captions[text]) for text in seen.values()]

    half = len(order) // 2 if len(order) < 2 * QUERIES else len(order)
    return chosen(order[: max(half, 1)]), chosen(order[::-1][: len(order) - half or len(order)])


def _query(record: EvaluationRecord, text: int, caption: str) -> dict[str, Any]:
    own = int(record.groups[text])
    results = [
        {"clip": record.clips[video], "score": f"{score:.3f}", "place": f"{i}.", "own": video == own}
        for i, (video, score) in enumerate(
            zip(record.top[text], record.top_scores[text], strict=True), start=1
        )
    ]
    rank = int(record.ranks["raw"]["t2v"][text])
    if not any(result["own"] for result in results):
        score = f"{record.positive[text]:.3f}"
        results.append({"clip": record.clips[own], "score": score, "place": f"rank {rank:,}", "own": True})
    return {"caption": caption, "rank": f"{rank:,}", "results": results, "clip": record.clips[own]}


def _hubs(record: EvaluationRecord) -> list[dict[str, Any]]:
    """Return the clips that are among the first five of the most captions."""
    counts = np.bincount(record.top.ravel(), minlength=len(record.clips))
    captions = np.bincount(record.groups, minlength=len(record.clips))
    order = np.argsort(-counts, kind="stable")[:HUBS]
    return [
        {
            "clip": record.clips[i],
            "count": f"{counts[i]:,}",
            "share": f"{100 * counts[i] / len(record.groups):.1f} %",
            "factor": f"{counts[i] / counts.mean():.1f}",
            "captions": int(captions[i]),
        }
        for i in order
        if counts[i]
    ]


def _hub_sentence(record: EvaluationRecord) -> str:
    counts = np.bincount(record.top.ravel(), minlength=len(record.clips))
    never, often = int((counts == 0).sum()), int((counts > 3 * counts.mean()).sum())
    return (
        f"A clip is among the first {record.top.shape[1]} of {counts.mean():.1f} captions on average; "
        f"{often:,} of {len(counts):,} clips are there more than three times as often, {never:,} never."
    )


def _shown_clips(
    record: EvaluationRecord, queries: Sequence[dict[str, Any]], hubs: Sequence[dict[str, Any]]
) -> list[EvaluatedClip]:
    clips = [result["clip"] for query in queries for result in query["results"]]
    return list({clip.id: clip for clip in [*clips, *(hub["clip"] for hub in hubs)]}.values())


def _picture_rules(pictures: Mapping[str, bytes]) -> Markup:
    """Return a CSS rule for each strip, so that a clip shown twice is stored once."""
    return Markup(
        "\n".join(
            f".s{i}{{background-image:url(data:image/jpeg;base64,{base64.b64encode(content).decode()})}}"
            for i, content in enumerate(pictures.values())
        )
    )


def _frame_note(run: RunData, record: EvaluationRecord | None, strips: FrameStrips | None) -> str:
    if record is None:
        return ""
    if strips is None:
        return "No frames are shown: the stored config cannot be read, which says how to sample them."
    notes = []
    if strips.postponed:
        notes.append(f"{strips.postponed} clips are shown without frames, which the next report adds.")
    if strips.errors:
        notes.append(f"{len(strips.errors)} clips are shown without frames: {strips.errors[0]}")
    return " ".join(notes)


def _splits(run: RunData) -> list[tuple[str, ...]]:
    if run.facts is None:
        return []
    return [
        (use, numbers.name, f"{numbers.clips:,}", f"{numbers.captions:,}")
        for use, numbers in run.facts.splits.items()
    ]


def _protocol(run: RunData) -> list[str]:
    lines = [
        "Text to video: every caption is a query against all videos of the split. Video to text: every video "
        "is a query, and each video answers with its best caption. A tie counts against the query.",
        f"Ranges are {LEVEL:.0f} % intervals of a bootstrap over queries (up to {RESAMPLES:,} samples, "
        "seed 0; captions of one clip are drawn together; gains compare the same queries). They hold the "
        "sampling error of the evaluated clips, not that of the training seed.",
        "R@k is in percent; MdR and MnR are the median and the mean rank, best 1.",
    ]
    if run.validations:
        at = "" if run.best_step is None else f" (step {run.best_step:,})"
        lines.append(f"The tested step{at} has the highest sum of both R@1 on the validation split.")
    elif run.train:
        lines.append("There is no validation split: the last step is tested, and no curve of R@1 is shown.")
    if run.split == "val" and run.validations:
        lines.append(
            "No test result yet: figures of the validation split, on which the step is chosen, "
            "are optimistic."
        )
    data = run.config.get("data", {})
    if data:
        source = data.get("shards") or data.get("manifest")
        lines.append(
            f"Frames: at most {data.get('frames')} of each clip by {data.get('sampling')} sampling, "
            f"from {source}. Captions: at most {data.get('context_length')} tokens."
        )
    if "test" in run.records and len(run.records["test"].ranks) > 1:
        lines.append(
            "Dual softmax and QB-Norm use the other queries of the test set or the training captions: they "
            "are re-rankings, not to be compared with plain R@k."
        )
    return lines


def _losses(run: RunData) -> list[tuple[str, str, str, str, str]]:
    """Return the active terms: name, meaning, weight, first and last value."""
    method = run.config.get("method", {})
    count = max(1, len(run.train) // 20)
    rows = []
    for name in loss_terms(run.train):
        meaning, key = LOSSES.get(name, (f"a term of {method.get('name', 'the method')}", ""))
        logged = [line[name] for line in run.train if name in line]
        ends = [f"{np.mean(part):.3f}" for part in (logged[:count], logged[-count:])]
        weight = "1" if key is None else _value(method.get(key, ""))
        rows.append((name, meaning, weight, *ends))
    return rows


def _config(run: RunData) -> Mapping[str, Any]:
    """Return all keys of the config, with defaults of options that the run is older than."""
    return run.config if run.parsed is None else run.parsed.model_dump(mode="json")


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return dotted keys and values of nested tables."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _changed(run: RunData) -> list[tuple[str, str, str]] | None:
    """Return keys that differ from their defaults, with value and default; None without a readable config."""
    if run.parsed is None:
        return None
    return [
        (key, _value(value), "required" if default is ... else _value(default))
        for key, value, default in _with_defaults(run.parsed)
        if value != default
    ]


def _with_defaults(model: BaseModel, prefix: str = "") -> Iterable[tuple[str, Any, Any]]:
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _with_defaults(value, f"{prefix}{name}.")
        else:
            default = ... if info.is_required() else info.get_default(call_default_factory=True)
            yield f"{prefix}{name}", value, default


def _value(value: Any) -> str:
    """Return a value as a reader of TOML writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    if isinstance(value, Path | str):
        return str(value)
    return str(value)


def _machine(run: RunData) -> list[tuple[str, str]]:
    rows = []
    if run.facts is not None:
        facts = run.facts
        rows = [
            ("device", facts.device),
            (
                "processor",
                f"{facts.cpu or 'unknown'}, {facts.cores} cores, {facts.memory_gib:g} GiB of memory",
            ),
            ("parameters", f"{facts.parameters:,}, of which {facts.trained_parameters:,} train"),
        ]
        names = {"name": "weights", "source": "source of the weights", "licence": "licence of the weights"}
        rows += [(names[key], value) for key, value in facts.weights.items() if value and key in names]
    return rows + [(name, _value(value)) for name, value in run.versions.items() if value is not None]


def _speed(run: RunData) -> list[tuple[str, str]]:
    rates = [line["clips_per_second"] for line in run.train if "clips_per_second" in line]
    if not rates:
        return []
    steady = rates[len(rates) // 10 :]
    rows = [
        ("clips per second", f"{np.median(steady):,.1f} (median of steps, without the first tenth)"),
        ("steps", f"{run.steps:,} of {run.config.get('batch_size', '?')} pairs"),
        ("time since the start", _duration(max(line["seconds"] for line in [*run.train, *run.validations]))),
    ]
    memory = [line["gpu_memory_gib"] for line in run.train if "gpu_memory_gib" in line]
    if memory:
        rows.append(("GPU memory", f"{max(memory):.1f} GiB at most, on the first GPU"))
    return rows


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _final_rows(run: RunData) -> tuple[str, Row] | None:
    """Return the split and the row of the trained model."""
    for name in ("test", "val"):
        record = run.records.get(name)
        if record is not None:
            return name, Row(
                f"{run.name}: {_short_title(record)}", _cells(record.ranks["raw"], record.groups)
            )
    for name, metrics in run.results.items():
        if _is_trained(name):
            return "test", Row(f"{run.name}: {name}", _plain_cells(metrics))
    if run.validations:
        line = run.validations[-1]
        return "val", Row(f"{run.name}: step {line['step']}", _plain_cells(line))
    return None


def _comparison_tables(runs: Sequence[RunData]) -> list[tuple[str, list[Row]]]:
    by_split: dict[str, list[Row]] = {}
    for run in runs:
        found = _final_rows(run)
        if found is not None:
            by_split.setdefault(found[0], []).append(found[1])
    titles = {"test": "Test split", "val": "Validation split"}
    return [(titles[split], rows) for split, rows in by_split.items()]


def _comparison_gains(runs: Sequence[RunData]) -> list[Row]:
    """Return the differences from the first run, where both have results of the same queries."""
    rows = []
    for split in ("test", "val"):
        first = runs[0].records.get(split)
        for run in runs[1:]:
            other = run.records.get(split)
            if first is None or other is None:
                continue
            if [(c.id, c.captions) for c in first.clips] == [(c.id, c.captions) for c in other.clips]:
                rows.append(Row(f"{split}: {run.name} minus {runs[0].name}", _gain_cells(first, other)))
    return rows
