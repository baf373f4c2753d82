"""Checkpoints that are whole or not there: written aside, checked by sum, put in place by one rename."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

STATE = "state.json"
BEST = "best.json"
FORMAT = 1
_NAME = re.compile(r"(\.old-)?step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; says which file, what was expected and what found."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds.

    step: optimiser steps taken.
    tensors: by part ("trained", "optimizer", and "average" where there is one), then by name.
    meta: anything JSON; its "fingerprint" says what the tensors belong to.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


def save(
    directory: Path | str, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]
) -> Path:
    """Write one checkpoint. Only one process of a run may.

    It is written into a folder beside its place, flushed to the disk and renamed: whoever looks finds all of
    it or nothing. A checkpoint of the same step is replaced. Remains of interrupted writes are removed.

    Args:
        directory: of the run's checkpoints; made if absent.
        step: optimiser steps taken, >= 0.
        tensors: parts, each one safetensors file; an empty part is allowed.
        meta: anything `json` writes.

    Returns:
        The checkpoint's folder, `step-00000120`.

    Raises:
        CheckpointError: no room, no permission, or any other refusal of the disk. Earlier checkpoints are
            untouched.
    """
    directory = Path(directory)
    final = directory / f"step-{step:08d}"
    writing = directory / f".writing-{final.name}"
    with _disk(final, remains=writing):
        directory.mkdir(parents=True, exist_ok=True)
        _clear_remains(directory)
        writing.mkdir()
        files = {f"{part}.safetensors": dict(named) for part, named in tensors.items()}
        for name, named in files.items():
            _write_tensors(writing / name, named)
        sums = {name: _sum_and_size(writing / name) for name in files}
        state = {"format": FORMAT, "step": step, "files": sums, "meta": dict(meta)}
        _write_text(writing / STATE, json.dumps({**state, "sha256": _sum_of_state(state)}, indent=2))
        _flush(writing)
        _put_in_place(writing, final)
    return final


def load(path: Path | str) -> Checkpoint:
    """Read a checkpoint, verifying every byte.

    Raises:
        CheckpointError: a file is missing, cut off or changed; the message says which.
    """
    path = Path(path)
    state = _read_state(path)
    tensors = {}
    for name, expected in state["files"].items():
        _verify(path / name, expected)
        tensors[name.removesuffix(".safetensors")] = load_file(path / name)
    return Checkpoint(path=path, step=state["step"], tensors=tensors, meta=state["meta"])


def latest(directory: Path | str) -> Checkpoint | None:
    """The newest whole checkpoint, or None; a broken one is passed over with a warning that says why."""
    for path in reversed(_list(Path(directory))):
        try:
            return load(path)
        except CheckpointError as error:
            logger.warning("checkpoint passed over: %s", error)
    return None


def evaluated(found: Checkpoint) -> dict[str, Tensor]:
    """The trained parameters that were evaluated and are to be used: their average, where there is one."""
    return found.tensors.get("average", found.tensors["trained"])


def set_best(directory: Path | str, path: Path, score: float) -> None:
    """Record the checkpoint at `path` as the best so far, with its score on validation.

    Raises:
        CheckpointError: the disk refuses.
    """
    pointer = Path(directory) / BEST
    writing = pointer.with_name(f".writing-{BEST}")
    with _disk(pointer, remains=writing):
        _write_text(writing, json.dumps({"checkpoint": path.name, "score": score}))
        os.replace(writing, pointer)
        _flush(pointer.parent)


def best(directory: Path | str) -> tuple[Path, float] | None:
    """The best checkpoint's folder and its score, or None where none was recorded.

    Raises:
        CheckpointError: the record is not readable, or its checkpoint is gone.
    """
    pointer = Path(directory) / BEST
    if not pointer.exists():
        return None
    try:
        found = json.loads(pointer.read_text())
        path, score = Path(directory) / found["checkpoint"], float(found["score"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{pointer}: expected a checkpoint and its score, found {error!r}") from None
    if not path.is_dir():
        raise CheckpointError(f"{pointer}: expected the folder {path.name}, found none")
    return path, score


def reselect(directory: Path | str, step: int) -> None:
    """Point to a checkpoint that can be read as the best, for a run that goes on from `step`.

    Where the best was broken, or is of a step that will be taken again, the best of the whole checkpoints up
    to `step` takes its place, by the score in its meta's "better"; where none has one, none is the best.

    Raises:
        CheckpointError: the disk refuses, or the record of the best is not readable.
    """
    directory = Path(directory)
    known = best(directory)
    if known is None or (_step(known[0]) <= step and is_whole(known[0])):
        return
    logger.warning("checkpoint no longer the best: %s is broken or newer than step %d", known[0], step)
    whole = [path for path in _list(directory) if _step(path) <= step and is_whole(path)]
    scores = [(_read_state(path)["meta"].get("better"), path) for path in whole]
    scored = [(score, path) for score, path in scores if score is not None]
    if scored:
        score, path = max(scored)
        set_best(directory, path, score)
    else:
        (directory / BEST).unlink()


def keep(directory: Path | str, count: int) -> None:
    """Remove all but the newest `count` whole checkpoints and the best.

    Broken ones are removed too once `count` whole ones are newer; the last whole one never is.
    """
    directory = Path(directory)
    pointed = best(directory)
    whole = 0
    for path in reversed(_list(directory)):
        if whole >= max(1, count):
            if pointed is None or path != pointed[0]:
                shutil.rmtree(path, ignore_errors=True)
        elif is_whole(path):
            whole += 1


def check_fingerprint(
    found: Mapping[str, Any], expected: Mapping[str, Any], source: str = "checkpoint"
) -> None:
    """Refuse a checkpoint that belongs to something else.

    Args:
        found: of the checkpoint.
        expected: of this run; nested mappings are compared key by key.
        source: names the checkpoint in the message.

    Raises:
        CheckpointError: the first keys that differ, with both values.
    """
    differing = list(_differences(json.loads(json.dumps(found)), json.loads(json.dumps(expected))))
    if differing:
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise CheckpointError(f"{source}: another architecture: {'; '.join(differing[:3])}{more}")


class CheckpointWriter:
    """Runs what writes a checkpoint in a thread of its own.

    One write is in flight at most: the next waits for it.  What goes wrong in it is raised by whichever
    method is called next.  When the interpreter ends, it waits for a write that is still going on.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begin to write, once the write before is done.

        Args:
            write: touches no tensor that training changes.
        """
        self.wait()
        self._last = self._thread.submit(write)

    def check(self) -> None:
        """Raise the error of a write that has ended with one."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written; raises the error of the last write."""
        last = self._last
        if last is not None:
            try:
                last.result()
            finally:
                self._last = None

    def leave(self, within: float) -> None:
        """Before this process is ended from another thread: give a write that is going on so many seconds."""
        last = self._last
        if last is not None:
            wait([last], timeout=within)


