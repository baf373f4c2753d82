"""The `data` table of a run's config."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from discovla.data.sampling import Sampler, Slice
from discovla.data.tokens import split_tokenizer
from discovla.data.video.frames import Damaged, Hdr, Interpolation, Resize

Augment = Literal["none", "light", "randaugment", "resized_crop"]
FULL_SIZE = ("randaugment", "resized_crop")  # augmentations that are applied before frames are resized
LongCaptions = Literal["error", "truncate"]


class StillsConfig(BaseModel):
    """Training on stills of the drawn world, drawn in memory."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    count: int = Field(ge=1)
    """Stills in an epoch."""

    easy_epochs: int = Field(default=0, ge=0)
    """First epochs whose stills show one thing each."""

    moment: Literal["start_or_end", "end"] = "start_or_end"
    """Moment that a still shows of a move or a change of colour in its caption: "start_or_end" one of both by
    chance, so that "from P to Q" and "from Q to P" are as likely captions of it, or "end"."""


class DataConfig(BaseModel):
    """Clips, their frames and captions, and the processes that read them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    shards: str | None = Field(default=None, min_length=1)
    """Folder or URL of the shards that `discovla shard` wrote.  Clips, captions and frames are read from it
    instead of from `manifest` and the video files."""

    manifest: Path | None = Field(default=None, validate_default=True)
    """JSONL manifest of the clips; required unless `shards` is set."""

    train_split: str = "train"
    """Split of the training clips."""

    val_split: str | None = "val"
    """Split on which the best checkpoint is selected; empty tests the last checkpoint."""

    test_split: str | None = "test"
    """Split of the final evaluation.  Where the clips have no split of the default name, or with an empty
    name, it is `val_split`, whose figures are optimistic because the best step is selected on them."""

    frames: int = Field(default=12, ge=1)
    """Frames of a clip that the model sees.  Those that a short clip lacks are black and masked."""

    sampling: Sampler = "discovla"
    """Method by which frames are sampled: `discovla` (evenly, at `sample_rate`), `clip4clip` (whole frames of
    each second), `clip2video` (from frames stored at `sample_rate`, shifted at random in training) or
    `t2vparser` (one per segment, at random in training)."""

    sample_rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Frames a second that `sampling` reads; `clip4clip` needs a whole number, `t2vparser` 1."""

    sampling_divisor: int = Field(default=1, ge=1)
    """Divisor of the number of stored frames; `clip2video` only."""

    sampling_slice: Slice = "even"
    """Frames that are kept of a clip with more than `frames`: `even`, `first` or `last`; `clip4clip` only."""

    context_length: int = Field(default=32, ge=2)
    """Tokens of a caption, start and end included; all of the model's where its text tower reads padding."""

    tokenizer: str = "clip"
    """Tokenizer of captions: "clip", "siglip", "siglip-i18n", "gemma" (SigLIP 2), "xlm-v" (MetaCLIP 2), "mt5"
    or "bert" (CLIPA), as the model needs.  All but "clip" need the package `tokenizers` and a file, which is
    downloaded once, or named: "gemma:/path/to/tokenizer.json"."""

    resize: Resize = "shortest"
    """Resize of frames, as the model needs: `shortest` resizes the short side and cuts out the middle square,
    `squash` changes the aspect."""

    interpolation: Interpolation = "bicubic"
    """Interpolation of the resize, as the model needs: `bicubic` or `bilinear`."""

    augment: Augment = "none"
    """Augmentation of training frames, the same for all frames of a clip: `none`, `light` (brightness and
    contrast), `randaugment` (DiscoVLA's) or `resized_crop` (T2VParser's).  The last two are applied before
    frames are resized."""

    long_captions: LongCaptions = "error"
    """Captions longer than `context_length`: `error` refuses to start, `truncate` cuts them."""

    missing_frame_captions: Literal["error", "drop"] = "error"
    """Training captions without frame captions, where the method needs them: `error` refuses to start, `drop`
    leaves them out."""

    reversed_pairs: bool = False
    """Also train on pairs of a clip played backwards and a caption that is true of it, for the training clips
    whose `reversed_captions` the manifest has.  A batch of n pairs has n / 2 clips, each with its reverse."""

    order_words: Path | None = None
    """TOML file with the phrases that tell the order of events, `words`, and the pairs of phrases that
    exchange, `exchanges`, for method.reversed_negatives and method.swapped_captions.  Default: English."""

    exchanges: Literal["all", "places"] = "all"
    """Exchanges of method.swapped_captions: all, or only those of places ("from P to Q", "moves to P"), the
    ones that reversed pairs teach least; then fewer captions are encoded."""

    damaged: Damaged = "refuse"
    """Videos that decode up to some frame only: `refuse` counts them as bad, `use` reads up to there."""

    hdr: Hdr = "refuse"
    """HDR videos (transfer functions PQ and HLG): `refuse` counts them as bad, `tonemap` maps their frames to
    SDR (decoder `pyav`)."""

    bad_clip_share: float = Field(default=0.01, ge=0, le=1)
    """Largest share of training clips that may turn out bad before the run stops."""

    quarantine: Path | None = None
    """JSONL list of training clips to leave out, as `discovla doctor` writes it."""

    index_dir: Path | None = None
    """Folder in which the frame index of each video file is kept.  Default:
    `$XDG_CACHE_HOME/discovla/frame_index`, or `~/.cache` in place of an unset `$XDG_CACHE_HOME`."""

    decoder: Literal["pyav", "torchcodec", "dali"] = "pyav"
    """Library that decodes frames: `pyav` (all files), `torchcodec` (faster on long videos; extra
    `torchcodec`) or `dali` (whole batches on the GPU, from files or shards; extra `dali`).  A file that the
    library would decode otherwise than PyAV counts as bad.  `discovla doctor --bench` measures them."""

    decode_seconds: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    """Seconds that decoding a clip, or a batch of `dali`, may take.  After that its process is replaced and
    the clip counts as bad."""

    workers: int = Field(default=2, ge=0)
    """Processes that read clips; 0 reads in the training process."""

    stills: StillsConfig | None = None
    """Train on drawn stills instead of the clips of `train_split`."""

    @field_validator("manifest")
    @classmethod
    def _manifest_or_shards(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is None and info.data.get("shards") is None:
            raise ValueError("expected a manifest, or data.shards")
        return value

    @field_validator("quarantine", "index_dir", "order_words", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value  # an empty path would mean the current folder

    @field_validator("tokenizer")
    @classmethod
    def _known_tokenizer(cls, value: str) -> str:
        split_tokenizer(value)
        return value

    @field_validator("decoder", mode="before")
    @classmethod
    def _named_decoder(cls, value: object) -> object:
        if value in ("auto", "dali+pyav"):  # choices that earlier versions had
            raise ValueError("expected a decoder that `discovla doctor MANIFEST --bench` measures")
        return value

    @field_validator("sample_rate")
    @classmethod
    def _rate_of_sampling(cls, value: float, info: ValidationInfo) -> float:
        sampling = info.data.get("sampling")
        if sampling == "t2vparser" and value != 1:
            raise ValueError("expected 1.0 with sampling = 't2vparser', which samples by segment")
        if sampling == "clip4clip" and value != int(value):
            raise ValueError("expected a whole number of frames a second with sampling = 'clip4clip'")
        return value

    @field_validator("sampling_divisor", "sampling_slice")
    @classmethod
    def _option_of_sampling(cls, value: int | str, info: ValidationInfo) -> int | str:
        owner = {"sampling_divisor": "clip2video", "sampling_slice": "clip4clip"}[str(info.field_name)]
        if value not in (1, "even") and info.data.get("sampling", owner) != owner:
            raise ValueError(f"expected the default unless sampling = {owner!r}")
        return value
