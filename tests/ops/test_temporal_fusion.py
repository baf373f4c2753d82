from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from discovla.nn.block import BlockShape
from discovla.nn.fusion import FusionAttention
from discovla.nn.layout import SequenceLayout
from discovla.ops.dispatch import IMPLEMENTATIONS, KernelUnavailable
from discovla.ops.fusion_norm import fusion_norm
from discovla.ops.short_attention import Packing
from discovla.ops.temporal_fusion import FrameGroups, _temporal_fusion, temporal_fusion
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["temporal_fusion"]
# fp32: sums over all keys of a group.  fp16: weights and gradients are rounded to 11 bits
BUDGET = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3}
HEADS, CHANNELS = 2, 5


@dataclass(frozen=True)
class Case:
    """Groups of sequences: lengths of the sequences of each group, all equal unless packed.

    alone: of those before them, which have no group.
    """

    lengths: list[list[int]]
    alone: tuple[int, ...] = ()
    packed: bool = False
    causal: bool = False
    masked: bool = False
    position: bool = False

    @property
    def flat(self) -> list[int]:
        return [*self.alone, *(length for group in self.lengths for length in group)]

    @property
    def starts(self) -> list[int]:
        return [sum(self.flat[:s]) for s in range(len(self.flat))]

    @property
    def readout(self) -> Tensor:
        """The last row where rows are causal, as the end of a caption; else the first, as a class token."""
        ends = [
            first + (length - 1) * self.causal for first, length in zip(self.starts, self.flat, strict=True)
        ]
        return torch.tensor(ends, device=DEVICE)[len(self.alone) :].view(len(self.lengths), -1)

    def masks(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys seen within a sequence: all but every third; across a group: none of its second sequence."""
        if not self.masked:
            return None, None
        key = torch.cat([torch.arange(length) % 3 != 1 for length in self.flat])
        frames = len(self.lengths[0])
        group = torch.cat([torch.full((n,), s % frames != 1) for s, n in enumerate(self.flat)])
        return key.to(DEVICE), group.to(DEVICE)

    def groups(self) -> FrameGroups:
        shape = (sum(self.flat),) if self.packed else (len(self.flat), self.flat[0])
        masks = [None if mask is None else mask.view(shape) for mask in self.masks()]
        packing = None
        if self.packed:
            offsets = torch.tensor([*self.starts, sum(self.flat)], dtype=torch.int32, device=DEVICE)
            packing = Packing(offsets=offsets, max_length=max(self.flat), num_rows=sum(self.flat))
        return FrameGroups(
            heads=HEADS,
            readout_rows=self.readout,
            packing=packing,
            causal=self.causal,
            key_mask=masks[0],
            group_mask=masks[1],
            ungrouped=len(self.alone),
        )

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """Rows r 3w, and positions where there are any: one more than frames."""
        generator = torch.Generator().manual_seed(sum(self.flat))
        shapes = [(sum(self.flat), 3 * HEADS * CHANNELS)]
        shapes += [(len(self.lengths[0]) + 1, HEADS * CHANNELS)] if self.position else []
        noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [x.to(DEVICE, dtype).requires_grad_() for x in noise]

    def run(self, leaves: list[Tensor], impl) -> list[Tensor]:
        """Rows r w and own n w."""
        qkv = leaves[0] if self.packed else leaves[0].view(len(self.flat), self.flat[0], -1)
        position = leaves[1] if self.position else None
        out = temporal_fusion(qkv, self.groups(), position=position, impl=impl)
        return list(out.tensor_split([len(leaves[0])]))


def plain(case: Case, leaves: list[Tensor]) -> list[Tensor]:
    """Compute `temporal_fusion` one query at a time, as by hand."""
    q, k, v = leaves[0].unflatten(-1, (3, HEADS, CHANNELS)).unbind(1)  # r h c
    frames, moved = len(case.lengths[0]), k
    owner = torch.repeat_interleave(torch.tensor(case.flat)).to(DEVICE)  # the sequence of each row
    if case.position:
        moved = k + leaves[1][(owner - len(case.alone)) % frames].unflatten(-1, (HEADS, CHANNELS))
    key_mask, group_mask = case.masks()
    group_of = (owner - len(case.alone)).div(frames, rounding_mode="floor")
    place, readout = torch.arange(len(q), device=DEVICE), case.readout.flatten()

    def attend(i: int, keys: Tensor, seen: Tensor) -> Tensor:
        if not seen.any():
            return 0 * q[i].flatten()
        weights = (torch.einsum("hc,jhc->hj", q[i], keys[seen]) / CHANNELS**0.5).softmax(-1)
        return torch.einsum("hj,jhc->hc", weights, v[seen]).flatten()

    def within(i: int) -> Tensor:
        seen = (owner == owner[i]) & (place <= i if case.causal else True)
        return attend(i, k, seen if key_mask is None else seen & key_mask)

    def across(i: int) -> Tensor:
        seen = (group_of == group_of[i]) & (owner >= len(case.alone))
        return attend(i, moved, seen if group_mask is None else seen & group_mask)

    ends = set(readout.tolist())
    rows = torch.stack([across(i) if i in ends else within(i) for i in range(len(q))])
    return [rows, torch.stack([within(i) for i in readout.tolist()])]


CASES = {
    "one": Case([[1]]),
    "frames": Case([[7, 7, 7], [7, 7, 7]]),
    "padded-frames": Case([[7, 7, 7], [7, 7, 7]], masked=True, position=True),
    "only-frame-padded": Case([[3, 3]], masked=True),
    "frames-of-63": Case([[63, 63]]),
    "frames-of-70": Case([[70, 70]], masked=True, position=True),
    "captions": Case([[3, 1, 12], [5, 2, 7]], packed=True, causal=True, position=True),
    "long-captions": Case([[5, 65]], packed=True, causal=True),  # a readout row is the first of its tile
    "masked-captions": Case([[3, 9, 4]], packed=True, causal=True, masked=True),
    "captions-alone": Case([[3, 1], [2, 7]], (5, 8, 1), packed=True, causal=True, masked=True, position=True),
    "frames-alone": Case([[66, 66]], (66,)),
    "17-frames": Case([[1] * 17], position=True),  # more than a tile of readout rows
}
RUNS = [
    (name, torch.float64 if name in ("frames-of-70", "captions", "captions-alone") else torch.float32)
    for name in CASES
]
RUNS += [("padded-frames", torch.float16)]
# lengths that fill their tiles exactly: of 16, 32 and 64 keys, and two of 64
CASES |= {f"exactly-{length}": Case([[length] * 2]) for length in (16, 32, 64, 128)}
CASES |= {"captions-of-16-and-64": Case([[16, 64]], packed=True, causal=True)}
RUNS += [(name, torch.float32) for name in CASES if name.startswith("exactly")]
RUNS += [("captions-of-16-and-64", torch.float32), ("exactly-128", torch.float16)]


def assert_close(got: Tensor, want: Tensor, budget: float, name: str) -> None:
    assert (got.double() - want).abs().max() <= budget * max(1, want.abs().max()), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_values_and_gradients_are_those_of_the_formula(name, dtype, impl, monkeypatch):
    """Backward takes whole groups, two frames of a group, or frame by frame; some of them load rows again."""
    skip_what_no_gpu_kernel_takes(impl, dtype)
    least = {"captions": 1, "captions-alone": 1, "exactly-32": 1, "padded-frames": 8}.get(name, 1024)
    monkeypatch.setattr("discovla_kernels.temporal_fusion.PROGRAMS", least)
    if name in ("captions", "exactly-32", "padded-frames"):
        monkeypatch.setattr("discovla_kernels.temporal_fusion.reloads", lambda x, tile: tile["ONE"])
    case = CASES[name]
    x = case.leaves(dtype)
    truth = [leaf.detach().double().requires_grad_() for leaf in x]
    want, got = plain(case, truth), case.run(x, impl)
    directions = [torch.randn(w.shape, dtype=torch.float64, device=DEVICE) for w in want]
    for part, g, w in zip(("rows", "own"), got, want, strict=True):
        assert g.dtype == dtype
        assert_close(g, w, BUDGET[dtype], part)
    expected = torch.autograd.grad(sum((w * d).sum() for w, d in zip(want, directions, strict=True)), truth)
    actual = torch.autograd.grad(
        sum((g * d.to(dtype)).sum() for g, d in zip(got, directions, strict=True)), x
    )
    for part, g, w in zip(("qkv", "position"), actual, expected, strict=False):
        assert_close(g, w, 2 * BUDGET[dtype], part)


@pytest.mark.parametrize("impl", IMPLS)
def test_readout_rows_whose_group_is_all_padding_are_zero(impl):
    x = torch.randn(4, 3, 3 * HEADS * CHANNELS, device=DEVICE, requires_grad=True)
    mask = torch.tensor([[False] * 3, [False] * 3, [True] * 3, [True] * 3], device=DEVICE)
    readout = torch.arange(0, 12, 3, device=DEVICE).view(2, 2)
    groups = FrameGroups(heads=HEADS, readout_rows=readout, group_mask=mask)
    out = temporal_fusion(x, groups, impl=impl)
    (grad,) = torch.autograd.grad(out.sum(), x)
    rows, own = out[:12].view(4, 3, -1), out[12:]
    assert not rows[:2, 0].any() and rows[2:, 0].all() and own.all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_with_adapter_and_layer_norm_it_is_the_attention_of_a_fusion_block(impl):
    block = FusionAttention(BlockShape(width=10, heads=2, mlp_width=20), 3, positions=True).to(DEVICE)
    for parameter in (block.frame_position, block.adapter.up.weight):
        torch.nn.init.normal_(parameter)
    x, mask = torch.randn(6, 5, 10, device=DEVICE), torch.ones(6, 5, dtype=torch.bool, device=DEVICE)
    mask[2] = False
    readout = torch.arange(0, 30, 5, device=DEVICE).view(2, 3)
    first = torch.zeros(6, dtype=torch.long, device=DEVICE)
    want = block(x, SequenceLayout(group=3, readout=first, fusion_key_mask=mask))
    groups = FrameGroups(heads=2, readout_rows=readout, group_mask=mask)
    out = temporal_fusion(block.qkv(x), groups, position=block.frame_position, impl=impl)
    readout_index = torch.full((30,), -1, dtype=torch.int32, device=DEVICE)
    readout_index[readout.flatten()] = torch.arange(6, dtype=torch.int32, device=DEVICE)
    total, _ = fusion_norm(x, block.out(out), block.adapter.weights, readout_index, impl=impl)
    torch.testing.assert_close(total, x + want, atol=1e-5, rtol=1e-5)


def test_beside_its_input_the_kernel_keeps_only_the_readout_rows_results():
    case = CASES["frames"]
    x = case.leaves(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.run(x, "triton")
    more = [t for t in kept if t.untyped_storage().data_ptr() != x[0].untyped_storage().data_ptr()]
    assert [tuple(t.shape) for t in more] == [(2, 3), (6, HEADS * CHANNELS), (6, HEADS)]


def test_two_runs_are_bitwise_equal():
    case = CASES["long-captions"]
    x = case.leaves(torch.float32)
    grads = [torch.autograd.grad(sum(y.square().sum() for y in case.run(x, "triton")), x)[0] for _ in "ab"]
    assert torch.equal(*grads)


def test_the_reference_passes_gradcheck():
    case = Case([[2, 3]], (2,), packed=True, causal=True, masked=True, position=True)
    assert torch.autograd.gradcheck(
        lambda *x: tuple(case.run(list(x), "reference")), case.leaves(torch.float64)
    )


def test_the_op_is_registered_soundly():
    skip_what_no_gpu_kernel_takes("triton", torch.float64)
    case = Case([[2, 3]], (2,), packed=True, causal=True, masked=True, position=True)
    x, position = case.leaves(torch.float64)
    offsets = case.groups().packing.offsets
    position = position.detach()[:2].requires_grad_()
    arguments = (x, case.readout, offsets, *case.masks(), position, HEADS, 3, True, 1)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_temporal_fusion, arguments, test_utils=tests)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_that_do_not_fit_are_refused_by_name(impl):
    x, readout = torch.zeros(4, 3, 12), torch.arange(0, 12, 3).view(2, 2)
    seen = torch.ones(4, 3) > 0

    def call(qkv=x, *, readout_rows=readout, position=None, key=seen, group=seen):
        groups = FrameGroups(heads=2, readout_rows=readout_rows, key_mask=key, group_mask=group)
        return temporal_fusion(qkv, groups, position=position, impl=impl)

    for message, wrong in (
        ("qkv: expected n l 3w, w a multiple of 2 heads", lambda: call(x[0])),
        ("readout_rows: expected int64, b f of 4 sequences", lambda: call(readout_rows=readout[:1])),
        ("readout_rows: expected int64, b f of 4 sequences", lambda: call(readout_rows=readout.int())),
        ("key_mask: expected shape", lambda: call(key=seen[:2])),
        ("group_mask: expected bool, found torch.uint8", lambda: call(group=seen.to(torch.uint8))),
        ("group_mask: expected shape", lambda: call(group=seen[:2])),
        ("position: expected at least 2 rows 4 wide", lambda: call(position=x[0, :1, :4])),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            wrong()


def test_groups_too_large_for_the_kernel_are_refused():
    groups = FrameGroups(heads=1, readout_rows=torch.arange(65)[None])
    with pytest.raises(KernelUnavailable, match="groups of at most 64 frames, found 65"):
        temporal_fusion(torch.zeros(65, 1, 3), groups, impl="triton")
