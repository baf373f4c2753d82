"""Trained parameters, gradients and moments in flat buffers, updated without a read by the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, _foreach_copy_, _foreach_norm, _foreach_zero_, nn  # pyright: ignore[reportPrivateImportUsage]

from discovla.engine.adam import UPDATES, Buffers, Coefficients, clip_factors, step_size
from discovla.engine.optim import OptimConfig, ParameterGroup, group_parameters

ALIGNMENT = 64  # bytes; torch aligns tensors of their own so, and kernels rely on 16


class FlatOptimizer(torch.optim.Optimizer):
    """Clips the global gradient norm and updates all trained parameters in flat buffers.

    The parameters become views of one buffer; two others hold their moments and a fourth their gradients, so
    that an update takes about thirty operations for any number of parameters.  The host reads nothing: a step
    whose gradient norm is not finite leaves parameters, moments and the number of steps as they are.  On a
    CPU the numbers are those of one `AdamW`, `torch.optim.AdamW` or `BertAdam` update for each tensor, bit
    for bit.

    Args:
        module: on its device; parameters with requires_grad are trained.
        config: of the optimiser.
        groups: parameters with their own learning rate or weight decay.

    Attributes:
        trained: parameters by name.
        steps: number of updates, 0-dim float64 on the device.

    Raises:
        ValueError: nothing to train, trained parameters of several dtypes, or a group that matches none.
    """

    norm: Tensor  # of the last `step`

    def __init__(self, module: nn.Module, config: OptimConfig, groups: Sequence[ParameterGroup] = ()) -> None:
        members = group_parameters(module, config, groups)
        self.config = config
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        first = next(iter(self.trained.values()))
        if dtypes := sorted({str(p.dtype) for p in self.trained.values()} - {str(first.dtype)}):
            raise ValueError(
                f"optimiser: expected trained parameters of one dtype, found {first.dtype} and {dtypes[0]}"
            )
        unit = ALIGNMENT // first.element_size()
        starts, bounds, end = {}, [0], 0
        for group in members:
            for param in group["params"]:
                starts[param] = end
                end += -(-param.numel() // unit) * unit
            bounds.append(end)
        self._starts = [starts[param] for param in self.trained.values()]
        self._places = [slice(*place) for place in pairwise(bounds)]  # of the groups
        self.flat, self.grad, self.mean, self.square = (first.detach().new_zeros(end) for _ in range(4))
        for param, view in zip(self.trained.values(), self._views(self.flat), strict=True):
            view.copy_(param.detach())
            param.data = view
        self._grads = self._views(self.grad)
        wide = {"dtype": torch.float64, "device": first.device}
        count = len(members)
        self.steps = torch.zeros((), **wide)
        self._zero = self.flat.new_zeros(())
        beta1, beta2 = config.betas
        self._fixed = torch.tensor([beta1, beta2, 1 - beta1], **wide)
        self._rates = torch.zeros(2 * count, **wide)  # of each group the learning rate, then 1 - its decay
        left_out = [1.0, 1.0, 0.0, 1.0, *[0.0] * count, *[1.0] * count]  # coefficients that change nothing
        self._left_out = torch.tensor(left_out, **wide)
        if config.name == "bert_adam" and config.clip_tensor_norm is not None:
            order = sorted(range(len(self._starts)), key=self._starts.__getitem__)
            ends = [*(self._starts[i] for i in order[1:]), end]
            lengths = [b - self._starts[i] for i, b in zip(order, ends, strict=True)]
            self._order = torch.tensor(order, device=first.device)
            self._lengths = torch.tensor(lengths, device=first.device)
        flat_groups = [
            {**group, "params": [self.flat[place]]}
            for group, place in zip(members, self._places, strict=True)
        ]
        super().__init__(flat_groups, {"lr": config.lr, "betas": config.betas, "eps": config.eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group of the buffers as it is; torch's own method imports torch._dynamo, for seconds."""
        self.param_groups.append(self.defaults | param_group)

    def _views(self, buffer: Tensor) -> list[Tensor]:
        """Return the part of a flat buffer that belongs to each parameter, in its shape."""
        return [
            buffer[start : start + p.numel()].view(p.shape)
            for start, p in zip(self._starts, self.trained.values(), strict=True)
        ]

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next steps, which groups scale; copied without a sync."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]
        rates = [group["lr"] for group in self.param_groups]
        rates += [1 - group["lr"] * group["weight_decay"] for group in self.param_groups]
        pinned = self._rates.is_cuda
        self._rates.copy_(torch.tensor(rates, dtype=torch.float64, pin_memory=pinned), non_blocking=True)

    @torch.no_grad()
    def set_gradients(self, gradients: Sequence[Tensor | None], world_size: int = 1) -> None:
        """Copy the gradients of the parameters, zeros for None, and average them over the processes."""
        pairs = list(zip(self._grads, gradients, strict=True))
        present = [(view, grad) for view, grad in pairs if grad is not None]
        _foreach_copy_([view for view, _ in present], [grad for _, grad in present])
        if absent := [view for view, grad in pairs if grad is None]:
            _foreach_zero_(absent)
        if world_size > 1:
            dist.all_reduce(self.grad)
            self.grad /= world_size

    def take_gradients(self, world_size: int = 1) -> None:
        """Move the parameters' `grad` into the buffer, averaged over the processes."""
        self.set_gradients([param.grad for param in self.trained.values()], world_size)
        for param in self.trained.values():
            param.grad = None

    @torch.no_grad()
    def update(self) -> Tensor:
        """Clip the gradients in the buffer and update the parameters.

        Returns:
            The global norm before clipping, 0-dim; if it is not finite, nothing has changed.
        """
        norm = torch.linalg.vector_norm(torch.stack(_foreach_norm(self._grads)))
        finite = norm < float("inf")  # False for NaN
        config = self.config
        if config.clip_grad_norm is not None:
            self.grad.mul_(clip_factors(norm, config.clip_grad_norm))
        grad = torch.where(finite, self.grad, self._zero, out=self.grad)
        if config.name == "bert_adam" and config.clip_tensor_norm is not None:
            grad = grad * self._tensor_factors(config.clip_tensor_norm)
        self.steps.add_(finite)
        coefficients = self._coefficients(finite)
        for number, (group, place) in enumerate(zip(self.param_groups, self._places, strict=True)):
            buffers = (self.flat[place], self.mean[place], self.square[place], grad[place])
            UPDATES[config.name](Buffers(*buffers), coefficients[number], group)
        return norm

    def step(self, closure: Any = None) -> None:
        """Clip and update; `closure` must be None."""
        assert closure is None, "the gradients are those of the buffer"
        self.norm = self.update()

    def _tensor_factors(self, limit: float) -> Tensor:
        """Return factors that clip each tensor's gradient, one for every element of the buffer."""
        norms = torch.stack(_foreach_norm(self._grads))[self._order]
        return clip_factors(norms, limit).repeat_interleave(self._lengths, output_size=len(self.grad))

    def _coefficients(self, finite: Tensor) -> list[Coefficients]:
        """Return the coefficients of each group; those that change nothing if the norm is not finite."""
        count = len(self.param_groups)
        bias = 1 - self._fixed[:2] ** self.steps
        rates, keep = self._rates.split(count)
        root = bias[1].sqrt()
        sizes = step_size(self.config.name, rates, root, bias[0])
        every = torch.cat([self._fixed, root[None], sizes, keep])
        values = torch.where(finite, every, self._left_out).to(self.flat.dtype).unbind()
        common = {"keep_mean": values[0], "keep_square": values[1], "lerp": values[2], "root": values[3]}
        return [Coefficients(**common, size=values[4 + i], keep=values[4 + count + i]) for i in range(count)]

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Return views of the moments by key and name."""
        named = {"exp_avg": self.mean, "exp_avg_sq": self.square}
        return {key: dict(zip(self.trained, self._views(x), strict=True)) for key, x in named.items()}

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore parameters, moments and the number of steps at the end of the context."""
        state = (self.flat, self.mean, self.square, self.steps)
        copies = [x.clone() for x in state]
        try:
            yield
        finally:
            for x, copy in zip(state, copies, strict=True):
                x.copy_(copy)