def _differences(found: Any, expected: Any, key: str = "") -> Iterator[str]:
    """One line for every key whose values differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in sorted(found.keys() | expected.keys()):
            inner = f"{key}.{name}" if key else name
            yield from _differences(found.get(name), expected.get(name), inner)
    elif found != expected:
        yield f"{key}: expected {expected!r}, found {found!r}"


@contextmanager
def _disk(target: Path, *, remains: Path) -> Iterator[None]:
    """Turn what the disk says into one line, and leave nothing half-written behind."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        _remove(remains)
        raise CheckpointError(f"{target}: expected to write it, found: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What the system said, and which room is left where that is the trouble."""
    code = getattr(error, "errno", None)
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text
    return f"{text}: the disk is full, earlier checkpoints are untouched" if full else text


def _write_tensors(path: Path, named: dict[str, Tensor]) -> None:
    """One safetensors file, flushed to the disk."""
    save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in named.items()}, path)
    _flush(path)


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(writing: Path, final: Path) -> None:
    """Rename; one of the same step steps aside first and is removed after."""
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        os.rename(final, old)
    os.rename(writing, final)
    _flush(final.parent)
    _remove(old)


def _clear_remains(directory: Path) -> None:
    """Remove what interrupted writes left; a checkpoint that had stepped aside comes back."""
    for path in directory.glob(".old-step-*"):
        final = path.with_name(path.name.removeprefix(".old-"))
        if not final.exists():
            os.rename(path, final)
    for pattern in (".writing-*", ".old-*"):
        for path in directory.glob(pattern):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder or a file; what resists stays, for nobody takes it for a checkpoint."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _list(directory: Path) -> list[Path]:
    """Folders named like checkpoints, oldest first; one that stepped aside comes before its successor."""
    if not directory.is_dir():
        return []
    found = [(path, match) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for path, match in sorted(found, key=lambda item: (int(item[1][2]), not item[1][1]))]


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[2]) if match else -1


def is_whole(path: Path) -> bool:
    """Whether every byte of a checkpoint is as it was written."""
    try:
        state = _read_state(path)
        for name, expected in state["files"].items():
            _verify(path / name, expected)
    except CheckpointError:
        return False
    return True


def _read_state(path: Path) -> dict[str, Any]:
    """state.json, with the keys that loading needs."""
    try:
        state = json.loads((path / STATE).read_text())
    except OSError as error:
        raise CheckpointError(f"{path / STATE}: expected a readable file, found: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path / STATE}: expected JSON, found: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else state
        raise CheckpointError(f"{path / STATE}: expected format {FORMAT}, found {found!r}")
    expected, found = state.pop("sha256", None), _sum_of_state(state)
    if found != expected:
        raise CheckpointError(f"{path / STATE}: expected sha256 {expected}, found {found}")
    return state


def _sum_of_state(state: dict[str, Any]) -> str:
    """Of its content, however it is laid out."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _verify(path: Path, expected: dict[str, Any]) -> None:
    """Refuse a file that is not what was written."""
    try:
        found = _sum_and_size(path)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}") from None
    for key in ("bytes", "sha256"):
        if found[key] != expected[key]:
            raise CheckpointError(f"{path}: expected {key} {expected[key]}, found {found[key]}")


def _sum_and_size(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
