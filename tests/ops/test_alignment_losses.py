import math

import pytest
import torch
from torch import Tensor

from discovla.ops.alignment_losses import AlignmentInputs, alignment_losses
from discovla.ops.frame_similarity import frame_similarity
from discovla.ops.info_nce import cosine_similarity, info_nce

SCALE = torch.tensor(7.0, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def frame_similarity_by_hand(text, video, scale, text_mask, video_mask):
    """Pair by pair, on the real parts only."""
    out = torch.zeros(len(text), len(video), dtype=torch.float64)
    for a in range(len(text)):
        for b in range(len(video)):
            rows, columns = text[a][text_mask[a]], video[b][video_mask[b]]
            if not len(rows) or not len(columns):
                continue
            match = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(columns).T
            best, back = match.max(1).values, match.max(0).values
            pool = [(p * (scale * p).softmax(0)).sum() for p in (best, back)]
            out[a, b] = (pool[0] + pool[1]) / 2
    return out


@pytest.mark.parametrize("frames", [1, 7, 63], ids=lambda f: f"F{f}")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "ragged"])
def test_frame_similarity_is_its_formula_on_the_real_parts(frames, masked):
    text, video = noise(3, frames, 5).requires_grad_(), noise(4, frames + 2, 5).requires_grad_()
    text_mask = torch.ones(3, frames, dtype=torch.bool)
    video_mask = torch.ones(4, frames + 2, dtype=torch.bool)
    if masked:
        text_mask[1, frames // 2 + 1 :] = False
        video_mask[2, 1:] = False
    want = frame_similarity_by_hand(text, video, SCALE, text_mask, video_mask)
    expected = torch.autograd.grad((want * noise(3, 4)).sum(), (text, video))
    masks = {"text_mask": text_mask, "video_mask": video_mask} if masked else {}
    got = frame_similarity(text, video, SCALE, **masks)
    actual = torch.autograd.grad((got * noise(3, 4)).sum(), (text, video))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    for g, w in zip(actual, expected, strict=True):
        torch.testing.assert_close(g, w, atol=1e-11, rtol=1e-10)


def test_a_side_without_a_real_part_contributes_nothing():
    text, video = noise(2, 3, 4).requires_grad_(), noise(2, 3, 4)
    mask = torch.tensor([[True, True, True], [False, False, False]])
    got = frame_similarity(text, video, SCALE, text_mask=mask)
    got[1].sum().backward()
    assert got.isfinite().all()
    assert text.grad is not None and text.grad.isfinite().all()
    assert not text.grad[1].any()


def test_frame_similarity_passes_gradcheck():
    assert torch.autograd.gradcheck(
        lambda t, v, s: frame_similarity(t, v, s),
        (noise(2, 3, 4).requires_grad_(), noise(3, 2, 4).requires_grad_(), SCALE.clone().requires_grad_()),
    )


def inputs(n: int) -> AlignmentInputs:
    return AlignmentInputs(
        text=noise(n, 6, seed=1).requires_grad_(),
        video=noise(n, 6, seed=2).requires_grad_(),
        text_frames=noise(n, 3, 6, seed=3).requires_grad_(),
        video_frames=noise(n, 3, 6, seed=4).requires_grad_(),
    )


def test_info_nce_of_a_worked_pair():
    # unit vectors at right angles: logits are s on the diagonal and 0 beside it
    eye = torch.eye(2, dtype=torch.float64)
    want = -math.log(math.exp(7) / (math.exp(7) + 1))
    assert info_nce(eye, eye, SCALE).item() == pytest.approx(want, rel=1e-12)


def test_the_official_distillation_weight_falls_with_the_batch_and_the_fixed_one_does_not():
    for n in (4, 128):
        x = inputs(n)
        official = alignment_losses(x, SCALE).distill
        fixed = alignment_losses(x, SCALE, kl_norm="fixed").distill
        assert (fixed / official).item() == pytest.approx(n / 128, rel=1e-12)


def test_a_detached_teacher_gets_no_gradient_from_the_distillation():
    x = inputs(5)
    alignment_losses(x, SCALE, detach_teacher=True).distill.backward()
    assert x.video_frames.grad is None
    assert x.video.grad is not None and x.video.grad.any()
    alignment_losses(x, SCALE).distill.backward()
    assert x.video_frames.grad is not None and x.video_frames.grad.any()


def test_ignored_pairs_are_out_of_every_softmax():
    # sample 2 shows the clip of sample 0
    x = inputs(3)
    ignore = torch.tensor([[False, False, True], [False, False, False], [True, False, False]])
    got = alignment_losses(x, SCALE, ignore=ignore)
    video = SCALE * cosine_similarity(x.text, x.video)
    frame = SCALE * frame_similarity(x.text_frames, x.video_frames, SCALE)
    rows = [[0, 1], [0, 1, 2], [1, 2]]

    def cross_entropy(m):
        return sum(-(m[i, rows[i]].log_softmax(0)[rows[i].index(i)]) for i in range(3)) / 3

    def kl(s, t):
        pairs = [(s[i, r].log_softmax(0), t[i, r].log_softmax(0)) for i, r in enumerate(rows)]
        return sum((p.exp() * (p - q)).sum() for q, p in pairs)

    assert got.video.item() == pytest.approx(((cross_entropy(video) + cross_entropy(video.T)) / 2).item())
    assert got.frame.item() == pytest.approx(((cross_entropy(frame) + cross_entropy(frame.T)) / 2).item())
    want = 100 / 9 * (kl(video, frame) + kl(video.T, frame.T)) / 2
    assert got.distill.item() == pytest.approx(want.item())
    (got.video + got.frame + got.distill).backward()
    assert x.text.grad is not None and x.text.grad.isfinite().all()


def test_the_losses_pass_gradcheck():
    def total(text, video, text_frames, video_frames, scale):
        losses = alignment_losses(
            AlignmentInputs(text=text, video=video, text_frames=text_frames, video_frames=video_frames),
            scale,
        )
        return losses.video + 0.3 * losses.frame + losses.distill

    x = inputs(4)
    arguments = (x.text, x.video, x.text_frames, x.video_frames, SCALE.clone().requires_grad_())
    assert torch.autograd.gradcheck(total, arguments)
