from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from discovla.batch import Embedding
from discovla.ops.alignment_losses import AlignmentInputs, _alignment_block, alignment_losses
from discovla.ops.dispatch import IMPLEMENTATIONS
from discovla.ops.info_nce import info_nce
from discovla.ops.streamed.losses import contrastive_streamed
from discovla.testing import relative_error
from tests.methods import golden_discovla as golden_file
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

STREAMED = [impl for impl in IMPLEMENTATIONS["info_nce"] if impl != "reference"]
NAMES = ("text", "video", "text_frames", "video_frames", "scale")
SIZES = [1, 7, 63, 130]
# fp32: rounding of logits of size 7, and of probabilities that cancel against the diagonal
BUDGET = {torch.float64: 1e-11, torch.float32: 2e-5}
CASES = [(torch.float64, n) for n in SIZES] + [(torch.float32, n) for n in (*SIZES[:3], 16, 64)]


@dataclass(frozen=True)
class Case:
    leaves: list[Tensor]  # text, video, text frames, video frames, scale
    masks: tuple[Tensor | None, Tensor | None]
    ignore: Tensor | None


def case(n: int, masked: bool, dtype: torch.dtype, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed + n)
    shapes = [(n, 5), (n, 5), (n, 3, 6), (n, 2, 6)]
    noise = [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for s in shapes]
    leaves = [x.requires_grad_() for x in [*noise, torch.tensor(7.0, dtype=dtype, device=DEVICE)]]
    if not masked:
        return Case(leaves, (None, None), None)
    text_mask = torch.arange(3) <= torch.arange(n)[:, None] % 3
    video_mask = torch.arange(2) <= torch.arange(n)[:, None] % 2
    clip = torch.arange(n) % max(1, n // 2)  # two captions or three of every clip
    ignore = (clip[:, None] == clip).fill_diagonal_(False)
    return Case(leaves, (text_mask.to(DEVICE), video_mask.to(DEVICE)), ignore.to(DEVICE))


def widened(x: Case) -> Case:
    return Case([leaf.detach().double().requires_grad_() for leaf in x.leaves], x.masks, x.ignore)


def losses(x: Case, impl: str, detach: bool = False) -> list[Tensor]:
    inputs = AlignmentInputs(
        text=x.leaves[0],
        video=x.leaves[1],
        text_frames=x.leaves[2],
        video_frames=x.leaves[3],
        text_mask=x.masks[0],
        video_mask=x.masks[1],
    )
    out = alignment_losses(inputs, x.leaves[4], detach_teacher=detach, ignore=x.ignore, impl=impl)
    return [out.video, out.frame, out.distill]


def assert_close(got: Tensor, want: Tensor, budget: float, name: str, size: float = 1e-2) -> None:
    """Within `budget` of the largest entry, or of `size` where larger terms than the entry have cancelled."""
    assert (got.double() - want).abs().max() <= budget * max(size, want.abs().max()), name


@pytest.mark.parametrize("impl", STREAMED)
@pytest.mark.parametrize(("dtype", "n"), CASES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_alignment_losses_and_gradients_are_those_of_the_formula(n, masked, dtype, impl):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    x = case(n, masked, dtype)
    truth = widened(x)
    for detach in (False, True) if n == 7 else (False,):
        want, got = losses(truth, "reference", detach), losses(x, impl, detach)
        # logits of size 7 cancel, in the divergence after a multiplication by w n = 100 / n
        cancelled = {"video": 0.7, "frame": 0.7, "distill": 70 / n}
        for (name, size), g, w in zip(cancelled.items(), got, want, strict=True):
            assert_close(g, w, BUDGET[dtype], name, size)
        expected = torch.autograd.grad(want[0] + 0.3 * want[1] + 2 * want[2], truth.leaves)
        actual = torch.autograd.grad(got[0] + 0.3 * got[1] + 2 * got[2], x.leaves)
        for name, g, w in zip(
            ("text", "video", "text_frames", "video_frames", "scale"), actual, expected, strict=True
        ):
            assert_close(g, w, BUDGET[dtype], name, 70 if n == 1 else 0.01)


@pytest.mark.parametrize("impl", STREAMED)
@pytest.mark.parametrize(("dtype", "n"), [*CASES, (torch.float16, 7)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_info_nce_and_its_gradients_are_those_of_the_formula(n, masked, dtype, impl):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    x = case(n, masked, dtype)
    x.leaves[4] = torch.tensor(
        7.0, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE, requires_grad=True
    )
    truth = widened(x)
    which = [0, 1, 4]
    want = info_nce(*(truth.leaves[i] for i in which), ignore=x.ignore, impl="reference")
    got = info_nce(*(x.leaves[i] for i in which), ignore=x.ignore, impl=impl)
    assert_close(got, want, BUDGET.get(dtype, 2e-5), "loss")
    expected = torch.autograd.grad(want, [truth.leaves[i] for i in which])
    actual = torch.autograd.grad(got, [x.leaves[i] for i in which])
    for name, g, w in zip(("text", "video", "scale"), actual, expected, strict=True):
        # a gradient comes back in the dtype of its input
        assert_close(g, w, 1e-3 if g.dtype == torch.float16 else BUDGET[g.dtype], name)


@pytest.mark.parametrize("impl", STREAMED)
@pytest.mark.parametrize("pairs", [10, 24, 60])
def test_any_cut_into_blocks_gives_the_same_losses_and_gradients(pairs, impl, monkeypatch):
    skip_what_no_gpu_kernel_takes(impl, torch.float64)
    x = case(11, True, torch.float64)
    whole = losses(x, impl)
    expected = torch.autograd.grad(sum(whole), x.leaves)
    for module in ("discovla.ops.streamed", "discovla_kernels"):
        monkeypatch.setattr(f"{module}.contrastive.pairs_per_block", lambda text, keep: pairs)
    cut = losses(x, impl)
    actual = torch.autograd.grad(sum(cut), x.leaves)
    for g, w in zip([*cut, *actual], [*whole, *expected], strict=True):
        assert relative_error(g, w) < 1e-12


@pytest.mark.parametrize("impl", STREAMED)
@pytest.mark.parametrize("file", ["model", "loss_only"])
def test_golden_losses_and_gradients_pass_through_streamed_ops(golden, file, impl, monkeypatch):
    skip_what_no_gpu_kernel_takes(impl, torch.float64)
    data = golden_file.read(golden, file)
    model = golden_file.loss_head(data, torch.float64)
    names = ("video_L", "frame_L", "framevideo_V", "frame_V")
    leaves = {name: data.get(f"feat.{name}", torch.float64).requires_grad_() for name in names}
    monkeypatch.setattr("discovla.ops.dispatch._automatic", lambda op, *rest: impl)
    text = Embedding(pooled=leaves["video_L"], frames=leaves["frame_L"])
    losses = model.losses(text, Embedding(pooled=leaves["framevideo_V"], frames=leaves["frame_V"]))
    losses.total.backward()
    for name, got in {"total": losses.total, **losses.terms}.items():
        assert relative_error(got, data.tensors[f"loss.{name}"]) < 1e-6, name
    for name, leaf in leaves.items():
        assert relative_error(leaf.grad, data.tensors[f"grad.feat.{name}"]) < 1e-6, name


@pytest.mark.parametrize("impl", STREAMED)
def test_logits_far_apart_neither_overflow_nor_vanish(impl):
    eye = torch.eye(6, device=DEVICE)
    scale = torch.tensor(100.0, device=DEVICE)
    # every text is nearest to another's video: the loss is the whole scale
    assert info_nce(eye, eye.roll(1, 0), scale, impl=impl).item() == pytest.approx(100, rel=1e-6)
    assert info_nce(eye, eye, scale, impl=impl).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("impl", STREAMED)
@pytest.mark.parametrize("frames", [False, True], ids=["pooled", "frames"])
def test_the_op_is_registered_soundly(impl, frames):
    skip_what_no_gpu_kernel_takes(impl, torch.float64)
    x = case(5, True, torch.float64)
    parts = (*x.leaves[2:4], *x.masks) if frames else (None, None, None, None)
    arguments = (*x.leaves[:2], *parts, x.leaves[4], x.ignore, 0.5, False, impl)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(contrastive_streamed, arguments, test_utils=tests)


def test_the_op_of_one_block_is_registered_soundly():
    skip_what_no_gpu_kernel_takes("triton", torch.float64)
    x = case(5, True, torch.float64)
    arguments = (*x.leaves[:4], *x.masks, x.leaves[4], x.ignore, 0.5, 0.3, 2.0, False)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_alignment_block, arguments, test_utils=tests)


@pytest.mark.parametrize("impl", STREAMED)
def test_the_total_is_the_weighted_sum(impl):
    skip_what_no_gpu_kernel_takes(impl, torch.float64)
    x, alpha, beta = case(7, True, torch.float64), 0.3, 2.0
    names, masks = ("text", "video", "text_frames", "video_frames"), ("text_mask", "video_mask")
    given = AlignmentInputs(
        **dict(zip(names, x.leaves, strict=False)), **dict(zip(masks, x.masks, strict=True))
    )
    out = alignment_losses(given, x.leaves[4], alpha=alpha, beta=beta, ignore=x.ignore, impl=impl)
    want = out.video + alpha * out.frame + beta * out.distill
    expected = torch.autograd.grad(want, x.leaves, retain_graph=True)
    assert relative_error(out.total, want) < 1e-12
    for g, w in zip(torch.autograd.grad(out.total, x.leaves), expected, strict=True):
        assert relative_error(g, w) < 1e-12


@pytest.mark.parametrize("impl", STREAMED)
def test_one_loss_alone_can_be_differentiated(impl):
    skip_what_no_gpu_kernel_takes(impl, torch.float64)
    x = case(7, False, torch.float64)
    for which in range(3):
        want = torch.autograd.grad(losses(x, "reference")[which], x.leaves, allow_unused=True)
        actual = torch.autograd.grad(losses(x, impl)[which], x.leaves)
        for g, w in zip(actual, want, strict=True):
            assert relative_error(g, torch.zeros_like(g) if w is None else w) < 1e-11 or not g.any()
