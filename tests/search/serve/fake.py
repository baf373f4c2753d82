"""A small stand-in for an index, with real video files: the server is tested without a model."""

from __future__ import annotations

import io
import threading
import time
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from discovla.retrieval.embeddings import Embeddings
from discovla.search.records import (
    Hit,
    ImageQuery,
    IndexProgress,
    IndexStatus,
    LikeQuery,
    Query,
    SearchResult,
    TextQuery,
    VideoEntry,
    VideoQuery,
)

COLOURS = {"red": (214, 69, 65), "green": (52, 152, 94), "blue": (58, 108, 217), "amber": (222, 160, 48)}
SECONDS = 12  # of a video
MOMENT = 4  # seconds of a moment
RATE = 10  # frames a second


def picture(colour: str, moment: float, width: int = 320, height: int = 180) -> np.ndarray:
    """Draw a disc of a colour that moves from left to right, y x 3, uint8; `moment` is 0..1."""
    y, x = np.mgrid[0:height, 0:width]
    ground = np.stack([40 + 60 * y / height, 46 + 40 * x / width, 64 + 50 * y / height], axis=2)
    disc = np.hypot(x - width * (0.15 + 0.7 * moment), y - height / 2) < height * 0.24
    ground[disc] = COLOURS[colour]
    return ground.astype(np.uint8)


def write_video(path: Path, colour: str) -> Path:
    """Write an H.264 file of `SECONDS` seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(RATE), options={"g": "20"})
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        for i in range(SECONDS * RATE):
            frame = av.VideoFrame.from_ndarray(picture(colour, i / (SECONDS * RATE)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def jpeg(pixels: np.ndarray) -> bytes:
    """Encode a picture."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@dataclass
class FakeIndex:
    """Index of one video for each colour, cut into moments of `MOMENT` seconds.

    A text is closest to the video whose colour it names, an image to that of its mean colour.  `year` is a
    column, and the one condition that it knows is `year > N`.  batches: sizes of the batches of texts.
    """

    folder: Path
    batches: list[int] = field(default_factory=list)
    progress: IndexProgress | None = None
    delay: float = 0.0  # seconds that a search takes
    clip_delay: float = 0.0  # seconds that decoding a clip takes
    searching: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.files = [write_video(self.folder / f"{colour} disc.mp4", colour) for colour in COLOURS]

    @property
    def moments(self) -> list[tuple[int, int]]:
        """Video and start of each moment."""
        return [(v, start) for v in range(len(self.files)) for start in range(0, SECONDS, MOMENT)]

    def _moment(self, moment_id: int) -> tuple[int, int]:
        if not 0 <= moment_id < len(self.moments):
            raise KeyError(f"moment {moment_id}: not in the index")
        return self.moments[moment_id]

    def _closeness(self, query: Query) -> np.ndarray:
        """Return the score of each video."""
        colours = np.array(list(COLOURS.values()), dtype=np.float64)
        match query:
            case TextQuery():
                return np.array([0.9 if name in query.text else 0.2 for name in COLOURS])
            case ImageQuery():
                assert isinstance(query.image, bytes)
                mean = np.asarray(Image.open(io.BytesIO(query.image)).convert("RGB")).mean((0, 1))
                return 1 - np.linalg.norm(colours - mean, axis=1) / 442
            case VideoQuery():
                return np.array([0.9 if Path(query.path) == file else 0.3 for file in self.files])
            case LikeQuery():
                video, _ = self._moment(query.moment_id)
                return np.array([0.9 if v == video else 0.3 for v in range(len(self.files))])
        raise AssertionError(query)

    def search(
        self, query: Query, k: int = 10, *, where: str | None = None, merge: bool = True
    ) -> SearchResult:
        began = time.perf_counter()
        self.searching.set()
        time.sleep(self.clip_delay if isinstance(query, VideoQuery) else self.delay)
        least = 0
        if where is not None:
            if not where.startswith("year > ") or not where[7:].isdecimal():
                raise ValueError(f"where: expected year > N, found {where!r}")
            least = int(where[7:])
        scores = self._closeness(query)
        hits = [self._hit(i, v, start, float(scores[v])) for i, (v, start) in enumerate(self.moments)]
        hits = [hit for hit in hits if hit.columns["year"] > least]  # type: ignore[operator]
        if isinstance(query, LikeQuery):
            hits = [hit for hit in hits if hit.moment_id != query.moment_id]
        hits = sorted(hits, key=lambda hit: -hit.score)[:k]
        best = hits[0].probability if hits else None
        note = "The best hit is probably not what was asked for." if best is not None and best < 0.5 else ""
        seconds = time.perf_counter() - began
        return SearchResult(hits=hits, probability_best=best, note=note, seconds=seconds)

    def _hit(self, moment_id: int, video: int, start: int, score: float) -> Hit:
        return Hit(
            moment_id=moment_id,
            video=str(self.files[video]),
            video_id=video,
            start=float(start),
            end=float(start + MOMENT),
            best_frame=start + 2.0,
            score=score - 0.01 * start,
            probability=min(1.0, max(0.0, score - 0.02 * start)),
            columns={"year": 2020 + video},
        )

    def embed_texts(self, texts: list[str]) -> Embeddings:
        self.batches.append(len(texts))
        return Embeddings(pooled=torch.arange(len(texts))[:, None].float(), index=torch.arange(len(texts)))

    def thumbnail(self, moment_id: int) -> bytes:
        video, start = self._moment(moment_id)
        return jpeg(picture(list(COLOURS)[video], (start + 2) / SECONDS))

    def media_path(self, moment_id: int) -> Path:
        return self.files[self._moment(moment_id)[0]]

    def frame_scores(self, moment_id: int, query: Query) -> list[tuple[float, float]]:
        video, start = self._moment(moment_id)
        closeness = float(self._closeness(query)[video])
        return [(start + i / 3, closeness - 0.02 * abs(i - 6)) for i in range(12)]

    def videos(self) -> list[VideoEntry]:
        return [self._entry(i, file) for i, file in enumerate(self.files)]

    def _entry(self, number: int, file: Path) -> VideoEntry:
        return VideoEntry(
            video_id=number,
            video=str(file),
            start=None,
            end=None,
            state="indexed",
            reason="",
            duration=float(SECONDS),
            moments=SECONDS // MOMENT,
            columns={"year": 2020 + number},
        )

    def refused(self) -> list[VideoEntry]:
        entry = self._entry(99, self.folder / "broken.mp4")
        reason = "expected a video, found a file of 0 bytes"
        return [replace(entry, state="refused", reason=reason, duration=0.0, moments=0)]

    def status(self) -> IndexStatus:
        return IndexStatus(
            model="clip:drawn",
            fingerprint="0123456789ab",
            moment_mode="windows",
            videos=len(self.files),
            moments=len(self.moments),
            refused=1,
            gone=0,
            seconds=float(SECONDS * len(self.files)),
            size=123_456,
            columns={"year": "int", "title": "text"},
            calibrated=500,
            progress=self.progress,
        )

    def refresh(self) -> bool:
        return False
