"""Baselines of the training step: the published step in plain PyTorch, with peft's LoRA, and matmuls only."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step_inputs import size_of
from benchmarks.step_work import frozen_matmuls
from discovla import torchvision_cpu
from discovla.batch import Batch
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.ops.preprocess_frames import preprocess_frames
from discovla.towers.architecture import Architecture

PEFT_PACKAGES = ("peft", "transformers", "accelerate")  # imports of peft besides torch


class ReferenceStep:
    """The published step: forward and backward of a batch, computed as in the release.

    It computes in float32, with captions padded to their full length, every row of every layer, low-rank
    updates of q, k and v as separate tensors, attention scores and all b b f f frame similarities in
    memory.  The code is ours; the weights are those of a `DiscoVLA`.

    Args:
        method: its weights are copied; it has the published losses and no frame positions.
        sdpa: use torch's fused attention instead of scores in memory.
        autocast: dtype to autocast to; None computes in the dtype of the weights.
        anomaly: detect anomalies in backward, as the release does.
    """

    def __init__(
        self,
        method: DiscoVLA,
        *,
        sdpa: bool = False,
        autocast: torch.dtype | None = None,
        anomaly: bool = False,
    ) -> None:
        config = method.config
        published = config.tune == "lora" and config.similarity == "pooled" and config.kl_norm == "official"
        repaired = config.mask_padded_frames or config.detach_teacher or config.frame_position
        if not published or repaired:
            raise ValueError("method: expected the published DiscoVLA, found one with other options")
        self.architecture, self.config = method.architecture, config
        self.sdpa, self.autocast, self.anomaly = sdpa, autocast, anomaly
        self.weights = {
            name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in method.named_parameters()
        }
        self.trained = {name: p for name, p in self.weights.items() if p.requires_grad}

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of a batch; gradients are in `trained`."""
        for p in self.trained.values():
            p.grad = None
        with torch.autograd.set_detect_anomaly(True) if self.anomaly else nullcontext():
            losses = self.losses(batch)
            losses["total"].backward()
        return losses

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return l_vid + alpha l_frm + beta l_dis, and its terms."""
        kind = batch.frames.device.type
        with torch.autocast(kind, self.autocast) if self.autocast else nullcontext():
            video = self.video(batch.frames)  # b f d
            assert batch.frame_text_ids is not None and batch.frame_text_mask is not None
            group = batch.frame_text_ids.shape[1]
            frame_ids, frame_mask = batch.frame_text_ids.flatten(0, 1), batch.frame_text_mask.flatten(0, 1)
            text = self.text(batch.text_ids, batch.text_mask)
            frame_text = self.text(frame_ids, frame_mask, group).unflatten(0, (-1, group))
        scale = self.weights["logit_scale.log"].exp()
        if self.autocast:
            text, frame_text, video = text.float(), frame_text.float(), video.float()
        return self._losses(text, frame_text, video, batch.frame_mask, scale)

    def _losses(
        self, text: Tensor, frame_text: Tensor, frames: Tensor, mask: Tensor, scale: Tensor
    ) -> dict[str, Tensor]:
        text, frame_text, frames = _unit(text), _unit(frame_text), _unit(frames)
        weight = mask.to(frames)[..., None]
        video = _unit((frames * weight).sum(1) / weight.sum(1))
        student = text @ video.T  # t v
        pairs = torch.einsum("atd,bvd->abtv", frame_text, frames)
        teacher = (_pool(pairs.amax(3), scale) + _pool(pairs.amax(2), scale)) / 2
        losses = {
            "video": (_cross_entropy(scale * student) + _cross_entropy(scale * student.T)) / 2,
            "frame": (_cross_entropy(scale * teacher) + _cross_entropy(scale * teacher.T)) / 2,
            "distill": (_kl(student, teacher, scale) + _kl(student.T, teacher.T, scale)) / 2,
        }
        total = losses["video"] + self.config.alpha * losses["frame"] + self.config.beta * losses["distill"]
        return {"total": total, **losses}

    def video(self, frames: Tensor) -> Tensor:
        """Return features of frames, b f d."""
        b, f = frames.shape[:2]
        kernel = self.weights["vision.patch_embedding"]
        pixels = preprocess_frames(frames, dtype=kernel.dtype).flatten(0, 1)
        x = F.conv2d(pixels, kernel, stride=self.architecture.patch_size).flatten(2).transpose(1, 2)
        cls = self.weights["vision.class_embedding"].to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1) + self.weights["vision.position_embedding"]  # (b f) p w
        x = self.norm("vision.ln_pre", x)
        readout = torch.zeros(len(x), dtype=torch.long, device=x.device)
        x = self.blocks("vision", x, f, readout, None)
        x = self.norm("vision.ln_post", x) @ self.weights["vision.projection"]  # (b f) p d
        return x[:, 0].unflatten(0, (b, f))

    def text(self, ids: Tensor, mask: Tensor, group: int = 0) -> Tensor:
        """Return features of captions, n d; each `group` neighbours are fused."""
        length = ids.shape[1]
        x = (
            self.weights["text.token_embedding.weight"][ids]
            + self.weights["text.position_embedding"][:length]
        )
        x = self.blocks("text", x, group, ids.argmax(-1), mask)
        x = self.norm("text.ln_final", x) @ self.weights["text.projection"]  # n l d
        return x[torch.arange(len(x), device=x.device), ids.argmax(-1)]

    def blocks(self, side: str, x: Tensor, group: int, readout: Tensor, mask: Tensor | None) -> Tensor:
        """Apply all blocks of a tower to n l w; a mask of real tokens (n l, bool) makes attention causal."""
        layers = (self.architecture.vision if side == "vision" else self.architecture.text).layers
        fused = self.config.fused_vision_blocks if side == "vision" else self.config.fused_text_blocks
        within, across = None, None
        if mask is not None:
            mask = mask.to(x.device)
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            within, across = _additive(causal & mask[:, None], x), _additive(mask, x)
        for layer in range(layers):
            name = f"{side}.blocks.{layer}"
            y = self.norm(f"{name}.ln_1", x)
            if group and layer >= layers - fused:
                update = self.fusion(f"{name}.attention", y, group, readout, (within, across))
            else:
                update = self.merge(f"{name}.attention", self.attend(*self.heads(side, name, y), within))
            x = x + update
            y = self.linear(f"{name}.mlp.up", self.norm(f"{name}.ln_2", x))
            x = x + self.linear(f"{name}.mlp.down", self.activation(y))
        return x

    def fusion(
        self,
        name: str,
        y: Tensor,
        group: int,
        readout: Tensor,
        masks: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        """Attention whose readout rows become adapter(own row) + attention over the whole group."""
        side, block = name.split(".")[0], name.removesuffix(".attention")
        within, across = masks
        q, k, v = self.heads(side, block, y)  # n h l c
        local = self.merge(name, self.attend(q, k, v, within))
        rows = torch.arange(len(y), device=y.device)
        keys, values = (
            x.unflatten(0, (-1, group)).transpose(1, 2).flatten(2, 3).contiguous() for x in (k, v)
        )  # b h (f l) c
        queries = q[rows, :, readout].unflatten(0, (-1, group)).transpose(1, 2)  # b h f c
        if across is not None:
            across = across.unflatten(0, (-1, group)).flatten(1)[:, None, None]
        read = self.merge(name, self.attend(queries, keys, values, across)).flatten(0, 1)  # n w
        small = self.activation(self.linear(f"{name}.adapter.down", local[rows, readout]), quick=True)
        fused = self.linear(f"{name}.adapter.up", small) + read
        return local.index_put((rows, readout), fused.to(local.dtype))

    def heads(self, side: str, block: str, y: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, n h l c."""
        heads = (self.architecture.vision if side == "vision" else self.architecture.text).heads
        name = f"{block}.attention"
        a, b = self.weights[f"{name}.lora.a"], self.weights[f"{name}.lora.b"]
        deltas = ((y @ a.T) @ b.T).chunk(3, dim=-1)
        parts = self.linear(f"{name}.qkv", y).chunk(3, dim=-1)
        return tuple(
            (part + delta).unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()
            for part, delta in zip(parts, deltas, strict=True)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return softmax(q kᵀ / sqrt(c) + mask) v."""
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]
        if self.sdpa:
            return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.to(q.dtype))
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        return (scores if mask is None else scores + mask).softmax(-1) @ v

    def merge(self, name: str, heads: Tensor) -> Tensor:
        return self.linear(f"{name}.out", heads.transpose(1, 2).flatten(2))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self.weights[f"{name}.bias"], 1e-5)

    def activation(self, x: Tensor, *, quick: bool = False) -> Tensor:
        if quick or self.architecture.activation == "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        return F.gelu(x)


def compiled(step: ReferenceStep) -> Callable[[Batch], dict[str, Tensor]]:
    """Compile the forward pass with torch's fastest mode, for GPUs."""
    step.losses = torch.compile(step.losses, mode="max-autotune-no-cudagraphs")
    return step


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _additive(mask: Tensor, x: Tensor) -> Tensor:
    """Return 0 where the mask is true, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, -torch.inf)


def _pool(best: Tensor, scale: Tensor) -> Tensor:
    """Sum over the last axis, weighted by its softmax."""
    return (best * (scale * best).softmax(-1)).sum(-1)


def _cross_entropy(logits: Tensor) -> Tensor:
    return -logits.log_softmax(1).diagonal().mean()


def _kl(student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
    p, q = (scale * teacher).log_softmax(1), (scale * student).log_softmax(1)
    return 100 / len(student) ** 2 * (p.exp() * (p - q)).sum()


def peft_missing() -> str:
    """Return why peft cannot be imported, in one line; empty if it can.

    `pip install --no-deps peft transformers accelerate tokenizers` installs it.
    """
    missing = [name for name in PEFT_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"{', '.join(missing)} not installed: pip install --no-deps {' '.join(PEFT_PACKAGES)} tokenizers"
        )
    torchvision_cpu.install()  # transformers imports torchvision
    try:
        importlib.import_module("peft")
    except (ImportError, RuntimeError, OSError) as error:
        return f"peft does not import: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return ""


class PeftStep(ReferenceStep):
    """The published step with low-rank updates by the peft library.

    peft wraps separate linear layers for q, k and v, so each has its own factor a, where the release has one
    for all three: more is trained and computed.  It starts from the same numbers, so losses are equal.

    Raises:
        ModuleNotFoundError: peft or one of its imports is not installed.
    """

    def __init__(self, method: DiscoVLA, *, sdpa: bool = False, autocast: torch.dtype | None = None) -> None:
        super().__init__(method, sdpa=sdpa, autocast=autocast)
        if reason := peft_missing():
            raise ModuleNotFoundError(reason)
        names = [name.removesuffix(".lora.a") for name in self.weights if name.endswith(".lora.a")]
        self.layers = {name: self._wrapped(name) for name in names}
        self.trained = {name: p for name, p in self.weights.items() if p.requires_grad}

    def _wrapped(self, name: str) -> nn.ModuleDict:
        """Make layers q, k and v of an attention with peft's updates; add their parameters to `weights`."""
        peft: Any = importlib.import_module("peft")
        weight, bias = (self.weights.pop(f"{name}.qkv.{kind}").chunk(3) for kind in ("weight", "bias"))
        a, b = self.weights.pop(f"{name}.lora.a"), self.weights.pop(f"{name}.lora.b").chunk(3)
        layers: dict[str, nn.Linear] = {}
        for part, w, c in zip("qkv", weight, bias, strict=True):
            layers[part] = nn.Linear(a.shape[1], len(w), device=w.device, dtype=w.dtype)
            with torch.no_grad():
                layers[part].weight.copy_(w)
                layers[part].bias.copy_(c)
        config = peft.LoraConfig(
            r=len(a), lora_alpha=len(a), lora_dropout=0.0, target_modules=["q", "k", "v"]
        )
        wrapped = cast(Any, peft.inject_adapter_in_model(config, nn.ModuleDict(layers)))
        with torch.no_grad():
            for part, up in zip("qkv", b, strict=True):
                wrapped[part].lora_A["default"].weight.copy_(a)
                wrapped[part].lora_B["default"].weight.copy_(up)
        wrapped.to(a.device, a.dtype)
        self.weights.update({f"{name}.{own}": p for own, p in wrapped.named_parameters()})
        return wrapped

    def heads(self, side: str, block: str, y: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, n h l c."""
        heads = (self.architecture.vision if side == "vision" else self.architecture.text).heads
        layers = self.layers[f"{block}.attention"]
        return tuple(
            layers[part](y).unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for part in "qkv"
        )


class MatmulStep:
    """The matmul-only lower bound of our step: products with frozen weights, forward and backward.

    Attention, low-rank updates, layer norms, activations and losses are left out.  Each projection of each
    block has its own weights (noise), so that caches hold no more of them than in a real step.
    """

    def __init__(self, architecture: Architecture, *, dtype: torch.dtype, device: str) -> None:
        self.architecture, self.dtype, self.device = architecture, dtype, device
        self.weights: dict[tuple[int, int, int], Tensor] = {}
        self.inputs: dict[tuple[int, int], Tensor] = {}

    def __call__(self, batch: Batch) -> None:
        """Compute all products for a batch of this size and drop the results."""
        with torch.no_grad():
            for number, (rows, inputs, outputs, backward) in enumerate(self.products(batch)):
                weight = self._weight(number, inputs, outputs)
                torch.mm(self._rows(rows, inputs), weight.T)
                if backward:
                    torch.mm(self._rows(rows, outputs), weight)

    def products(self, batch: Batch) -> Iterator[tuple[int, int, int, bool]]:
        """Yield rows, inputs, outputs, and True if there is a gradient by the input."""
        return frozen_matmuls(self.architecture, DiscoVLAConfig(), size_of(batch))

    def _weight(self, number: int, inputs: int, outputs: int) -> Tensor:
        key = number, inputs, outputs
        if key not in self.weights:
            self.weights[key] = self._noise(outputs, inputs)
        return self.weights[key]

    def _rows(self, rows: int, width: int) -> Tensor:
        if (rows, width) not in self.inputs:
            self.inputs[rows, width] = self._noise(rows, width)
        return self.inputs[rows, width]

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)
