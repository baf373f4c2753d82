"""Cases of the towers' ops, see `cases`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from discovla.ops.attention import attention
from discovla.ops.cases import TF32, Case
from discovla.ops.dispatch import Impl
from discovla.ops.fp8_linear import FP8Weight, fp8_linear, quantise_rows, quantise_weight
from discovla.ops.frame_patches import frame_patches
from discovla.ops.fusion_norm import AdapterWeights, fusion_norm
from discovla.ops.layer_norm import layer_norm
from discovla.ops.lora_norm import lora_norm
from discovla.ops.mlp import MLPWeights, mlp
from discovla.ops.readout_attention import Readout, readout_attention
from discovla.ops.readout_lora_norm import readout_lora_norm
from discovla.ops.short_attention import Packing, short_attention
from discovla.ops.temporal_fusion import FrameGroups, temporal_fusion
from discovla.ops.unit_mean import unit_mean

FRAMES, TOKENS, RANK, PATCH = 12, 12, 8, 32  # of a clip, of a caption on average, of an adapter, in pixels
# largest errors of values and gradients: results, and in half precision attention weights, are rounded
LIMITS = {torch.float32: (2e-5, 2e-4), torch.float16: (2e-3, 4e-3), torch.bfloat16: (4e-3, 8e-3)}
FP8_LIMITS = (4e-2, 4e-2)  # a number of three bits beside the first is off by 2.6 % on average
Results = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class TowerCase(Case):
    """An op of the towers on n rows, sequences or frames of width `dim`.

    `masked` means packed sequences; for frame_patches a float32 result; for quantise_rows that rows and
    scales are returned separately.
    """

    rows: int
    """Rows of a sequence, hidden units or pixels; part of the name."""
    products: float
    """Floating-point operations of its matrix products, forward and backward."""

    @property
    def name(self) -> str:
        step = "step" if self.backward else "fwd"
        packed = " packed" if self.masked and self.backward else ""
        return f"{self.op} {step}{packed} {self.n}x{self.rows} w={self.dim} {str(self.dtype)[6:]}"

    @property
    def flops(self) -> float:
        return self.products

    @property
    def scaled(self) -> bool:
        return False

    @property
    def limits(self) -> tuple[float, float]:
        if self.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
            return TF32
        return FP8_LIMITS if self.op == "fp8_linear" else LIMITS[self.dtype]

    @property
    def reference_bytes(self) -> float:
        """Least memory of the reference: its scores, or ten times its inputs."""
        inputs = 10.0 * sum(2 * torch.Size(shape).numel() for shape in self.shapes)
        attends = self.op in ("attention", "short_attention", "temporal_fusion", "readout_attention")
        return inputs + (12.0 * self.products / (14 * 64) if attends else 0.0)  # 14 c operations a score

    def leaves(self, device: torch.device | str, seed: int = 0) -> list[Tensor]:
        """Return inputs of noise, or bytes."""
        generator = torch.Generator(device).manual_seed(seed)
        if self.op == "frame_patches":
            shape = self.shapes[0]
            return [torch.randint(256, shape, generator=generator, device=device, dtype=torch.uint8)]
        noise = [torch.randn(s, generator=generator, device=device).to(self.dtype) for s in self.shapes]
        return [x.requires_grad_(self.backward) for x in noise]

    def run(self, leaves: list[Tensor], impl: Impl) -> list[Tensor]:
        """Return all results in one vector, and the gradients of their products with noise."""
        with torch.set_grad_enabled(self.backward):
            out = self.call(leaves, impl, self.masked)
        results = [out] if isinstance(out, Tensor) else list(out)
        value = torch.cat([x.detach().flatten() for x in results])
        if not self.backward:
            return [value]
        generator = torch.Generator(value.device).manual_seed(1)
        noise = [torch.randn(x.shape, generator=generator, device=x.device) for x in results]
        directions = [d.to(torch.bfloat16).to(x.dtype) for d, x in zip(noise, results, strict=True)]
        return [value, *torch.autograd.grad(results, leaves, directions)]


@cache
def _frozen(shapes: tuple[tuple[int, ...], ...], device: torch.device) -> list[Tensor]:
    """Return frozen weights that are exact in every dtype."""
    generator = torch.Generator(device).manual_seed(2)
    noise = [torch.randn(s, generator=generator, device=device) / s[-1] ** 0.5 for s in shapes]
    return [x.to(torch.bfloat16) for x in noise]


@cache
def packed_captions(n: int, device: torch.device) -> Packing:
    """Return a packing of lengths from 6 to 18, 12 on average."""
    lengths = torch.arange(n, device=device) * 5 % (TOKENS + 1) + TOKENS // 2
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Packing(offsets=ends.int(), max_length=TOKENS // 2 + TOKENS, num_rows=int(ends[-1]))


@cache
def _groups(n: int, rows: int, heads: int, packed: bool, device: torch.device) -> FrameGroups:
    """Group n frames or captions by up to 12; the last one is padding unless groups have one member."""
    frames = next(f for f in range(FRAMES, 0, -1) if n % f == 0)
    packing = packed_captions(n, device) if packed else None
    first = torch.arange(n, device=device) * rows if packing is None else packing.offsets[:-1].long()
    last = first if packing is None else packing.offsets[1:].long() - 1
    count = n * rows if packing is None else int(packing.offsets[-1])
    seen = torch.arange(count, device=device) < (first[-1] if frames > 1 else count)
    return FrameGroups(
        heads=heads,
        readout_rows=last.view(-1, frames),
        packing=packing,
        causal=packed,
        group_mask=seen if packed else seen.view(n, rows),
    )


@cache
def gain_and_shift(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a frozen gain and shift of a norm."""
    gain, shift = _frozen(((width,), (width,)), device)
    return 1 + gain, shift


