"""Plans of clips, made by the workers of a loader, and the decoder of the plans of a batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discovla.batch import BadClip
from discovla.data.config import DataConfig
from discovla.data.dali.pipeline import Content, PipelineConfig, Plan, decode_batch
from discovla.data.manifest import Clip
from discovla.data.sampling import clip_sampling
from discovla.data.sandbox import Sandbox, WorkerLost
from discovla.data.shards.reader import Shards
from discovla.data.video.errors import DecodeError, check_file
from discovla.data.video.frames import sampled_indices
from discovla.data.video.index import FrameIndex, FrameIndexStore, default_index_dir
from discovla.data.video.pyav import index_video

CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})  # decoded on a CPU, which is for tests
GPU_CODECS = CPU_CODECS | {"h264", "hevc", "mpeg4", "av1"}
# Mean difference from PyAV's frames in levels.  DALI interpolates the colours of 4:2:0 video, FFmpeg repeats
# them, which shows at edges.
TOLERANCE_MEAN = 3.0

DecodedBatch = tuple[Tensor, list[str | None]]  # b f y x 3 uint8, and per clip the reason if it has no frames


class DaliClipReader:
    """`ClipReader` that plans frames, which `DaliDecoder` decodes a batch at a time.

    Which frames are sampled depends on the frame index of a file, which PyAV makes at the first visit.

    Args:
        image_size: pixels of a side of the frames.
        shards: source of the frames; None reads video files.

    Raises:
        ValueError: DALI is not installed.
    """

    def __init__(self, config: DataConfig, image_size: int, shards: Shards | None = None) -> None:
        check_installed()
        self.config, self._shards = config, shards
        content: Content = "video"
        if shards is not None:
            content = "raw" if shards.settings.format == "raw" else "jpeg"
        self.pipeline = PipelineConfig(
            content=content,
            frames=config.frames,
            image_size=image_size,
            augment=config.augment,
            device=torch.cuda.current_device() if torch.cuda.is_available() else None,
            threads=max(1, config.workers),
            time_limit=config.decode_seconds,
        )
        self._store = FrameIndexStore(config.index_dir or default_index_dir())
        self._sandbox = Sandbox(index_video, limit=config.decode_seconds)

    def read(self, clip: Clip, seed: str | None = None) -> Plan:
        """See `ClipReader`.

        Raises:
            DecodeError: the clip gives no frames, or DALI would decode other frames than PyAV.
        """
        config, sampling = self.config, clip_sampling(self.config, clip, seed)
        if self._shards is not None:
            stored = self._shards.stored_frames(clip, sampling, damaged=config.damaged)
            indices, places, content = np.arange(len(stored.content)), stored.places, stored.content
        else:
            check_file(clip.video)
            index = self._index(clip.video)
            numbers = sampled_indices(clip.video, index, sampling, config.damaged, config.hdr)
            indices, places = np.unique(numbers, return_inverse=True)
            content = None
            if reason := unfit(index, gpu=self.pipeline.device is not None):
                raise DecodeError(clip.video, f"cannot be read by decoder = 'dali': {reason}")
        return Plan(
            id=clip.id,
            path=clip.video,
            indices=indices.astype(np.int32),
            places=places.astype(np.int64),
            content=content,
            seed=seed,
        )

    def close(self) -> None:
        """End the process that indexes files."""
        self._sandbox.close()

    def _index(self, path: Path) -> FrameIndex:
        """Return the frame index of a file, made if it is not stored."""
        index = self._store.get(path)
        if index is None:
            try:
                index = self._sandbox(path)
            except WorkerLost as error:
                raise DecodeError(path, f"not decoded: {error}") from error
            self._store.put(path, index)
        return index


class DaliDecoder:
    """Decodes the plans of batches in a process of its own, one batch ahead.

    A clip that hangs or crashes the process costs itself only: the process is replaced and the other clips of
    the batch are decoded one by one.  On a GPU, frames stay in its memory.

    Raises:
        ValueError: DALI is not installed.
    """

    def __init__(self, config: PipelineConfig) -> None:
        check_installed()
        self.config = config
        self._stream: torch.cuda.Stream | None = None
        self._sandbox: Sandbox[Any, Any] = Sandbox(decode_batch, limit=config.time_limit)

    def decode(self, plans: Sequence[Plan | None]) -> DecodedBatch:
        """Return the frames of plans, b f y x 3 uint8 on the device, and per clip the reason if it has none.

        Rows of None, of clips without frames and of frames that a clip lacks are black.

        Raises:
            RuntimeError: DALI does not run here.
        """
        self._send(plans)
        return self._receive(plans)

    def decode_batches(self, batches: Iterable[dict[str, Any]]) -> Generator[dict[str, Any], None, None]:
        """Yield batches with frames in place of plans; the next batch is decoded while one is used."""
        pending: dict[str, Any] | None = None
        try:
            for fields in batches:
                previous, pending = pending, None
                decoded = None if previous is None else self._receive(previous["frames"])
                self._send(fields["frames"])
                pending = fields
                if previous is not None and decoded is not None:
                    yield _with_frames(previous, decoded)
            if pending is not None:
                previous, pending = pending, None
                yield _with_frames(previous, self._receive(previous["frames"]))
        finally:
            if pending is not None:  # the caller left in the middle: the answer must not stay in the pipe
                self._receive(pending["frames"])

    def close(self) -> None:
        """End the process."""
        self._sandbox.close()

    def _send(self, plans: Sequence[Plan | None]) -> None:
        self._sandbox.submit((self.config, tuple(plans)))

    def _receive(self, plans: Sequence[Plan | None]) -> DecodedBatch:
        """Return the frames of the plans sent last."""
        answer, error = self._sandbox.answer()
        if isinstance(error, WorkerLost):
            return self._decode_one_by_one(plans, error)
        if error is not None:
            raise error
        assert answer is not None, "the process returns frames or an error"
        frames, reasons = answer
        if isinstance(frames, Tensor):  # memory of the other process, which it reuses for the next batch
            return self._copied(frames), reasons
        return torch.from_numpy(frames), reasons

    def _copied(self, frames: Tensor) -> Tensor:
        """Copy frames on a GPU on a stream of its own, and wait for that copy but for no training step."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(frames.device)
        with torch.cuda.stream(self._stream):
            copy = frames.clone()
        copy.record_stream(torch.cuda.current_stream(frames.device))
        self._stream.synchronize()
        return copy

    def _decode_one_by_one(self, plans: Sequence[Plan | None], error: WorkerLost) -> DecodedBatch:
        """Decode the clips of a batch, one of which was too much for the process, in batches of one."""
        if len(plans) == 1:
            side = self.config.image_size
            black = torch.zeros(1, self.config.frames, side, side, 3, dtype=torch.uint8)
            return black.to(self.config.torch_device), [f"not decoded: {error}"]
        batches = [self.decode([plan]) for plan in plans]
        return torch.cat([frames for frames, _ in batches]), [reasons[0] for _, reasons in batches]


