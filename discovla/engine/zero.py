"""How the engine runs a step, and the DeepSpeed settings that follow from it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from discovla.engine.distributed import Wire
from discovla.engine.optim import OptimConfig
from discovla.ops.dispatch import Memory

LARGE = 100_000_000  # trained parameters; above, splitting the optimiser's 8 bytes for each is worth it
LARGEST_BUCKET = 50_000_000  # elements that travel, and are buffered, at once


class EngineConfig(BaseModel):
    """What carries out a training step, and in which precision.

    device: "auto" takes a GPU where there is one.
    strategy: "deepspeed" or plain "torch".
    zero_stage: what DeepSpeed splits over ranks: 0 nothing, 1 optimiser state, 2 and gradients, 3 and
        parameters. "auto" is 0 up to 100 million trained parameters or on one process, else 1.
    offload: where the optimiser's state, and its update, go from the GPU: "cpu" memory; "none" keeps them.
        For zero_stage >= 1, which "auto" then takes.
    offload_parameters: keep parameters there too, but for those under way; for zero_stage 3.
    precision: "fp32"; "bf16": frozen weights and compute in bf16, trained parameters in fp32; "fp8": as that,
        but frozen linear layers multiply in 8 bits: for GPUs of Hopper and later, emulated on a CPU;
        "fp8_backward": the gradients that pass them too, for one more byte a frozen weight.
    residual: what blocks add up their updates in, where precision is not "fp32".
    bf16_parameters: DeepSpeed's own bf16 mode, which casts trained parameters too and keeps fp32 masters;
        only for full fine-tuning, with precision "bf16" and stage >= 1.
    impl: what computes the blocks of the towers: "torch" plainly, "triton" by the kernels, "reference" by
        their formulas. "auto" takes what has been found fastest on the device.
    memory: what these blocks keep of a token for backward, in widths of the tower: "keep" 9,
        "recompute_mlp" 5 for 16 % more work, "recompute_projections" 2 for 30 %, "recompute_blocks" 1 for
        33 %, counted for ViT-B/32; "auto" takes the first that the free memory of a GPU holds, and on a CPU
        "keep".
    distinct_captions: let identical captions pass as one what no other caption is seen in: the same numbers,
        for less work where captions of neighbouring frames repeat.
    capture: "graph" records a step and its backward as a CUDA graph for every shape of batch, which is then
        one launch; captions take up to 5 % more rows, so that few shapes come.  On GPUs, whose memory for
        activations stays taken, and that of the gradients once for each shape; steps with clips that could
        not be read, and the first of a shape, are taken as by "none".  "auto" is ZeRO stage 0 then.
    grad_scale: "exact" makes the gradient of many processes that of one; "official" leaves it 1/W, as
        released.
    wire: what embeddings and their gradients travel between processes in: "compute" in the dtype the towers
        compute in, 2 bytes a number below precision "fp32", "fp32" never in less than 4.  Sums are made in 4.
    accumulate: parts in which a process encodes its clips of a step. Above 1, activations are kept for one
        part at a time and computed again in backward, or after it at zero_stage 3; loss and gradient stay
        those of the whole batch.
    join_within: seconds for all processes of the run to come together, before those that came give up.
    lost_after: seconds without a sign of life after which a process counts as lost; one that ends is noticed
        at once.
    pace_every: steps between comparisons of the ranks' own time, which name those that hold the others up.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = "auto"
    strategy: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    offload: Literal["none", "cpu"] = "none"
    offload_parameters: bool = False
    precision: Literal["fp32", "bf16", "fp8", "fp8_backward"] = "fp32"
    residual: Literal["bf16", "fp32"] = "bf16"
    bf16_parameters: bool = False
    impl: Literal["auto", "reference", "torch", "triton"] = "auto"
    memory: Memory = "auto"
    distinct_captions: bool = False
    capture: Literal["none", "graph"] = "none"
    grad_scale: Literal["exact", "official"] = "exact"
    wire: Wire = "compute"
    accumulate: int = Field(default=1, ge=1)
    join_within: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    lost_after: float = Field(default=60.0, gt=10, allow_inf_nan=False)
    pace_every: int = Field(default=100, ge=1)

    @model_validator(mode="after")
    def _bf16_parameters_need_zero(self) -> EngineConfig:
        if self.bf16_parameters and (
            self.strategy != "deepspeed" or self.precision != "bf16" or self.zero_stage == 0
        ):
            raise ValueError(
                "bf16_parameters: expected strategy deepspeed, precision bf16 and zero_stage >= 1, found "
                f"{self.strategy}, {self.precision} and {self.zero_stage}"
            )
        return self

    @model_validator(mode="after")
    def _captured_steps_keep_their_shape(self) -> EngineConfig:
        for key, plain in (
            ("accumulate", (1,)),
            ("distinct_captions", (False,)),
            ("zero_stage", ("auto", 0)),
            ("bf16_parameters", (False,)),
            ("offload", ("none",)),
            ("impl", ("auto", "torch", "triton")),
        ):
            if self.capture == "graph" and (found := getattr(self, key)) not in plain:
                raise ValueError(f"capture: expected 'none' with {key} = {found!r}, found 'graph'")
        return self

    @field_validator("offload", mode="before")
    @classmethod
    def _drives_hold_no_state(cls, value: Any) -> Any:
        if value == "nvme":
            raise ValueError("expected 'none' or 'cpu': checkpoints do not reach state that lies on a drive")
        return value

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> EngineConfig:
        if self.offload != "none" and (self.strategy != "deepspeed" or self.zero_stage == 0):
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
    def _fp8_weights_are_whole(self) -> EngineConfig:
        if self.precision.startswith("fp8") and self.zero_stage == 3:
            raise ValueError(
                f"precision: expected 'fp32' or 'bf16' at zero_stage 3, found {self.precision!r}"
            )
        return self


