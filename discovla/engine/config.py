"""Settings of the training engine, and the ZeRO stage that follows from them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from discovla.engine.distributed import CommDtype, GradScale
from discovla.ops.dispatch import Memory

SHARDING_THRESHOLD = 100_000_000  # trained parameters above which sharding the optimiser state saves memory


class EngineConfig(BaseModel):
    """Device, precision, sharding and timeouts of a training run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; "auto" takes a GPU if there is one."""

    strategy: Literal["auto", "deepspeed", "torch"] = "auto"
    """Library that reduces gradients and updates parameters: DeepSpeed, or plain torch (no sharding). "auto"
    takes DeepSpeed on several processes, and on one with a zero_stage above 0, offload or bf16_parameters."""

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage: what DeepSpeed shards over ranks. 0 nothing, 1 optimiser state, 2 also gradients, 3 also
    parameters. "auto" is 1 for more than 100 million trained parameters on several processes, else 0."""

    offload: Literal["none", "cpu"] = "none"
    """Where the optimiser state lies and is updated: "none" on the GPU, "cpu" in the host's memory. "cpu"
    needs zero_stage >= 1; "auto" is then 1."""

    offload_parameters: bool = False
    """Also keep parameters in the host's memory and copy them to the GPU when a layer needs them. Needs
    offload "cpu" and zero_stage 3."""

    precision: Literal["auto", "fp32", "bf16", "fp8", "fp8_backward"] = "auto"
    """Compute precision. "auto": "bf16" on a GPU that has it, else "fp32". "bf16": frozen weights and compute
    in bf16, trained parameters in fp32. "fp8": as bf16, with frozen linear layers multiplied in FP8 (Hopper
    or later; emulated on a CPU). "fp8_backward": gradients through these layers in FP8 too, for one more byte
    per frozen weight."""

    tf32: bool = True
    """Multiply float32 matrices in TF32 on a GPU, which keeps 10 of 23 bits of each factor. It concerns
    whatever is float32: the losses, and with precision "fp32" the towers. A CPU has no TF32."""

    residual_dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of the residual stream of the towers when precision is not "fp32"."""

    bf16_parameters: bool = False
    """Use DeepSpeed's bf16 mode, which casts trained parameters to bf16 and keeps fp32 master copies. For
    full fine-tuning only; needs precision "bf16" and zero_stage >= 1."""

    impl: Literal["auto", "reference", "torch", "compiled", "ops", "triton"] = "auto"
    """Implementation of the transformer blocks: plain "torch", the same "compiled" by torch.compile, "triton"
    kernels, "ops" (each op by its own choice), or the "reference" formulas. "auto" takes what `tune` measured
    as fastest on this GPU; without a measurement "compiled" if torch.compile works, else "torch". On a CPU,
    and at zero_stage 3, it is "torch"."""

    tune: str = "auto"
    """Measurement from which impl = "auto" chooses on a GPU. "auto": the first start checks the
    implementations of each op against float64 and times them, which takes about a minute, and keeps the
    choices in the user's cache folder (DISCOVLA_CACHE). "off": none. Else a file of choices that `discovla
    tune` has written."""

    memory: Memory = "auto"
    """Activations that a transformer block keeps for backward, in tower widths per token (ViT-B/32): "keep"
    9, "recompute_mlp" 5 for 16 % more work, "recompute_projections" 2 for 30 %, "recompute_blocks" 1 for 33
    %. "auto" takes the first that fits the free GPU memory, and "keep" on a CPU."""

    frozen_features: Literal["auto", "off"] = "auto"
    """"auto": if the vision tower or its first blocks are frozen, every epoch reads the same frames without
    augmentation and clips are read twice or more, encode each training clip once and
    train from its features, or its tokens after the last frozen block, in `directory`/features. The losses
    keep every bit in fp32. "off": encode frames in every step."""

    frozen_views: int = Field(default=0, ge=0)
    """Number of augmentations of each clip that frozen_features encodes, each once; a sample
    reads one of them. 0: augmented frames are encoded in every step."""

    distinct_captions: bool = False
    """Encode identical captions of a batch once. Same numbers; less work if captions of neighbouring frames
    repeat."""

    capture: Literal["none", "graph"] = "none"
    """"graph" records forward and backward as a CUDA graph per batch shape and replays it in one launch.
    Needs a GPU and ZeRO stage 0 ("auto" is then 0). Pads captions by up to 5 % of rows to keep the shapes
    few. The memory of activations, and of gradients once per shape, stays allocated. The first step of a
    shape and steps with unreadable clips run unrecorded."""

    grad_scale: GradScale = "exact"
    """"exact": gradients equal those of one process with the whole batch. "official": gradients through the
    gathered embeddings are scaled by 1/W on W processes, as in the released code of DiscoVLA."""

    comm_dtype: CommDtype = "compute"
    """Dtype of embeddings and their gradients sent between processes: "compute" is the towers' compute dtype,
    "fp32" is never narrower than float32. Sums are always made in float32."""

    grad_cache_chunks: int = Field(default=1, ge=1)
    """Gradient caching: encode a process's clips in this many chunks and keep the activations of one chunk at
    a time; backward encodes each chunk again. Loss and gradient stay those of the whole batch."""

    rendezvous_timeout: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    """Seconds to wait at start for all processes of the run. After it the run ends and names the missing
    ranks."""

    heartbeat_timeout: float = Field(default=60.0, gt=10, allow_inf_nan=False)
    """Seconds without a heartbeat after which a process counts as lost. A process that exits is noticed at
    once."""

    straggler_check_every: int = Field(default=100, ge=1)
    """Steps between comparisons of the ranks' own time per step; slow ranks are named in the log."""

    @field_validator("offload", mode="before")
    @classmethod
    def _refuse_nvme(cls, value: Any) -> Any:
        if value == "nvme":
            raise ValueError("expected 'none' or 'cpu': checkpoints cannot include optimiser state on NVMe")
        return value

    @model_validator(mode="after")
    def _check_bf16_parameters(self) -> EngineConfig:
        if self.bf16_parameters and (
            self.strategy == "torch" or self.precision != "bf16" or self.zero_stage == 0
        ):
            raise ValueError(
                "bf16_parameters: expected strategy deepspeed, precision bf16 and zero_stage >= 1, found "
                f"{self.strategy}, {self.precision} and {self.zero_stage}"
            )
        return self

    @model_validator(mode="after")
    def _check_capture(self) -> EngineConfig:
        if self.capture == "none":
            return self
        for key, allowed in (
            ("grad_cache_chunks", (1,)),
            ("distinct_captions", (False,)),
            ("zero_stage", ("auto", 0)),
            ("bf16_parameters", (False,)),
            ("offload", ("none",)),
            ("impl", ("auto", "torch", "compiled", "ops", "triton")),
        ):
            value = getattr(self, key)
            if value not in allowed:
                raise ValueError(f"capture: expected 'none' with {key} = {value!r}, found 'graph'")
        return self

    @model_validator(mode="after")
    def _check_offload(self) -> EngineConfig:
        if self.offload != "none" and (self.strategy == "torch" or self.zero_stage == 0):
            raise ValueError(
                f"offload: expected strategy deepspeed and zero_stage >= 1 with {self.offload!r}, found "
                f"{self.strategy} and {self.zero_stage}"
            )
        if self.offload_parameters and (self.offload == "none" or self.zero_stage != 3):
            raise ValueError(
                "offload_parameters: expected offload 'cpu' and zero_stage 3, found "
                f"{self.offload!r} and {self.zero_stage}"
            )
        return self

    @model_validator(mode="after")
    def _check_fp8(self) -> EngineConfig:
        if self.precision.startswith("fp8") and self.zero_stage == 3:
            raise ValueError(
                f"precision: expected 'fp32' or 'bf16' at zero_stage 3, found {self.precision!r}"
            )
        return self


def resolve_precision(config: EngineConfig, device: torch.device) -> EngineConfig:
    """Return the config with precision "auto" replaced by the precision of the device."""
    if config.precision != "auto":
        return config
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.model_copy(update={"precision": "bf16" if bf16 else "fp32"})


def set_tf32(config: EngineConfig, device: torch.device) -> None:
    """Allow or forbid TF32 in this process's products and convolutions on GPUs, as `engine.tf32` says."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32


def choose_stage(config: EngineConfig, trained: int, world_size: int) -> int:
    """Return the ZeRO stage of a run that trains `trained` parameters on `world_size` processes."""
    if config.zero_stage != "auto":
        return config.zero_stage
    if config.capture == "graph":
        return 0
    if config.bf16_parameters or config.offload != "none":
        return 1
    return 1 if world_size > 1 and trained > SHARDING_THRESHOLD else 0


def choose_strategy(config: EngineConfig, trained: int, world_size: int) -> tuple[str, str]:
    """Return the name of a run's strategy, and the reason in words."""
    if config.strategy != "auto":
        return config.strategy, "engine.strategy"
    if stage := choose_stage(config, trained, world_size):
        return "deepspeed", f"ZeRO stage {stage}"
    return ("torch", "one process") if world_size == 1 else ("deepspeed", f"{world_size} processes")
