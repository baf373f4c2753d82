import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from discovla.batch import Embedding
from discovla.methods.clip2video import CLIP2Video, CLIP2VideoConfig, key_mask
from discovla.methods.clip4clip import CLIP4Clip, CLIP4ClipConfig
from discovla.methods.released import load_released
from discovla.nn.features import unit
from discovla.ops.dispatch import IMPLEMENTATIONS
from discovla.ops.soft_vlad import soft_assignment
from discovla.testing import noise_batch, tiny_architecture
from discovla.towers.weights import initialise
from tests.methods import golden_clip2video as golden_file
from tests.methods.golden_clip2video import FEATURES, LOSSES, PER_SCALE, Golden
from tests.ops.kernels import force

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float64, id="fp64")]
MASK_MODES = {
    "full": "raggedstrict",
    "raggedofficial": "official",
    "ragged": "ragged",
    "raggedstrict": "raggedstrict",
}
NO_TAB = {"center_type": "none"}
NO_TDB = {**NO_TAB, "temporal_type": "none"}
ABLATIONS = {
    "tdb_sigmoid_selfA": {"temporal_proj": "sigmoid_selfA"},
    "tdb_sigmoid_mlp": {"temporal_proj": "sigmoid_mlp"},
    "tdb_plain": {"temporal_proj": "none"},
    "centerproj_TAB": {"center_proj": "TAB"},
    "centerproj_none": {"center_proj": "none"},
    "noTAB": NO_TAB,
    "noTAB_noTDB_seqTransf": NO_TDB,
    "noTAB_noTDB_meanP": {**NO_TDB, "sim_type": "meanP"},
}


