"""The tables of an index: moments and videos, in LanceDB, and its settings in a JSON file.

Both tables are only ever appended to.  The last row of a video is its state; moments count once a row of
`videos` names them, so that a process killed between the two leaves nothing half there.  `compact` removes
what no longer counts.
"""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from discovla.files import write_file
from discovla.foreign import to_json
from discovla.search.records import Value

SETTINGS = "index.json"
VERSION = 1
TABLES = "tables"
TAKE = 4096  # rows that are read at once
State = Literal["indexed", "refused", "gone", "removed"]


class StaleRead(Exception):
    """Another process has rewritten the tables since their contents were read."""


@dataclass(frozen=True, kw_only=True)
class VideoRow:
    """A row of the table `videos`.

    video: absolute path.  start, end: as in the source; None for the start or end of the file.
    clip: the source is one moment.
    size, mtime_ns, checksum: of the file when it was read; 0 and "" if there was none.
    duration: seconds of the source.  moments: their number.
    columns: the user's, as JSON.
    """

    video_id: int
    video: str
    start: float | None
    end: float | None
    clip: bool
    size: int
    mtime_ns: int
    checksum: str
    state: State
    reason: str
    duration: float
    moments: int
    columns: str

    @property
    def key(self) -> tuple[str, float | None, float | None, bool]:
        """Key by which a source is the same when it is added again."""
        return self.video, self.start, self.end, self.clip

    def own_columns(self) -> dict[str, Value]:
        """Return the user's columns."""
        return json.loads(self.columns)


