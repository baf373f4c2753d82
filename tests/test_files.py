"""Files that are written completely or not at all, and what killed processes leave of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from discovla.files import remove_unfinished, replacing, write_file


def test_a_file_keeps_its_content_after_an_error_and_nothing_is_left(tmp_path):
    path = tmp_path / "a.json"
    write_file(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_remains_of_a_killed_process_are_removed_and_those_of_a_living_one_kept(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from discovla.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file: file.write(b'half'); file.flush(); os._exit(9)"
    )
    for name in ("a.json", "b.json"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
    write_file(tmp_path / "a.json", "whole")
    assert len(os.listdir(tmp_path)) == 2, "remains of another file stay until its writer removes them"
    with replacing(tmp_path / "c.json") as file:
        remove_unfinished(tmp_path)
        file.write(b"whole")
    assert sorted(os.listdir(tmp_path)) == ["a.json", "c.json"]


def test_hidden_files_of_other_programs_stay(tmp_path):
    names = [".a.part", ".movie.mp4.part", ".a.json.part"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_remains_that_may_not_be_removed_do_not_prevent_a_write(tmp_path, monkeypatch):
    old = tmp_path / ".a.json.12345678.1.abcdef01.part"
    old.touch()
    os.utime(old, (1, 1))
    unlink = Path.unlink

    def refused(path, missing_ok=False):
        if path == old:
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    write_file(tmp_path / "a.json", "whole")
    assert (tmp_path / "a.json").read_text() == "whole"


def test_remains_of_other_machines_are_removed_after_a_day_or_by_the_only_writer(tmp_path):
    new, old = (tmp_path / f".{name}.json.12345678.1.abcdef01.part" for name in ("new", "old"))
    for path in (new, old):
        path.touch()
    os.utime(old, (1, 1))
    remove_unfinished(tmp_path)
    assert [path.exists() for path in (new, old)] == [True, False]
    remove_unfinished(tmp_path, only_writer=True)
    assert not new.exists()
