"""Files that other programs wrote: what they hold, and readers that run no code from them."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import date, datetime, timedelta, timezone
from pathlib import Path, PosixPath
from typing import Any, Literal

import numpy as np

Kind = Literal["safetensors", "torch", "jit", "npy", "npz", "pickle", "text"]

HEAD = 1024  # bytes that tell what a file holds
_OTHER_FORMATS = (
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"\xfd7zXZ", "an xz archive; unpack it"),
    (b"BZh", "a bzip2 archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive; unpack it"),
    (b"\x89HDF", "an HDF5 file, as Keras and MATLAB write it; convert it"),
    (b"MATLAB 5.0", "a MATLAB file; convert it with scipy.io.loadmat and numpy.save"),
    (b"PAR1", "a Parquet file; convert it with pandas"),
    (b"ARROW1", "an Arrow file; convert it"),
    (b"GGUF", "a GGUF file; convert it"),
)
# Classes of plain values, which loading cannot make do anything.
_LOADING_ERRORS = (
    *(pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError),
    *(OverflowError, MemoryError),
)
_ARRAY_ERRORS = (
    *(ValueError, EOFError, OSError, KeyError, NotImplementedError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
_NUMPY_CORES = ("numpy.core", "numpy._core")  # of NumPy 1 and 2
_PLAIN_ARRAYS = {
    *((f"{core}.multiarray", name) for core in _NUMPY_CORES for name in ("_reconstruct", "scalar")),
    *((f"{core}.numeric", "_frombuffer") for core in _NUMPY_CORES),
    *(("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("collections", "OrderedDict")),
}


def recognise(path: Path, expected: str) -> Kind:
    """Return the format of a file by its content, whatever its name says.

    Args:
        expected: what the file should hold, for the error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, holds nothing, or is known not to hold what is expected: half a download,
            a Git LFS pointer, a web page, an archive.
    """
    if path.is_dir():
        raise ValueError(f"{path}: expected {expected}, found a folder; name the file in it")
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path}: expected {expected}, found a pipe or device; save it as a file")
        raise FileNotFoundError(f"{path}: expected {expected}, found none")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD)
    contents = other_contents(head)
    if contents is not None:
        raise ValueError(f"{path}: expected {expected}, found {contents}")
    if head[:4] == b"PK\x03\x04":
        return _kind_of_zip(path, expected)
    if head[:6] == b"\x93NUMPY":
        return "npy"
    if head[8:9] == b"{":
        _check_safetensors_size(path, expected, size)
        return "safetensors"
    if head[:1] == b"\x80":
        return "torch" if b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." in head else "pickle"
    if _is_text(head):
        return "text"
    raise ValueError(f"{path}: expected {expected}, found {size:,} bytes of no known format")


def read_torch(path: Path, expected: str) -> Any:
    """Read a file of `torch.save` to the CPU: tensors, plain values and NumPy's.

    Raises:
        ValueError: it holds an object of another class, or is damaged.
    """
    import torch  # takes seconds to import

    try:
        # A path would be read by its suffix.
        with torch.serialization.safe_globals(_plain_classes()), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except _LOADING_ERRORS as error:
        raise ValueError(f"{path}: expected {expected}, found {_unreadable(error)}") from error


def read_arrays(path: Path, kind: Kind, expected: str) -> Any:
    """Read the array of a .npy file, or the arrays of an .npz file by name.

    Raises:
        ValueError: it holds pickled objects, or is damaged.
    """
    try:
        content = np.load(path, allow_pickle=False)
        return _plain_arrays(content) if kind == "npz" else content
    except _ARRAY_ERRORS as error:
        pickled = "pickled objects" if "pickle" in str(error) else f"a damaged .{kind} file: {error}"
        raise ValueError(f"{path}: expected {expected}, found {pickled}") from error


def _plain_arrays(archive: Any) -> dict[str, Any]:
    """Return the arrays of an .npz file by name, None for arrays of pickled objects beside others."""
    arrays: dict[str, Any] = {}
    refused: ValueError | None = None
    for name in archive.files:
        try:
            arrays[name] = archive[name]
        except ValueError as error:
            if "pickle" not in str(error):
                raise
            arrays[name], refused = None, error
    if refused is not None and all(array is None for array in arrays.values()):
        raise refused
    return arrays


def read_tensors(path: Path, expected: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file to the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another format, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    kind = recognise(path, expected)
    if kind != "safetensors":
        raise ValueError(f"{path}: expected {expected}, found a file of the format {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected {expected}, found a damaged safetensors file: {error}") from error


def read_jit(path: Path, expected: str) -> dict[str, Any]:
    """Read the weights of a TorchScript archive to the CPU.

    Raises:
        ValueError: it is damaged.
    """
    import torch

    try:
        return dict(torch.jit.load(path, map_location="cpu").state_dict())
    except _LOADING_ERRORS as error:
        raise ValueError(f"{path}: expected {expected}, found a damaged TorchScript archive") from error


def read_safetensors(path: Path, expected: str) -> dict[str, Any]:
    """Read a safetensors file to the CPU.

    Raises:
        ValueError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected {expected}, found a damaged safetensors file: {error}") from error


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file.
    """
    if recognise(path, expected) != "text":
        raise ValueError(f"{path}: expected {expected}, found no text")
    try:
        value = parse_json(read_utf8(path, expected))
    except ValueError as error:
        raise ValueError(f"{path}: expected {expected}, found text that is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected {expected}, found {describe(value)}")
    return value


def parse_json(text: str, *, unique: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        unique: refuse an object that has a key twice; else the last one counts.

    Raises:
        json.JSONDecodeError: it is no JSON, or nested too deeply for Python.
    """

    def pairs_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            (key, times), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise json.JSONDecodeError(f"expected the key {key!r} once, found it {times} times", text, 0)
        return values

    try:
        return json.loads(text, object_pairs_hook=pairs_of if unique else None)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # of a number with thousands of digits
        raise json.JSONDecodeError(str(error).split(";")[0], text, 0) from None
    except RecursionError:
        raise json.JSONDecodeError("lists or objects nested too deeply", text, 0) from None


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON that can be written as UTF-8: the name of a file may hold other bytes.

    Letters beyond ASCII stay readable, unless the text holds such a name.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text if printable(text) == text else json.dumps(value, indent=indent)


