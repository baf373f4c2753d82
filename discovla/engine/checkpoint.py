"""Checkpoints on disk: written to a temporary folder, verified by checksum, put in place by one rename."""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from discovla.tensor_files import write_tensors

logger = logging.getLogger(__name__)

STATE = "state.json"
BEST = "best.json"
FORMAT = 1
WRITE_LIMIT = 1200.0  # seconds that a write may take before the file system counts as hung
_NAME = re.compile(r"(\.old-)?step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; names the file, what was expected and what was found."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Content of a checkpoint.

    step: optimiser steps taken.
    tensors: by part ("trained", "optimizer", and "average" with an EMA), then by name.
    meta: JSON values; "fingerprint" identifies the architecture that the tensors belong to.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


def save(
    directory: Path | str, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]
) -> Path:
    """Write one checkpoint; only one process of a run may call it.

    The files are written to a temporary folder, flushed to the disk and renamed, so a reader sees all of the
    checkpoint or nothing.  It replaces one of the same step. Remains of interrupted writes are removed.

    Args:
        directory: folder of the run's checkpoints, created if missing.
        step: optimiser steps taken, >= 0.
        tensors: by part; each part becomes one safetensors file and may be empty.
        meta: JSON values.

    Returns:
        The checkpoint's folder, `step-00000120`.

    Raises:
        CheckpointError: disk full, no permission or another disk error; earlier checkpoints are untouched.
    """
    directory = Path(directory)
    final = step_folder(directory, step)
    writing = directory / f".writing-{final.name}"
    with _disk_errors(final, temporary=writing):
        directory.mkdir(parents=True, exist_ok=True)
        _clean_up(directory)
        writing.mkdir()
        files = {f"{part}.safetensors": dict(named) for part, named in tensors.items()}
        for name, named in files.items():
            _write_tensors(writing / name, named)
        checksums = {name: _checksum(writing / name) for name in files}
        state = {"format": FORMAT, "step": step, "files": checksums, "meta": dict(meta)}
        _write_text(writing / STATE, json.dumps({**state, "sha256": _state_checksum(state)}, indent=2))
        _flush(writing)
        _put_in_place(writing, final)
    return final


def load(path: Path | str) -> Checkpoint:
    """Read a checkpoint and verify every file.

    Raises:
        CheckpointError: a file is missing, truncated or changed; names it.
    """
    path = Path(path)
    state = _read_state(path)
    tensors = {}
    for name, expected in state["files"].items():
        _verify(path / name, expected)
        tensors[name.removesuffix(".safetensors")] = load_file(path / name)
    return Checkpoint(path=path, step=state["step"], tensors=tensors, meta=state["meta"])


def latest(directory: Path | str) -> Checkpoint | None:
    """Return the newest complete checkpoint, or None; skip broken ones with a warning."""
    for path in reversed(_list(Path(directory))):
        try:
            return load(path)
        except CheckpointError as error:
            logger.warning("checkpoint skipped: %s", error)
    return None


