import json
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from discovla.ops import token_similarity as op
from discovla.ops.dispatch import IMPLEMENTATIONS, KernelUnavailable
from discovla.ops.streamed import token_similarity as streamed
from discovla.ops.token_similarity import TokenInputs, token_similarity, token_training_similarity
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

SIDES = ("text", "video")
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float64, id="fp64")]
IMPLS = IMPLEMENTATIONS["token_similarity"]
STREAMED = [impl for impl in IMPLS if impl != "reference"]


def inputs(texts=3, videos=4, i=5, j=4, d=6, *, masked=True, seed=0) -> TokenInputs:
    generator = torch.Generator().manual_seed(seed)
    noise = {"generator": generator, "dtype": torch.float64}
    return TokenInputs(
        text=torch.randn(texts, i, d, **noise).requires_grad_(),
        video=torch.randn(videos, j, d, **noise).requires_grad_(),
        text_mask=torch.arange(i) <= torch.arange(texts)[:, None] if masked else None,
        video_mask=torch.arange(j) <= torch.arange(videos)[:, None] if masked else None,
    )


def scores_of(x: TokenInputs, kind: str, impl: str = "auto", kappa: float = 100.0) -> torch.Tensor:
    """The similarity that `kind` names, kernels on the GPU where there is one."""
    if impl == "triton" and str(x.text.device) != DEVICE:
        skip_what_no_gpu_kernel_takes(impl, x.text.dtype)
        given = {f.name: y for f in fields(x) if (y := getattr(x, f.name)) is not None}
        moved = TokenInputs(**{name: y.to(DEVICE) for name, y in given.items()})
        return scores_of(moved, kind, impl, kappa).to(x.text.device)
    match kind:
        case "eval":
            return token_similarity(x, kappa=kappa, impl=impl)
        case "communication":
            return token_training_similarity(x, kappa=kappa, communication=True, impl=impl)
        case _:
            return token_training_similarity(x, kappa=kappa, padding=kind, impl=impl)


KINDS = ["masked", "official", "communication", "eval"]
# combinations that attend to each other have no kernel
CASES = [
    (kind, impl) for kind in KINDS for impl in IMPLS if impl in IMPLEMENTATIONS["token_communication"]
] + [(kind, "triton") for kind in KINDS if kind != "communication"]


def pair_by_hand(a, b, kind: str, kappa: float):
    """One pair of real rows, written out row by row as the specification has it."""
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    c = torch.stack([sum(p * y for p, y in zip((kappa * b @ x).softmax(0), b, strict=True)) for x in a])
    e = torch.stack([sum(p * x for p, x in zip((kappa * a @ y).softmax(0), a, strict=True)) for y in b])
    if kind == "communication":
        c = (c @ c.T / c.shape[1] ** 0.5).softmax(-1) @ c
        e = (e @ e.T / e.shape[1] ** 0.5).softmax(-1) @ e
    r, q = (a * c).sum(-1), (b * e).sum(-1)
    w, u = (kappa * r).softmax(0), (kappa * q).softmax(0)
    return ((w * r).sum() + (u * q).sum()) / 2 if kind == "eval" else (w @ a) @ (u @ b)


@pytest.mark.parametrize(("kind", "impl"), [case for case in CASES if case[0] != "official"])
@pytest.mark.parametrize("i", [1, 7, 63])
def test_scores_are_the_formula_on_the_real_rows(kind, impl, i):
    x = inputs(i=i, j=3)
    want = torch.stack(
        [
            torch.stack(
                [pair_by_hand(a[m], b[n], kind, 7.0) for b, n in zip(x.video, x.video_mask, strict=True)]
            )
            for a, m in zip(x.text, x.text_mask, strict=True)
        ]
    )
    got = scores_of(x, kind, impl, kappa=7.0)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    weight = torch.randn_like(want)
    actual, expected = (torch.autograd.grad((s * weight).sum(), (x.text, x.video)) for s in (got, want))
    for f, w in zip(actual, expected, strict=True):
        torch.testing.assert_close(f, w, atol=1e-11, rtol=1e-10)


@pytest.fixture(scope="module")
def file(golden):
    folder = golden / "t2vparser"
    return load_file(folder / "similarity.safetensors"), json.loads((folder / "similarity.json").read_text())


