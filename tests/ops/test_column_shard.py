"""Losses put together from the columns of several processes (threads here) are those of whole matrices."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from discovla.ops.alignment_losses import AlignmentInputs, alignment_losses, frame_alignment
from discovla.ops.column_shard import ColumnShard
from discovla.ops.info_nce import contrastive_loss, cosine_similarity, info_nce
from discovla.testing import peak_bytes, relative_error

N, PARTS, WIDTH = 11, (3, 2), 5
SCALE = 9.0
IMPLS = ["reference", "torch"]
SPLITS = {"one": [11], "two": [6, 5], "ragged": [4, 1, 6], "with an empty one": [5, 0, 6]}


class Ranks:
    """Threads that add up and compare tensors as processes do."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.barrier = sizes, Barrier(len(sizes))
        self.given: dict[int, tuple[Tensor, ...]] = {}

    def run(self, part: Callable[[slice, ColumnShard], list[Tensor]]) -> list[list[Tensor]]:
        """part(its columns) of every rank."""
        with ThreadPoolExecutor(len(self.sizes)) as pool:
            return list(pool.map(lambda rank: self._run(rank, part), range(len(self.sizes))))

    def _run(self, rank: int, part: Callable[[slice, ColumnShard], list[Tensor]]) -> list[Tensor]:
        first = sum(self.sizes[:rank])
        columns = ColumnShard(
            first_text=first,
            all_reduce=lambda *own: [
                _Sum.apply(x, y) for x, y in zip(own, self._sums(rank, own), strict=True)
            ],
            all_reduce_max=lambda own: torch.stack([x[0] for x in self._everyones(rank, (own,))]).amax(0),
        )
        try:
            return part(slice(first, first + self.sizes[rank]), columns)
        except BaseException:
            self.barrier.abort()
            raise

    def _everyones(self, rank: int, own: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        self.given[rank] = tuple(x.detach().clone() for x in own)
        self.barrier.wait(30)
        actual = [self.given[other] for other in range(len(self.sizes))]
        self.barrier.wait(30)
        return actual

    def _sums(self, rank: int, own: tuple[Tensor, ...]) -> list[Tensor]:
        return [torch.stack(parts).sum(0) for parts in zip(*self._everyones(rank, own), strict=True)]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own, total):
        return total.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


def leaves() -> list[Tensor]:
    """text, video, text frames, video frames, scale."""
    shapes = [(N, WIDTH), (N, WIDTH), (N, PARTS[0], WIDTH), (N, PARTS[1], WIDTH)]
    made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [x.requires_grad_() for x in [*made, torch.tensor(SCALE, dtype=torch.float64)]]


def masks_and_ignore() -> tuple[Tensor, Tensor, Tensor]:
    text_mask, video_mask = torch.rand(N, PARTS[0]) < 0.7, torch.rand(N, PARTS[1]) < 0.7
    text_mask[:, 0] = video_mask[:, 0] = True
    clip = torch.arange(N) % 4
    return text_mask, video_mask, (clip[:, None] == clip).fill_diagonal_(False)


def check(
    losses: Callable[[list[Tensor], slice, ColumnShard | None], list[Tensor]], sizes: list[int]
) -> None:
    """Every rank's losses are the whole ones, and their gradients add up to the whole one."""
    x = leaves()
    expected = losses(x, slice(None), None)
    weights = [0.7, 0.4, 1.3][: len(expected)]
    whole = torch.autograd.grad(_weighed(expected, weights), x, allow_unused=True)

    def part(own: slice, columns: ColumnShard) -> list[Tensor]:
        mine = [leaf.detach().requires_grad_() for leaf in x]
        actual = losses(mine, own, columns)
        grads = torch.autograd.grad(_weighed(actual, weights), mine, allow_unused=True)
        return [*actual, *(g for g in grads if g is not None)]

    for actual in (ranks := Ranks(sizes).run(part)):
        for got, want in zip(actual, expected, strict=False):
            assert relative_error(got.detach(), want.detach()) < 1e-12
    present = [g for g in whole if g is not None]
    for index, want in enumerate(present, start=len(expected)):
        assert relative_error(torch.stack([actual[index] for actual in ranks]).sum(0), want) < 1e-10