def check_installed() -> None:
    """Raise ValueError if DALI is not installed."""
    if reason := missing():
        raise ValueError(f"decoder: {reason}")


def missing() -> str | None:
    """Return the reason why DALI cannot be used here, or None."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "DALI is not installed: pip install 'discovla[dali]'"
    return None


def unfit(index: FrameIndex, *, gpu: bool) -> str | None:
    """Return the reason why DALI would decode other frames of a file than PyAV, or None."""
    codecs = GPU_CODECS if gpu else CPU_CODECS
    if index.codec not in codecs:
        return (
            f"expected one of the codecs {', '.join(sorted(codecs))} on {'a GPU' if gpu else 'a CPU'}, "
            f"found {index.codec}"
        )
    if index.hdr is not None:
        return f"expected SDR, found HDR ({index.hdr}), which DALI does not map to SDR"
    if not index.seekable:
        return "expected a whole file, frames of one size and ascending times"
    if index.rotation:
        return f"expected no rotation, which DALI ignores, found {index.rotation} degrees"
    if index.packets != index.count:
        return f"expected a frame of each packet, found {index.packets} packets and {index.count} frames"
    if index.stream_index:
        return f"expected the best video stream to be stream 0, found stream {index.stream_index}"
    if "10" in index.pixel_format or "12" in index.pixel_format:
        return f"expected pixels of 8 bits, found {index.pixel_format}"
    return None


def _with_frames(fields: dict[str, Any], decoded: DecodedBatch) -> dict[str, Any]:
    """Return the fields of a batch with its frames; clips that DALI could not decode become bad."""
    frames, reasons = decoded
    bad_rows = (~fields["valid"]).nonzero().flatten().tolist()
    bad: dict[int, BadClip] = dict(zip(bad_rows, fields["bad"], strict=True))
    mask = fields["frame_mask"].clone()
    for row, (plan, reason) in enumerate(zip(fields["frames"], reasons, strict=True)):
        if reason is not None:
            bad[row] = BadClip(id=plan.id, video=str(plan.path), reason=reason)
            frames[row], mask[row] = 0, True  # like every bad clip
    return fields | {
        "frames": frames,
        "frame_mask": mask,
        "valid": torch.tensor([row not in bad for row in range(len(reasons))]),
        "bad": tuple(bad[row] for row in sorted(bad)),
    }