def selected_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the parameters to evaluate and export: the EMA if there is one, else the trained parameters."""
    return checkpoint.tensors.get("average", checkpoint.tensors["trained"])


def step_folder(directory: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return directory / f"step-{step:08d}"


def set_best(directory: Path | str, path: Path, score: float) -> None:
    """Record the checkpoint at `path` as the best so far, with its validation score; earlier ones are kept.

    Raises:
        CheckpointError: disk error, or the record of earlier ones is unreadable.
    """
    directory, step = Path(directory), _step(path)
    earlier = [entry for entry in _bests(directory) if entry[0] < step]
    _write_bests(directory, [*earlier, (step, score)])


def best(directory: Path | str) -> tuple[Path, float] | None:
    """Return the best checkpoint's folder and score, or None if none was recorded.

    Raises:
        CheckpointError: the record is unreadable, or its checkpoint is gone.
    """
    directory = Path(directory)
    bests = _bests(directory)
    if not bests:
        return None
    step, score = bests[-1]
    path = step_folder(directory, step)
    if not path.is_dir():
        raise CheckpointError(f"{directory / BEST}: expected the folder {path.name}, found none")
    return path, score


def reselect_best(directory: Path | str, step: int) -> None:
    """Select the best checkpoint again for a run that resumes at `step`.

    The last one that was the best and is complete and not newer than `step` remains.

    Raises:
        CheckpointError: disk error, or the record of the best is unreadable.
    """
    directory = Path(directory)
    bests = _bests(directory)
    kept = list(bests)
    while kept and (kept[-1][0] > step or not is_complete(step_folder(directory, kept[-1][0]))):
        newest, _ = kept.pop()
        logger.warning(
            "checkpoint no longer the best: %s is broken or newer than step %d",
            step_folder(directory, newest),
            step,
        )
    if not kept:
        (directory / BEST).unlink(missing_ok=True)
    elif kept != bests:
        _write_bests(directory, kept)


def _bests(directory: Path) -> list[tuple[int, float]]:
    """Return step and score of every checkpoint that was the best, in the order of steps."""
    pointer = directory / BEST
    if not pointer.exists():
        return []
    try:
        record = json.loads(pointer.read_text())
        entries = [*record.get("earlier", ()), [record["checkpoint"], record["score"]]]
        return [(_step(Path(name)), float(score)) for name, score in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{pointer}: expected a checkpoint and its score, found {error!r}") from None


def _write_bests(directory: Path, bests: Sequence[tuple[int, float]]) -> None:
    """Write the record of the best checkpoint, the last of these, and of earlier ones."""
    pointer = directory / BEST
    writing = pointer.with_name(f".writing-{BEST}")
    *earlier, (name, score) = [(step_folder(directory, step).name, score) for step, score in bests]
    with _disk_errors(pointer, temporary=writing):
        _write_text(writing, json.dumps({"checkpoint": name, "score": score, "earlier": earlier}))
        os.replace(writing, pointer)
        _flush(pointer.parent)


def prune(directory: Path | str, count: int) -> None:
    """Remove all but the best and the newest `count` complete checkpoints, at least one.

    Broken checkpoints are removed once `count` complete ones are newer.
    """
    directory = Path(directory)
    recorded = best(directory)
    complete = 0
    for path in reversed(_list(directory)):
        if complete >= max(1, count):
            if recorded is None or path != recorded[0]:
                shutil.rmtree(path, ignore_errors=True)
        elif is_complete(path):
            complete += 1


def check_fingerprint(
    found: Mapping[str, Any], expected: Mapping[str, Any], source: str = "checkpoint"
) -> None:
    """Raise CheckpointError if a checkpoint belongs to another architecture.

    Args:
        found: fingerprint of the checkpoint.
        expected: fingerprint of this run; nested mappings are compared key by key.
        source: names the checkpoint in the message.

    Raises:
        CheckpointError: the first keys that differ, with both values.
    """
    differing = list(_differences(json.loads(json.dumps(found)), json.loads(json.dumps(expected))))
    if differing:
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise CheckpointError(f"{source}: another architecture: {'; '.join(differing[:3])}{more}")


class CheckpointWriter:
    """Writes checkpoints in a thread of its own while training continues, one at a time.

    An error of a write is raised by the next call of any method.  The interpreter waits for a write in
    progress before it exits, up to `WRITE_LIMIT`."""

    def __init__(self) -> None:
        self._last: Future[None] | None = None
        atexit.register(_finish_within, weakref.ref(self), WRITE_LIMIT)

    def start(self, write: Callable[[], None]) -> None:
        """Start a write after the previous one is done.

        Args:
            write: must not touch tensors that training changes.
        """
        self.wait()
        self._last = last = Future()
        # a daemon: the interpreter does not wait for a file system that never answers
        threading.Thread(target=_run, args=(write, last), name="checkpoint", daemon=True).start()

    def check(self) -> None:
        """Raise the error of a write that has failed."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written; raise the error of the last write.

        Raises:
            CheckpointError: it takes longer than `WRITE_LIMIT`.
        """
        last = self._last
        if last is None:
            return
        wait([last], timeout=WRITE_LIMIT)
        self._last = None
        if not last.done():
            raise CheckpointError(
                f"checkpoint: expected it to be written within {WRITE_LIMIT:g} s, found the write still in "
                "progress: the file system does not answer"
            )
        last.result()

    def finish_within(self, seconds: float) -> None:
        """Give a write in progress this long, before another thread ends the process."""
        last = self._last
        if last is not None:
            wait([last], timeout=seconds)


def _run(write: Callable[[], None], future: Future[None]) -> None:
    """Body of the thread: write, and note the end or the error."""
    try:
        write()
    except BaseException as error:  # raised where the write is waited for
        future.set_exception(error)
    else:
        future.set_result(None)


def _finish_within(writer: weakref.ref[CheckpointWriter], seconds: float) -> None:
    """Give the last write of a writer that still exists its time, when the interpreter exits."""
    if (existing := writer()) is not None:
        existing.finish_within(seconds)


def _differences(found: Any, expected: Any, key: str = "") -> Iterator[str]:
    """Yield one line for every key whose values differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in sorted(found.keys() | expected.keys()):
            inner = f"{key}.{name}" if key else name
            yield from _differences(found.get(name), expected.get(name), inner)
    elif found != expected:
        yield f"{key}: expected {expected!r}, found {found!r}"


