"""Terminal output of the commands: progress bars, log lines and facts, or JSON lines for other programs.

On a terminal a pass shows a bar; elsewhere it prints a plain line every ten seconds.  Only rank 0 prints.
Results go to stdout, everything else to stderr.  Warnings of other libraries are held back and printed
once each by `close`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column, Table
from rich.text import Text

Mode = Literal["library", "lines", "quiet", "json"]
T = TypeVar("T")

DELAY = 2.0  # seconds that a pass takes before it is shown
LONGEST = 300  # letters of a warning of another library
EVERY = 10.0  # seconds between two lines of a pass where there is no terminal
OURS = ("discovla", "train", "__main__", "benchmarks")  # roots of the names of our loggers


class Bar:
    """Progress of one pass, shown as a bar or, where there is no terminal, as lines."""

    def __init__(self, task: TaskID | None) -> None:
        self._task = task  # None shows nothing
        self._next_line = time.monotonic() + DELAY
        self._lines = threading.Lock()  # or the line of the timer of `progress` may follow a newer one

    def advance(self, count: int = 1, text: str = "") -> None:
        """Count `count` more as done; `text` replaces what stands behind the estimate."""
        self._update(advance=count, **({"text": text} if text else {}))

    def update(self, done: int, total: int) -> None:
        """Set how many are done, of how many."""
        self._update(completed=done, total=total)

    def _update(self, **values: Any) -> None:
        if self._task is not None:
            _screen.bars.update(self._task, **values)
            if not _screen.draws and time.monotonic() >= self._next_line:
                self.print_line()

    def print_line(self) -> None:
        """Print the state of the pass as one line, or as JSON."""
        with self._lines:
            self._next_line = time.monotonic() + EVERY
            for task in _screen.bars.tasks:
                if task.id != self._task:
                    continue
                parts = [f"{task.description}: {_count(task)}", _time_left(task), task.fields["text"]]
                if _screen.mode == "lines":
                    _screen.console.print(Text(", ".join(part for part in parts if part)))
                done = {"pass": task.description, "done": int(task.completed), "total": task.total}
                left = {"unit": task.fields["unit"], "seconds_left": task.time_remaining}
                event({"kind": "progress", **done, **left})


class _Console(Console):
    """Console that leaves the cursor visible, because a killed process could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class _Column(ProgressColumn):
    """Column with a text that a function makes of the task."""

    def __init__(self, text: Callable[[Task], str], **options: Any) -> None:
        self._text = text
        super().__init__(Column(no_wrap=True, **options))

    def render(self, task: Task) -> Text:
        return Text(self._text(task))


def _count(task: Task) -> str:
    """Return how many units are done, of how many."""
    done, total = int(task.completed), task.total
    number = f"{done:,}" if total is None else f"{done:,} of {int(total):,}"
    return f"{number} {task.fields['unit']}"


