"""Interface of a training step (forward, backward, update, state) and its plain torch implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from discovla.batch import Batch, Losses
from discovla.engine.config import EngineConfig
from discovla.engine.distributed import World
from discovla.engine.flat import FlatOptimizer
from discovla.engine.optim import OptimConfig, ParameterGroup

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Settings of a run that a strategy needs.

    batch_size: clips per step over all processes.  groups: parameters with their own lr or weight decay.
    """

    engine: EngineConfig
    optim: OptimConfig
    world: World
    batch_size: int
    groups: Sequence[ParameterGroup] = ()

    def __post_init__(self) -> None:
        if self.batch_size % self.world.size:
            raise ValueError(
                f"batch_size: expected a multiple of the {self.world.size} processes, found {self.batch_size}"
            )
        clips, chunks = self.batch_size // self.world.size, self.engine.grad_cache_chunks
        if chunks > clips:
            raise ValueError(
                f"engine.grad_cache_chunks: expected at most the {clips} clips of a process, found {chunks}"
            )


class Strategy(ABC):
    """Trains a module whose forward(batch) returns `Losses`.

    States are unsharded on every rank, on the CPU, by the names of `module.named_parameters()`, so they do
    not depend on the number of processes or the ZeRO stage.  A loaded state must be equal on every rank."""

    module: nn.Module
    plan: StepPlan
    recordable: FlatOptimizer | None = None  # whose update may be part of a recorded step

    def __init__(self, module: nn.Module, plan: StepPlan) -> None:
        self.module = module.to(plan.world.device)
        self.plan = plan
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}

    @abstractmethod
    def __call__(self, batch: Batch) -> Losses:
        """Run the forward pass of a training step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Compute gradients averaged over ranks; zeros for parameters that the loss does not reach."""

    @abstractmethod
    def step(self, lr: float) -> Tensor:
        """Clip the gradients, update the parameters and clear the gradients.

        Args:
            lr: of this step; groups scale it.

        Returns:
            The global norm of the averaged gradient before clipping, 0-dim on the device.  If it is not
            finite, nothing was updated.
        """

    def take(self, batch: Batch, lr: float) -> tuple[Losses, Tensor]:
        """Take one whole step: forward, backward and `step`; return the losses and the gradient norm."""
        losses = self(batch)
        self.backward(losses.total)
        return losses, self.step(lr)

    @abstractmethod
    def bound(self, name: str, limit: float) -> None:
        """Bound a trained parameter from above, in every copy that the strategy holds."""

    @abstractmethod
    def trained_state(self) -> dict[str, Tensor]:
        """Return the trained parameters in fp32, by name."""

    @abstractmethod
    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Load trained parameters.

        Raises:
            ValueError: a parameter is missing, unexpected or of another shape.
        """

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the moments as "exp_avg/NAME" and "exp_avg_sq/NAME", and the number of steps as "step"."""

    @abstractmethod
    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Load the optimiser state.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape.
        """

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Yield the module with unsharded parameters, for evaluation or export; do not train inside."""
        yield self.module


class TorchStrategy(Strategy):
    """Plain torch: one all-reduce of one flat gradient, then the same update on every rank."""

    def __init__(self, module: nn.Module, plan: StepPlan) -> None:
        super().__init__(module, plan)
        self.optimizer = FlatOptimizer(module, plan.optim, plan.groups)
        self.recordable = self.optimizer if plan.world.size == 1 else None
        broadcast_module(module, plan.world)

    def __call__(self, batch: Batch) -> Losses:
        return self.module(batch)

    def take(self, batch: Batch, lr: float) -> tuple[Losses, Tensor]:
        self.optimizer.set_learning_rate(lr)  # before a recorded step, which includes the update
        losses = self(batch)
        if losses.grad_norm is not None:
            return losses, losses.grad_norm
        self.backward(losses.total)
        return losses, self.optimizer.update()

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.take_gradients(self.plan.world.size)

    def step(self, lr: float) -> Tensor:
        self.optimizer.set_learning_rate(lr)
        return self.optimizer.update()

    def bound(self, name: str, limit: float) -> None:
        with torch.no_grad():
            self.trained[name].clamp_(max=limit)

    def trained_state(self) -> dict[str, Tensor]:
        return {name: copy_to_cpu(param) for name, param in self.trained.items()}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        check_state("trained state", state, {name: p.shape for name, p in self.trained.items()})
        with torch.no_grad():
            for name, param in self.trained.items():
                param.copy_(state[name])

    def optimizer_state(self) -> dict[str, Tensor]:
        return collect_state(self.optimizer)

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        restore_state(self.optimizer, state)


def trained_size(module: nn.Module) -> int:
    """Return the number of elements of trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters to `dtype`, to save memory.

    Call it after the weights are loaded and before a strategy is made.  Buffers keep their dtype, because
    they may be position tables that need fp32, and so do scalars: the log of a logit scale of 100 would be 1
    % off in bf16.

    Args:
        module: parameters with requires_grad stay in fp32.
        dtype: floating point.
    """
    for param in module.parameters():
        if not param.requires_grad and param.is_floating_point() and param.dim():
            param.data = param.data.to(dtype)


def broadcast_module(module: nn.Module, world: World) -> None:
    """Copy rank 0's parameters and buffers to every rank."""
    if world.size > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU, so that later steps do not change it."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def collect_state(optimizer: FlatOptimizer) -> dict[str, Tensor]:
    """Return the state of an optimiser over unsharded parameters."""
    moments = optimizer.moments()
    state = {f"{key}/{name}": copy_to_cpu(x) for key in MOMENTS for name, x in moments[key].items()}
    state["step"] = optimizer.steps.to("cpu", torch.int64)
    return state


def restore_state(optimizer: FlatOptimizer, state: dict[str, Tensor]) -> None:
    """Load a state into an optimiser over unsharded parameters."""
    check_optimizer_state(state, optimizer.trained)
    for key, named in optimizer.moments().items():
        for name, x in named.items():
            x.copy_(state[f"{key}/{name}"])
    optimizer.steps.copy_(state["step"])


def check_optimizer_state(state: dict[str, Tensor], trained: dict[str, nn.Parameter]) -> None:
    """Raise ValueError unless an optimiser state belongs to these parameters."""
    shapes = {f"{key}/{name}": full_shape(p) for key in MOMENTS for name, p in trained.items()}
    check_state("optimizer state", state, {**shapes, "step": torch.Size([])})


def check_state(label: str, state: dict[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    """Raise ValueError unless a state has these names and shapes."""
    if missing := sorted(shapes.keys() - state.keys()):
        raise ValueError(f"{label}: expected {missing[0]!r}, found none ({len(missing)} missing)")
    if unexpected := sorted(state.keys() - shapes.keys()):
        raise ValueError(f"{label}: expected no {unexpected[0]!r}, found it ({len(unexpected)} unexpected)")
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise ValueError(f"{label}: {name}: expected {tuple(shape)}, found {tuple(state[name].shape)}")


def full_shape(param: nn.Parameter) -> torch.Size:
    """Return the unsharded shape of a parameter, which ZeRO stage 3 may have sharded."""
    return torch.Size(getattr(param, "ds_shape", param.shape))
