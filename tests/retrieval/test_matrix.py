"""One matrix of a file of any program is read; anything else is refused in one line that names the file."""

from __future__ import annotations

import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from discovla.cli import main
from discovla.retrieval.matrix import read_matrix

MATRIX = np.array([[0.5, 0.25, -1.0], [2.0, 3e-2, 0.0]])
_HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000000), }\n"
HUGE = b"\x93NUMPY\x01\x00" + len(_HEADER).to_bytes(2, "little") + _HEADER
ROWS = [",".join(map(str, row)) for row in MATRIX]


def text(content: str):
    return lambda path: path.write_text(content)


def pickled(value: object):
    return lambda path: path.write_bytes(pickle.dumps(value))


def saved(value: object):
    return lambda path: torch.save(value, path)


def npy(value: np.ndarray):
    def write(path):
        with path.open("wb") as file:
            np.save(file, value)

    return write


def npz(**arrays: np.ndarray):
    def write(path):
        with path.open("wb") as file:
            np.savez(file, **arrays)

    return write


def npy_bytes() -> bytes:
    file = io.BytesIO()
    np.save(file, MATRIX)
    return file.getvalue()


def zip_bytes() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=MATRIX)
    return file.getvalue()


TAKEN = {
    ".npy": npy(MATRIX),
    ".npz of one": npz(similarity=MATRIX),
    ".npz with ids": npz(similarity=MATRIX, ids=np.array(["a", "b"]), scale=np.array(3.0)),
    ".pt": saved(torch.tensor(MATRIX)),
    ".pt in bfloat16": saved(torch.tensor(MATRIX).bfloat16()),
    ".pt of a dict": saved({"sim": torch.tensor(MATRIX), "epoch": 3}),
    ".pt of an array": saved(MATRIX),
    ".pt of a nested dict": saved({"test": {"sim": torch.tensor(MATRIX)}, "epoch": 3}),
    ".pt of a sparse tensor": saved(torch.tensor(MATRIX).to_sparse()),
    ".npz with objects": npz(similarity=MATRIX, ids=np.array(["a", None], dtype=object)),
    ".safetensors": lambda path: save_file({"sim": torch.tensor(MATRIX)}, path),
    ".pkl of an array": pickled(MATRIX),
    ".pkl of Python's numbers": pickled(MATRIX.astype(object)),
    ".pkl of rows": pickled(MATRIX.tolist()),
    ".pkl of a dict": pickled({"sim": MATRIX}),
    ".json": text(json.dumps(MATRIX.tolist())),
    ".csv": text("\n".join(ROWS) + "\n"),
    ".csv with a header": text("\n".join(["v1,v2,v3", *ROWS])),
    ".csv of pandas": text("\n".join([",0,1,2", f"0,{ROWS[0]}", f"1,{ROWS[1]}"])),
    ".csv with labels": text("\n".join([f"t0,{ROWS[0]}", f"t1,{ROWS[1]}"])),
    ".csv with captions": text(f'caption,a,b,c\n"one, two",{ROWS[0]}\n"say ""hi""; you",{ROWS[1]}\n'),
    ".csv of Excel": text("\ufeff" + "\r\n".join(row.replace(",", ";") for row in ROWS)),
    ".tsv": text("\n".join(row.replace(",", "\t") for row in ROWS)),
    ".txt of NumPy": lambda path: np.savetxt(path, MATRIX, header="similarity"),
}


@pytest.mark.parametrize("write", TAKEN.values(), ids=TAKEN)
def test_one_matrix_is_read_whatever_the_format(write, tmp_path):
    write(tmp_path / "s")
    assert np.allclose(read_matrix(tmp_path / "s"), MATRIX, atol=1e-3)