@dataclass(frozen=True, kw_only=True)
class MomentRow:
    """A row of the table `moments`.

    start, end: seconds from the first frame of the file.  times: f float32, of its frames, in the same.
    best: place of the frame that is closest to the whole, of which `thumbnail` is a JPEG.
    pooled: d, in the type of the index.  tokens: k d in the same, or None.  mask: k bool, or None.
    frames: f d float16, features of the frames; None if they are the tokens.
    """

    moment_id: int
    video_id: int
    start: float
    end: float
    times: np.ndarray
    best: int
    thumbnail: bytes
    pooled: np.ndarray
    tokens: np.ndarray | None
    mask: np.ndarray | None
    frames: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The moments that count, in the order of the table, and the current row of each video.

    offset: n, row of each moment in the table.  moment_id, video_id: n int64.  start, end: n float64.
    """

    videos: dict[int, VideoRow]
    offset: np.ndarray
    moment_id: np.ndarray
    video_id: np.ndarray
    start: np.ndarray
    end: np.ndarray
    next_moment: int
    next_video: int
    stale: int  # rows of the table that no longer count

    def __len__(self) -> int:
        return len(self.moment_id)

    @cached_property
    def place_of(self) -> dict[int, int]:
        """Place of each moment by its id."""
        return {int(one): place for place, one in enumerate(self.moment_id)}

    def place(self, moment_id: int) -> int:
        """Return the place of a moment.

        Raises:
            KeyError: no such moment.
        """
        if type(moment_id) is not int or moment_id not in self.place_of:
            raise KeyError(f"moment: expected one of the index, found {moment_id!r}"[:100])
        return self.place_of[moment_id]


@dataclass
class Store:
    """The folder of an index.

    Args:
        path: of the index.
        dimension: d, of the vectors.
        dtype: of the vectors.
    """

    path: Path
    dimension: int
    dtype: str = "float32"
    _tables: dict[str, Any] = field(default_factory=dict)

    def open(self, *, create: bool = False) -> None:
        """Connect to the tables, made if `create`."""
        lancedb = import_lancedb()
        with plain_errors(self.path):
            database = lancedb.connect(self.path / TABLES)
            for name, schema in _schemas(self.dimension, self.dtype).items():
                self._tables[name] = (
                    database.create_table(name, schema=schema, exist_ok=True)
                    if create
                    else database.open_table(name)
                )

    def append(self, moments: Sequence[MomentRow], videos: Sequence[VideoRow]) -> None:
        """Write moments, and then the videos that make them count.

        Raises:
            OSError: the disk is full, or a file cannot be written.
        """
        with plain_errors(self.path):
            if moments:
                self._tables["moments"].add(_moment_table(moments, self.dimension, self.dtype))
            if videos:
                self._tables["videos"].add(_video_table(videos))

    def version(self) -> tuple[int, int]:
        """Return the newest versions of the tables on disk, which are read from then on."""
        with plain_errors(self.path):
            for table in self._tables.values():
                table.checkout_latest()
            return self._tables["moments"].version, self._tables["videos"].version

    def contents(self) -> Contents:
        """Read what counts."""
        with plain_errors(self.path):
            rows = self._tables["videos"].search().to_arrow().to_pylist()
            columns = ["moment_id", "video_id", "start", "end"]
            table = self._tables["moments"].search().select(columns).to_arrow()
        arrays = [table[name].to_numpy() for name in columns]
        last: dict[tuple[Any, ...], VideoRow] = {}
        for row in (VideoRow(**values) for values in rows):
            last[row.key] = row
        videos = {row.video_id: row for row in last.values() if row.state != "removed"}
        kept = np.isin(arrays[1], _ids(videos, "indexed", "gone"))  # a file that is gone may return
        offset = np.flatnonzero(np.isin(arrays[1], _ids(videos, "indexed")))
        largest = [int(array.max(initial=-1)) for array in arrays[:2]]
        return Contents(
            videos=videos,
            offset=offset,
            moment_id=arrays[0][offset],
            video_id=arrays[1][offset],
            start=arrays[2][offset],
            end=arrays[3][offset],
            next_moment=largest[0] + 1,
            next_video=max(largest[1], *(row["video_id"] for row in rows), -1) + 1
            if rows
            else largest[1] + 1,
            stale=int((~kept).sum()) + len(rows) - len(videos),
        )

    def pooled(self, contents: Contents) -> np.ndarray:
        """Read the pooled vectors of all moments that count, n d in the stored type.

        Raises:
            StaleRead: moments are no longer there.
        """
        with plain_errors(self.path):
            table = self._tables["moments"].search().select(["moment_id", "pooled"]).to_arrow()
        parts = [chunk.flatten().to_numpy().reshape(-1, self.dimension) for chunk in table["pooled"].chunks]
        vectors = np.concatenate(parts) if parts else np.zeros((0, self.dimension), self.dtype)
        ids = table["moment_id"].to_numpy()
        if np.array_equal(ids, contents.moment_id):
            return vectors
        kept = np.isin(ids, contents.moment_id)
        if not np.array_equal(ids[kept], contents.moment_id):
            raise StaleRead(str(self.path))
        return vectors[kept]

    def read(self, contents: Contents, places: np.ndarray, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Read some columns of the moments at some places, in the order of the places.

        Raises:
            StaleRead: other moments are at these places by now.
        """
        wanted = contents.offset[places]
        rows: dict[int, dict[str, Any]] = {}
        with plain_errors(self.path):
            for first in range(0, len(wanted), TAKE):
                offsets = sorted({int(one) for one in wanted[first : first + TAKE]})
                query = self._tables["moments"].take_offsets(offsets).select(["moment_id", *columns])
                for row in _rows(query.to_arrow(), self.dimension):
                    rows[row["moment_id"]] = row
        try:
            return [rows[int(one)] for one in contents.moment_id[places]]
        except KeyError:
            raise StaleRead(str(self.path)) from None

    def compact(self, contents: Contents) -> None:
        """Delete what no longer counts, join files and remove old versions."""
        with plain_errors(self.path):
            if contents.stale:
                kept = {"moments": ("indexed", "gone"), "videos": ("indexed", "gone", "refused")}
                for name, states in kept.items():
                    table = self._tables[name]
                    every = table.search().select(["video_id"]).to_arrow()["video_id"].to_numpy()
                    dropped = np.setdiff1d(every, _ids(contents.videos, *states)).tolist()
                    for first in range(0, len(dropped), TAKE):
                        table.delete(f"video_id in ({', '.join(map(str, dropped[first : first + TAKE]))})")
            with warnings.catch_warnings():  # that readers lose the old files; ours then read again
                warnings.simplefilter("ignore", UserWarning)
                for table in self._tables.values():
                    table.optimize(cleanup_older_than=timedelta(0))

    def vectors(self, row: dict[str, Any], column: str, dtype: str | None = None) -> np.ndarray | None:
        """Return vectors of a row that `read` returned, k d; None if it has none."""
        content = row[column]
        if content is None:
            return None
        return np.frombuffer(content, dtype or self.dtype).reshape(-1, self.dimension)


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of an index.

    Raises:
        ValueError: there is no index, or one of another version.
    """
    file = path / SETTINGS
    if not file.is_file():
        found = "nothing" if not path.exists() else "a folder without one" if path.is_dir() else "a file"
        raise ValueError(
            f"{path}: expected an index, found {found}; `discovla index RUN VIDEOS --out` makes one"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        version = settings["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected the settings of an index: {error}") from None
    if version != VERSION:
        raise ValueError(f"{file}: expected version {VERSION}, found {version}; index the videos again")
    return settings


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of an index, completely or not at all."""
    write_file(path / SETTINGS, to_json(settings, indent=1) + "\n")


