"""Exit statuses: 0 done, 1 a bug, 2 wrong input, 75 stopped by a signal, 141 the output is not read."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from discovla import cli
from discovla.data.video.errors import DecodeError
from discovla.errors import PeerLost, RunStopped

ROOT = Path(__file__).parents[1]
BAD_INPUT = {
    "prepare": ["csv", "none.csv", "--out", "m.jsonl"],
    "doctor": ["none.jsonl"],
    "frames": ["none.mp4", "--out", "frames"],
    "caption": ["none.jsonl", "--out", "captions.json"],
    "shard": ["none.jsonl", "--out", "shards"],
    "draw": ["/dev/null/folder"],
    "config": ["none.toml"],
    "zero": ["none.toml"],
    "preflight": ["none.toml"],
    "evaluate": ["none"],
    "export": ["none", "--out", "x"],
    "train": ["none.toml"],
    "report": ["none"],
    "embed": ["none", "none.jsonl", "out"],
    "index": ["none", "none.mp4", "--out", "x.index"],
    "search": ["none", "a red circle"],
    "serve": ["none"],
    "models": ["--none"],
    "tune": ["--none"],
}


def ended(error: BaseException | None, monkeypatch) -> int:
    """Return the status of a command whose work raises an error."""

    def work(arguments: argparse.Namespace) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *_: argparse.Namespace(run=work))
    return cli.main([])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (ValueError("x: expected one"), 2),
        (FileNotFoundError(2, "No such file", "x"), 2),
        (DecodeError("x.mp4", "cut off"), 2),
        (PeerLost("rank 1 is lost"), 2),
        (RunStopped("stopped at step 3"), 75),
    ],
)
def test_an_end_that_is_no_bug_has_at_most_one_line(error, status, monkeypatch, capsys):
    assert ended(error, monkeypatch) == status
    assert capsys.readouterr().err.count("\n") == (error is not None)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("frames"),
        AttributeError("'int' object has no attribute 'float'"),
        TypeError("x"),
        AssertionError(),
        RuntimeError("x"),
        UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_bug_has_a_traceback_and_says_so(error, monkeypatch, capsys):
    assert ended(error, monkeypatch) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert type(error).__name__ in printed
    assert printed.splitlines()[-1] == (
        "discovla: error: this is a bug in discovla; report it with the lines above"
    )


def test_a_file_name_in_bytes_is_printed_as_a_name(monkeypatch, capsys):
    ended(FileNotFoundError(2, "No such file", b"/data/\xe9.mp4"), monkeypatch)
    assert capsys.readouterr().err == "discovla: error: /data/\\xe9.mp4: No such file\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_bad_input_of_every_command_ends_with_2(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main([command, *BAD_INPUT[command]])
    except SystemExit as refused:  # by the parser of options
        status = refused.code
    assert status == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command_ends_with_0(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert not left.value.code
    assert capsys.readouterr().out.startswith("usage: discovla")


def test_an_ascii_terminal_does_not_end_a_command(tmp_path):
    (tmp_path / "t.csv").write_text("video,caption\nété.mp4,un été\n", encoding="utf-8")
    words = ["prepare", "csv", str(tmp_path / "t.csv"), "--out", str(tmp_path / "m.jsonl")]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    job = subprocess.run(
        [sys.executable, "-m", "discovla", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert job.returncode == 0, job.stderr
    assert r"1 videos missing" in job.stdout
    assert r"\xe9t\xe9.mp4" in job.stdout


def test_letters_that_the_system_s_file_names_have_not_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert ended(UnicodeEncodeError("ascii", "caf\u00e9.mp4", 3, 4, "ordinal not in range"), monkeypatch) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert r"file names in UTF-8, found that this terminal's are in ascii, which has no '\xe9'" in line


def test_closed_streams_do_not_end_a_command(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["config", "own"]) == 0


def test_a_command_whose_output_is_no_longer_read_ends_without_a_word(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    assert cli.main(["config"]) == 141
    assert capsys.readouterr().err == ""


def test_a_connection_that_breaks_is_an_error(monkeypatch, capsys):
    assert ended(BrokenPipeError(32, "Broken pipe"), monkeypatch) == 2
    assert "Broken pipe" in capsys.readouterr().err