REFUSED = {
    "empty": (text(""), "found an empty file"),
    "web page": (text("<html>"), "found a web page"),
    "two matrices": (npz(a=MATRIX, b=MATRIX), r"found a \(2, 3\), b \(2, 3\); save one matrix alone"),
    "no matrix": (npz(a=MATRIX[0]), r"found a \(3,\)"),
    "a vector": (npy(MATRIX[0]), r"found an array of shape \(3,\)"),
    "texts": (npy(np.array([["a", "b"]])), r"found an array of shape \(1, 2\) of str32, which are no real"),
    "truth values": (npy(MATRIX > 0), "of bool, which are no real numbers"),
    "three axes": (npy(MATRIX[None]), r"found an array of shape \(1, 2, 3\)$"),
    "MATLAB": (lambda path: path.write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200)), "found a MATLAB file"),
    "Parquet": (lambda path: path.write_bytes(b"PAR1" + bytes(200)), "found a Parquet file"),
    "rows of JSON": (text("[1, 2]\n[3, 4]\n"), "s:2: .*damaged JSON"),
    "complex": (saved(torch.tensor(MATRIX) + 0j), "of complex128, which are no real numbers"),
    "no values": (saved(torch.ones(2, 2, device="meta")), "without values"),
    "numbers with commas": (text('"1,000",2\n3,4\n'), "s:1: column 1: expected a number, found '1,000'"),
    "an open quote": (text('"a,1,2\nb,3,4\n'), "s:2: .*found a quoted cell that does not end"),
    "rows of two lengths": (text("[[1, 2], [3]]"), "found a list of 2 rows of 1 to 2 values"),
    "a bottomless list": (text("[" * 100_000), "s:1: .*damaged JSON: lists or objects nested too deeply"),
    "UTF-16": (lambda path: path.write_bytes("1,2\n".encode("utf-16")), "found text in UTF-16"),
    "objects alone": (npz(a=np.array([[None]], dtype=object)), "found pickled objects"),
    "huge": (lambda path: path.write_bytes(HUGE), "found a damaged .npy file: Unable to allocate"),
    "objects": (npy(np.array([[None, 1]], dtype=object)), "found pickled objects"),
    "half": (lambda path: path.write_bytes(npy_bytes()[:90]), "found a damaged .npy file"),
    "half a zip": (lambda path: path.write_bytes(zip_bytes()[:90]), "of an archive without its end"),
    "a module": (saved(torch.nn.Linear(2, 2)), "an object of class torch.nn"),
    "a class": (pickled(Exception), "it names builtins.Exception"),
    "a cut pickle": (
        lambda path: path.write_bytes(pickle.dumps(MATRIX)[:40]),
        "not a pickle of plain values",
    ),
    "a short row": (text("1,2\n3\n"), "s:2: expected 2 columns, found 1"),
    "a word": (text("1,2\n3,x\n"), "s:2: column 2: expected a number, found 'x'"),
    "decimal commas": (text("0,5;1,5\n2,5;3,5\n"), "s:2: column 1: expected a number, found '2,5'|found"),
    "prose": (text("Not Found"), "found labels without numbers"),
    "Latin-1": (lambda path: path.write_bytes(b"v\xe9,b\n1,2\n"), "s: .*found"),
    "cut JSON": (text("[[1, 2],\n[3"), "s:2: .*damaged JSON"),
}


@pytest.mark.parametrize(("write", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_file_without_one_matrix_is_refused_by_name(write, reason, tmp_path):
    write(tmp_path / "s")
    with pytest.raises(ValueError, match=reason) as error:
        read_matrix(tmp_path / "s")
    assert str(error.value).startswith(f"{tmp_path / 's'}:")
    assert "\n" not in str(error.value)


def test_the_command_evaluates_a_table(tmp_path, capsys):
    (tmp_path / "s.csv").write_text("3,1\n1,3\n")
    assert main(["evaluate", "--matrix", str(tmp_path / "s.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["t2v"]["R@1"] == 100.0


def test_the_command_refuses_a_similarity_that_is_not_finite(tmp_path, capsys):
    (tmp_path / "s.csv").write_text("3,nan\n1,3\n")
    assert main(["evaluate", "--matrix", str(tmp_path / "s.csv")]) == 2
    assert f"{tmp_path}/s.csv: " in capsys.readouterr().err


def test_a_pipe_is_named(tmp_path):
    os.mkfifo(tmp_path / "s")
    with pytest.raises(ValueError, match="found a pipe or device; save it as a file"):
        read_matrix(tmp_path / "s")