def _time_left(task: Task) -> str:
    """Return the estimated time as hours, minutes and seconds; empty if there is no estimate yet."""
    if task.time_remaining is None or task.finished:
        return ""
    minutes, seconds = divmod(int(task.time_remaining), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"


class _Bars(Progress):
    """Bars of the passes that have taken long enough."""

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        return super().make_tasks_table([t for t in tasks if (t.elapsed or 0.0) >= t.fields["delay"]])


class _Screen:
    """State of the output of this process."""

    def __init__(self, mode: Mode = "library") -> None:
        self.mode, self.pid = mode, os.getpid()
        self.console = _Console(stderr=True, highlight=False, soft_wrap=True)
        self.bars = _Bars(
            _Column(lambda task: task.description),
            BarColumn(bar_width=None, table_column=Column(min_width=8, max_width=40)),
            _Column(_count),
            _Column(_time_left),
            _Column(lambda task: task.fields["text"], overflow="ellipsis"),
            console=self.console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,  # a forked process would write through a lock that may be held
        )
        self.held: dict[tuple[str, str], int] = {}  # warning of another library -> how often it came
        self.handler = _Handler()

    @property
    def draws(self) -> bool:
        """True if passes are drawn as bars."""
        return self.console.is_terminal and self.mode != "json"

    def stop_drawing(self) -> None:
        """Remove the bars."""
        if self.bars.live.is_started:
            self.bars.stop()

    def shows(self, wanted: bool | None) -> bool:
        """Return True if passes are shown; `wanted` None leaves it to the mode and the terminal."""
        if wanted is False or self.mode == "quiet" or not _first_rank():
            return False
        return bool(wanted) or self.mode != "library" or self.console.is_terminal


class _Handler(logging.Handler):
    """Print our log records above the bars, and hold back warnings of other libraries."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        if os.getpid() != _screen.pid:  # a forked process, in which the console's lock may be held
            sys.stderr.write(message + "\n")
        elif record.name.partition(".")[0] in OURS:
            style = "yellow" if record.levelno == logging.WARNING else "red"
            word = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            text = Text(word, style=style).append(message, style="default")
            _screen.console.print(text, soft_wrap=not _screen.draws)  # a terminal breaks lines between words
        elif record.levelno >= logging.WARNING:
            key = _library_and_line(record.name, message)
            _screen.held[key] = _screen.held.get(key, 0) + 1


_screen = _Screen()


def start(*, quiet: bool = False, as_json: bool = False, level: int = logging.INFO) -> None:
    """Set up the output of a command, anew if it was set up before.

    Args:
        quiet: print warnings and results only.
        as_json: print events as JSON lines on stdout, and on stderr warnings only.
        level: least level of our log records that are printed without `quiet` and `as_json`.
    """
    global _screen
    logging.getLogger().removeHandler(_screen.handler)
    _screen = _Screen("quiet" if quiet else "json" if as_json else "lines")
    logging.getLogger().addHandler(_screen.handler)
    logging.getLogger().setLevel(logging.WARNING if quiet or as_json else level)
    logging.captureWarnings(True)


def close() -> None:
    """End the output of a command: print the warnings of other libraries that were held back, each once."""
    global _screen
    clear()
    for (name, line), count in _screen.held.items():
        times = "" if count == 1 else f" ({count} times)"
        _screen.console.print(
            Text(f"warning of {name}: {line}{times}", style="dim"), soft_wrap=not _screen.draws
        )
    logging.getLogger().removeHandler(_screen.handler)
    logging.captureWarnings(False)
    _screen = _Screen()


def clear() -> None:
    """Remove the bars from the terminal."""
    _screen.stop_drawing()


def is_json() -> bool:
    """Return True if the command prints JSON lines."""
    return _screen.mode == "json"


def width() -> int | None:
    """Return the columns of the terminal on stdout; None if it is none."""
    return _screen.console.width if sys.stdout.isatty() else None


@contextmanager
def progress(
    what: str, total: int | None, unit: str, *, done: int = 0, delay: float = DELAY, show: bool | None = None
) -> Iterator[Bar]:
    """Show the progress of a pass, if it takes longer than `delay` seconds.

    Args:
        what: the pass, as in "validation, videos".
        total: number of units; None if it is not known yet.
        unit: of what is counted, in the plural.
        done: units that an earlier process has done.
        show: None shows it on a terminal, and elsewhere if a command runs.
    """
    if not _screen.shows(show):
        yield Bar(None)
        return
    bars = _screen.bars
    task = bars.add_task(what, total=total, completed=done, text="", delay=delay, unit=unit)
    bar = Bar(task)
    first = threading.Timer(delay, bar.print_line)  # the first step of a pass may take long
    first.daemon = True
    if _screen.draws:
        bars.start()
    else:
        first.start()
    try:
        yield bar
    finally:
        first.cancel()
        bars.remove_task(task)
        if not bars.tasks:
            _screen.stop_drawing()


def counted(batches: Iterable[T], bar: Bar) -> Iterator[T]:
    """Yield batches of tensors, or tuples of them, and count their rows once the caller is done with one."""
    for batch in batches:
        yield batch
        bar.advance(len(batch[0] if isinstance(batch, tuple) else batch))  # type: ignore[arg-type]


def facts(rows: Mapping[str, str]) -> None:
    """Print names and values on stderr, one pair a line."""
    if _screen.mode != "lines" or not _first_rank():
        return
    if not _screen.draws:
        length = max(map(len, rows))
        for name, value in rows.items():
            _screen.console.print(Text(f"{name:<{length}}  {value}"))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    _screen.console.print(table, soft_wrap=False)


def event(values: Mapping[str, Any]) -> None:
    """Print an event, `kind` and other keys, as a JSON line on stdout if the command prints JSON lines."""
    if _screen.mode == "json" and _first_rank():
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _library_and_line(logger: str, message: str) -> tuple[str, str]:
    """Return the library of a warning, and the first line of its text, shortened."""
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    library = logger.partition(".")[0]
    if warned := re.match(r"(?P<path>.*?):\d+: (?P<text>\w+: .*)", line):  # as `warnings` formats it
        path = Path(warned["path"])
        below = path.parts[path.parts.index("site-packages") + 1 :] if "site-packages" in path.parts else ()
        library, line = below[0] if below else path.name, warned["text"]
    return library, line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