@contextmanager
def _disk_errors(target: Path, *, temporary: Path) -> Iterator[None]:
    """Turn disk errors into a CheckpointError of one line and remove the temporary file or folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        _remove(temporary)
        raise CheckpointError(f"{target}: expected to write it, found: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the system's message; for a full disk add that earlier checkpoints are untouched."""
    code = getattr(error, "errno", None)
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text
    return f"{text}: the disk is full, earlier checkpoints are untouched" if full else text


def _write_tensors(path: Path, named: dict[str, Tensor]) -> None:
    """Write one safetensors file and flush it to the disk."""
    write_tensors(path, named)
    _flush(path)


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(writing: Path, final: Path) -> None:
    """Rename to the final path; an existing checkpoint of the same step is moved aside, then removed."""
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        os.rename(final, old)
    os.rename(writing, final)
    _flush(final.parent)
    _remove(old)


def _clean_up(directory: Path) -> None:
    """Remove remains of interrupted writes; restore a checkpoint that was moved aside but not replaced."""
    for path in directory.glob(".old-step-*"):
        final = path.with_name(path.name.removeprefix(".old-"))
        if not final.exists():
            os.rename(path, final)
    for pattern in (".writing-*", ".old-*"):
        for path in directory.glob(pattern):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder or file; what cannot be removed is ignored later because of its name."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _list(directory: Path) -> list[Path]:
    """List checkpoint folders, oldest first; one that was moved aside precedes its successor."""
    if not directory.is_dir():
        return []
    named = [(path, match) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for path, match in sorted(named, key=lambda item: (int(item[1][2]), not item[1][1]))]


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[2]) if match else -1


def is_complete(path: Path) -> bool:
    """Return True if every file of a checkpoint is as it was written."""
    try:
        state = _read_state(path)
        for name, expected in state["files"].items():
            _verify(path / name, expected)
    except CheckpointError:
        return False
    return True


def _read_state(path: Path) -> dict[str, Any]:
    """Read and verify state.json."""
    try:
        state = json.loads((path / STATE).read_text())
    except OSError as error:
        raise CheckpointError(f"{path / STATE}: expected a readable file, found: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path / STATE}: expected JSON, found: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else state
        raise CheckpointError(f"{path / STATE}: expected format {FORMAT}, found {found!r}")
    expected, found = state.pop("sha256", None), _state_checksum(state)
    if found != expected:
        raise CheckpointError(f"{path / STATE}: expected sha256 {expected}, found {found}")
    return state


def _state_checksum(state: dict[str, Any]) -> str:
    """Return the SHA-256 of the content, independent of its layout."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _verify(path: Path, expected: dict[str, Any]) -> None:
    """Raise CheckpointError if a file is not as it was written."""
    try:
        found = _checksum(path)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}") from None
    for key in ("bytes", "sha256"):
        if found[key] != expected[key]:
            raise CheckpointError(f"{path}: expected {key} {expected[key]}, found {found[key]}")


def _checksum(path: Path) -> dict[str, Any]:
    """Return the size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
