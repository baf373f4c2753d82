"""DeepSpeed strategy: its settings, and ZeRO 0 to 3 with sharded state read and written by parameter name.

The library is imported when the first strategy is made, not with this module.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from discovla.batch import Batch, Losses
from discovla.engine.config import EngineConfig, choose_stage
from discovla.engine.distributed import World, init_single_process_group
from discovla.engine.flat import FlatOptimizer
from discovla.engine.grad_cache import GradCache
from discovla.engine.optim import (
    OptimConfig,
    for_partitions,
    make_optimizer,
    set_learning_rate,
    start_state,
)
from discovla.engine.strategy import (
    MOMENTS,
    StepPlan,
    Strategy,
    broadcast_module,
    check_optimizer_state,
    check_state,
    collect_state,
    copy_to_cpu,
    full_shape,
    restore_state,
    trained_size,
)

MAX_BUCKET = 50_000_000  # elements that are buffered and communicated at once
OFFLOAD_MODULE = "deepspeed.runtime.zero.parameter_offload"  # holds the stack of running modules at stage 3


def deepspeed_settings(
    config: EngineConfig, optim: OptimConfig, *, micro_batch: int, world_size: int, trained: int
) -> dict[str, Any]:
    """Return the settings for `deepspeed.initialize`.

    Args:
        config: of the engine.
        optim: of the optimiser; at stage 0 it clips by itself.
        micro_batch: clips per step on one process.
        world_size: number of processes.
        trained: number of trained parameters, for the bucket sizes: DeepSpeed's defaults take 2 GB for
            adapters.
    """
    stage = choose_stage(config, trained, world_size)
    bucket = max(2, min(MAX_BUCKET, trained + trained % 2))  # DeepSpeed needs an even number
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,  # a fixed order of sums, so that runs are reproducible bit for bit
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": config.offload, "pin_memory": True}
    if config.offload_parameters:
        zero["offload_param"] = {"device": config.offload, "pin_memory": True}
    if stage == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "train_batch_size": micro_batch * world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip_grad_norm if stage > 0 and optim.clip_grad_norm else 0.0,
        "zero_allow_untested_optimizer": True,  # our optimisers are elementwise: sharding changes nothing
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a step
        "bf16": {"enabled": config.bf16_parameters},
        "zero_optimization": zero,
    }
    if stage == 3:  # with gradient caching a step has several backward passes
        settings["managed_gradient_accumulation"] = config.grad_cache_chunks == 1
    return settings


class DeepSpeedStrategy(Strategy):
    """DeepSpeed's engine around the module.

    At stage 0 DeepSpeed would flatten the gradients, sum them over ranks and copy every tensor back, also on
    one process; `FlatOptimizer` does without the copies, so DeepSpeed's reduction is switched off there.
    Stages 1 and 2 give every rank a slice of one flat tensor of all trained parameters, stage 3 a slice of
    each parameter.  `local_slice` finds this rank's slice of a parameter or moment; reading a state assembles
    the slices of all ranks, loading one copies this rank's slice from it."""

    def __init__(self, module: nn.Module, plan: StepPlan) -> None:
        super().__init__(module, plan)
        trained = trained_size(module)
        self.stage = choose_stage(plan.engine, trained, plan.world.size)
        self.deferred: list[Callable[[], Tensor]] = []  # chunks of the batch to encode again after backward
        # at stage 3 DeepSpeed gathers no parameters for a forward pass inside backward
        if self.stage == 3 and plan.engine.grad_cache_chunks > 1:
            if not isinstance(module, GradCache):
                raise ValueError(
                    "engine.grad_cache_chunks: expected 1 with zero_stage 3 and a module without gradient "
                    f"caching, found {plan.engine.grad_cache_chunks}"
                )
            module.deferred = self.deferred
        if plan.engine.bf16_parameters:
            _check_full_fine_tuning(module, trained)
        reached = list(self.trained.values()) if self.stage in (1, 2) else []
        self.shell = _Shell(self.module, reached)
        if self.stage == 0:
            optimizer: torch.optim.Optimizer = FlatOptimizer(self.module, plan.optim, plan.groups)
        else:
            optimizer = make_optimizer(self.module, for_partitions(plan.optim), plan.groups)
        deepspeed = load_deepspeed(plan.world)
        self.zero = deepspeed.zero
        settings = deepspeed_settings(
            plan.engine,
            plan.optim,
            micro_batch=plan.batch_size // plan.world.size,
            world_size=plan.world.size,
            trained=trained,
        )
        broadcast_module(self.module, plan.world)
        if self.stage == 3:
            _refuse_non_tensor_outputs(self.module)
        with _scalars_allowed(deepspeed, self.module, self.stage):
            self.engine, *_ = deepspeed.initialize(model=self.shell, optimizer=optimizer, config=settings)
        self.optimizer: torch.optim.Optimizer = self.engine.basic_optimizer
        self.flat = self.optimizer if isinstance(self.optimizer, FlatOptimizer) else None
        if self.flat is None:
            start_state(self.optimizer, self._flat_tensors())
        self.running: list[nn.Module] = importlib.import_module(OFFLOAD_MODULE).FWD_MODULE_STACK
        self.idle = len(self.running)
        self.order = _GradientOrder(list(self.trained.values()), plan.world) if self.stage == 2 else None

    def __call__(self, batch: Batch) -> Losses:
        if self.stage == 3:
            # recomputed modules whose forward was cut short in backward still count as running
            del self.running[self.idle :]
            # else parameters that this step does not reach keep the last step's gradient
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()
        self.deferred.clear()
        total, *terms = self.engine(batch)
        return Losses(total=total, terms=dict(zip(self.shell.names, terms, strict=True)))

    def backward(self, loss: Tensor) -> None:
        if self.flat is not None:
            with self.engine.no_sync():
                self.engine.backward(loss)
            self.flat.take_gradients(self.plan.world.size)
            return
        self.engine.backward(loss)
        for encode_again in self.deferred:
            surrogate = self.engine(encode_again)
            if surrogate.requires_grad:  # False for a frozen tower
                self.engine.backward(surrogate)
        self.deferred.clear()
        if self.order is not None:
            self.order.check()

    def step(self, lr: float) -> Tensor:
        if self.flat is not None:
            self.flat.set_learning_rate(lr)
            self.engine.step()
            return self.flat.norm
        set_learning_rate(self.optimizer, lr)
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())  # -1 if it is not finite
        return torch.full((), norm if norm >= 0 else float("nan"), device=self.plan.world.device)

    @torch.no_grad()
    def bound(self, name: str, limit: float) -> None:
        param: Any = self.trained[name]
        (param.ds_tensor if self.stage == 3 else param).clamp_(max=limit)
        held = self.local_slice(param) if self.stage > 0 else None
        if held is not None:
            held[0].clamp_(max=limit)

    def trained_state(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return {name: copy_to_cpu(param) for name, param in self.trained.items()}
        return {name: self._read(param, None) for name, param in self.trained.items()}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        check_state("trained state", state, {name: full_shape(p) for name, p in self.trained.items()})
        params: list[Any] = list(self.trained.values())
        if self.stage == 3:
            params[0].all_gather(params)
        with torch.no_grad():
            for name, param in self.trained.items():
                param.copy_(state[name])
        if self.stage == 3:
            params[0].partition(params, has_been_updated=True)
        if self.stage > 0:  # the optimiser updates master copies
            for name, param in self.trained.items():
                self._write(param, None, state[name])

    def optimizer_state(self) -> dict[str, Tensor]:
        if self.flat is not None:
            return collect_state(self.flat)
        state = {f"{key}/{name}": self._read(p, key) for key in MOMENTS for name, p in self.trained.items()}
        state["step"] = self.optimizer.state[self._flat_tensors()[0]]["step"].to("cpu", torch.int64)
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        if self.flat is not None:
            return restore_state(self.flat, state)
        check_optimizer_state(state, self.trained)
        for name, param in self.trained.items():
            for key in MOMENTS:
                self._write(param, key, state[f"{key}/{name}"])
        for flat in self._flat_tensors():
            self.optimizer.state[flat]["step"].fill_(state["step"].item())

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        if self.stage < 3:
            yield self.module
            return
        # DeepSpeed's hooks would release and gather parameters on all ranks at each call of a module
        offload = self.engine.optimizer.parameter_offload
        with self.zero.GatheredParameters(list(self.module.parameters())):
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield self.module
            finally:
                offload._register_deepspeed_module(offload.module)

    def _flat_tensors(self) -> list[Tensor]:
        """Return the tensors that the optimiser updates on this rank."""
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def _read(self, param: nn.Parameter, key: str | None) -> Tensor:
        """Return a parameter's unsharded master (key None) or moment on the CPU."""
        return copy_to_cpu(self.assemble(param, self.local_slice(param, key)))

    def _write(self, param: nn.Parameter, key: str | None, value: Tensor) -> None:
        """Copy this rank's slice of an unsharded master (key None) or moment."""
        held = self.local_slice(param, key)
        if held is not None:
            target, start = held
            target.copy_(value.reshape(-1)[start : start + target.numel()])

    def assemble(self, param: nn.Parameter, held: tuple[Tensor, int] | None) -> Tensor:
        """Return an unsharded float32 tensor of a parameter's shape from the slices of all ranks."""
        full = torch.zeros(full_shape(param), dtype=torch.float32, device=self.plan.world.device)
        if held is not None:
            values, start = held
            full.view(-1)[start : start + values.numel()].copy_(values)
        if self.plan.world.size > 1:  # summed as integers, because 0.0 + -0.0 loses the sign
            dist.all_reduce(full.view(torch.int32))
        return full

    @torch.no_grad()
    def local_slice(self, param: nn.Parameter, key: str | None = None) -> tuple[Tensor, int] | None:
        """Return this rank's slice of a parameter's master (key None) or moment, None if it has none.

        The slice is a flat view, with the index of its first element in the parameter; both stay the same
        over steps."""
        if self.stage == 3:
            zero: Any = self.engine.optimizer
            group, offset, length = zero.grad_position[zero.get_param_id(param)]
            start = length * self.plan.world.rank
            count = min(length, max(0, full_shape(param).numel() - start))  # the rest is padding
            flat = zero.fp32_partitioned_groups_flat[group]
        else:
            mapping: Any = getattr(param, "_hp_mapping", None)
            if mapping is None:
                return None
            offset, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            start = mapping.lp_fragment_address.start
            flat = self.optimizer.param_groups[mapping.param_group_index]["params"][0]
        tensor = flat if key is None else self.optimizer.state[flat][key]
        return (tensor.detach().narrow(0, offset, count), start) if count else None


class _Shell(nn.Module):
    """Returns losses as a tuple, because DeepSpeed hooks only tensors in tuples, lists and dicts.

    It calls the module's forward without the module's own hooks for the same reason; the module's direct
    parameters count as the shell's.  Parameters in `reached` get a gradient even if this rank's loss does not
    reach them: stages 1 and 2 reduce gradients in the order they arrive, and ranks that reduce different
    parameters would hang or mix them up.
    """

    def __init__(self, module: nn.Module, reached: list[nn.Parameter]) -> None:
        super().__init__()
        self.inner = module
        self.reached = tuple(reached)
        self.names: tuple[str, ...] = ()

    def forward(self, batch: Batch | Callable[[], Tensor]) -> tuple[Tensor, ...] | Tensor:
        """Return the losses of a batch, or the surrogate loss of a chunk that is encoded again."""
        if not isinstance(batch, Batch):
            return batch()
        losses = self.inner.forward(batch)
        self.names = tuple(losses.terms)
        total = _ReachAll.apply(losses.total, *self.reached) if self.reached else losses.total
        return total, *losses.terms.values()


class _ReachAll(torch.autograd.Function):
    """Identity on the first argument, with zero gradients for the others."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *params: Tensor) -> Tensor:
        ctx.params = [(param.shape, param.dtype, param.device) for param in params]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros((), dtype=d, device=v).expand(s) for s, d, v in ctx.params)
        return grads[0], *zeros


class _GradientOrder:
    """Checks that gradients arrive in the same order on every rank.

    Stage 2 packs gradients in the order they arrive and averages the packs.  If the losses of ranks reach
    different parameters, it would sum gradients of different parameters without an error.
    """

    def __init__(self, params: list[nn.Parameter], world: World) -> None:
        self.world = world
        self.arrived: list[int] = []
        for index, param in enumerate(params):
            param.register_post_accumulate_grad_hook(lambda _, index=index: self.arrived.append(index))

    def check(self) -> None:
        """Raise RuntimeError on every rank after a backward pass whose order differs on one."""
        checksum = zlib.crc32(repr(self.arrived).encode())
        self.arrived.clear()
        if self.world.size == 1:
            return
        bounds = torch.tensor([checksum, -checksum], device=self.world.device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        if bounds.sum().item() != 0:
            raise RuntimeError(
                "zero_stage 2: expected every rank's loss to reach the same parameters, found ranks that "
                "differ; use stage 0 or 1"
            )


def _refuse_non_tensor_outputs(module: nn.Module) -> None:
    """Raise ValueError at stage 3 if a module with parameters returns anything but tensors.

    DeepSpeed hooks tensors only, and would compute gradients from parameters that are already released.
    """

    def check(submodule: nn.Module, _inputs: Any, output: Any) -> None:
        parts = output.values() if isinstance(output, dict) else output
        parts = parts if isinstance(output, dict | tuple | list) else [output]
        if not all(isinstance(part, Tensor) for part in parts):
            raise ValueError(
                f"zero_stage 3: expected {type(submodule).__name__} to return tensors, found "
                f"{type(output).__name__}; choose a stage below 3"
            )

    for submodule in module.modules():
        if submodule is not module and next(submodule.parameters(recurse=False), None) is not None:
            submodule.register_forward_hook(check)


def load_deepspeed(world: World) -> Any:
    """Import DeepSpeed for this world's device without its log lines, and ensure a process group.

    Raises:
        ValueError: DeepSpeed was imported before for another device.
    """
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    # DeepSpeed calls deprecated functions of torch.distributed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.INFO))  # its import logs
    try:
        deepspeed = importlib.import_module("deepspeed")
    finally:
        logging.disable(disabled)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    accelerator = deepspeed.get_accelerator().device_name()
    if accelerator != world.device.type:
        raise ValueError(
            f"DS_ACCELERATOR: expected {world.device.type!r} for this run, found {accelerator!r}"
        )
    if world.device.type == "cpu":
        # it would compile a shared-memory all-reduce for a minute, which only its inference uses
        deepspeed.ops.__compatible_ops__ = {}
    init_single_process_group(world)
    return deepspeed


@contextmanager
def _scalars_allowed(deepspeed: Any, module: nn.Module, stage: int) -> Iterator[None]:
    """Let `deepspeed.initialize` accept parameters without dimensions (a logit scale).

    DeepSpeed 0.19.8 broadcasts parameters as bytes, which fails on scalars.  Below stage 3 its broadcast is
    skipped, since `broadcast_module` ran before; at stage 3 scalars get one dimension for the call.
    """
    engine = deepspeed.DeepSpeedEngine
    original = engine._broadcast_model
    engine._broadcast_model = lambda self: None
    scalars: list[Any] = [p for p in module.parameters() if p.dim() == 0] if stage == 3 else []
    for param in scalars:
        param.data = param.data.view(1)
    try:
        yield
    finally:
        engine._broadcast_model = original
        for param in scalars:
            param.ds_shape = torch.Size([])  # the shape of the gathered parameter


def _check_full_fine_tuning(module: nn.Module, trained: int) -> None:
    """Raise ValueError if adapters are trained in DeepSpeed's bf16 mode, which casts them too."""
    total = sum(p.numel() for p in module.parameters())
    if 2 * trained < total:
        raise ValueError(
            f"bf16_parameters: expected full fine-tuning, found {trained} of {total} parameters trained; "
            "precision 'bf16' alone keeps trained parameters in fp32"
        )