def read_utf8(path: Path, expected: str) -> str:
    """Read a text file, without a byte order mark.

    Raises:
        ValueError: it is not UTF-8, and the message names the line; or it is a web page, an archive, ...
    """
    content = path.read_bytes()
    other = other_contents(content[:HEAD]) if content else None  # empty texts have errors of their own
    if other is None and content[:4] == b"PK\x03\x04":
        other = "a zip archive, as spreadsheets are saved; save it as text"
    if other is None and content[:HEAD].count(b"\0") > len(content[:HEAD]) // 4:
        other = "null characters, as in UTF-16 or UTF-32; save it as UTF-8"
    if other is not None:
        raise ValueError(f"{path}: expected {expected} in UTF-8, found {other}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"0x{content[error.start]:02x}"
        raise ValueError(f"{path}:{line}: expected {expected} in UTF-8, found byte {byte}") from error


def read_plain_pickle(path: Path, *, arrays: bool = False) -> Any:
    """Read a pickle of containers, texts and numbers; any other class or function in it is refused.

    Args:
        arrays: accept NumPy arrays too.

    Raises:
        ValueError: the file is missing or is not such a pickle.
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, _PLAIN_ARRAYS if arrays else set()).load()
    except _LOADING_ERRORS as error:
        raise ValueError(f"{path}: not a pickle of plain values: {error or 'it is empty'}") from error
    except OSError as error:
        raise ValueError(f"{path}: expected a pickle, {error.strerror}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Load only the classes named; call no other function."""

    def __init__(self, file: Any, allowed: set[tuple[str, str]]) -> None:
        super().__init__(file, encoding="utf-8")  # of texts that Python 2 wrote
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed or (self.allowed and module == "numpy.dtypes"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def printable(text: str) -> str:
    """Return a text that can be written as UTF-8, with `\\xNN` for each byte of a file's name that is not."""
    text = re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", text)
    return text.encode("utf-8", "backslashreplace").decode()


def describe(value: Any) -> str:
    """Return what a loaded value is, in a few words."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        of = _unusual_values(value)
        return f"an array of shape {tuple(shape)}{of}" if len(shape) else f"one number{of}"
    if isinstance(value, Mapping):
        names = [str(name) for name in value]
        if not names:
            return "an empty dict"
        return f"a dict of {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if isinstance(value, list | tuple):
        if not value or not all(isinstance(row, list | tuple) for row in value):
            return f"a list of {len(value)} values"
        lengths = sorted({len(row) for row in value})
        if len(lengths) > 1:
            return f"a list of {len(value)} rows of {lengths[0]} to {lengths[-1]} values"
        first = f", the first {str(value[0][0])[:40]!r}" if lengths[0] else ""
        return f"a list of {len(value)} rows of {lengths[0]} values{first}"
    return f"a {type(value).__name__}"


def _unusual_values(value: Any) -> str:
    """Return words about the values of an array or tensor that are no real numbers; "" if they are."""
    dtype: Any = getattr(value, "dtype", None)
    if isinstance(dtype, np.dtype):
        return "" if dtype.kind in "fiu" else f" of {dtype.name}, which are no real numbers"
    if getattr(value, "is_meta", False):
        return " without values"
    name = str(dtype).removeprefix("torch.")
    return f" of {name}, which are no real numbers" if re.match("complex|bool|qu?int", name) else ""


def nested(value: Any, *, depth: int = 3, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a value and the values of nested dicts with names of text, each with its dotted name."""
    yield name, value
    if depth and isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str) and isinstance(inner, Mapping):
                yield from nested(inner, depth=depth - 1, name=f"{name}.{key}" if name else key)


def other_contents(head: bytes) -> str | None:
    """Return what a file holds that is never what is expected, None if its first bytes do not tell."""
    if not head:
        return "an empty file (0 bytes); download it again"
    if not head.strip(b"\0"):
        return "only zero bytes, as an interrupted download leaves them; download it again"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "text in UTF-16 or UTF-32; save it as UTF-8"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fetch the file with `git lfs pull`"
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, as a failed download leaves it; download the file again"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    return next((words for magic, words in _OTHER_FORMATS if head.startswith(magic)), None)


def _kind_of_zip(path: Path, expected: str) -> Kind:
    """Return which of the formats that are zip archives a file has."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: expected {expected}, found {size:,} bytes of an archive without its end, as half "
            "a download leaves it; download it again"
        ) from None
    if any(name.endswith("/constants.pkl") for name in names):
        return "jit"
    if any(name.endswith("/data.pkl") for name in names):
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    some = ", ".join(names[:3]) or "nothing"
    raise ValueError(f"{path}: expected {expected}, found a zip archive of {some}; unpack it")


def _check_safetensors_size(path: Path, expected: str, size: int) -> None:
    """Refuse a safetensors file that is shorter than its header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= size else b""
    total = 8 + length
    if len(text) == length:
        try:
            entries = json.loads(text)
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            total += max(ends, default=0)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(
                f"{path}: expected {expected}, found a damaged safetensors header; download it again"
            ) from None
    if size < total:
        raise ValueError(
            f"{path}: expected {expected}, found {size:,} of {total:,} bytes of a safetensors file, as half "
            "a download leaves it; download it again"
        )


def _is_text(head: bytes) -> bool:
    """Return True if bytes are UTF-8 text, which may break off within its last letter."""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or len(head) < HEAD:
            return False
    return b"\0" not in head


def _unreadable(error: Exception) -> str:
    """Return why torch does not load a file, without its advice to load it unsafely."""
    text = str(error)
    name = re.search(r"GLOBAL (\S+) was not|class (\S+?),? ", text)
    if name:
        return (
            f"an object of class {name[1] or name[2]}, which cannot be loaded without running its code; save "
            "the model's state_dict() alone"
        )
    inner = re.search(r"WeightsUnpickler error: (.+)", text)
    lines = [inner[1]] if inner else text.strip().splitlines()
    return f"a file that torch cannot read: {lines[0] if lines else type(error).__name__}"


def _plain_classes() -> list[Any]:
    """Return the classes that training scripts save beside weights and that only hold values."""
    scalar: Any
    reconstruct: Any
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    dtypes = [kind for name, kind in vars(np.dtypes).items() if name.endswith("DType")]
    renamed = [(f, f"{core}.multiarray.{f.__name__}") for f in (scalar, reconstruct) for core in _NUMPY_CORES]
    times = [datetime, date, timedelta, timezone]
    return [np.dtype, np.ndarray, *dtypes, *renamed, *times, Namespace, PosixPath]
