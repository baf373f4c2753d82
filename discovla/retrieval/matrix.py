"""Similarity matrices from files of any program: arrays of NumPy and torch, pickles, JSON, text tables."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from discovla.foreign import (
    describe,
    nested,
    parse_json,
    read_arrays,
    read_plain_pickle,
    read_safetensors,
    read_torch,
    read_utf8,
    recognise,
)
from discovla.retrieval.ranks import Array

log = logging.getLogger(__name__)

EXPECTED = "a matrix of similarities (texts x videos)"


def read_matrix(path: str | Path) -> Array:
    """Read the one matrix of a file, recognised by its content.

    A text table has one row a line, separated by tabs, semicolons, commas or spaces; a header and a first
    column of labels are left out with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no matrix of numbers, or several; the message names it and what it holds.
    """
    path = Path(path)
    kind = recognise(path, EXPECTED)
    if kind == "text":
        return _text_matrix(path)
    if kind in ("npy", "npz"):
        content = read_arrays(path, kind, EXPECTED)
    elif kind == "safetensors":
        content = read_safetensors(path, EXPECTED)
    elif kind == "torch":
        content = read_torch(path, EXPECTED)
    elif kind == "pickle":
        content = read_plain_pickle(path, arrays=True)
    else:
        raise ValueError(f"{path}: expected {EXPECTED}, found a TorchScript archive")
    return _only_matrix(path, content)


def _only_matrix(path: Path, content: Any) -> Array:
    """Return the one matrix of numbers in the content of a file."""
    if isinstance(content, Mapping):
        arrays = {
            f"{parent}.{name}" if parent else str(name): _array(value)
            for parent, values in nested(content)
            for name, value in values.items()
            if not isinstance(value, Mapping)
        }
        matrices = {name: array for name, array in arrays.items() if array is not None and array.ndim == 2}
        if len(matrices) == 1:
            name, matrix = next(iter(matrices.items()))
            others = [other for other in arrays if other != name]
            if others:
                log.warning("%s: %r is read; left out: %s", path, name, ", ".join(others[:5]))
            return matrix
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items() if array is not None)
        raise ValueError(
            f"{path}: expected {EXPECTED}, found {shapes or describe(content)}; save one matrix alone"
        )
    array = _array(content)
    if array is None or array.ndim != 2:
        raise ValueError(
            f"{path}: expected {EXPECTED}, found {describe(content if array is None else array)}"
        )
    return array


def _array(value: Any) -> Array | None:
    """Return numbers as an array, None for anything else."""
    if hasattr(value, "detach"):  # a tensor
        if value.is_meta or value.is_quantized or value.is_complex():
            return None
        value = value.detach().to_dense().to("cpu")
        if value.dtype.is_floating_point and value.dtype.itemsize < 4:
            value = value.float()  # NumPy has no bfloat16
        value = value.numpy()
    try:
        array = np.asarray(value)
        if array.dtype.kind == "O":  # Python's numbers, as pandas keeps them
            array = np.asarray(array.tolist())
    except ValueError:  # rows of different lengths
        return None
    return array if array.dtype.kind in "fiu" else None


def _text_matrix(path: Path) -> Array:
    """Read a table of numbers, or a JSON list of rows."""
    text = read_utf8(path, EXPECTED)
    if text.lstrip().startswith(("[", "{")):
        try:
            content = parse_json(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{error.lineno}: expected {EXPECTED}, found damaged JSON: {error.msg}"
            ) from None
        return _only_matrix(path, content)
    cells = _text_rows(path, text)
    first = cells[0][1]
    header = first if first[0] == "" or not any(map(_is_number, first)) else None
    body = cells if header is None else cells[1:]
    labels = bool(body) and (
        (header is not None and header[0] == "") or not any(_is_number(row[0]) for _, row in body)
    )
    if header is not None or labels:
        left_out = " and ".join(
            name
            for name, there in (("the header", header is not None), ("the first column", labels))
            if there
        )
        log.warning("%s: %s left out, as labels", path, left_out)
    width = len(body[0][1]) if body else 0
    for number, row in body:
        if len(row) != width:
            raise ValueError(f"{path}:{number}: expected {width} columns, found {len(row)}")
        for column, cell in enumerate(row[labels:], start=1 + labels):
            if not _is_number(cell):
                raise ValueError(f"{path}:{number}: column {column}: expected a number, found {cell[:40]!r}")
    if not body or width == labels:
        raise ValueError(f"{path}: expected {EXPECTED}, found labels without numbers")
    return np.array([[float(cell) for cell in row[labels:]] for _, row in body])


def _text_rows(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Return the cells of each row of a table with the number of its last line, without comments."""
    lines = [(n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
    lines = [(n, line) for n, line in lines if not line.startswith("#")]
    if not lines:
        raise ValueError(f"{path}: expected {EXPECTED}, found no line of numbers")
    contents = [f"{line}\n" for _, line in lines]
    separator = next((mark for mark in "\t;," if len(next(csv.reader(contents, delimiter=mark))) > 1), None)
    if separator is None and '"' not in contents[0]:
        return [(n, line.split()) for n, line in lines]
    reader = csv.reader(contents, delimiter=separator or ",", strict=True)
    try:
        return [(lines[reader.line_num - 1][0], [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error:
        raise ValueError(
            f"{path}:{lines[reader.line_num - 1][0]}: expected {EXPECTED}, found a quoted cell that does not "
            "end at a separator"
        ) from None


def _is_number(cell: str) -> bool:
    return (
        re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf|NaN|Inf|Infinity)", cell)
        is not None
    )