def golden_inputs(tensors, dtype, text="text") -> TokenInputs:
    rows = {"text": tensors[text], "video": tensors["video"]}
    return TokenInputs(
        **{side: x.to(dtype, copy=True).requires_grad_() for side, x in rows.items()},
        text_mask=tensors["mask"].bool(),
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("train.logits", "official", "text"),
        ("train.logits_other_padding", "official", "text_other_padding"),
        ("train.logits_padding_removed", "masked", "text"),
        ("train.logits_padding_removed", "masked", "text_other_padding"),
        ("eval.logits", "eval", "text"),
        ("eval.logits_padding_removed", "eval", "text"),
        ("eval.logits_other_padding", "eval", "text_other_padding"),
    ],
)
def test_scores_equal_the_golden_ones(file, name, kind, text, dtype, impl):
    tensors, sidecar = file
    got = scores_of(golden_inputs(tensors, dtype, text), kind, impl, sidecar["config"]["tau"])
    want = tensors[name]
    limit = 2e-5 if dtype == torch.float32 else 1e-8 * want.abs().max()
    assert (got - want).abs().max() <= limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_communication_equals_the_golden_scores(file, dtype):
    tensors, sidecar = file
    x, kappa = golden_inputs(tensors, dtype), sidecar["config"]["tau"]
    got = token_training_similarity(x, kappa=kappa, padding="official", communication=True)
    want = tensors["train.logits_communication_on"]
    assert (got - want).abs().max() <= (2e-5 if dtype == torch.float32 else 1e-8 * want.abs().max())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "kind"), [("train", "official"), ("eval", "eval")])
def test_gradients_equal_the_golden_ones(file, name, kind, dtype, impl):
    tensors, sidecar = file
    x = golden_inputs(tensors, dtype)
    scores = scores_of(x, kind, impl, sidecar["config"]["tau"])
    (scores * torch.arange(scores.numel(), dtype=dtype).view_as(scores).cos()).sum().backward()
    for side in ("text", "video"):
        got, want = getattr(x, side).grad, tensors[f"{name}.grad.{side}"]
        limit = 2e-4 if dtype == torch.float32 else 1e-8
        assert (got - want).abs().max() <= limit * want.abs().max()