@pytest.fixture(params=IMPLEMENTATIONS["soft_vlad"])
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each implementation of the ops in turn."""
    force(monkeypatch, request.param)


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def head(golden: Path) -> Golden:
    return golden_file.read(golden, "clip2video_head")


def load(head: Golden, dtype: torch.dtype, **options) -> CLIP2Video:
    case = head.sidecar["case"]
    config = CLIP2VideoConfig(
        head_layers=case["layers"], centers=case["K"], center_weight=case["w"], **options
    )
    method = golden_file.load(head, CLIP2Video, config, dtype)
    assert isinstance(method, CLIP2Video)
    return method


def tiny(seed: int = 0, **options) -> CLIP2Video:
    """A small model whose heads cannot be copied from its text tower, which is wider."""
    torch.manual_seed(seed)
    method = CLIP2Video(tiny_architecture(), CLIP2VideoConfig(head_layers=2, **options))
    initialise(method, method.architecture, seed)
    method.initialise_from_clip()
    method.freeze()
    return method


def scale(head: Golden) -> float:
    return math.exp(head.tensors["param.clip.logit_scale"].item())


def embed(
    method: CLIP2Video, head: Golden, inputs: dict[str, Tensor], mask: Tensor
) -> tuple[Embedding, Embedding]:
    token_mask = head.get("in.token_mask", torch.float64)
    text = method.embed_text(inputs["text"], inputs["tokens"], token_mask)
    return text, method.embed_video(inputs["frames"], mask)


@pytest.mark.parametrize("mode", MASK_MODES)
def test_golden_tokens_embeddings_and_assignments(head, mode, dtype):
    method = load(head, dtype, mask_mode=MASK_MODES[mode])
    frames = head.get("in.frames", dtype)
    mask = head.get(f"in.frame_mask_{'full' if mode == 'full' else 'ragged'}", dtype)
    assert method.difference and method.positions and method.transformer and method.vlad
    tokens, places, seen = method.difference(frames, mask, method.positions(frames.shape[1]))
    head.check(f"{mode}.tdb.tokens", tokens, dtype, FEATURES)
    assert torch.equal(seen.long(), head.tensors[f"{mode}.tdb.mask"])
    head.check(f"{mode}.global.transformer_in", tokens + places, dtype, FEATURES)
    keys = key_mask(seen, method.transformer.heads, method.config.mask_mode)
    read = method.transformer(tokens + places, keys)
    head.check(f"{mode}.global.transformer_out", read, dtype, FEATURES)
    tokens, seen = method.video_tokens(frames, mask)
    head.check(f"{mode}.tab.video_tokens", tokens, dtype, FEATURES)
    assert torch.equal(seen.double(), head.tensors[f"{mode}.tab.video_token_mask"])
    share = soft_assignment(tokens, method.vlad.assignment)
    head.check(f"{mode}.tab.video_assign", share, dtype, FEATURES)
    if mode == "full":
        words = soft_assignment(head.get("in.tokens", dtype), method.vlad.assignment)
        head.check("full.tab.text_assign", words, dtype, FEATURES)
        want = head.tensors["full.tdb.pos"] + head.tensors["full.tdb.type"]
        torch.testing.assert_close(places.double(), want, rtol=0, atol=5e-7)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("mode", MASK_MODES)
def test_golden_similarities_losses_and_gradients(head, mode, dtype):
    method = load(head, dtype, mask_mode=MASK_MODES[mode])
    inputs = {n: head.get(f"in.{n}", dtype).requires_grad_() for n in ("frames", "tokens", "text")}
    mask = head.get(f"in.frame_mask_{'full' if mode == 'full' else 'ragged'}", dtype)
    text, video = embed(method, head, inputs, mask)
    assert text.tokens is not None and video.tokens is not None
    head.check(f"{mode}.global.video_emb", unit(video.pooled), dtype, FEATURES)
    head.check(f"{mode}.tab.video_emb", video.tokens[:, 0], dtype, FEATURES)
    if mode == "full":
        head.check("full.tab.text_emb", text.tokens[:, 0], dtype, FEATURES)
    whole, aligned = method.similarities(text, video)
    assert aligned is not None
    limit = PER_SCALE * scale(head)
    head.check(f"{mode}.sim_global", whole, dtype, limit)
    head.check(f"{mode}.sim_tab", aligned, dtype, limit)
    head.check(f"{mode}.sim_final", method.similarity(text, video), dtype, limit)
    losses = method.losses(text, video)
    for name, got in {"loss": losses.total, "loss_global": losses.terms["global"]}.items():
        head.check(f"{mode}.{name}", got, dtype, LOSSES)
    head.check(f"{mode}.loss_tab", losses.terms["aligned"], dtype, LOSSES)
    losses.total.backward()
    for name, tensor in inputs.items():
        if f"{mode}.grad.in.{name}" in head.tensors:
            head.check_gradient(f"{mode}.grad.in.{name}", tensor.grad, dtype)
    if any(name.startswith(f"{mode}.grad.param.") for name in head.tensors):
        golden_file.check_gradients(head, f"{mode}.grad.param.", method, dtype)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("strict", [False, True], ids=["ragged", "raggedstrict"])
def test_golden_short_videos(head, strict, dtype):
    if not strict and dtype == torch.float32:
        pytest.skip("the file is to be compared in float64 only: -1e6 on every key rounds float32 scores")
    method = load(head, dtype, mask_mode="raggedstrict" if strict else "ragged")
    inputs = {n: head.get(f"in.{n}", dtype) for n in ("frames", "tokens", "text")}
    found = method.similarity(*embed(method, head, inputs, head.get("short.frame_mask", dtype)))
    head.check(
        "short_strict.sim_final" if strict else "short.sim_final", found, dtype, PER_SCALE * scale(head)
    )


@pytest.mark.usefixtures("forced")
def test_golden_similarity_of_more_captions_than_videos(head, dtype):
    method = load(head, dtype, mask_mode="ragged")
    text = method.embed_text(
        head.get("rect.text", dtype), head.get("rect.tokens", dtype), head.get("rect.token_mask", dtype)
    )
    video = method.embed_video(head.get("in.frames", dtype), head.get("in.frame_mask_ragged", dtype))
    head.check("rect.sim_final", method.similarity(text, video), dtype, PER_SCALE * scale(head))


@pytest.mark.parametrize("mode", ["full", "ragged"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_golden_ablations(golden, head, name, mode, dtype):
    ablations = golden_file.read(golden, "clip2video_ablations")
    method = load(head, dtype, mask_mode="ragged", **ABLATIONS[name])
    inputs = {n: head.get(f"in.{n}", dtype) for n in ("frames", "tokens", "text")}
    mask = head.get(f"in.frame_mask_{mode}", dtype)
    if f"{name}.{mode}.tokens" in ablations.tensors:
        assert method.difference and method.positions
        tokens, *_ = method.difference(inputs["frames"], mask, method.positions(mask.shape[1]))
        ablations.check(f"{name}.{mode}.tokens", tokens, dtype, FEATURES)
    found = method.similarity(*embed(method, head, inputs, mask))
    ablations.check(f"{name}.{mode}.sim_final", found, dtype, PER_SCALE * scale(head))


def test_every_golden_ablation_is_compared(golden):
    file = golden_file.read(golden, "clip2video_ablations")
    assert {name.split(".")[0] for name in file.tensors} == set(ABLATIONS)


def test_without_alignment_it_trains_on_one_loss():
    method = tiny(center_type="none")
    batch = noise_batch(method.architecture, frames=2)
    losses = method.losses(*method.encode(batch))
    losses.total.backward()
    assert set(losses.terms) == {"video"}
    assert method.difference and method.difference.types.weight.grad is not None
    assert method.difference.types.weight.grad.abs().max() > 0


def test_with_every_block_off_it_is_clip4clips_temporal_transformer():
    ours = tiny(center_type="none", temporal_type="none")
    other = CLIP4Clip(ours.architecture, CLIP4ClipConfig(head="seqTransf", head_layers=2))
    other.load_state_dict(ours.state_dict())
    frames, mask = torch.randn(3, 5, 16), torch.arange(5) < torch.tensor([[2], [5], [1]])
    assert torch.equal(ours.embed_video(frames, mask).pooled, other.embed_video(frames, mask).pooled)


@pytest.mark.parametrize("mode", ["raggedstrict", "ragged", "official"])
def test_padded_frames_reach_a_video_in_the_released_modes_only(mode):
    method = tiny(mask_mode=mode).double()
    frames = torch.randn(3, 6, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([[4], [6], [1]])
    video = method.embed_video(frames, mask)
    assert video.tokens is not None
    (video.pooled.sum() + video.tokens.sum()).backward()
    assert frames.grad is not None
    assert bool((frames.grad[~mask] == 0).all()) == (mode == "raggedstrict")


@pytest.mark.parametrize("mode", ["raggedstrict", "ragged", "official"])
def test_a_video_depends_on_its_neighbours_in_the_official_mode_only(mode):
    method = tiny(mask_mode=mode).double()
    frames = torch.randn(3, 5, 16, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[4], [5], [2]])
    together = method.embed_video(frames, mask).pooled
    alone = torch.cat([method.embed_video(frames[i : i + 1], mask[i : i + 1]).pooled for i in range(3)])
    assert torch.allclose(together, alone, rtol=1e-10, atol=1e-12) == (mode != "official")


def test_three_frames_are_enough_and_two_are_not():
    method = tiny()
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert method.embed_video(torch.randn(2, 3, 16), mask).pooled.isfinite().all()
    with pytest.raises(
        ValueError, match=r"frames: expected at least 3 with method\.center_proj = 'TAB_TDB', got 2"
    ):
        method.embed_video(torch.randn(2, 2, 16), mask[:, :2])
    with pytest.raises(
        ValueError, match=r"frames: expected at least 2 with method\.temporal_type = 'TDB', got 1"
    ):
        tiny(center_type="none").embed_video(torch.randn(2, 1, 16), mask[:, :1])


def test_more_frames_than_positions_are_refused():
    with pytest.raises(ValueError, match="positions: expected at most 12, got 13"):
        tiny().embed_video(torch.randn(1, 13, 16), torch.ones(1, 13, dtype=torch.bool))


def test_a_caption_with_only_the_start_token_is_refused():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    with pytest.raises(ValueError, match="words of caption 1: expected at least one entry"):
        tiny().embed_text(torch.randn(2, 16), torch.randn(2, 3, 16), mask)


def test_encoding_does_not_change_the_text_mask():
    method = tiny()
    batch = noise_batch(method.architecture)
    mask = batch.text_mask.clone()
    mask[:, :2] = True
    given = mask.clone()
    method.encode_text(batch.text_ids, mask)
    assert torch.equal(mask, given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": "tokens"}, "similarity"),
        ({"sim_type": "meanP"}, "expected method.temporal_type = 'none' with a mean"),
        ({"temporal_type": "none"}, "expected method.temporal_type = 'TDB' with differences"),
        ({"centers": 0}, "centers"),
    ],
    ids=str,
)
def test_contradictory_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        CLIP2VideoConfig(**options)


@pytest.mark.parametrize(
    "options", [{}, {"temporal_proj": "sigmoid_mlp"}, {"temporal_proj": "none"}], ids=str
)
def test_heads_start_from_clip(head, options):
    layers = head.sidecar["case"]["layers"]
    method = CLIP2Video(golden_file.architecture(head), CLIP2VideoConfig(head_layers=layers, **options))
    initialise(method, method.architecture, 0)
    method.initialise_from_clip()
    assert method.positions and method.difference and method.action and method.transformer
    assert torch.equal(method.positions.weight, method.text.position_embedding)
    assert torch.equal(method.difference.types.weight, method.text.position_embedding[:2])
    first = dict(method.text.blocks[0].named_parameters())
    starts = [method.action, method.transformer]
    starts += [method.difference.attention] if method.difference.attention is not None else []
    for part in starts:
        assert all(torch.equal(p, first[n]) for n, p in part.blocks[0].named_parameters())
    if method.difference.projection is not None:
        rows = len(method.difference.projection)
        assert torch.equal(method.difference.projection, method.vision.projection[:rows])


def test_the_official_masks_are_those_of_the_flat_rows():
    mask = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.bool)
    mixed = key_mask(mask, 2, "official")
    rows = [0, 1, 2, 0, 1, 2]  # of 3 videos and 2 heads, by hand
    assert torch.equal(mixed, mask[rows].view(3, 2, 2))


def test_a_released_checkpoint_loads_by_its_names(head, tmp_path):
    source, target = (load(head, torch.float32) for _ in range(2))
    with torch.no_grad():
        for p in source.parameters():
            p.copy_(torch.randn(p.shape))
    own = dict(source.named_parameters())
    state = {f"module.{theirs}": own[ours].detach() for ours, theirs in golden_file.names(source).items()}
    width = source.architecture.embed_dim
    state["module.frame2t_projection"] = torch.zeros(width, width)  # not used with attention
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "c.safetensors")
    load_released(target, tmp_path / "c.safetensors")
    assert all(torch.equal(p, own[name]) for name, p in target.named_parameters())
    assert set(golden_file.names(source)) == set(own)


def test_evaluation_keeps_both_similarities(head):
    method = load(head, torch.float32)
    inputs = {n: head.get(f"in.{n}", torch.float32) for n in ("frames", "tokens", "text")}
    text, video = embed(method, head, inputs, head.get("in.frame_mask_ragged", torch.float32))
    kept = Embedding(pooled=video.pooled, tokens=video.tokens)
    rows = torch.cat([method.similarity(text[i : i + 2], kept) for i in range(0, len(text), 2)])
    torch.testing.assert_close(rows, method.similarity(text, video))


@pytest.mark.parametrize("weight", [0.0, 0.2, 0.9, 1.0])
def test_the_weight_belongs_to_the_global_similarity_in_ranking_loss_and_student(weight):
    method = tiny(center_weight=weight).double()
    text = Embedding(pooled=torch.randn(5, 16).double(), tokens=unit(torch.randn(5, 1, 16).double()))
    video = Embedding(pooled=torch.randn(5, 16).double(), tokens=unit(torch.randn(5, 1, 16).double()))
    scale = method.logit_scale()
    glob = scale * unit(text.pooled) @ unit(video.pooled).T
    aligned = scale * text.tokens[:, 0] @ video.tokens[:, 0].T
    mixed = weight * glob + (1 - weight) * aligned
    torch.testing.assert_close(method.similarity(text, video), mixed)
    ignore = torch.zeros(5, 5, dtype=torch.bool)
    ignore[0, 3] = True
    losses = method.video_losses(text, video, ignore)
    torch.testing.assert_close(losses.logits[~ignore], mixed[~ignore])
    assert losses.logits[0, 3] < -1e3
    terms = {}
    for name, logits in (("global", glob), ("aligned", aligned)):
        seen = logits.masked_fill(ignore, -math.inf)
        rows, columns = seen.log_softmax(1).diagonal(), seen.log_softmax(0).diagonal()
        terms[name] = -(rows.mean() + columns.mean()) / 2
        torch.testing.assert_close(losses.terms[name], terms[name])
    torch.testing.assert_close(losses.total, weight * terms["global"] + (1 - weight) * terms["aligned"])
