"""DeepSpeed behind the strategy's door: ZeRO 0 to 3, whose partitioned state is read and written by name."""

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
from discovla.engine.grad_cache import GradCache
from discovla.engine.optim import OptimConfig, for_partitions, make_optimizer, set_learning_rate, start_state
from discovla.engine.strategy import (
    MOMENTS,
    StepPlan,
    Strategy,
    broadcast_module,
    check_optimizer_state,
    check_state,
    clip_gradients,
    collect_state,
    copy_to_cpu,
    finite,
    not_finite,
    restore_state,
    trained_size,
    whole_shape,
)

logger = logging.getLogger(__name__)

HOOKS = "deepspeed.runtime.zero.parameter_offload"  # where it notes at stage 3 which modules run
LARGEST_BUCKET = 50_000_000  # elements that travel, and are buffered, at once


def deepspeed_settings(
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
        settings["managed_gradient_accumulation"] = config.grad_cache_chunks == 1
    return settings


class DeepSpeedStrategy(Strategy):
    """DeepSpeed's engine around the module.

    Stages 1 and 2 give every rank a slice of one flat tensor of all trained parameters, stage 3 a slice of
    each parameter. `pieces` finds what this rank holds of a parameter, or of a moment; reading puts the
    pieces of all ranks together, writing cuts them out of the whole.
    """

    def __init__(self, module: nn.Module, plan: StepPlan) -> None:
        super().__init__(module, plan)
        trained = trained_size(module)
        self.stage = choose_stage(plan.engine, trained, plan.world.size)
        self.later: list[Callable[[], Tensor]] = []  # parts of a batch to be encoded again
        # DeepSpeed gathers no parameters for a forward pass inside backward
        if self.stage == 3 and plan.engine.grad_cache_chunks > 1:
            if not isinstance(module, GradCache):
                raise ValueError(
                    "engine.grad_cache_chunks: expected 1 with zero_stage 3 and a module without gradient "
                    f"caching, found {plan.engine.grad_cache_chunks}"
                )
            module.later = self.later
        if plan.engine.bf16_parameters:
            _check_full_fine_tuning(module, trained)
        self.shell = _Shell(self.module, list(self.trained.values()) if self.stage in (1, 2) else [])
        optim = for_partitions(plan.optim) if self.stage > 0 else plan.optim
        optimizer = make_optimizer(self.module, optim, plan.groups)
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
            _refuse_records(self.module)
        with _scalars_survive(deepspeed, self.module, self.stage):
            self.engine, *_ = deepspeed.initialize(model=self.shell, optimizer=optimizer, config=settings)
        self.optimizer: torch.optim.Optimizer = self.engine.basic_optimizer
        start_state(self.optimizer, self._flat())
        self.running: list[nn.Module] = importlib.import_module(HOOKS).FWD_MODULE_STACK
        self.idle = len(self.running)
        self.order = _Order(list(self.trained.values()), plan.world) if self.stage == 2 else None

    def __call__(self, batch: Batch) -> Losses:
        if self.stage == 3:
            # modules whose second pass was cut short, once backward had all it needs, still count as running
            del self.running[self.idle :]
            # it would go on with the last step's gradient of what this one does not touch
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()
        self.later.clear()
        total, *terms = self.engine(batch)
        return Losses(total=total, terms=dict(zip(self.shell.names, terms, strict=True)))

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        for part in self.later:
            share = self.engine(part)
            if share.requires_grad:  # of a frozen tower it has none
                self.engine.backward(share)
        self.later.clear()
        if self.order is not None:
            self.order.check()

    def step(self, lr: float) -> float:
        set_learning_rate(self.optimizer, lr)
        if self.stage == 0:
            norm = clip_gradients(list(self.trained.values()), self.plan.optim.clip_grad_norm)
            self.engine.step()
            return norm
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        if not finite(norm):
            raise FloatingPointError(not_finite(norm))
        return norm

    def trained_state(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return {name: copy_to_cpu(param) for name, param in self.trained.items()}
        return {name: self._read(param, None) for name, param in self.trained.items()}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        check_state("trained state", state, {name: whole_shape(p) for name, p in self.trained.items()})
        params: list[Any] = list(self.trained.values())
        if self.stage == 3:
            params[0].all_gather(params)
        with torch.no_grad():
            for name, param in self.trained.items():
                param.copy_(state[name])
        if self.stage == 3:
            params[0].partition(params, has_been_updated=True)
        if self.stage > 0:  # the masters that the optimiser updates are copies
            for name, param in self.trained.items():
                self._write(param, None, state[name])

    def optimizer_state(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return collect_state(self.optimizer, self.trained)
        state = {f"{key}/{name}": self._read(p, key) for key in MOMENTS for name, p in self.trained.items()}
        state["step"] = self.optimizer.state[self._flat()[0]]["step"].to("cpu", torch.int64)
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        if self.stage == 0:
            return restore_state(self.optimizer, self.trained, state)
        check_optimizer_state(state, self.trained)
        for name, param in self.trained.items():
            for key in MOMENTS:
                self._write(param, key, state[f"{key}/{name}"])
        for flat in self._flat():
            self.optimizer.state[flat]["step"].fill_(state["step"].item())

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        if self.stage < 3:
            yield self.module
            return
        # its hooks would let go of parameters and gather them anew, with every rank, at each call of a module
        hooks = self.engine.optimizer.parameter_offload
        with self.zero.GatheredParameters(list(self.module.parameters())):
            for hook in (*hooks.forward_hooks, *hooks.backward_hooks):
                hook.remove()
            hooks.forward_hooks, hooks.backward_hooks = [], []
            try:
                yield self.module
            finally:
                hooks._register_deepspeed_module(hooks.module)

    def _flat(self) -> list[Tensor]:
        """The tensors the optimiser really updates on this rank."""
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def _read(self, param: nn.Parameter, key: str | None) -> Tensor:
        """The whole of a parameter's master (None) or of a moment, on the CPU."""
        return copy_to_cpu(self.together(param, self.pieces(param, key)))

    def together(self, param: nn.Parameter, pieces: list[tuple[Tensor, int]]) -> Tensor:
        """A whole in float32, of a parameter's shape, from the pieces on all ranks."""
        whole = torch.zeros(whole_shape(param), dtype=torch.float32, device=self.plan.world.device)
        for piece, start in pieces:
            whole.view(-1)[start : start + piece.numel()].copy_(piece)
        if self.plan.world.size > 1:  # as integers: 0.0 + -0.0 would lose a sign
            dist.all_reduce(whole.view(torch.int32))
        return whole

    def _write(self, param: nn.Parameter, key: str | None, whole: Tensor) -> None:
        """Cut this rank's piece of a master (None) or of a moment out of the whole."""
        for piece, start in self.pieces(param, key):
            piece.copy_(whole.reshape(-1)[start : start + piece.numel()])

    @torch.no_grad()
    def pieces(self, param: nn.Parameter, key: str | None = None) -> list[tuple[Tensor, int]]:
        """What the optimiser of this rank holds of a parameter's master (None) or of a moment.

        At most one flat view, with where in the parameter it begins; it stays the same over steps.
        """
        if self.stage == 3:
            zero: Any = self.engine.optimizer
            group, offset, length = zero.grad_position[zero.get_param_id(param)]
            start = length * self.plan.world.rank
            held = min(length, max(0, whole_shape(param).numel() - start))  # the rest pads the last rank
            flat = zero.fp32_partitioned_groups_flat[group]
        else:
            mapping: Any = getattr(param, "_hp_mapping", None)
            if mapping is None:
                return []
            offset, held = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            start = mapping.lp_fragment_address.start
            flat = self.optimizer.param_groups[mapping.param_group_index]["params"][0]
        tensor = flat if key is None else self.optimizer.state[flat][key]
        return [(tensor.detach().narrow(0, offset, held), start)] if held else []


class _Shell(nn.Module):
    """Returns losses as a tuple, for DeepSpeed hooks only tensors that lie in tuples, lists and dicts.

    The module's own hooks are passed by for the same reason: its direct parameters count as the shell's.
    `touched` get a gradient even where this rank's loss does not reach them: stages 1 and 2 reduce gradients
    as they come, and ranks that reduce different ones wait for each other, or take one for another.
    """

    def __init__(self, module: nn.Module, touched: list[nn.Parameter]) -> None:
        super().__init__()
        self.inner = module
        self.touched = tuple(touched)
        self.names: tuple[str, ...] = ()

    def forward(self, batch: Batch | Callable[[], Tensor]) -> tuple[Tensor, ...] | Tensor:
        """Losses of a batch, or what a part of one gives that is encoded again."""
        if not isinstance(batch, Batch):
            return batch()
        losses = self.inner.forward(batch)
        self.names = tuple(losses.terms)
        total = _Touch.apply(losses.total, *self.touched) if self.touched else losses.total
        return total, *losses.terms.values()


class _Touch(torch.autograd.Function):
    """The identity on its first argument, with zero gradients for the others."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *params: Tensor) -> Tensor:
        ctx.params = [(param.shape, param.dtype, param.device) for param in params]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros((), dtype=d, device=v).expand(s) for s, d, v in ctx.params)
        return grads[0], *zeros


class _Order:
    """Whether gradients came in the same order on every rank.

    Stage 2 packs them as they come and averages the packs, so it would add up gradients of different
    parameters where ranks differ in what their losses reach. Nothing else would notice.
    """

    def __init__(self, params: list[nn.Parameter], world: World) -> None:
        self.world = world
        self.arrived: list[int] = []
        for index, param in enumerate(params):
            param.register_post_accumulate_grad_hook(lambda _, index=index: self.arrived.append(index))

    def check(self) -> None:
        """After a backward pass; a RuntimeError on every rank where one differs."""
        found = zlib.crc32(repr(self.arrived).encode())
        self.arrived.clear()
        if self.world.size == 1:
            return
        largest = torch.tensor([found, -found], device=self.world.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        if largest.sum().item() != 0:
            raise RuntimeError(
                "zero_stage 2: expected every rank's loss to reach the same parameters, found ranks that "
                "differ; stages 0 and 1 can do that"
            )


def _refuse_records(module: nn.Module) -> None:
    """Stage 3: an error where DeepSpeed would silently compute gradients from parameters gone by then."""

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
    """Import DeepSpeed for this world's device, quietly, and give it a process group.

    Raises:
        ValueError: DeepSpeed was imported before, for another device.
    """
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed"
    )  # its calls, not ours
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.INFO))  # it reports its own import
    try:
        deepspeed = importlib.import_module("deepspeed")
    finally:
        logging.disable(disabled)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    found = deepspeed.get_accelerator().device_name()
    if found != world.device.type:
        raise ValueError(f"DS_ACCELERATOR: expected {world.device.type!r} for this run, found {found!r}")
    if world.device.type == "cpu":
        # It would compile a shared-memory all-reduce, a minute's work, that only its inference calls.
        deepspeed.ops.__compatible_ops__ = {}
    init_single_process_group(world)
    return deepspeed


@contextmanager
def _scalars_survive(deepspeed: Any, module: nn.Module, stage: int) -> Iterator[None]:
    """Let parameters without dimensions (a logit scale) through DeepSpeed's start.

    0.19.8 sends parameters round as bytes, which fails on them. Below stage 3 that broadcast is left out,
    ours came before it; at stage 3 they get one dimension until they are split, and lose it again.
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
            param.ds_shape = torch.Size([])  # what a gathered parameter is viewed as


def _check_full_fine_tuning(module: nn.Module, trained: int) -> None:
    """Refuse DeepSpeed's bf16 mode where adapters are trained: it casts them too."""
    total = sum(p.numel() for p in module.parameters())
    if 2 * trained < total:
        raise ValueError(
            f"bf16_parameters: expected full fine-tuning, found {trained} of {total} parameters trained; "
            "precision 'bf16' alone keeps trained parameters in fp32"
        )