def choose_stage(config: EngineConfig, trained: int, world_size: int) -> int:
    """The ZeRO stage of a run that trains `trained` parameters on `world_size` processes."""
    if config.zero_stage != "auto":
        return config.zero_stage
    if config.capture == "graph":
        return 0
    if config.bf16_parameters or config.offload != "none":
        return 1
    return 1 if world_size > 1 and trained > LARGE else 0


def zero_json(
    config: EngineConfig, optim: OptimConfig, *, micro_batch: int, world_size: int, trained: int
) -> dict[str, Any]:
    """The settings `deepspeed.initialize` takes.

    Args:
        config: of the engine.
        optim: of the optimiser; at stage 0 clipping is the strategy's own, for DeepSpeed's forgets the norm.
        micro_batch: clips of a step on one process.
        world_size: processes.
        trained: trained parameters, to size the buckets: DeepSpeed's default would take 2 GB for adapters.
    """
    stage = choose_stage(config, trained, world_size)
    bucket = max(2, min(LARGEST_BUCKET, trained + trained % 2))  # DeepSpeed wants it even
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "train_batch_size": micro_batch * world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip_grad_norm if stage > 0 and optim.clip_grad_norm else 0.0,
        "zero_allow_untested_optimizer": True,  # elementwise, so a flat partition changes nothing
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "bf16": {"enabled": config.bf16_parameters},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,  # one order of sums: a run can be repeated bit for bit
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    if config.offload != "none":
        settings["zero_optimization"]["offload_optimizer"] = {"device": config.offload, "pin_memory": True}
    if config.offload_parameters:
        settings["zero_optimization"]["offload_param"] = {"device": config.offload, "pin_memory": True}
    if stage == 3:
        settings["zero_optimization"]["stage3_prefetch_bucket_size"] = bucket
        # one backward a step, or with parts several
        settings["managed_gradient_accumulation"] = config.accumulate == 1
    return settings
