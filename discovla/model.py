"""Open a run, a checkpoint, an export or a plain CLIP, and embed videos and texts with it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from discovla import terminal
from discovla.batch import BadClip
from discovla.config import ConfigError, RunConfig, parse_config, translate_stored
from discovla.data.config import DataConfig
from discovla.data.dataset import ArrayClipReader, check_captions, clip_reader
from discovla.data.loader import readable_batches, text_batches
from discovla.data.manifest import Clip
from discovla.data.tokens import make_tokenizer
from discovla.data.video.errors import DecodeError
from discovla.engine import checkpoint
from discovla.engine.config import EngineConfig
from discovla.engine.distributed import choose_device
from discovla.foreign import read_tensors
from discovla.inputs import check_inputs, tower_inputs
from discovla.methods import build
from discovla.methods.base import Method
from discovla.methods.clip import CLIPConfig
from discovla.nn.token_merging import MergeConfig
from discovla.peft_format import apply_peft, read_peft
from discovla.retrieval.embed import embed_texts, embed_videos
from discovla.retrieval.embeddings import Embeddings
from discovla.retrieval.similarity import similarity_matrix, similarity_tile
from discovla.towers.weights import DRAWN, ModelConfig, reachable
from discovla.train_step import prepare_method

ADAPTER = "adapter.safetensors"  # trained parameters in an export
HUB = "hf:"  # prefix of a repository of Hugging Face's hub in place of a path
PLAIN = "clip:"  # prefix of a plain CLIP in place of a path
# options of the data that do not change embeddings
NEUTRAL = {"workers", "index_dir", "decode_seconds", "quarantine", "bad_clip_share", "manifest"}

Video = str | Path | tuple[str | Path, float | None, float | None] | np.ndarray | Tensor
Precision = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained method with the config of its run.

    method: with the trained parameters, or their moving average if the run has one.
    step: of the checkpoint.
    """

    config: RunConfig
    method: Method
    step: int


class NoneReadable(ValueError):
    """All videos of a call were refused."""

    def __init__(self, refused: Sequence[BadClip]) -> None:
        first = f"the first {refused[0].video}: {refused[0].reason}"
        super().__init__(f"videos: expected at least one that can be read, found none; {first}")
        self.refused = tuple(refused)


