import ast

import numpy as np
import pytest
import torch
from torch import Tensor

from discovla.batch import Embedding
from discovla.ops.dispatch import IMPLEMENTATIONS
from discovla.ops.info_nce import cosine_similarity
from discovla.retrieval.metrics import retrieval_metrics
from tests.methods.golden_t2vparser import (
    embed,
    head_gradients,
    heads,
    loss_head,
    read,
    tower_gradients,
    towers,
)
from tests.ops.kernels import force

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float64, id="fp64")]


@pytest.fixture(params=IMPLEMENTATIONS["token_similarity"])
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each implementation of the ops in turn."""
    force(monkeypatch, request.param)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def limit(dtype: torch.dtype):
    """The tolerance: as given in float32, 1e-8 of the largest value in float64."""
    return lambda single: single if dtype == torch.float32 else 1e-8


def direction(x: Tensor) -> Tensor:
    return torch.arange(x.numel(), dtype=x.dtype).view_as(x).cos()


# --- towers


def by_patch(cls: Tensor, patches: Tensor) -> Tensor:
    """The branch as the files have it: b 1+pf w, the class row, then patch by patch with time fastest."""
    return torch.cat([cls[:, None], patches.transpose(1, 2).flatten(1, 2)], dim=1)


def test_golden_stan_values_of_trunk_and_branch(golden, dtype, limit):
    file, model = read(golden, "stan"), towers(golden, dtype)
    found = {}
    for i, block in enumerate(model.vision.blocks):
        block.register_forward_hook(lambda m, x, y, i=i: found.update({f"trunk{i}.out": y}))
    for j, layer in enumerate(model.stan.layers):

        def record(m, x, y, j=j):
            state = x[0]
            found[f"branch{j}.in"] = by_patch(state.cls, state.patches)
            found[f"branch{j}.after_T"] = by_patch(
                state.cls, state.patches + m._among_frames(state.patches, None)
            )
            found[f"branch{j}.out"] = by_patch(y.cls, y.patches)

        layer.register_forward_hook(record)
    pixels = file.get("pixels", dtype)
    found["frames"] = model.encode_frames(pixels, torch.ones(pixels.shape[:2], dtype=torch.bool))
    assert {n for n in file.tensors if n.startswith(("trunk", "branch"))} < set(found)
    for name, got in found.items():
        file.check(name, got, limit(2e-5))


def test_golden_stan_gradients(golden, dtype, limit):
    file, model = read(golden, "stan"), towers(golden, dtype)
    pixels = file.get("pixels", dtype)
    frames = model.encode_frames(pixels, torch.ones(pixels.shape[:2], dtype=torch.bool))
    (frames * direction(frames)).sum().backward()
    wanted = {n.removeprefix("grad.w."): n for n in file.tensors if n.startswith("grad.w.")}
    found = tower_gradients(model, file.weights())
    rows = len(file.tensors["w.STAN_time_embed.weight"])
    found["STAN_time_embed.weight"] = found["STAN_time_embed.weight"][:rows]
    assert wanted and set(wanted) <= set(found)
    for name, tensor in wanted.items():
        file.check(tensor, found[name], limit(1e-4))
    file.check("grad.pixels", pixels.grad, limit(1e-4))


def test_golden_stan_starts_with_temporal_halves_that_do_nothing(golden, dtype, limit):
    file, model = read(golden, "stan"), towers(golden, dtype)
    for layer in model.stan.layers:
        torch.nn.init.zeros_(layer.temporal_fc.weight)
        torch.nn.init.zeros_(layer.temporal_fc.bias)
    pixels = file.get("pixels", dtype)
    frames = model.encode_frames(pixels, torch.ones(pixels.shape[:2], dtype=torch.bool))
    file.check("frames_zero_temporal_fc", frames, limit(2e-5))


def test_golden_text_tower_without_a_padding_mask(golden, dtype, limit):
    file, model = read(golden, "text_tower"), towers(golden, dtype, padding="official", plus=False)
    ids = file.tensors["token_ids"]
    text = model.encode_text(ids, ids != 0)
    file.check("tokens", text.tokens[:, : ids.shape[1]], limit(2e-5))
    file.check("text", text.pooled, limit(2e-5))


# --- heads


@pytest.mark.usefixtures("forced")
def test_golden_head_losses_and_every_gradient(golden, dtype, limit):
    file, model = read(golden, "head"), heads(golden, dtype)
    x, text, video = embed(model, file, dtype)
    losses = model.losses(text, video)
    losses.total.backward()
    weight = file.config["multiview_weight"]
    file.check("total", losses.total, limit(1e-4))
    file.check("NCE_loss", losses.terms["nce"], limit(1e-4))
    file.check("Multiview_loss", weight * losses.terms["diversity"], limit(1e-5))
    for name in ("frames", "tokens", "text"):
        file.check(f"grad.{name}", x[name].grad, limit(2e-3))
    wanted = {n.removeprefix("grad.w."): t for n, t in file.tensors.items() if n.startswith("grad.w.")}
    for name, got in head_gradients(model, wanted).items():
        file.check(f"grad.w.{name}", got.view_as(wanted[name]), limit(2e-3))


@pytest.mark.parametrize("part", ["NCE_loss", "Multiview_loss"])
def test_golden_head_gradient_of_each_loss(golden, dtype, limit, part):
    file = read(golden, "head")
    weight = 0.0 if part == "NCE_loss" else file.config["multiview_weight"]
    model = heads(golden, dtype, diversity=weight)
    _, text, video = embed(model, file, dtype)
    own = model.video_losses(text, video, None)
    (own.total if part == "NCE_loss" else weight * own.terms["diversity"]).backward()
    file.check(f"part.{part}.grad.query_tokens", model.decomposition.tokens.grad[None], limit(2e-3))


@pytest.mark.usefixtures("forced")
def test_golden_head_stored_features_and_logits(golden, dtype, limit):
    file, model = read(golden, "head"), heads(golden, dtype)
    x, text, video = embed(model, file, dtype)
    file.check("predict.video_feature", video.tokens, limit(1e-5))
    file.check("predict.text_feature", text.tokens, limit(1e-5))
    assert torch.equal(text.mask.long(), file.tensors["predict.mask"])
    file.check("predict.mv", model.decomposition.views_of_video(model.video_mlp(x["frames"])), limit(1e-5))
    file.check("predict.mt", model.decomposition.views_of_text(x["tokens"]), limit(1e-5))
    tau = model.config.tau
    file.check("predict.logits_eval", tau * model.similarity(text, video), limit(2e-5), absolute=True)
    file.check("train.logits", tau * model.training_logits(text, video), limit(2e-5), absolute=True)


@pytest.mark.usefixtures("forced")
def test_golden_head_with_padding_out_of_the_similarity(golden, dtype, limit):
    # the file's text stack still sees padding, so only the similarity is masked here
    file = read(golden, "head")
    _, text, video = embed(heads(golden, dtype), file, dtype)
    masked = heads(golden, dtype, padding="masked")
    logits = masked.config.tau * masked.training_logits(text, video)
    file.check("train.logits_padding_removed", logits, limit(2e-5), absolute=True)
    file.check("NCE_loss_padding_removed", masked.losses(text, video).terms["nce"], limit(1e-4))


@pytest.mark.usefixtures("forced")
def test_golden_head_variants_of_the_composition(golden, dtype, limit):
    file = read(golden, "head")
    names = {n.rsplit(".", 1)[0] for n in file.tensors if n.startswith("variant.")}
    assert names
    for name in names:
        described = file.sidecar["tensors"][f"{name}.NCE_loss"]["desc"]
        model = heads(golden, dtype, **ast.literal_eval(described.split("changed: ")[1]))
        losses = model.losses(*embed(model, file, dtype)[1:])
        file.check(f"{name}.NCE_loss", losses.terms["nce"], limit(1e-4))
        got = file.config["multiview_weight"] * losses.terms["diversity"]
        file.check(f"{name}.Multiview_loss", got, limit(1e-5))


def gathered(parts: list[Embedding], own: int) -> Embedding:
    """Gather embeddings as rank `own` sees them; backward keeps its own slice, unscaled."""
    parts = [part if rank == own else part.map(Tensor.detach) for rank, part in enumerate(parts)]
    return Embedding(
        pooled=torch.cat([part.pooled for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        mask=None if parts[0].mask is None else torch.cat([part.mask for part in parts]),
    )


@pytest.mark.parametrize("scale", ["exact", "official"])
def test_golden_two_rank_gradients(golden, dtype, limit, scale):
    """official: grad NCE / W + grad diversity, as released.  exact: the gradient one process would find."""
    file = read(golden, "two_rank")
    world = file.config["world_size"]
    model = heads(golden, dtype, diversity_ratio=world if scale == "official" else 1.0)
    for rank in range(world):
        sides = zip(*(embed(model, file, dtype, f"rank{r}.")[1:] for r in range(world)), strict=True)
        text, video = (gathered(list(parts), rank) for parts in sides)
        losses = model.losses(text, video)
        file.check(f"rank{rank}.NCE_loss", losses.terms["nce"], limit(1e-4))
        diversity = file.sidecar["scalars"]["single.Multiview_loss"] / model.config.diversity
        assert losses.terms["diversity"].item() == pytest.approx(diversity, rel=limit(1e-5))
        slices = world if scale == "exact" else 1  # engine.distributed.gather's scale of the own slice
        (losses.total * slices / world).backward()  # averaged over ranks
    names = [
        n.removeprefix("official_avg.grad.w.") for n in file.tensors if n.startswith("official_avg.grad.w.")
    ]
    every = {
        n.removeprefix("grad.w."): t
        for n, t in read(golden, "head").tensors.items()
        if n.startswith("grad.w.")
    }
    found = head_gradients(model, every)
    for name in names:
        want = file.tensors[f"official_avg.grad.w.{name}"]
        if scale == "exact":
            want = file.tensors[f"single.NCE.grad.w.{name}"] + file.tensors[f"single.div.grad.w.{name}"]
        error = (found[name].view_as(want) - want).abs().max() / want.abs().max()
        assert error <= limit(2e-3), name


def test_golden_losses_alone(golden, dtype, limit, monkeypatch):
    file = read(golden, "losses")
    sim = file.get("nce.sim", dtype)
    views = {side: file.get(f"div.{side}", dtype) for side in ("text", "video")}
    model = loss_head(golden, dtype, views=views["text"].shape[1])
    text, video = (Embedding(pooled=views[side][:, 0], tokens=views[side]) for side in ("text", "video"))
    monkeypatch.setattr(model, "training_logits", lambda text, video: sim / model.config.tau)
    terms = model.video_losses(text, video, None).terms
    file.check("nce.value", terms["nce"], limit(1e-5))
    file.check("div.value", terms["diversity"], limit(1e-5))
    (terms["nce"] + terms["diversity"]).backward()
    file.check("nce.grad.sim", sim.grad, limit(1e-5))
    for side, grad in views.items():
        file.check(f"div.grad.{side}", grad.grad, limit(1e-5))


def test_golden_losses_of_pooled_features(golden, dtype, monkeypatch):
    # the value may be far below 1, which float32 cannot hold: there only its smallness is checked
    file, model = read(golden, "losses"), loss_head(golden, dtype)
    pooled = {side: file.get(f"nce_emb.{side}", dtype) for side in ("text", "video")}
    rows = cosine_similarity(pooled["text"], pooled["video"]) / model.config.tau
    monkeypatch.setattr(model, "training_logits", lambda text, video: rows)
    noise = Embedding(pooled=torch.randn(2, 4), tokens=torch.randn(2, model.config.views, 4))
    nce = model.video_losses(noise, noise, None).terms["nce"]
    value = abs(file.tensors["nce_emb.value"].item())
    limit = 1e-6 + 1e-5 * value if dtype == torch.float32 else 1e-8 * value + 1e-15
    file.check("nce_emb.value", nce, limit, absolute=True)
    if dtype == torch.float64:
        nce.backward()
        for side, x in pooled.items():
            file.check(f"nce_emb.grad.{side}", x.grad, 1e-8)


# --- evaluation


def released_figures(similarity: np.ndarray) -> dict[str, float]:
    found = retrieval_metrics(similarity)["t2v"]
    return {k.replace("@", ""): found[k] for k in ("R@1", "R@5", "R@10", "MdR", "MnR")}


@pytest.mark.usefixtures("forced")
def test_golden_metric_similarity_and_ranks(golden, dtype, limit):
    file, model = read(golden, "metric"), loss_head(golden, dtype)
    text = Embedding(
        pooled=file.tensors["text"][:, 0], tokens=file.get("text", dtype), mask=file.tensors["mask"].bool()
    )
    video = Embedding(pooled=file.tensors["video"][:, 0], tokens=file.get("video", dtype))
    logits = model.similarity(text, video).detach()
    file.check("similarity", model.config.tau * logits, limit(2e-5), absolute=True)
    assert released_figures(logits.numpy()) == pytest.approx(file.sidecar["metrics_DSL_False"], abs=1e-12)


def test_golden_metric_with_a_dual_softmax(golden):
    file = read(golden, "metric")
    similarity = file.tensors["similarity"].numpy()
    softmax = torch.from_numpy(100 * similarity).softmax(0).numpy()
    np.testing.assert_allclose(similarity * softmax, file.tensors["similarity_dsl"].numpy(), atol=1e-12)
    assert released_figures(similarity * softmax) == pytest.approx(
        file.sidecar["metrics_DSL_True"], abs=1e-12
    )


def test_golden_metric_counts_a_tied_query_once(golden):
    similarity = read(golden, "metric").tensors["similarity"].numpy().copy()
    similarity[:, 3] = similarity[:, 2]
    found = retrieval_metrics(similarity)["t2v"]
    assert found["R@1"] * len(similarity) / 100 == pytest.approx(round(found["R@1"] * len(similarity) / 100))


@pytest.mark.usefixtures("forced")
def test_golden_similarities_of_training_and_of_ranking(golden, dtype, limit):
    file = read(golden, "similarity")
    model = loss_head(golden, dtype, kappa=file.config["tau"])
    rows = {side: file.get(side, dtype) for side in ("text", "video")}
    text = Embedding(pooled=rows["text"][:, 0], tokens=rows["text"], mask=file.tensors["mask"].bool())
    video = Embedding(pooled=rows["video"][:, 0], tokens=rows["video"])
    tau = model.config.tau
    file.check("train.logits", tau * model.training_logits(text, video), limit(2e-5), absolute=True)
    file.check("eval.logits", tau * model.similarity(text, video), limit(2e-5), absolute=True)