def size_on_disk(path: Path) -> int:
    """Return the bytes of the files in a folder."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except OSError:  # removed in the meantime
                continue
    return total


def import_lancedb() -> Any:
    """Import LanceDB.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import lancedb
    except ImportError:
        raise ValueError("search: expected LanceDB, found none: pip install 'discovla[search]'") from None
    return lancedb


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Turn errors of LanceDB into an OSError that names the index; a full disk is ENOSPC."""
    try:
        yield
    except (RuntimeError, OSError, ValueError) as error:
        text = " ".join(str(error).split())
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "os error 28" in text:
            raise OSError(
                errno.ENOSPC, "no space left on the disk; the index has what was written before", str(path)
            ) from None
        raise OSError(errno.EIO, f"LanceDB: {text}"[:400], str(path)) from error


def _ids(videos: Mapping[int, VideoRow], *states: State) -> np.ndarray:
    """Return the ids of the videos in these states, int64."""
    return np.array([i for i, row in videos.items() if row.state in states], np.int64)


def _rows(table: Any, dimension: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow table, with vectors as arrays."""
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name == "pooled":
            columns[name] = column.flatten().to_numpy().reshape(-1, dimension)
        else:
            columns[name] = column.to_pylist()
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _schemas(dimension: int, dtype: str) -> dict[str, Any]:
    """Return the Arrow schemas of both tables."""
    import pyarrow as pa

    vector = pa.float16() if dtype == "float16" else pa.float32()
    moments = {
        "moment_id": pa.int64(),
        "video_id": pa.int64(),
        "start": pa.float64(),
        "end": pa.float64(),
        "times": pa.binary(),
        "best": pa.int32(),
        "thumbnail": pa.binary(),
        "pooled": pa.list_(vector, dimension),
        "tokens": pa.binary(),
        "mask": pa.binary(),
        "frames": pa.binary(),
    }
    types = {"int": pa.int64(), "float": pa.float64(), "float | None": pa.float64(), "bool": pa.bool_()}
    videos = {one.name: types.get(str(one.type), pa.string()) for one in fields(VideoRow)}
    return {"moments": pa.schema(moments), "videos": pa.schema(videos)}


def _moment_table(rows: Sequence[MomentRow], dimension: int, dtype: str) -> Any:
    """Return moments as an Arrow table."""
    import pyarrow as pa

    schema = _schemas(dimension, dtype)["moments"]
    pooled = np.stack([row.pooled for row in rows]).astype(dtype)
    vectors = pa.array(pooled.reshape(-1), schema.field("pooled").type.value_type)
    columns: dict[str, Any] = {"pooled": pa.FixedSizeListArray.from_arrays(vectors, dimension)}
    types = {"times": "float32", "tokens": dtype, "mask": "bool", "frames": "float16"}
    for name in schema.names:
        if name in types:
            columns[name] = [_bytes(getattr(row, name), types[name]) for row in rows]
        elif name != "pooled":
            columns[name] = [getattr(row, name) for row in rows]
    return pa.table(
        [
            columns[name] if name == "pooled" else pa.array(columns[name], schema.field(name).type)
            for name in schema.names
        ],
        schema=schema,
    )


def _video_table(rows: Sequence[VideoRow]) -> Any:
    """Return videos as an Arrow table."""
    import pyarrow as pa

    return pa.Table.from_pylist([asdict(row) for row in rows], schema=_schemas(1, "float32")["videos"])


def _bytes(array: np.ndarray | None, dtype: str) -> bytes | None:
    return None if array is None else np.ascontiguousarray(array, dtype).tobytes()