class Model:
    """A retrieval method that embeds videos and texts and scores them.

    Args:
        method: on the CPU; it is moved to the device.
        data: sampling and decoding of videos, and length of texts.
        batch_size: videos or texts embedded at once.
        device: as in `load`.
        precision: as in `load`.
        run: run that the method is from; None for a plain CLIP.
        source: path or name that `load` opens; "" for a method made otherwise.
        merge: as `load` was given it.
    """

    def __init__(
        self,
        method: Method,
        data: DataConfig,
        *,
        batch_size: int = 64,
        device: str = "auto",
        precision: Precision = "fp32",
        run: LoadedRun | None = None,
        source: str = "",
        merge: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
        check_inputs(method.architecture, data)
        self.method, self.data, self.batch_size, self.run = method.eval(), data, batch_size, run
        self.source, self.merge = source, merge
        self.device, self.precision = choose_device(device), precision
        self.fingerprint = method.fingerprint()  # of the weights before a narrower precision
        prepare_method(method, EngineConfig(precision=precision), self.device)

    def identity(self) -> dict[str, Any]:
        """Return what decides the embeddings: the model, its trained weights, precision and data."""
        weights = 0
        for _, tensor in sorted(self.method.trained_state().items()):
            weights = zlib.crc32(tensor.float().cpu().contiguous().numpy().data, weights)
        return {
            "model": self.fingerprint,
            "trained": weights,
            "step": None if self.run is None else self.run.step,
            "precision": self.precision,
            "data": self.data.model_dump(mode="json", exclude=NEUTRAL),
        }

    def embed_videos(
        self,
        videos: Sequence[Video],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool | None = None,
    ) -> Embeddings:
        """Embed videos, with frames sampled as in evaluation.

        Args:
            videos: each a path, a (path, start, end) in seconds with None for the start or end of the file,
                or frames f y x 3, uint8 RGB, of which at most `data.frames` are used, evenly spaced.
            on_error: "skip" leaves out videos that cannot be read; `index` and `refused` of the result show
                which rows are there and what was wrong with the others.
            progress: show a bar; None shows it on a terminal if embedding takes long.

        Raises:
            DecodeError: a video cannot be read; it is named.
            NoneReadable: all videos are refused.
            ValueError: no video, or an input of another kind.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error: expected 'raise' or 'skip', found {on_error!r}")
        if len(videos) == 0:
            raise ValueError("videos: expected at least one, found none")
        clips, arrays = _clips(videos)
        size = self.method.architecture.image_size
        reader = clip_reader(clips, self.data, size, training=False)
        if arrays:
            if self.data.decoder == "dali" and len(arrays) < len(clips):
                raise ValueError(
                    "videos: expected only paths or only frames with decoder = 'dali', found both"
                )
            reader = ArrayClipReader(arrays, reader, size)
        refused: list[BadClip] = []
        index: list[Tensor] = []

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            read = readable_batches(clips, self.data, size, self.batch_size, reader=reader)
            with terminal.progress("embedding", len(clips), "videos", show=progress) as bar:
                for batch, reasons in terminal.counted(read, bar):
                    for place, reason in zip(batch.clip_index.tolist(), reasons, strict=True):
                        if reason is None:
                            continue
                        path = clips[place].video
                        if on_error == "raise":
                            raise DecodeError(path, f"{reason}; on_error='skip' leaves such videos out")
                        refused.append(BadClip(id=str(place), video=str(path), reason=reason))
                    readable = torch.tensor([reason is None for reason in reasons])
                    if readable.any():
                        index.append(batch.clip_index[readable])
                        yield batch.frames[readable], batch.frame_mask[readable]
            if not index:
                raise NoneReadable(refused)

        embedding = embed_videos(self.method, batches(), self.device)
        return Embeddings.of(embedding, torch.cat(index), refused)

    def embed_texts(self, texts: Sequence[str], *, progress: bool | None = None) -> Embeddings:
        """Embed texts.

        Args:
            texts: captions or queries.
            progress: as in `embed_videos`.

        Raises:
            ValueError: no text, or one that is longer than the context if `data.long_captions` is "error".
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts: expected a list of strings, found {texts!r}"[:200])
        if len(texts) == 0:
            raise ValueError("texts: expected at least one, found none")
        data = self.data
        _check_lengths(texts, data)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            with terminal.progress("embedding", len(texts), "texts", show=progress) as bar:
                tokens = text_batches(texts, data.context_length, self.batch_size, data.tokenizer)
                yield from terminal.counted(tokens, bar)

        return Embeddings.of(embed_texts(self.method, batches(), self.device))

    def similarity(self, text: Embeddings, video: Embeddings) -> Tensor:
        """Return the method's own similarity of all texts and videos, t v, on the CPU; higher is closer."""
        tile = similarity_tile(self.method, text.embedding(), video.embedding(), self.device)
        return torch.from_numpy(similarity_matrix(tile, len(text), len(video)))


def load(
    path: str | Path,
    *,
    device: str = "auto",
    precision: Precision = "fp32",
    batch_size: int | None = None,
    data: Mapping[str, Any] | None = None,
    peft: str | Path | None = None,
    merge: int | None = None,
) -> Model:
    """Open a trained or a plain model to embed videos and texts.

    Args:
        path: run directory (its best checkpoint, or the newest if none was selected), checkpoint, folder that
            `discovla export` wrote, the same on Hugging Face's hub ("hf:USER/NAME"), or a plain CLIP with
            mean pooling: "clip:ARCH@TAG", "clip:ARCH@FILE" by open_clip's names, or "clip:drawn".
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        precision: "fp32", as `discovla evaluate` computes, "bf16" or "fp8".
        batch_size: videos or texts embedded at once; default: `eval_batch_size` of the run.
        data: keys of the run's `data` table to change, such as {"frames": 8}.
        peft: folder with LoRA in PEFT's format, for open_clip or transformers, to add to a plain CLIP.
        merge: number of similar tokens that every block of the vision tower merges in each frame, without
            training (ToMe, arXiv 2210.09461): later blocks read fewer tokens, and
            features differ.  None: as the model was trained.

    Raises:
        ConfigError: nothing of these at the path, a wrong key in `data`, or `merge` for a model that merges
            already or whose towers do not allow it.
        CheckpointError: a broken checkpoint, or one of other pretrained weights than its config names.
        ValueError: an unknown model, device or precision.
    """
    name = str(path)
    if peft is not None and not name.startswith(PLAIN):
        raise ConfigError(f"peft: expected a plain CLIP ({PLAIN}ARCH@TAG) to add it to, found {name}")
    if name.startswith(PLAIN):
        method = _plain_method(_plain_config(name), peft)
        config = DataConfig.model_validate({"manifest": Path(), **tower_inputs(method.architecture)})
        run, size = None, 64
        if merge is not None:
            merge_tokens(method, merge, name)
    else:
        run = load_run(path, merge=merge)
        method, config, size = run.method, run.config.data, run.config.eval_batch_size
    return Model(
        method,
        _data_config(config, data or {}),
        batch_size=size if batch_size is None else batch_size,
        device=device,
        precision=precision,
        run=run,
        source=_source(name),
        merge=merge,
    )


def load_run(path: Path | str, *, merge: int | None = None) -> LoadedRun:
    """Load a run, on the CPU.

    Args:
        path: run directory: its best checkpoint, or the newest if none was selected; checkpoint; export; or
            "hf:USER/NAME", an export on Hugging Face's hub.
        merge: as in `load`.

    Raises:
        ConfigError: no run there, or one that `merge` does not go with.
        CheckpointError: a broken checkpoint, or one of other pretrained weights than its config names.
    """
    run = _load_trained(path)
    if merge is not None:
        merge_tokens(run.method, merge, str(path))
    return run


def _load_trained(path: Path | str) -> LoadedRun:
    """Load a run as it was trained."""
    if str(path).startswith(HUB):
        return _load_export(download_export(str(path).removeprefix(HUB)))
    path = Path(path)
    if (path / ADAPTER).is_file():
        return _load_export(path / ADAPTER)
    if (path / checkpoint.STATE).is_file():
        stored = checkpoint.load(path)
    else:
        best = checkpoint.best(path / "checkpoints")
        stored = checkpoint.load(best[0]) if best else checkpoint.latest(path / "checkpoints")
    if stored is None:
        raise ConfigError(
            f"{path}: expected a run directory, a checkpoint or an export, found no checkpoint there"
        )
    config = parse_config(translate_stored(stored.meta["config"]), str(stored.path / checkpoint.STATE))
    method = build(config.model, config.method)
    checkpoint.check_fingerprint(stored.meta["fingerprint"], method.fingerprint(), str(stored.path))
    method.load_trained_state(checkpoint.selected_weights(stored))
    return LoadedRun(config=config, method=method, step=stored.step)


def _load_export(path: Path) -> LoadedRun:
    """Load the adapter of an export on the pretrained weights that its config names."""
    trained, metadata = read_tensors(path, "the export of a run")
    if not {"config", "step"} <= set(metadata):
        raise ConfigError(f"{path}: expected the config of a run in its metadata, found none")
    config = parse_config(translate_stored(json.loads(metadata["config"])), str(path))
    method = build(config.model, config.method)
    if "fingerprint" in metadata:  # exports of earlier versions have none
        checkpoint.check_fingerprint(json.loads(metadata["fingerprint"]), method.fingerprint(), str(path))
    method.load_trained_state(trained)
    return LoadedRun(config=config, method=method, step=int(metadata["step"]))


def merge_tokens(method: Method, per_block: int, source: str) -> None:
    """Merge similar tokens in every block of a method's vision tower, without training; see `load`.

    Raises:
        ConfigError: the method merges already, or it or its towers do not allow it; the message has `source`.
    """
    config = method.config
    if per_block < 1:
        raise ConfigError(f"{source}: merge: expected at least 1 token a block, found {per_block}")
    if config.merge != "none":
        raise ConfigError(
            f"{source}: merge: expected a model that was trained with all tokens, found method.merge = "
            f"{config.merge!r}"
        )
    values = {**config.model_dump(), "merge": "tome", "merging": MergeConfig(per_block=per_block)}
    try:
        method.merge_untrained(type(config).model_validate(values))
    except ValidationError as error:
        raise ConfigError(f"{source}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def _plain_method(model: ModelConfig, peft: str | Path | None) -> Method:
    """Build a plain CLIP, with LoRA of PEFT's format if there is some."""
    method = build(model, CLIPConfig(tune="frozen"))
    if peft is None:
        return method
    updates = read_peft(Path(peft), method.architecture)
    rank = len(next(iter(updates.values()))[0])
    adapted = build(model, CLIPConfig(tune="lora", lora_rank=rank))
    apply_peft(adapted, updates)
    return adapted


def download_export(repository: str) -> Path:
    """Download the adapter of an export from Hugging Face's hub, unless it is in the cache.

    Args:
        repository: USER/NAME.

    Raises:
        ConfigError: there is no such export, or no connection.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        offline = not reachable(constants.ENDPOINT)
        return Path(hf_hub_download(repository, ADAPTER, local_files_only=offline))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{HUB}{repository}: expected {ADAPTER} on the hub, found {reason}") from None


def _plain_config(name: str) -> ModelConfig:
    """Return the model that "clip:ARCH@TAG", "clip:ARCH@FILE" or "clip:drawn" names."""
    architecture, at, weights = name.removeprefix(PLAIN).partition("@")
    if name.removeprefix(PLAIN) in DRAWN:
        return ModelConfig(pretrained=name.removeprefix(PLAIN))
    if not (at and architecture and weights):
        raise ConfigError(f"{name}: expected clip:ARCH@TAG, clip:ARCH@FILE or clip:drawn")
    return ModelConfig(architecture=architecture, pretrained=weights)


def _source(name: str) -> str:
    """Return a path or name that means the same in every folder."""
    prefix, at, weights = name.rpartition("@") if name.startswith(PLAIN) else ("", "", name)
    return prefix + at + (os.path.abspath(weights) if os.path.exists(weights) else weights)


def _data_config(config: DataConfig, changes: Mapping[str, Any]) -> DataConfig:
    """Return the config for videos from files, with some keys changed."""
    values = {**config.model_dump(), "shards": None, "manifest": Path(), "stills": None, **changes}
    try:
        return DataConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"data.{key}: {first['msg']}, found {first['input']!r}") from None


def _check_lengths(texts: Sequence[str], data: DataConfig) -> None:
    """Refuse a text that is longer than the context, or warn that it is cut, as `data.long_captions` asks."""
    if data.long_captions == "error":
        tokens = make_tokenizer(data.context_length, data.tokenizer)
        for text in texts:
            if (length := tokens.length(text)) > data.context_length:
                most = f"expected at most {data.context_length} tokens each"
                raise ValueError(f"texts: {most}, found {length}: {text[:80]!r}")
    captions = Clip(id="texts", video=Path(), captions=tuple(texts), split="")
    check_captions([captions], data.context_length, long=data.long_captions, tokenizer=data.tokenizer)


def _clips(videos: Sequence[Video]) -> tuple[list[Clip], dict[str, np.ndarray]]:
    """Return a clip for each video, and the frames of those given as arrays by the id of the clip."""
    clips: list[Clip] = []
    arrays: dict[str, np.ndarray] = {}
    for place, video in enumerate(videos):
        name, path, start, end = str(place), Path(f"videos[{place}]"), None, None
        match video:
            case str() | Path():
                path = Path(video)
            case (str() | Path() as file, start, end):
                path = Path(file)
                if not all(x is None or isinstance(x, int | float) for x in (start, end)):
                    raise ValueError(
                        f"videos[{place}]: expected start and end in seconds, found {start!r}, {end!r}"
                    )
            case np.ndarray() | Tensor():
                arrays[name] = _frames(video, place)
            case _:
                raise ValueError(
                    f"videos[{place}]: expected a path, (path, start, end) or frames f y x 3, found "
                    f"{type(video).__name__}"
                )
        clips.append(Clip(id=name, video=path, captions=("",), split="", start=start, end=end))
    return clips, arrays


def _frames(video: np.ndarray | Tensor, place: int) -> np.ndarray:
    """Return frames in memory as an array, after a check."""
    frames = video.numpy(force=True) if isinstance(video, Tensor) else video
    if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape or frames.dtype != np.uint8:
        raise ValueError(
            f"videos[{place}]: expected frames f y x 3 of uint8, found shape {frames.shape} of {frames.dtype}"
        )
    return frames
