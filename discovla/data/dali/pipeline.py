"""The decoding process: DALI decodes a batch, torch augments and resizes its frames on the same device."""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from discovla.data.augment import crop_box, light_table, randaugment_steps
from discovla.data.config import Augment
from discovla.data.video.frames import resize_geometry
from discovla.torchvision_cpu import install

CLIPS = 16  # clips decoded at once, which bounds the memory of frames of full size


Content = Literal["video", "jpeg", "raw"]


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Options of the decoding process, the same for all batches.

    content: what is decoded: video files, JPEG frames or raw frames.
    frames: largest number of frames of a clip.
    image_size: pixels of a side of the frames of the model.
    augment: augmentation of plans with a seed.
    device: index of the GPU; None decodes on the CPU.
    threads: CPU threads.
    time_limit: seconds that a batch may take.
    """

    content: Content = "video"
    frames: int
    image_size: int
    augment: Augment = "none"
    device: int | None = None
    threads: int = 2
    time_limit: float = 300.0

    @property
    def torch_device(self) -> torch.device:
        """Device of the decoded frames."""
        return torch.device("cpu" if self.device is None else f"cuda:{self.device}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The frames of one clip before they are decoded.

    id, path: of the clip.
    indices: frames of the file to decode, f' int32 ascending, without repeats.
    places: for each sampled frame, its place among the decoded frames, f int64.
    content: JPEG bytes of each of f' frames, or raw frames f' y x 3; None reads the file.
    seed: seed of the augmentation; None leaves the frames unchanged.
    """

    id: str
    path: Path
    indices: np.ndarray
    places: np.ndarray
    content: tuple[bytes, ...] | np.ndarray | None = None
    seed: str | None = None

    def __len__(self) -> int:
        return len(self.places)


def decode_batch(
    item: tuple[PipelineConfig, tuple[Plan | None, ...]],
) -> tuple[np.ndarray | Tensor, list[str | None]]:
    """Return the frames of plans, b f y x 3 uint8, and per clip the reason if it has none.

    On a GPU the frames are a tensor in its memory, which is reused by the next call.
    """
    config, plans = item
    frames, reasons = _decoder(config).decode(plans)
    if not frames.is_cuda:
        return frames.numpy(), reasons
    torch.cuda.synchronize(frames.device)  # the reader is another process
    return frames, reasons


@lru_cache(maxsize=1)
def _decoder(config: PipelineConfig) -> BatchDecoder:
    """Return the decoder of this process."""
    torch.set_num_threads(1)
    install()
    return BatchDecoder(config)


class BatchDecoder:
    """A DALI pipeline, built again after a clip that makes it fail.

    Raises:
        RuntimeError: DALI does not run here.
    """

    def __init__(self, config: PipelineConfig) -> None:
        self.config, self.device = config, config.torch_device
        self._pool = ThreadPoolExecutor(config.threads)
        self._pipeline: Any = None if config.content == "raw" else _build_pipeline(config)

    def decode(self, plans: Sequence[Plan | None]) -> tuple[Tensor, list[str | None]]:
        """Return the frames of plans and the reasons, see `decode_batch`."""
        side = self.config.image_size
        shape = (len(plans), self.config.frames, side, side, 3)
        batch = torch.zeros(shape, dtype=torch.uint8, device=self.device)  # b f y x c
        reasons: list[str | None] = [None] * len(plans)
        rows = [(row, plan) for row, plan in enumerate(plans) if plan is not None]
        for first in range(0, len(rows), CLIPS):
            part = rows[first : first + CLIPS]
            for (row, plan), frames in zip(part, self._full_frames([p for _, p in part]), strict=True):
                if isinstance(frames, str):
                    reasons[row] = frames
                    continue
                places = torch.from_numpy(plan.places).to(self.device)
                sampled = augment_and_resize(frames, plan.seed, self.config)[places]
                batch[row, : len(sampled)] = _lighten(sampled, plan, self.config)
        return batch, reasons

    def _full_frames(self, plans: Sequence[Plan]) -> list[Tensor | str]:
        """Return per clip the frames at full size, f' y x c on the device, or the reason if it has none."""
        if self.config.content == "raw":
            return [torch.from_numpy(np.array(plan.content)).to(self.device) for plan in plans]
        results: dict[int, Tensor | str] = {}
        readable: dict[int, tuple[Plan, list[np.ndarray]]] = {}
        for row, content in enumerate(self._pool.map(_encoded_content, plans)):
            if isinstance(content, str):
                results[row] = content
            else:
                readable[row] = plans[row], content
        results |= zip(readable, self._run(list(readable.values())), strict=True)
        return [results[row] for row in range(len(plans))]

    def _run(self, clips: list[tuple[Plan, list[np.ndarray]]]) -> list[Tensor | str]:
        """Run the pipeline; if it fails, run each clip alone in a new one."""
        if not clips:
            return []
        try:
            return self._outputs(clips)
        except RuntimeError as error:
            self._pipeline = _build_pipeline(self.config)
            if len(clips) == 1:
                return [f"DALI: {_reason(error)}"]
            return [frames for clip in clips for frames in self._run([clip])]

    def _outputs(self, clips: list[tuple[Plan, list[np.ndarray]]]) -> list[Tensor | str]:
        """Return the decoded frames of each clip, f' y x c."""
        feed_ndarray = importlib.import_module("nvidia.dali.plugin.pytorch").feed_ndarray
        self._pipeline.feed_input("content", [image for _, contents in clips for image in contents])
        if self.config.content == "video":
            self._pipeline.feed_input("indices", [plan.indices for plan, _ in clips])
        (outputs,) = self._pipeline.run()
        stream = None if self.device.type == "cpu" else torch.cuda.current_stream(self.device)

        def tensors() -> Iterator[Tensor]:
            for output in outputs:
                tensor = torch.empty(output.shape(), dtype=torch.uint8, device=self.device)
                feed_ndarray(output, tensor, cuda_stream=stream)
                yield tensor

        decoded = tensors()
        if self.config.content == "video":
            return list(decoded)
        return [torch.stack([next(decoded) for _ in contents]) for _, contents in clips]


