"""Terminal output: bars on a terminal, lines elsewhere, JSON for machines, nothing on other ranks."""

import json
import logging
import os
import pty
import subprocess
import sys
import warnings

import pytest

from discovla import terminal

SCRIPT = """
import logging, time
from discovla import terminal
terminal.DELAY = 0.2
terminal.start()
terminal.facts({"run": "runs/x", "kernels": "a long list of names " * 5})
with terminal.progress("training", 40, "steps", done=10, delay=0) as bar:
    for step in range(30):
        time.sleep(0.02)
        bar.advance(text="loss 0.25")
        if step == 10:
            logging.getLogger("discovla.x").info("step %d: val R@1 40.0", step)
            with terminal.progress("validation", 30, "clips", delay=0.2) as inner:
                for _ in range(30):
                    time.sleep(0.02)
                    inner.advance()
            with terminal.progress("quick", 1, "clips", delay=5) as inner:
                inner.advance()
terminal.close()
"""


def on_a_terminal(columns: int) -> str:
    """Return what the script writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    env = os.environ | {"COLUMNS": str(columns), "TERM": "xterm-256color"}
    env.pop("RANK", None)
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        parts = []
        try:
            while part := os.read(ours, 4096):
                parts.append(part)
        except OSError:  # the other end is closed
            pass
        finally:
            os.close(ours)
        assert process.wait() == 0
    return b"".join(parts).decode()


@pytest.mark.parametrize("columns", [80, 160])
def test_a_terminal_shows_bars_that_fit_and_keep_the_cursor(columns):
    written = on_a_terminal(columns)
    shown = [line for line in written.replace("\r", "\n").split("\n") if "━" in line]
    plain = ["".join(part.partition("m")[2] for part in f"m{line}".split("\x1b[")) for line in shown]
    assert max(map(len, plain)) <= columns
    assert any("training" in line and "of 40 steps" in line and "loss 0.25" in line for line in plain)
    assert any("validation" in line and "left" in line for line in plain)
    assert "quick" not in written and "\x1b[?25l" not in written
    assert "step 10: val R@1 40.0" in written


@pytest.fixture
def output(capsys):
    """Return a function that reads stdout and stderr, and end the output of the command afterwards."""
    yield lambda: capsys.readouterr()
    terminal.close()


def a_pass(count: int = 3) -> None:
    with terminal.progress("reading", count, "clips", delay=0) as bar:
        for _ in range(count):
            bar.advance(text="fast")


def test_without_a_terminal_a_pass_prints_lines(output, monkeypatch):
    monkeypatch.setattr(terminal, "DELAY", 0.0)
    monkeypatch.setattr(terminal, "EVERY", 0.0)
    terminal.start()
    a_pass()
    printed = output()
    assert printed.out == ""
    assert printed.err.splitlines()[-1] == "reading: 3 of 3 clips, fast"


def test_a_pass_without_progress_for_long_prints_that_it_has_begun(output, monkeypatch):
    terminal.start()
    with terminal.progress("reading", 3, "clips", delay=0.05):
        for timer in (t for t in terminal.threading.enumerate() if isinstance(t, terminal.threading.Timer)):
            timer.join(5)
    assert output().err == "reading: 0 of 3 clips\n"


@pytest.mark.parametrize("how", ["library", "quiet", "rank 1", "short", "asked not to"])
def test_a_pass_prints_nothing_if(how, output, monkeypatch):
    if how == "rank 1":
        monkeypatch.setenv("RANK", "1")
    if how != "short":
        monkeypatch.setattr(terminal, "DELAY", 0.0)
    if how != "library":
        terminal.start(quiet=how == "quiet")
    delay = 2.0 if how == "short" else 0.0
    with terminal.progress("reading", 1, "clips", delay=delay, show=False if "not" in how else None) as bar:
        bar.advance()
    assert output() == ("", "")


def test_warnings_of_other_libraries_are_printed_once_each_at_the_end(output):
    terminal.start()
    ours, theirs = logging.getLogger("discovla.data"), logging.getLogger("lib.part")
    for _ in range(3):
        theirs.warning("\nslow\nwith details")
        theirs.info("unimportant")
    warnings.warn("old name", FutureWarning, stacklevel=1)
    ours.warning("clip %s is left out", "[a]")
    assert output().err == "warning: clip [a] is left out\n"
    terminal.close()
    lines = output().err.splitlines()
    assert lines == [
        "warning of lib: slow (3 times)",
        "warning of test_terminal.py: FutureWarning: old name",
    ]


def test_json_prints_events_on_stdout_and_warnings_on_stderr(output, monkeypatch):
    monkeypatch.setattr(terminal, "DELAY", 0.0)
    monkeypatch.setattr(terminal, "EVERY", 0.0)
    terminal.start(as_json=True)
    terminal.facts({"run": "x"})
    terminal.event({"kind": "val", "step": 3})
    a_pass()
    logging.getLogger("discovla.data").info("unimportant")
    printed = output()
    events = [json.loads(line) for line in printed.out.splitlines()]
    assert events[0] == {"kind": "val", "step": 3}
    last = {key: events[-1][key] for key in ("kind", "pass", "done", "total", "unit")}
    assert last == {"kind": "progress", "pass": "reading", "done": 3, "total": 3, "unit": "clips"}
    assert printed.err == ""


def test_events_are_not_printed_unless_json_is_asked_for(output):
    terminal.start()
    terminal.event({"kind": "val", "step": 3})
    assert output() == ("", "")


def test_a_command_that_has_ended_leaves_logging_as_it_was(output):
    handlers, show = list(logging.getLogger().handlers), warnings.showwarning
    terminal.start()
    terminal.close()
    assert logging.getLogger().handlers == handlers and warnings.showwarning is show
