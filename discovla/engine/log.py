"""Log of a run: config, versions, metrics.jsonl, TensorBoard and the progress of training."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from discovla import terminal
from discovla.engine.distributed import World
from discovla.files import write_file

METRICS = "metrics.jsonl"
PACKAGES = (
    "torch",
    "deepspeed",
    "open_clip_torch",
    "torchvision",
    "timm",
    "av",
    "numpy",
    "safetensors",
    "pydantic",
)


class RunLog:
    """Log of rank 0; on other ranks every method does nothing.

    The run directory gets `config.json`, `versions.json` (with the git commit), `metrics.jsonl` with one
    record per line, and TensorBoard files.  A resumed run drops the records of steps that it will repeat.

    Args:
        directory: of the run, created if missing.
        world: of this process.
        total: steps of the whole run.
        start: first step of this process; records of steps >= start are dropped.

    Raises:
        OSError: the directory or a file in it cannot be written; names it.
    """

    def __init__(self, directory: Path | str, world: World, *, total: int, start: int = 0) -> None:
        self.directory = Path(directory)
        self.world = world
        self._began = time.monotonic()
        if not world.first:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        drop_records(self.directory / METRICS, start)
        self._file = (self.directory / METRICS).open("ab", buffering=0)
        self._board = SummaryWriter(self.directory / "tensorboard", purge_step=start if start else None)
        self._open = ExitStack()
        bar = terminal.progress("training", total, "steps", done=start, delay=0)
        self._bar = self._open.enter_context(bar)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def describe(self, config: str) -> None:
        """Write the resolved config (JSON text), the versions of packages, and the git commit."""
        if self.world.first:
            (self.directory / "config.json").write_text(config)
            (self.directory / "versions.json").write_text(json.dumps(versions(self.world), indent=2))

    def step(self, step: int, *, clips: int, seconds: float, values: Mapping[str, float]) -> None:
        """Record one training step.

        Args:
            step: from 0.
            clips: number of clips in this step over all ranks.
            seconds: from the end of the step before to the end of this one.
            values: loss and its terms, lr, grad_norm.
        """
        if not self.world.first:
            return
        rate = clips / max(seconds, 1e-9)
        record: dict[str, Any] = {"step": step, **values, "clips_per_second": rate}
        if self.world.device.type == "cuda":
            record["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.world.device) / 2**30
        self._write({"kind": "train", **record, "seconds": time.monotonic() - self._began})
        for name, value in record.items():
            if name != "step":
                self._board.add_scalar(f"train/{name}", value, step)
        loss = f"loss {values['loss']:.4g}, " if "loss" in values else ""
        self._bar.advance(text=f"{loss}{rate:.4g} clips/s")

    def evaluation(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Record metrics of a split; nested mappings become slashed names in TensorBoard.

        Args:
            step: optimiser steps taken; a run that resumes there keeps the record.
            split: "val" or "test".
            values: numbers or nested mappings of numbers.
        """
        if not self.world.first:
            return
        self._write({"kind": split, "step": step, **values, "seconds": time.monotonic() - self._began})
        for name, value in flatten(values).items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Show pictures (y x 3, uint8) in TensorBoard, by their names."""
        if self.world.first:
            add_pictures(self._board, step, pictures)

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Record an event after `step` steps, such as a checkpoint or a slow rank."""
        if self.world.first:
            self._write({"kind": kind, "step": step, **values, "seconds": time.monotonic() - self._began})

    def close(self) -> None:
        """Close all files."""
        if self.world.first and not self._file.closed:
            self._open.close()
            self._board.close()
            self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        """Write one line without buffering, so that a killed run keeps it; print it if JSON is asked for."""
        try:
            self._file.write(f"{json.dumps(record)}\n".encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.directory / METRICS)) from error
        terminal.event(record)


def log_test(
    directory: Path, step: int, metrics: Mapping[str, Any], pictures: Mapping[str, np.ndarray]
) -> None:
    """Show the test metrics of step `step` and the pictures of the finished run in TensorBoard."""
    with SummaryWriter(directory / "tensorboard") as board:
        for name, value in flatten(metrics).items():
            board.add_scalar(f"test/{name}", value, step)
        add_pictures(board, step, pictures)


def add_pictures(board: SummaryWriter, step: int, pictures: Mapping[str, np.ndarray]) -> None:
    """Add pictures, y x 3 uint8, to a TensorBoard file."""
    for name, pixels in pictures.items():
        board.add_image(f"report/{name}", pixels, step, dataformats="HWC")


def has_record(path: Path, kind: str, step: int) -> bool:
    """Return True if metrics.jsonl has a record of a kind after `step` steps."""
    if not path.exists():
        return False
    starts = f'{{"kind": "{kind}", "step": {step},'
    return any(line.startswith(starts) and line.endswith("}") for line in path.read_text().splitlines())


def drop_records(path: Path, start: int) -> None:
    """Remove records from metrics.jsonl that a run from step `start` will write again.

    These are training records of steps >= start, evaluations after more than `start` steps (all of them at
    0), and a line that a kill cut off.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        if record["step"] < start or (record["kind"] != "train" and 0 < record["step"] == start):
            kept.append(line + "\n")
    write_file(path, "".join(kept))


def versions(world: World) -> dict[str, Any]:
    """Return the versions of packages and Python, the machine, and the git commit."""
    record: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            record[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            record[name] = None
    record["cuda"] = torch.version.cuda
    if world.device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(world.device)
    record["processes"] = world.size
    record["git_commit"] = git_commit()
    return record


def git_commit() -> str | None:
    """Return the commit of this code, with "+" if files were changed since; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed.strip() else "")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten nested mappings of numbers to slashed names."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = float(value)
    return flat
