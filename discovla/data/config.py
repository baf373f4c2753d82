"""What is read and how, as a run's config says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from discovla.data.sampling import Sampler, Sampling, Slice
from discovla.data.video.frames import Damaged, DecoderName

Augment = Literal["none", "light", "randaugment", "resized_crop"]
FULL_SIZE = ("randaugment", "resized_crop")  # what changes frames before they are made small
LongCaptions = Literal["error", "truncate"]
Resident = Literal["none", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class FrameSettings:
    """How clips become frames: which (see `Sampling`), how large, and what of files that break off.

    decoder: see `Decoder`.  limit: seconds that a file may take, in a process that is replaced where it does
    not survive it; None reads in this process and without limit.
    """

    frames: int
    image_size: int
    sampling: Sampler = "discovla"
    sample_rate: float = 1.0
    sampling_divisor: int = 1
    sampling_slice: Slice = "even"
    damaged: Damaged = "refuse"
    cache: Path | None = None
    decoder: DecoderName = "pyav"
    limit: float | None = None


class StillsConfig(BaseModel):
    """Drawn stills to train on: `count` in an epoch, with one thing each in the first `easy_epochs`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(ge=1)
    easy_epochs: int = Field(default=0, ge=0)


class DataConfig(BaseModel):
    """What is read and how.

    manifest: JSONL of the clips.  shards: folder or http(s) address of what `discovla shard` wrote, whose
    clips, captions and frames take the place of the manifest's.
    train_split, val_split, test_split: which of the clips are for what; no val_split, no selection.
    frames: how many the model sees.  sampling, sample_rate, sampling_divisor, sampling_slice: which of a
    clip, see `Sampling`; frames that a short clip lacks are masked placeholders.
    context_length: tokens of a caption.
    augment: `randaugment` is DiscoVLA's, `resized_crop` T2VParser's, `light` a cheap one.
    long_captions: what is done with a caption longer than the context; missing_frame_captions: with one that
    has no frame captions where the method needs them; damaged: with a clip that breaks off.
    bad_clip_share: largest share of clips found bad in training before it stops.  quarantine: list of clips
    that are not trained on, as `discovla doctor` writes it.
    cache: folder for decoded frames and for what is known of each file; the frames serve everything but
    training with an augmentation that works on frames of full size, with a sampling that draws frames anew,
    and all that `dali` decodes.
    decoder: who decodes, see `Decoder`; `auto` measures on the first clips, see `choose_decoder` too; `dali`
    makes the frames of a batch at once, of files or of shards, on the GPU where there is one, see
    `DaliClipReader`, and `dali+pyav` leaves to PyAV what it would read otherwise.  decode_seconds:
    how long a clip, or a batch of `dali`, may take before it counts as bad and its process is replaced.
    workers: processes that read, 0 reads in the training process.  stills: train on stills drawn in memory
    instead of the clips of the train_split.  resident: hold the frames of all training clips in memory, the
    host's (`cpu`, pinned where there is a GPU) or the GPU's; each process holds its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: str | None = Field(default=None, min_length=1)
    manifest: Path | None = Field(default=None, validate_default=True)
    train_split: str = "train"
    val_split: str | None = "val"
    test_split: str = "test"
    frames: int = Field(default=12, ge=1)
    sampling: Sampler = "discovla"
    sample_rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    sampling_divisor: int = Field(default=1, ge=1)
    sampling_slice: Slice = "even"
    context_length: int = Field(default=32, ge=2)
    augment: Augment = "none"
    long_captions: LongCaptions = "error"
    missing_frame_captions: Literal["error", "drop"] = "error"
    damaged: Damaged = "refuse"
    bad_clip_share: float = Field(default=0.01, ge=0, le=1)
    quarantine: Path | None = None
    cache: Path | None = None
    decoder: DecoderName | Literal["dali", "dali+pyav"] = "pyav"
    decode_seconds: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    workers: int = Field(default=2, ge=0)
    stills: StillsConfig | None = None
    resident: Resident = "none"

    @field_validator("manifest")
    @classmethod
    def _clips_from_somewhere(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is None and info.data.get("shards") is None:
            raise ValueError("expected a manifest, or data.shards")
        return value

    @field_validator("cache", "quarantine", mode="before")
    @classmethod
    def _nothing_is_none(cls, value: object) -> object:
        return None if value == "" else value  # an empty path would be the folder the run is started in

    @field_validator("resident")
    @classmethod
    def _frames_that_stay(cls, value: str, info: ValidationInfo) -> str:
        augment, sampling = info.data.get("augment"), info.data.get("sampling", "discovla")
        moves = Sampling(frames=1, sampler=sampling).is_random
        if value != "none" and (augment in FULL_SIZE or moves or info.data.get("stills") is not None):
            raise ValueError("expected 'none' with an augment, sampling or stills that draw frames anew")
        return value

    @field_validator("sample_rate")
    @classmethod
    def _a_rate_that_the_sampling_knows(cls, value: float, info: ValidationInfo) -> float:
        sampling = info.data.get("sampling")
        if sampling == "t2vparser" and value != 1:
            raise ValueError("expected 1.0: sampling = 't2vparser' takes frames of segments, at no rate")
        if sampling == "clip4clip" and value != int(value):
            raise ValueError("expected a whole number of frames a second with sampling = 'clip4clip'")
        return value

    @field_validator("sampling_divisor", "sampling_slice")
    @classmethod
    def _an_option_of_the_sampling(cls, value: int | str, info: ValidationInfo) -> int | str:
        owner = {"sampling_divisor": "clip2video", "sampling_slice": "clip4clip"}[str(info.field_name)]
        if value not in (1, "even") and info.data.get("sampling", owner) != owner:
            raise ValueError(f"expected none without sampling = {owner!r}, whose option it is")
        return value