def _build_pipeline(config: PipelineConfig) -> Any:
    """Build the DALI pipeline: encoded content in, frames of full size out."""
    dali = importlib.import_module("nvidia.dali")
    cpu = config.device is None

    @dali.pipeline_def
    def decode() -> Any:
        content = dali.fn.external_source(name="content", dtype=dali.types.UINT8, ndim=1)
        device = "cpu" if cpu else "mixed"
        if config.content == "jpeg":
            return dali.fn.decoders.image(content, device=device)
        indices = dali.fn.external_source(name="indices", dtype=dali.types.INT32, ndim=1)
        return dali.fn.decoders.video(content, frames=indices, device=device)

    pipeline = decode(
        batch_size=CLIPS * (config.frames if config.content == "jpeg" else 1),
        num_threads=config.threads,
        device_id=config.device,
        prefetch_queue_depth=1,  # each batch is fed right before it is taken
    )
    pipeline.build()
    return pipeline


def _encoded_content(plan: Plan) -> list[np.ndarray] | str:
    """Return the bytes of a plan's JPEG frames or of its file, or the reason if the file cannot be read."""
    if isinstance(plan.content, tuple):
        return [np.frombuffer(image, np.uint8) for image in plan.content]
    try:
        return [np.fromfile(plan.path, np.uint8)]
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def augment_and_resize(frames: Tensor, seed: str | None, config: PipelineConfig) -> Tensor:
    """Augment frames of full size and resize them for the model, as the PyAV reader does.

    Args:
        frames: f y x c uint8.
        seed: seed of the augmentation; None leaves it out.

    Returns: f y x c uint8, y = x = config.image_size.
    """
    augment = "none" if seed is None else config.augment
    x, side = frames.permute(0, 3, 1, 2), config.image_size  # f c y x
    height, width = x.shape[-2:]
    F = _functional()
    if augment == "resized_crop":
        left, top, right, bottom = crop_box(random.Random(seed), width, height)
        x = F.resized_crop(x, top, left, bottom - top, right - left, [side, side])
        return x.permute(0, 2, 3, 1)
    if augment == "randaugment" and seed is not None:
        x = randaugment(x, seed)
    (new_width, new_height), (left, top) = resize_geometry(width, height, side)
    if (new_width, new_height) != (width, height):
        x = F.resize(x, [new_height, new_width], F.InterpolationMode.BICUBIC)
    return x[..., top : top + side, left : left + side].permute(0, 2, 3, 1)


def randaugment(x: Tensor, seed: str) -> Tensor:
    """Apply the draws of `draw_randaugment`, which are timm's, by torchvision's operations.

    Geometric operations are bilinear where timm's are bicubic.

    Args:
        x: f c y x uint8; all frames get the same operations.
    """
    F = _functional()
    grey = {"interpolation": F.InterpolationMode.BILINEAR, "fill": [128.0] * 3}

    def affine(x: Tensor, translate: Sequence[float] = (0, 0), shear: Sequence[float] = (0, 0)) -> Tensor:
        degrees = [math.degrees(math.atan(factor)) for factor in shear]
        return F.affine(x, 0.0, list(translate), 1.0, degrees, center=[0.0, 0.0], **grey)

    operations: dict[str, Callable[..., Tensor]] = {
        "auto_contrast": F.autocontrast,
        "equalize": F.equalize,
        "invert": F.invert,
        "posterize": F.posterize,
        "solarize": lambda x, threshold: x if threshold > 255 else F.solarize(x, float(threshold)),
        "solarize_add": lambda x, add: torch.where(x < 128, (x.int() + add).clamp(max=255).byte(), x),
        "color": F.adjust_saturation,
        "contrast": F.adjust_contrast,
        "brightness": F.adjust_brightness,
        "sharpness": F.adjust_sharpness,
        "rotate": lambda x, degrees: F.rotate(x, degrees, **grey),
        "shear_x": lambda x, factor: affine(x, shear=(factor, 0)),
        "shear_y": lambda x, factor: affine(x, shear=(0, factor)),
        "translate_x_rel": lambda x, share: affine(x, translate=(-share * x.shape[-1], 0)),
        "translate_y_rel": lambda x, share: affine(x, translate=(0, -share * x.shape[-2])),
    }
    for function, arguments, _ in randaugment_steps(seed):
        x = operations[function.__name__](x, *arguments)
    return x


def _lighten(frames: Tensor, plan: Plan, config: PipelineConfig) -> Tensor:
    """Apply `draw_light` to the sampled frames of a plan, if it is the augmentation."""
    if plan.seed is None or config.augment != "light":
        return frames
    table = light_table(plan.seed, int(frames.sum()) / frames.numel())
    return torch.from_numpy(table).to(frames.device)[frames.int()]


def _functional() -> Any:
    """Return torchvision's functional transforms, which import only after `install`."""
    return importlib.import_module("torchvision.transforms.v2.functional")


def _reason(error: RuntimeError) -> str:
    """Return the line of DALI's error message that names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith(("[", "Error")) or "assert" in line.lower()]
    return (causes or lines)[-1][:300]
