"""Strips of frames of the clips that a report shows, decoded once and kept in the run directory."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from discovla.data.config import DataConfig
from discovla.data.dataset import ClipReader, FileClipReader, ShardClipReader
from discovla.data.manifest import Clip
from discovla.data.shards.reader import open_shards
from discovla.data.video.errors import DecodeError
from discovla.files import write_file
from discovla.retrieval.record import EvaluatedClip

FOLDER = "report_frames"
SIZE = 96  # pixels of a side of a frame
FRAMES = 4  # in a strip
GAP = 3  # pixels between two frames


class FrameStrips:
    """JPEG strips of four evenly spaced frames among those that the model sees.

    Args:
        directory: of the run; strips are kept in its folder `report_frames`.
        data: how frames are sampled and decoded.
        seconds: time after which no further clip is decoded; those left out follow in the next report.
    """

    def __init__(self, directory: Path, data: DataConfig, *, seconds: float) -> None:
        self.folder, self.data = directory / FOLDER, data
        self.deadline = time.monotonic() + seconds
        self.errors: list[str] = []
        self.postponed = 0
        self._reader: ClipReader | None = None

    def read(self, clips: Iterable[EvaluatedClip]) -> dict[str, bytes]:
        """Return the strips of clips by their id, without those that cannot be read or are postponed."""
        strips = {}
        try:
            for clip in clips:
                strip = self._strip(clip)
                if strip is not None:
                    strips[clip.id] = strip
        finally:
            if isinstance(self._reader, FileClipReader):
                self._reader.close()
            self._reader = None
        return strips

    def _strip(self, clip: EvaluatedClip) -> bytes | None:
        identity = f"{clip.id}\0{clip.video}\0{clip.start}\0{clip.end}\0{self.data.sampling}"
        path = self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.jpg"
        if path.is_file():
            return path.read_bytes()
        if time.monotonic() > self.deadline:
            self.postponed += 1
            return None
        source = Clip(
            id=clip.id,
            video=Path(clip.video),
            captions=clip.captions,
            split=clip.split,
            start=clip.start,
            end=clip.end,
        )
        try:
            self._reader = self._reader or make_reader(self.data)
            frames = self._reader.read(source)
        except (DecodeError, ValueError, OSError) as error:
            self.errors.append(str(error))
            return None
        assert isinstance(frames, np.ndarray), "a reader of files or shards returns pixels"
        content = encode_strip(frames)
        write_file(path, content)
        return content


def montage(rows: Sequence[tuple[str, Sequence[tuple[bytes | None, bool]]]]) -> np.ndarray:
    """Return one picture, y x 3 uint8, of captions and the strips of their clips, for TensorBoard.

    Args:
        rows: a caption, and for each clip its strip (None without frames) and True for the clip described.
    """
    width, height, text = 2 * SIZE, SIZE // 2, 16
    columns = max(len(strips) for _, strips in rows)
    picture = Image.new("RGB", (columns * (width + 8) + 8, len(rows) * (height + text + 12)), "white")
    pen = ImageDraw.Draw(picture)
    for i, (caption, strips) in enumerate(rows):
        y = i * (height + text + 12)
        printable = caption.encode("latin-1", "replace").decode("latin-1")  # PIL's own font has no others
        pen.text((8, y + 2), " ".join(printable.split()), fill="black")
        for j, (strip, own) in enumerate(strips):
            x = 8 + j * (width + 8)
            if own:
                pen.rectangle((x - 3, y + text - 3, x + width + 2, y + text + height + 2), fill="#1f9068")
            if strip is not None:
                small = Image.open(io.BytesIO(strip)).resize((width, height))
                picture.paste(small, (x, y + text))
    return np.asarray(picture)


def make_reader(data: DataConfig) -> ClipReader:
    """Return a reader of small frames on the CPU, also where DALI decodes for training."""
    if data.shards is not None:
        return ShardClipReader(data, SIZE, open_shards(data.shards))
    decoder = "pyav" if data.decoder == "dali" else data.decoder
    return FileClipReader(data.model_copy(update={"decoder": decoder}), SIZE)


def encode_strip(frames: np.ndarray) -> bytes:
    """Return a JPEG of evenly spaced frames side by side, from frames f y x 3."""
    chosen = frames[np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)]
    strip = Image.new("RGB", (FRAMES * (SIZE + GAP) - GAP, SIZE), "#808080")
    for i, frame in enumerate(chosen):
        small = Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        strip.paste(small, (i * (SIZE + GAP), 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=82)
    return file.getvalue()