@pytest.mark.parametrize(("kind", "impl"), [case for case in CASES if case[1] != "reference"])
@pytest.mark.parametrize("block", [1, 45, 70])  # cosines: one pair, two pairs, three
def test_streaming_in_blocks_changes_no_score_and_no_gradient(monkeypatch, kind, impl, block):
    monkeypatch.setattr("discovla.ops.streamed.token_similarity.BLOCK", block)
    monkeypatch.setattr("discovla_kernels.pairs.BLOCK_BYTES", 8 * block)
    x = inputs(texts=5, videos=4)
    got, want = scores_of(x, kind, impl), scores_of(x, kind, "reference")
    torch.testing.assert_close(got, want, atol=1e-14, rtol=1e-13)
    weight = torch.randn_like(want)
    actual, expected = (torch.autograd.grad((s * weight).sum(), (x.text, x.video)) for s in (got, want))
    for f, w in zip(actual, expected, strict=True):
        torch.testing.assert_close(f, w, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize(("kind", "impl"), [case for case in CASES if case[1] != "triton"])
def test_the_reference_passes_gradcheck(kind, impl):
    x = inputs(2, 3, 3, 2, 4)
    assert torch.autograd.gradcheck(
        lambda t, v: scores_of(replace(x, text=t, video=v), kind, impl, kappa=5.0), (x.text, x.video)
    )


@pytest.mark.parametrize("kind", ["masked", "communication", "eval"])
def test_padding_changes_no_score_and_gets_no_gradient(kind):
    x = inputs()
    other = replace(
        x,
        text=torch.where(x.text_mask[..., None], x.text, torch.randn_like(x.text)),
        video=torch.where(x.video_mask[..., None], x.video, torch.randn_like(x.video)),
    )
    scores = scores_of(x, kind)
    torch.testing.assert_close(scores, scores_of(other, kind), atol=1e-14, rtol=1e-13)
    scores.sum().backward()
    assert not x.text.grad[~x.text_mask].any() and not x.video.grad[~x.video_mask].any()


@pytest.mark.parametrize("kind", ["masked", "communication", "eval"])
def test_a_side_without_a_real_row_scores_nothing_and_spoils_nothing(kind):
    x = inputs()
    x = replace(x, text_mask=x.text_mask.clone(), video_mask=x.video_mask.clone())
    x.text_mask[1], x.video_mask[2] = False, False
    scores = scores_of(x, kind)
    scores.sum().backward()
    if kind != "eval":  # there the other side still contributes its own half
        assert not scores[1].any() and not scores[:, 2].any()
    assert scores[1, 2] == 0
    assert scores.isfinite().all() and x.text.grad.isfinite().all() and x.video.grad.isfinite().all()


def saved_sizes(x: TokenInputs, kind: str, impl: str) -> list[int]:
    """Elements of every tensor that the graph keeps until backward."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        scores_of(x, kind, impl)
    return sizes


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_texts_by_videos_by_rows_by_width_is_kept(kind):
    texts, videos, i, j, d = 6, 7, 5, 4, 64
    x = inputs(texts, videos, i, j, d)
    assert max(saved_sizes(x, kind, "reference")) < texts * videos * min(i, j) * d
    assert max(saved_sizes(x, kind, "torch")) <= max(texts * i * d, videos * j * d)


def test_no_block_is_larger_than_its_bound(monkeypatch):
    monkeypatch.setattr(streamed, "BLOCK", 100)
    seen = []
    weights = streamed._weights
    monkeypatch.setattr(
        streamed,
        "_weights",
        lambda text, video, *how: seen.append(len(text) * len(video) * 20) or weights(text, video, *how),
    )
    token_similarity(inputs(texts=9, videos=11), impl="torch").sum().backward()
    assert max(seen) <= 100 and sum(seen) == 2 * 9 * 11 * 20


# t i v j d
SHAPES = [(1, 1, 1, 1, 1), (7, 3, 5, 1, 63), (2, 12, 3, 7, 130), (3, 63, 2, 7, 5), (1, 130, 2, 5, 3)]
BUDGET = {torch.float32: 2e-5, torch.float16: 2e-5}


@pytest.mark.parametrize("impl", STREAMED)
@pytest.mark.parametrize("kind", ["masked", "official", "eval"])
@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float32, s) for s in SHAPES] + [(torch.float16, SHAPES[2])], ids=str
)
def test_values_and_gradients_of_ragged_shapes_keep_their_budget(impl, kind, dtype, shape):
    t, i, v, j, d = shape
    x = inputs(t, v, i, j, d)
    x.text_mask[0, -1], x.text_mask[0, i // 2], x.text_mask[-1] = True, False, i == 1  # a hole; no real row
    x = replace(x, **{side: getattr(x, side).detach().to(dtype).requires_grad_() for side in SIDES})
    wide = replace(x, **{side: getattr(x, side).detach().double().requires_grad_() for side in SIDES})
    got, want = scores_of(x, kind, impl, 20.0), scores_of(wide, kind, "reference", 20.0)
    assert (got.double() - want).abs().max() <= BUDGET[dtype]
    direction = torch.randn_like(want)
    actual = torch.autograd.grad((got * direction).sum(), (x.text, x.video))
    expected = torch.autograd.grad((want * direction).sum(), (wide.text, wide.video))
    for f, w in zip(actual, expected, strict=True):
        # what comes back in fp16 is rounded to it; of parallel vectors' gradients only rounding is left
        budget = 1e-3 if dtype == torch.float16 else BUDGET[dtype]
        assert (f.double() - w).abs().max() <= budget * max(w.abs().max(), 20.0 if d == 1 else 0.1)


@pytest.mark.parametrize("impl", STREAMED)
@pytest.mark.parametrize("mode", ["ranking", "official"])
def test_the_op_is_registered_soundly(impl, mode):
    skip_what_no_gpu_kernel_takes(impl, torch.float64)
    x = inputs(2, 3, 3, 2, 4)
    rows = (y.detach().to(DEVICE).requires_grad_() for y in (x.text, x.video))
    arguments = (*rows, x.text_mask.to(DEVICE), x.video_mask.to(DEVICE), 5.0, mode, impl)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op._token_similarity, arguments, test_utils=tests)


def test_more_products_than_the_kernel_holds_are_refused_by_name():
    x = TokenInputs(text=torch.ones(1, 130, 2), video=torch.ones(1, 65, 2))
    with pytest.raises(KernelUnavailable, match=r"at most 16384 products of a pair's rows.*found 256 x 128"):
        token_similarity(x, impl="triton")


def test_communication_has_no_kernel():
    with pytest.raises(KernelUnavailable, match="token_communication: no implementation 'triton'"):
        token_training_similarity(inputs(), communication=True, impl="triton")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(KernelUnavailable, match="token_similarity"):
        token_similarity(inputs(), impl="cuda")
