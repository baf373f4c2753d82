"""Everything that a report shows of a run, read from its directory."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from discovla.batch import BadClip
from discovla.config import ConfigError, RunConfig, parse_config, translate_stored
from discovla.engine import checkpoint
from discovla.engine.log import METRICS
from discovla.files import write_file
from discovla.retrieval.record import EvaluationRecord

FACTS = "facts.json"
RELIABILITY = "reliability.json"
RECORDS = ("test-plain", "test-untrained", "test", "val-start", "val")  # evaluation-<name>.npz

JSON = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """Numbers of one split: its name in the manifest, clips and captions."""

    name: str
    clips: int
    captions: int


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts of a run that are known when training starts and that its config does not hold.

    splits: use ("train", "val", "test") to its numbers.  pairs: training pairs.
    parameters, trained_parameters: numbers of them.  device: its name.
    weights: name, source and licence of the weights that the run started from, as in `WeightsOrigin`.
    """

    splits: Mapping[str, SplitFacts]
    pairs: int
    total_steps: int
    steps_per_epoch: int
    parameters: int
    trained_parameters: int
    device: str
    cpu: str = ""
    cores: int = 0
    memory_gib: float = 0.0
    weights: Mapping[str, str] = field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write `facts.json` of a run directory."""
        write_file(directory / FACTS, json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, directory: Path) -> RunFacts | None:
        """Read `facts.json`; None if the run has none.

        Raises:
            ValueError: the file is damaged; the message has its name.
        """
        path = directory / FACTS
        values = read_json(path)
        if values is None:
            return None
        try:
            splits = {use: SplitFacts(**numbers) for use, numbers in values.pop("splits").items()}
            return cls(**values, splits=splits)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: expected the facts of a run: {error}") from None


@dataclass(kw_only=True)
class RunData:
    """Values that a report shows of a run.

    config: the stored config by sections, with old keys translated; empty if it is missing.
    parsed: the same as a `RunConfig`; None if this version cannot read it.
    results: row to metrics on the test split.  complete: True if `results.json` was written.
    records: part of the file name ("test", "val", ...) to per-query results.
    train, validations: records of metrics.jsonl.  bad_clips: refused in training.
    reliability: bins of the probability of hits of an index, with how often they are right; none without.
    notes: one sentence for every part that cannot be shown.
    label: name to show instead of the directory's.
    """

    directory: Path
    config: JSON
    parsed: RunConfig | None
    versions: JSON
    facts: RunFacts | None
    results: JSON
    complete: bool
    records: dict[str, EvaluationRecord]
    train: list[JSON]
    validations: list[JSON]
    bad_clips: list[BadClip]
    quarantined: list[BadClip]
    best_step: int | None
    reliability: list[JSON] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def name(self) -> str:
        """Return the label, or without one the name of the run directory."""
        return self.label or self.directory.absolute().name

    @property
    def steps(self) -> int:
        """Return the number of recorded steps."""
        return self.train[-1]["step"] + 1 if self.train else 0

    @property
    def total_steps(self) -> int | None:
        """Return the number of steps that the run was to take, if it is known."""
        if self.facts is not None:
            return self.facts.total_steps
        return self.config.get("steps")

    @property
    def split(self) -> str:
        """Return the split of the newest results of the trained model: test if it was measured, else val."""
        return "test" if "test" in self.records or self.complete else "val"


def read_run(directory: Path) -> RunData:
    """Read a run directory; parts that are missing or damaged become notes.

    Raises:
        ConfigError: the folder is no run directory.
    """
    if not (directory / METRICS).is_file() and not (directory / "config.json").is_file():
        raise ConfigError(f"{directory}: expected a run directory, found no config.json or {METRICS} in it")
    notes: list[str] = []

    def read(path: Path, what: str) -> JSON:
        try:
            values = read_json(path)
        except ValueError as error:
            notes.append(f"{what} cannot be read: {error}.")
            return {}
        if values is None:
            notes.append(f"{what} is missing: the run has no {path.name}.")
        return values or {}

    config = read(directory / "config.json", "The config")
    parsed = None
    if config:
        try:
            config = _plain(translate_stored(config))
            parsed = parse_config(config, str(directory / "config.json"))
        except ValueError as error:
            notes.append(f"This version cannot read the stored config, so no defaults are marked: {error}")
    try:
        facts = RunFacts.load(directory)
    except ValueError as error:
        notes.append(str(error))
        facts = None
    complete = (directory / "results.json").is_file()
    results = read(directory / "results.json", "The table of test results") if complete else {}
    if not complete and (directory / "before.json").is_file():
        before = read(directory / "before.json", "The table of zero-shot results")
        results = before.get("rows", before)  # older runs hold the rows alone
    records = {}
    for name in RECORDS:
        path = directory / f"evaluation-{name}.npz"
        if path.is_file():
            try:
                records[name] = EvaluationRecord.load(path)
            except (ValueError, OSError) as error:
                notes.append(f"Per-query results cannot be read: {error}.")
    try:
        reliability = (read_json(directory / RELIABILITY) or {}).get("bins", [])
    except ValueError as error:
        notes.append(f"How often hits are right cannot be read: {error}.")
        reliability = []
    lines = _records(directory / METRICS)
    quarantine = None if parsed is None else parsed.data.quarantine
    best = _best(directory)
    return RunData(
        directory=directory,
        config=config,
        parsed=parsed,
        versions=read(directory / "versions.json", "The list of versions"),
        facts=facts,
        results=results,
        complete=complete,
        records=records,
        train=[line for line in lines if line["kind"] == "train"],
        validations=[line for line in lines if line["kind"] == "val"],
        bad_clips=_bad_clips(directory / "quarantine.jsonl"),
        quarantined=[] if quarantine is None else _bad_clips(Path(quarantine)),
        best_step=best,
        reliability=reliability,
        notes=notes,
    )


def read_json(path: Path) -> JSON | None:
    """Return the object in a JSON file; None without the file.

    Raises:
        ValueError: the file holds something else; the message has its name.
    """
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON object: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def machine() -> JSON:
    """Return the name of the CPU, its cores and the memory of this machine."""
    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu, "cores": os.cpu_count() or 0, "memory_gib": round(memory, 1)}


def device_name(device: torch.device) -> str:
    """Return the name of a device for a reader."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _plain(values: Any) -> JSON:
    return json.loads(json.dumps(values, default=str))


def _records(path: Path) -> list[JSON]:
    """Return the records of metrics.jsonl without a line that a kill cut off."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"kind", "step"} <= record.keys():
            records.append(record)
    return records


def _bad_clips(path: Path) -> list[BadClip]:
    """Return the clips of a quarantine list; lines that hold none are left out."""
    clips = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            clips.append(BadClip(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return clips


def _best(directory: Path) -> int | None:
    """Return the step of the best checkpoint."""
    try:
        found = checkpoint.best(directory / "checkpoints")
    except checkpoint.CheckpointError:
        return None
    return None if found is None else int(found[0].name.rpartition("-")[2])