def _layer_norm(leaves: list[Tensor], impl: Impl, packed: bool) -> Results:
    affine = gain_and_shift(leaves[0].shape[-1], leaves[0].device)
    return layer_norm(leaves[0], leaves[1], affine=affine, impl=impl)


def _lora_norm(leaves: list[Tensor], impl: Impl, packed: bool) -> Results:
    affine = gain_and_shift(leaves[0].shape[-1], leaves[0].device)
    return lora_norm(leaves[0], leaves[2], leaves[1], affine=affine, impl=impl)[:2]


def _mlp(leaves: list[Tensor], impl: Impl, packed: bool) -> Results:
    w = leaves[0].shape[-1]
    up, up_bias, down, down_bias = _frozen(((4 * w, w), (4 * w,), (w, 4 * w), (w,)), leaves[0].device)
    return mlp(leaves[0], MLPWeights(up=up, up_bias=up_bias, down=down, down_bias=down_bias), impl=impl)


def _fp8_linear(leaves: list[Tensor], impl: Impl, packed: bool) -> Results:
    """In float64 the truth: the product by the same weight, of rows that are not rounded."""
    x, width = leaves[0], leaves[0].shape[-1]
    weight, bias, rounded = _fp8_weight(width, x.device)
    if x.dtype == torch.float64:
        return torch.nn.functional.linear(x, weight.double(), bias.double())
    return fp8_linear(x, rounded, bias, impl=impl)


@cache
def _fp8_weight(width: int, device: torch.device) -> tuple[Tensor, Tensor, FP8Weight]:
    """Return a frozen weight 4w w that FP8 holds exactly, its bias, and it in FP8, for backward too."""
    weight, bias = _frozen(((4 * width, width), (4 * width,)), device)
    rounded = quantise_weight(weight, backward=True)
    return rounded.plain, bias, rounded


def _fusion_norm(leaves: list[Tensor], impl: Impl, packed: bool) -> Results:
    x, u, *weights = leaves
    names = ("down", "down_bias", "up", "up_bias")
    _, slots = _read_rows(len(x), x.device)
    adapter_weights = AdapterWeights(**dict(zip(names, weights, strict=True)))
    return fusion_norm(x, u, adapter_weights, slots, affine=gain_and_shift(x.shape[-1], x.device), impl=impl)


def _read_lora_norm(leaves: list[Tensor], impl: Impl, packed: bool) -> Results:
    (x, u, a), device = leaves, leaves[0].device
    read, z, _, z_read = readout_lora_norm(
        x, a, u, *_read_rows(len(x), device), affine=gain_and_shift(x.shape[-1], device), impl=impl
    )
    return read, z, z_read


def _unit_mean(leaves: list[Tensor], impl: Impl, packed: bool) -> Results:
    n, frames, _ = leaves[0].shape
    places, device = torch.arange(frames, device=leaves[0].device), leaves[0].device
    return unit_mean(leaves[0], places <= torch.arange(n, device=device)[:, None] % frames, impl=impl)