def _weighed(losses: list[Tensor], weights: list[float]) -> Tensor:
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()


def inputs(
    x: list[Tensor],
    own: slice,
    columns: ColumnShard | None,
    masks: Sequence[Tensor],
    group: int | None = None,
) -> AlignmentInputs:
    return AlignmentInputs(
        group=group,
        text=x[0],
        video=x[1][own],
        text_frames=x[2],
        video_frames=x[3][own],
        text_mask=masks[0],
        video_mask=masks[1][own],
        columns=columns,
    )


def streams_nothing(impl: str, split: str) -> bool:
    """An empty block is one that the reference computes, whatever its texts."""
    return impl != "reference" and split == "with an empty one"


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("impl", IMPLS)
def test_info_nce_of_columns_is_that_of_the_whole_matrix(impl, split):
    if streams_nothing(impl, split):
        impl = "auto"
    ignore = masks_and_ignore()[2]

    def losses(x, own, columns):
        how = {"ignore": ignore[:, own], "columns": columns, "impl": impl}
        return [info_nce(x[0], x[1][own], x[4], **how)]

    check(losses, SPLITS[split])


@pytest.mark.parametrize("detach", [False, True], ids=["taught both ways", "detached teacher"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("impl", IMPLS)
def test_alignment_losses_of_columns_are_those_of_whole_matrices(impl, split, detach):
    if streams_nothing(impl, split):
        impl = "auto"
    *masks, ignore = masks_and_ignore()

    def losses(x, own, columns):
        how = {"detach_teacher": detach, "ignore": ignore[:, own], "impl": impl}
        actual = alignment_losses(inputs(x, own, columns, masks), x[4], **how)
        return [actual.video, actual.frame, actual.distill]

    check(losses, SPLITS[split])


@pytest.mark.parametrize("detach", [False, True], ids=["taught both ways", "detached teacher"])
@pytest.mark.parametrize("split", SPLITS)
def test_frame_alignment_of_columns_is_that_of_the_whole_matrix_for_any_logits(split, detach):
    *masks, ignore = masks_and_ignore()

    def losses(x, own, columns):
        student = (x[4] * cosine_similarity(x[0], x[1][own]) ** 3).masked_fill(ignore[:, own], -1e9)
        how = {"kl_norm": "fixed", "detach_teacher": detach, "ignore": ignore[:, own]}
        frame, distill = frame_alignment(student, inputs(x, own, columns, masks), x[4], **how)
        return [contrastive_loss(student, columns), frame, distill]

    check(losses, SPLITS[split])


@pytest.mark.parametrize("taught", ["pooled", "other logits"])
@pytest.mark.parametrize("detach", [False, True], ids=["taught both ways", "detached teacher"])
@pytest.mark.parametrize("split", SPLITS)
def test_groups_of_columns_are_those_of_whole_matrices(split, detach, taught):
    *masks, ignore = masks_and_ignore()

    def losses(x, own, columns):
        how = {"detach_teacher": detach, "ignore": ignore[:, own]}
        given = inputs(x, own, columns, masks, group=4)
        if taught == "pooled":
            actual = alignment_losses(given, x[4], **how)
            return [actual.video, actual.frame, actual.distill]
        student = x[4] * cosine_similarity(x[0], x[1][own]) ** 3
        return list(frame_alignment(student.masked_fill(ignore[:, own], -1e9), given, x[4], **how))

    check(losses, SPLITS[split])


@pytest.mark.parametrize("kl_norm", ["official", "fixed"])
def test_losses_of_groups_are_the_mean_over_groups_as_batches(kl_norm):
    *masks, ignore = masks_and_ignore()
    x, n, groups = leaves(), 8, (slice(0, 4), slice(4, 8))
    x = [leaf[:n] if leaf.dim() else leaf for leaf in x]
    masks = [mask[:n] for mask in masks]
    how = {"kl_norm": kl_norm, "ignore": ignore[:n, :n]}
    actual = alignment_losses(inputs(x, slice(None), None, masks, group=4), x[4], **how)
    expected = []
    for group in groups:
        part = [leaf[group] if leaf.dim() else leaf for leaf in x]
        given = inputs(part, slice(None), None, [mask[group] for mask in masks])
        expected.append(alignment_losses(given, x[4], kl_norm=kl_norm, ignore=ignore[group, group]))
    whole = alignment_losses(inputs(x, slice(None), None, masks), x[4], **how)
    assert actual.video.item() == pytest.approx(whole.video.item(), rel=1e-12)
    for name in ("frame", "distill"):
        mean = sum(getattr(loss, name).item() for loss in expected) / 2
        assert getattr(actual, name).item() == pytest.approx(mean, rel=1e-12)
        assert getattr(whole, name).item() != pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_far_apart_on_ranks_neither_overflow_nor_vanish(impl):
    eye = torch.eye(4)
    scale = torch.tensor(500.0)
    actual = Ranks([2, 2]).run(
        lambda own, columns: [info_nce(eye, eye.roll(1, 0)[own], scale, columns=columns, impl=impl)]
    )
    torch.testing.assert_close([loss for (loss,) in actual], [torch.tensor(500.0)] * 2)


def alone(first: int) -> ColumnShard:
    """Columns of a process that hears nothing of the others: for counting its own work."""
    return ColumnShard(first_text=first, all_reduce=lambda *own: own, all_reduce_max=lambda x: x)


def block(n: int, videos: int, group: int | None = None) -> Callable[[str], None]:
    """Forward and backward of the alignment losses of n texts and these many videos."""
    shapes = [(n, 16), (videos, 16), (n, 4, 16), (videos, 4, 16)]
    x = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def run(impl: str) -> None:
        of = {"text": x[0], "video": x[1], "text_frames": x[2], "video_frames": x[3]}
        given = AlignmentInputs(**of, columns=alone(0), group=group)
        actual = alignment_losses(given, torch.tensor(9.0), impl=impl)
        (actual.video + actual.frame + actual.distill).backward()

    return run


def test_work_and_memory_of_a_rank_fall_as_one_over_their_number():
    n, work, memory = 256, {}, {}
    for size in (1, 2, 4):
        with FlopCounterMode(display=False) as counted:
            block(n, n // size)("reference")
        work[size] = counted.get_total_flops()
        memory[size] = peak_bytes(lambda size=size: block(n, n // size)("reference"))
    assert work[1] == 3 * 2 * n * n * 16 * (1 + 4 * 4)  # a product and its two derivatives, of both matrices
    assert [work[1] / work[size] for size in (2, 4)] == [2, 4]
    assert [memory[1] / memory[size] for size in (2, 4)] == pytest.approx([2, 4], rel=0.05)


def test_groups_bound_the_work_on_frames():
    def work(**how):
        with FlopCounterMode(display=False) as counted:
            block(256, 64, **how)("reference")
        return counted.get_total_flops()

    pooled, frames = (3 * 2 * 256 * 64 * 16 * parts for parts in (1, 4 * 4))
    assert work() == pooled + frames
    assert work(group=32) == pooled + (pooled + frames) / 8  # the student once more, inside groups


def test_streamed_columns_need_memory_for_embeddings_alone(monkeypatch):
    for module in ("frame_similarity", "contrastive"):
        monkeypatch.setattr(f"discovla.ops.streamed.{module}.ELEMENTS", 1 << 12)
    sizes = [peak_bytes(lambda n=n: block(n, n // 2)("torch")) for n in (64, 128, 256)]
    assert sizes[2] / sizes[1] < 2.2 and sizes[1] / sizes[0] < 2.2
