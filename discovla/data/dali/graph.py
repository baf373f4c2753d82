"""DALI's graphs from video, JPEG or raw frames to the frames a model takes, in a process of their own."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discovla.data.augment import apply_table, light_table
from discovla.data.dali.augment import augmented, packed_steps
from discovla.data.dali.plans import Plan
from discovla.data.dali.support import OTHER_COLOUR, DaliSettings

CLIPS = 16  # in a graph at once, so that frames of full size take bounded memory

Sample = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class GraphItem:
    """Clips whose frames are to be made, and by what."""

    settings: DaliSettings
    plans: tuple[Plan, ...]


def make_frames(item: GraphItem) -> tuple[np.ndarray | Tensor, list[str | None]]:
    """The frames of clips, b f y x 3 uint8, and of each clip why it has none, or None.

    On a GPU they are a tensor there, which stays as it is until the next call; black where a clip lacks them.
    """
    frames, reasons = _graph(item.settings).read(item.plans)
    if not frames.is_cuda:
        return frames.numpy(), reasons
    torch.cuda.synchronize(frames.device)  # who reads it is another process
    return frames, reasons


@lru_cache(maxsize=1)
def _graph(settings: DaliSettings) -> Graph:
    """The graph of this process."""
    torch.set_num_threads(1)
    return Graph(settings)


class Graph:
    """One graph, made anew where a clip ends it.

    Raises:
        RuntimeError: DALI cannot build it here.
    """

    def __init__(self, settings: DaliSettings) -> None:
        self.settings = settings
        self.device = device_of(settings)
        self._pool = ThreadPoolExecutor(settings.threads)
        self._pipeline = build_pipeline(settings)

    def read(self, plans: Sequence[Plan]) -> tuple[Tensor, list[str | None]]:
        """As `make_frames`."""
        chosen, side = self.settings, self.settings.image_size
        shape = (len(plans), chosen.frames, side, side, 3)
        out = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        reasons: list[str | None] = [None] * len(plans)
        rows = [row for row, plan in enumerate(plans) if not plan.empty]
        for first in range(0, len(rows), CLIPS):
            for row, found in self._made(rows[first : first + CLIPS], plans):
                if isinstance(found, str):
                    reasons[row] = found
                    continue
                places = torch.from_numpy(plans[row].places).to(self.device)
                shown = out[row, : len(places)]
                torch.index_select(found, 0, places, out=shown)
                if (seed := plans[row].light) is not None:
                    apply_table(shown, light_table(seed, int(shown.sum()) / shown.numel()))
        return out, reasons

    def _made(self, rows: Sequence[int], plans: Sequence[Plan]) -> Iterator[tuple[int, Tensor | str]]:
        """Frames of clips by their rows, or why they have none; files are read side by side."""
        good: list[tuple[int, list[Sample]]] = []
        loaded = self._pool.map(_loaded, [plans[row] for row in rows])
        for row, samples in zip(rows, loaded, strict=True):
            if isinstance(samples, str):
                yield row, samples
            else:
                good.append((row, samples))
        yield from self._run(good)

    def _run(self, clips: list[tuple[int, list[Sample]]]) -> Iterator[tuple[int, Tensor | str]]:
        """Run the graph; where a clip ends it, each of them is run alone in a new one."""
        if not clips:
            return
        try:
            outputs = iter(self._outputs([sample for _, samples in clips for sample in samples]))
        except RuntimeError as error:
            self._pipeline = build_pipeline(self.settings)
            if len(clips) == 1:
                yield clips[0][0], f"DALI: {_reason(error)}"
                return
            for clip in clips:
                yield from self._run([clip])
            return
        for row, samples in clips:
            parts = [next(outputs) for _ in samples]
            if self.settings.content == "jpeg":
                yield row, torch.stack([frames for frames, _ in parts])
                continue
            frames, means = parts[0]
            other = None if means is None else _other(samples[0], means)
            yield row, other or frames

    def _outputs(self, samples: Sequence[Sample]) -> list[tuple[Tensor, np.ndarray | None]]:
        """One run of the graph: f y x 3 of each sample, y x 3 of a JPEG; of video mean colours too, f 3."""
        feed_ndarray = importlib.import_module("nvidia.dali.plugin.pytorch").feed_ndarray
        for name in inputs(self.settings):
            layout = "FHWC" if name == "content" and self.settings.content == "raw" else ""
            self._pipeline.feed_input(name, [sample[name] for sample in samples], layout=layout)
        batch, *means = self._pipeline.run()
        colours = means[0].as_cpu() if means else None
        stream = None if self.device.type == "cpu" else torch.cuda.current_stream(self.device)
        found = []
        for row in range(len(samples)):
            frames = torch.empty(batch[row].shape(), dtype=torch.uint8, device=self.device)
            feed_ndarray(batch[row], frames, cuda_stream=stream)
            found.append((frames, None if colours is None else np.array(colours[row])))
        return found


def device_of(settings: DaliSettings) -> torch.device:
    """Where a graph leaves its frames."""
    return torch.device("cpu" if settings.device is None else f"cuda:{settings.device}")


def inputs(settings: DaliSettings) -> tuple[str, ...]:
    """Names of what a graph is fed."""
    names = ("content", *(("indices",) if settings.content == "video" else ()))
    if settings.sized:
        return names
    steps = ("kinds", "numbers", "matrices") if settings.augment == "randaugment" else ()
    return (*names, "cut", "part", "size", *steps)


def build_pipeline(settings: DaliSettings) -> Any:
    """A graph that is fed `inputs` and gives the frames of each sample, of video their colours too."""
    dali = importlib.import_module("nvidia.dali")
    define = dali.pipeline_def(_nodes, enable_conditionals=settings.augment == "randaugment")
    per_clip = settings.frames if settings.content == "jpeg" else 1
    pipeline = define(
        dali,
        settings,
        batch_size=CLIPS * per_clip,
        num_threads=settings.threads,
        device_id=settings.device,
        prefetch_queue_depth=1,  # one batch is fed for one that is taken
    )
    pipeline.build()
    return pipeline


def _nodes(dali: Any, settings: DaliSettings) -> Any:
    """The nodes of a graph."""
    fed = {name: _input(dali, settings, name) for name in inputs(settings)}
    frames = _decoded(dali.fn, settings, fed)
    means = dali.fn.reductions.mean(frames, axis_names="HW") if settings.content == "video" else None
    if settings.sized:
        return frames
    if settings.augment == "randaugment":
        frames = augmented(dali, frames, fed, "cpu" if settings.device is None else "gpu")
    frames = _fitted(dali, frames, fed, crop=settings.augment == "resized_crop")
    return frames if means is None else (frames, means)


def _input(dali: Any, settings: DaliSettings, name: str) -> Any:
    """What a graph is fed under a name."""
    axes = {"content": 4 if settings.content == "raw" else 1, "numbers": 2, "matrices": 3}
    kind = dali.types.INT32
    if name == "content":
        kind = dali.types.UINT8
    if name in ("size", "numbers", "matrices"):
        kind = dali.types.FLOAT
    return dali.fn.external_source(name=name, dtype=kind, ndim=axes.get(name, 1))


def _decoded(fn: Any, settings: DaliSettings, fed: dict[str, Any]) -> Any:
    """Frames of full size, on the device."""
    content, cpu = fed["content"], settings.device is None
    if settings.content == "raw":
        return content if cpu else content.gpu()
    device = "cpu" if cpu else "mixed"
    if settings.content == "jpeg":
        return fn.decoders.image(content, device=device)
    return fn.decoders.video(content, frames=fed["indices"], device=device)


def _fitted(dali: Any, frames: Any, fed: dict[str, Any], *, crop: bool) -> Any:
    """Frames of the model's size: a part cut out and resized, or resized and the middle cut out."""
    fn, types = dali.fn, dali.types
    kind = types.INTERP_LINEAR if crop else types.INTERP_CUBIC
    if crop:
        frames = fn.slice(frames, start=fed["cut"], shape=fed["part"], axis_names="HW")
    frames = fn.resize(frames, size=fed["size"], interp_type=kind, antialias=True)
    if not crop:
        frames = fn.slice(frames, start=fed["cut"], shape=fed["part"], axis_names="HW")
    return frames


