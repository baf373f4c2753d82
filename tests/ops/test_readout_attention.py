from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from discovla.ops.dispatch import IMPLEMENTATIONS, KernelUnavailable
from discovla.ops.readout_attention import Readout, _readout_attention, readout_attention
from discovla.ops.short_attention import Packing
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["readout_attention"]
# fp32: sums over all keys of a group.  fp16: weights and gradients are rounded to 11 bits
BUDGET = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3}
HEADS, CHANNELS = 2, 5
WIDTH = HEADS * CHANNELS


@dataclass(frozen=True)
class Case:
    """Sequences by their lengths: `alone` of them first, then groups of `group` neighbours."""

    lengths: tuple[int, ...]
    group: int = 0
    alone: int = 0
    packed: bool = False
    causal: bool = False
    masked: bool = False
    position: bool = False

    def masks(self) -> tuple[Tensor, Tensor]:
        """Keys seen within a sequence: all but every third; across a group: none of every other sequence."""
        if not self.masked:
            return torch.ones(sum(self.lengths)) > 0, torch.ones(sum(self.lengths)) > 0
        key = torch.cat([torch.arange(length) % 3 != 1 for length in self.lengths])
        group = torch.cat([torch.full((n,), s % 2 == 0) for s, n in enumerate(self.lengths)])
        return key, group

    @property
    def ends(self) -> Tensor:
        """A row of the middle, as that of a caption's end with padding after it; else the first."""
        starts = [sum(self.lengths[:s]) for s in range(len(self.lengths))]
        return torch.tensor([s + n * self.causal // 2 for s, n in zip(starts, self.lengths, strict=True)])

    def readout(self) -> Readout:
        shape = (sum(self.lengths),) if self.packed else (len(self.lengths), self.lengths[0])
        masks = [mask.view(shape).to(DEVICE) if self.masked else None for mask in self.masks()]
        offsets = torch.tensor([0, *self.lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
        packing = Packing(offsets=offsets, max_length=max(self.lengths), num_rows=sum(self.lengths))
        return Readout(
            heads=HEADS,
            rows=self.ends.to(DEVICE),
            group=self.group,
            ungrouped=self.alone,
            packing=packing if self.packed else None,
            causal=self.causal,
            key_mask=masks[0],
            group_mask=masks[1],
        )

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """Queries, rows of keys and values, and positions where there are any: one more than frames."""
        generator = torch.Generator().manual_seed(sum(self.lengths))
        shapes = [(len(self.lengths), WIDTH), (sum(self.lengths), 2 * WIDTH)]
        shapes += [(self.group + 1, WIDTH)] if self.position else []
        noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [x.to(DEVICE, dtype).requires_grad_() for x in noise]

    def run(self, leaves: list[Tensor], impl) -> tuple[Tensor, Tensor]:
        kv = leaves[1] if self.packed else leaves[1].unflatten(0, (len(self.lengths), -1))
        position = leaves[2] if self.position else None
        out = readout_attention(leaves[0], kv, self.readout(), position=position, impl=impl)
        return out.tensor_split([len(leaves[0])])


def plain(case: Case, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute `readout_attention` one query at a time, as by hand."""
    q = leaves[0].unflatten(-1, (HEADS, CHANNELS))
    k, v = leaves[1].unflatten(-1, (2, HEADS, CHANNELS)).unbind(1)  # r h c
    owner = torch.repeat_interleave(torch.tensor(case.lengths))  # the sequence of each row
    group, place, (key_mask, group_mask) = max(1, case.group), torch.arange(len(k)), case.masks()
    frame = (owner - case.alone) % group
    moved = k + leaves[2][frame.to(DEVICE)].unflatten(-1, (HEADS, CHANNELS)) if case.position else k

    def attend(s: int, keys: Tensor, seen: Tensor) -> Tensor:
        seen = seen.to(DEVICE)
        if not seen.any():
            return 0 * q[s].flatten()
        weights = (torch.einsum("hc,jhc->hj", q[s], keys[seen]) / CHANNELS**0.5).softmax(-1)
        return torch.einsum("hj,jhc->hc", weights, v[seen]).flatten()

    def within(s: int) -> Tensor:
        return attend(s, k, (owner == s) & key_mask & (place <= case.ends[s] if case.causal else True))

    def across(s: int) -> Tensor:
        first = s - (s - case.alone) % group
        return attend(s, moved, (owner >= first) & (owner < first + group) & group_mask)

    n = len(case.lengths)
    alone = case.alone if case.group else n
    rows = [within(s) if s < alone else across(s) for s in range(n)]
    own = [within(s) for s in range(alone, n)]
    return torch.stack(rows), torch.stack(own) if own else leaves[0][:0]


CASES = {
    "one": Case((1,)),
    "frames": Case((7,) * 6, group=3),
    "frames-alone": Case((7,) * 4),
    "padded-frames": Case((7,) * 6, group=3, masked=True, position=True),
    "17-frames": Case((1,) * 17, group=17, position=True),  # more than a tile of readout rows
    "frames-of-63": Case((63, 63), group=2),
    "frames-of-130": Case((130, 130), group=2, masked=True, position=True),
    "captions": Case((3, 1, 12, 5), packed=True, causal=True),
    "captions-of-frames": Case((3, 1, 12, 5, 2, 7), group=3, packed=True, causal=True),
    "both-captions": Case((70, 8, 3, 1, 12, 5), group=2, alone=2, packed=True, causal=True, masked=True),
    "both-placed": Case((4, 3, 1), group=2, alone=1, packed=True, causal=True, position=True),
}
# lengths that fill their tiles exactly
CASES |= {f"exactly-{length}": Case((length,) * 2, group=2) for length in (16, 32, 64, 128)}
CASES |= {"captions-of-64-and-16": Case((64, 16), packed=True, causal=True)}
RUNS = [(name, torch.float64 if name.startswith("both") else torch.float32) for name in CASES]
RUNS += [("padded-frames", torch.float16)]


def assert_close(got: Tensor, want: Tensor, budget: float, name: str) -> None:
    assert got.shape == want.shape, name
    assert not got.numel() or (got.double() - want).abs().max() <= budget * max(1, want.abs().max()), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_values_and_gradients_are_those_of_the_formula(name, dtype, impl):
    skip_what_no_gpu_kernel_takes(impl, dtype)
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
    for part, g, w in zip(("q", "kv", "position"), actual, expected, strict=False):
        assert_close(g, w, 2 * BUDGET[dtype], part)


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_that_see_no_key_give_zeros_and_zero_gradients(impl):
    q, kv = torch.randn(4, WIDTH, device=DEVICE), torch.randn(4, 3, 2 * WIDTH, device=DEVICE)
    mask = torch.tensor([[False] * 3, [False] * 3, [True] * 3, [True] * 3], device=DEVICE)
    ends = torch.arange(0, 12, 3, device=DEVICE)
    leaves = q.requires_grad_(), kv.requires_grad_()
    readout = Readout(heads=HEADS, rows=ends, group=2, key_mask=mask, group_mask=mask)
    rows, own = readout_attention(*leaves, readout, impl=impl).tensor_split([4])
    grads = torch.autograd.grad(rows.sum() + own.sum(), leaves)
    assert not rows[:2].any() and not own[:2].any() and rows[2:].all() and own[2:].all()
    assert all(g.isfinite().all() and not g[:2].any() for g in grads)


def test_the_kernel_keeps_only_its_inputs():
    x = CASES["frames"].leaves(torch.float32)
    own = {leaf.untyped_storage().data_ptr() for leaf in x}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        CASES["frames"].run(x, "triton")
    more = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert [tuple(t.shape) for t in more] == [(6,)], "the rows that are read"


def test_two_runs_are_bitwise_equal():
    case = CASES["both-captions"]
    x = case.leaves(torch.float32)
    grads = [torch.autograd.grad(sum(y.square().sum() for y in case.run(x, "triton")), x) for _ in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_reference_passes_gradcheck():
    case = CASES["both-placed"]
    assert torch.autograd.gradcheck(
        lambda *x: tuple(case.run(list(x), "reference")), case.leaves(torch.float64)
    )


def test_the_op_is_registered_soundly():
    skip_what_no_gpu_kernel_takes("triton", torch.float64)
    case = CASES["both-placed"]
    q, kv, position = case.leaves(torch.float64)
    position = position.detach()[:2].requires_grad_()
    readout = case.readout()
    tensors = (q, kv, readout.rows, readout.packing.offsets, None, None, position)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_readout_attention, (*tensors, HEADS, 4, True, 1, 2), test_utils=tests)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_that_do_not_fit_are_refused_by_name(impl):
    q, kv, ends = torch.zeros(4, 4), torch.zeros(4, 3, 8), torch.arange(0, 12, 3)
    seen = torch.ones(4, 3) > 0

    def call(q=q, kv=kv, *, rows=ends, position=None, group=2, key=seen, across=seen):
        readout = Readout(heads=2, rows=rows, group=group, key_mask=key, group_mask=across)
        return readout_attention(q, kv, readout, position=position, impl=impl)

    for message, wrong in (
        ("q: expected n w, w a multiple of 2 heads", lambda: call(q[0])),
        ("q: expected one row a sequence, found 2", lambda: call(q[:2])),
        ("kv: expected n l 8", lambda: call(kv=kv[0])),
        ("rows: expected shape", lambda: call(rows=ends[:2])),
        ("rows: expected int64", lambda: call(rows=ends.int())),
        ("group: expected a divisor of 4, found 3", lambda: call(group=3)),
        ("key_mask: expected shape", lambda: call(key=seen[:2])),
        ("group_mask: expected bool, found torch.uint8", lambda: call(across=seen.to(torch.uint8))),
        ("position: expected at least 2 rows 4 wide", lambda: call(position=q[:1])),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            wrong()


def test_groups_too_large_for_the_kernel_are_refused():
    readout = Readout(heads=1, rows=torch.arange(65), group=65)
    with pytest.raises(KernelUnavailable, match="groups of at most 64 frames, found 65"):
        readout_attention(torch.zeros(65, 1), torch.zeros(65, 1, 2), readout, impl="triton")
