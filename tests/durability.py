"""Record the order in which files are flushed and renamed, and kill a process between two calls."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CALLS = ("fsync", "rename", "replace", "unlink", "remove", "rmdir")  # of os; pathlib and shutil use them


def _path(x: object) -> str:
    """Return the path of an argument of a call: a descriptor's, or an absolute one."""
    return os.readlink(f"/proc/self/fd/{x}") if isinstance(x, int) else os.path.abspath(os.fspath(x))


@contextmanager
def intercepted(patch: pytest.MonkeyPatch, before: Callable[[str, list[str]], None]) -> Iterator[None]:
    """Call `before` with the name and the paths of every call of `CALLS`."""
    with patch.context() as inner:
        for name in CALLS:
            inner.setattr(os, name, _announced(name, getattr(os, name), before))
        yield


def _announced(name: str, call: Callable, before: Callable[[str, list[str]], None]) -> Callable:
    def announced(*args, **kwargs):
        before(name, [_path(x) for x in args if isinstance(x, int | str | os.PathLike)])
        return call(*args, **kwargs)

    return announced


def assert_durable(patch: pytest.MonkeyPatch, write: Callable[[], object], *, folders: bool) -> list[str]:
    """Check the order of `write`: what is renamed is flushed before, as is its folder's entry after.

    Args:
        folders: require that the folder of a renamed entry is flushed too.

    Returns:
        The paths that something was renamed to, in order.
    """
    flushed: dict[str, bytes | None] = {}  # contents of files at their flush; None for a folder
    moved: list[str] = []
    pending: set[str] = set()  # folders with a rename that is not flushed

    def before(name: str, paths: list[str]) -> None:
        if name == "fsync":
            here = Path(paths[0])
            flushed[paths[0]] = here.read_bytes() if here.is_file() else None
            pending.discard(paths[0])
        elif name in ("rename", "replace"):
            source, target = map(Path, paths[:2])
            if not Path(source).name.startswith("step-"):  # an entry that was complete before
                _assert_flushed(source, flushed)
            moved.append(str(target))
            pending.add(str(target.parent))
        elif folders:
            assert not pending, f"{name} {paths[0]} before the folder {pending} is flushed"

    with intercepted(patch, before):
        write()
    assert not folders or not pending, f"renamed in {pending}, whose entries are not flushed"
    return moved


def _assert_flushed(source: Path, flushed: dict[str, bytes | None]) -> None:
    """Check that a file, or a folder and all its files, are flushed with the content that they have."""
    for path in [source, *source.rglob("*")] if source.is_dir() else [source]:
        assert str(path) in flushed, f"{path} is renamed before it is flushed"
        if path.is_file():
            assert flushed[str(path)] == path.read_bytes(), f"{path} changed after it was flushed"


def killed_before(patch: pytest.MonkeyPatch, write: Callable[[], object], call: int) -> bool:
    """Run `write` in a forked process that is killed before its call number `call`; False if it ended."""
    child = os.fork()
    if not child:
        count = 0

        def before(name: str, paths: list[str]) -> None:
            nonlocal count
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        status = 1
        try:
            with intercepted(patch, before):
                write()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)