def _loaded(plan: Plan) -> list[Sample] | str:
    """What the graph is fed for a clip, or why its file cannot be read."""
    shared = {
        "indices": plan.indices,
        "cut": np.array(plan.cut, np.int32),
        "part": np.array(plan.part, np.int32),
        "size": np.array(plan.size, np.float32),
        "spread": np.array(plan.spread, np.float32),
        "means": np.full((len(plan.indices), 3), np.nan, np.float32) if plan.means is None else plan.means,
        **packed_steps(plan.steps),
    }
    if isinstance(plan.content, tuple):
        return [{"content": np.frombuffer(image, np.uint8), **shared} for image in plan.content]
    if plan.content is not None:
        return [{"content": plan.content, **shared}]
    try:
        return [{"content": np.fromfile(plan.path, np.uint8), **shared}]
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _other(sample: Sample, means: np.ndarray) -> str | None:
    """Why frames with these mean colours, f 3, are not those planned, or None."""
    far = np.nan_to_num(np.abs(means - sample["means"])).max(1)
    if far.max() <= OTHER_COLOUR + sample["spread"]:
        return None
    index, levels = sample["indices"][far.argmax()], far.max()
    what = f"it makes another picture of frame {index}, its mean colour {levels:.0f} levels off"
    return f"cannot be read by decoder = 'dali': {what}"


def _reason(error: RuntimeError) -> str:
    """What DALI found wrong, of all that it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("[", "Error")) or "assert" in line.lower()]
    return (told or lines)[-1][:300]