@cache
def _read_rows(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return every twelfth row, and for each row its place among those, or -1."""
    ends = torch.arange(0, rows, FRAMES, device=device)
    slots = torch.full((rows,), -1, dtype=torch.int32, device=device)
    return ends, slots.index_copy(0, ends, torch.arange(len(ends), dtype=torch.int32, device=device))


def _patches(leaves: list[Tensor], impl: Impl, packed: bool) -> Results:
    truth = leaves[0].dtype != torch.uint8  # float64 inputs ask for the truth
    dtype = leaves[0].dtype if truth else torch.float32 if packed else torch.bfloat16
    return frame_patches(leaves[0].to(torch.uint8), PATCH, dtype=dtype, impl=impl)


def _rounded(leaves: list[Tensor], impl: Impl, apart: bool) -> Results:
    q, scale = quantise_rows(leaves[0], impl=impl)
    return (q, scale) if apart else q.to(scale.dtype) * scale


# heads, sequences and their rows precede what every call takes: cases are sent to other processes
def _dense_attention(heads: int, leaves: list[Tensor], impl: Impl, causal: bool) -> Results:
    q, k, v = leaves[0].unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # 3 n h l c
    return attention(q, k, v, causal=causal, impl=impl).transpose(1, 2).flatten(2)


def _attention(heads: int, n: int, leaves: list[Tensor], impl: Impl, packed: bool) -> Results:
    packing = packed_captions(n, leaves[0].device) if packed else None
    return short_attention(leaves[0], heads, packing=packing, causal=packed, impl=impl)


def _fusion(heads: int, n: int, rows: int, leaves: list[Tensor], impl: Impl, packed: bool) -> Results:
    groups = _groups(n, rows, heads, packed, leaves[0].device)
    return temporal_fusion(leaves[0], groups, impl=impl).tensor_split([-groups.readout_rows.numel()])


def _readout(heads: int, n: int, rows: int, leaves: list[Tensor], impl: Impl, packed: bool) -> Results:
    groups = _groups(n, rows, heads, packed, leaves[0].device)
    readout = Readout(
        heads=heads,
        rows=groups.readout_rows.flatten(),
        group=groups.readout_rows.shape[1],
        packing=groups.packing,
        causal=packed,
        group_mask=groups.group_mask,
    )
    return readout_attention(leaves[0], leaves[1], readout, impl=impl)


def row_case(op: str, n: int, dim: int, *, frames: int = FRAMES, **options) -> TowerCase:
    """An op on n rows of width `dim`: norms, mlp, or unit_mean of `frames` rows n times."""
    weights, read = ((RANK, dim), (RANK,), (dim, RANK), (dim,)), n + -(-n // FRAMES)
    shapes = {
        "fusion_norm": ((n, dim), (read, dim), *weights),
        "readout_lora_norm": ((n, dim), (n, dim), (RANK, dim)),
        "unit_mean": ((n, frames, dim),),
        "layer_norm": ((n, dim), (n, dim)),
        "lora_norm": ((n, dim), (n, dim), (RANK, dim)),
        "mlp": ((n, dim),),
        "fp8_linear": ((n, dim),),
    }[op]
    units = {"lora_norm": RANK, "readout_lora_norm": RANK, "mlp": 4 * dim, "fp8_linear": 4 * dim}.get(op, 0)
    # weights of lora_norm train
    passes = {"lora_norm": 3, "readout_lora_norm": 3, "mlp": 4, "fp8_linear": 2}.get(op, 0)
    call = {
        "layer_norm": _layer_norm,
        "lora_norm": _lora_norm,
        "readout_lora_norm": _read_lora_norm,
        "fusion_norm": _fusion_norm,
        "unit_mean": _unit_mean,
        "mlp": _mlp,
        "fp8_linear": _fp8_linear,
    }[op]
    products = 2.0 * n * dim * units * passes
    return TowerCase(
        op=op, call=call, n=n, m=n, dim=dim, rows=units, products=products, shapes=shapes, **options
    )


def sequence_case(
    op: str, n: int, rows: int, dim: int, heads: int, *, packed: bool = False, **options
) -> TowerCase:
    """Make an attention case on n sequences of `rows` rows, or of packed captions of 12 on average.

    For `attention`, which has no packed sequences, `packed` means causal ones of `rows` rows.
    """
    lengths = torch.full((n,), rows)
    if packed and op != "attention":
        lengths = packed_captions(n, torch.device("cpu")).offsets.diff()
    dense = not packed or op == "attention"
    shape = (n, rows, 3 * dim) if dense else (int(lengths.sum()), 3 * dim)
    call = partial(_attention, heads, n) if op == "short_attention" else partial(_fusion, heads, n, rows)
    pairs, shapes = float(lengths.double().square().sum()), (shape,)
    if op == "readout_attention":
        call, pairs = partial(_readout, heads, n, rows), float(lengths.sum())
        shapes = ((n, dim), (*shape[:-1], 2 * dim))
    if op == "attention":
        call = partial(_dense_attention, heads)
    elif op != "short_attention":
        pairs += FRAMES * float(lengths.sum())  # the readout rows of a group attend to each of its rows
    products = 2 * pairs * dim * 7  # forward 2, backward 5
    rows = rows if dense else TOKENS
    return TowerCase(
        op=op, call=call, n=n, m=n, dim=dim, rows=rows, products=products, shapes=shapes, masked=packed,
        **options,
    )  # fmt: skip


def patch_case(n: int, pixels: int, dtype: torch.dtype) -> TowerCase:
    """Make a case of frame_patches on n frames."""
    return TowerCase(
        op="frame_patches", call=_patches, n=n, m=n, dim=3 * PATCH**2, rows=pixels, products=0.0,
        shapes=((n, 1, pixels, pixels, 3),), dtype=dtype, masked=dtype == torch.float32, backward=False,
    )  # fmt: skip


def rounding_case(n: int, dim: int, **options) -> TowerCase:
    """Make a case of quantise_rows on n rows of width `dim`."""
    return TowerCase(
        op="quantise_rows", call=_rounded, n=n, m=n, dim=dim, rows=1, products=0.0, shapes=((n, dim),),
        backward=False, **options,
    )  # fmt: skip
