"""Every method on every kind of towers: two steps, resumed after the first; what cannot be is refused."""

import copy
import dataclasses

import pytest
import torch

from discovla import methods
from discovla.batch import Batch
from discovla.engine.capture import Capture
from discovla.engine.distributed import World
from discovla.methods.base import Method
from discovla.testing import noise_batch, relative_error, tiny_towers
from discovla.towers.architecture import Architecture
from discovla.towers.weights import clip_names, initialise
from discovla.train_step import TrainStep
from tests import steps
from tests.engine.recorder import Rerun, Unwatched

TOWERS = tiny_towers()
QUICK_FIRST = [t if t in ("pe", "siglip") else pytest.param(t, marks=pytest.mark.slow) for t in TOWERS]
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
METHODS = {
    "clip": {"name": "clip"},
    "discovla": {"name": "discovla", "fused_vision_blocks": 1, "fused_text_blocks": 1, "lora_rank": 2},
    "seqTransf": {"name": "clip4clip", "head": "seqTransf", "head_layers": 1},
    "tightTransf": {"name": "clip4clip", "head": "tightTransf", "head_layers": 1},
    "clip2video": {"name": "clip2video", "head_layers": 1, "tune": "lora"},
    "t2vparser": {
        "name": "t2vparser",
        "stan_layers": 1,
        "views": 2,
        "decomposition_layers": 1,
        "decomposition_heads": 2,
    },
    "basis": {"name": "basis", "reversed_negatives": 0, "swapped_captions": 0},
}
# the pools of these towers do not fuse
REFUSED = {
    ("discovla", "coca"): "fused_vision_blocks: expected 0 for a tower with pool 'latent'",
    ("discovla", "clipa"): "fused_vision_blocks: expected 0 for a tower with pool 'mean'",
    **{
        ("t2vparser", tower): "stan_layers: expected 0 for a tower that is not read from a class row"
        for tower in ("pe", "siglip", "eva", "mobileclip", "coca", "clipa")
    },
}
WITHOUT = {"discovla": {"fused_vision_blocks": 0}, "t2vparser": {"stan_layers": 0}}


def make(method: str, architecture: Architecture, **options) -> Method:
    torch.manual_seed(0)
    kind = methods.METHODS[METHODS[method]["name"]]
    made = kind(architecture, kind.Config(**{**METHODS[method], **options}))
    initialise(made, architecture, 0)
    made.check_loss()
    made.initialise_from_clip()
    made.freeze()
    return made


def allowed(method: str, tower: str) -> Method:
    """The method on the towers, without the option that these refuse."""
    return make(method, TOWERS[tower], **(WITHOUT[method] if (method, tower) in REFUSED else {}))


def batch(architecture: Architecture, frames: int = 3) -> Batch:
    """Noise whose captions have a start, a word and an end, so that each has words to align."""
    made = noise_batch(architecture, frames=frames)
    mask = made.text_mask.clone()
    mask[:, :2] = True
    return dataclasses.replace(made, text_mask=mask)


def step(method: Method, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    loss = method.losses(*method.encode(batch(method.architecture))).total
    loss.backward()
    optimizer.step()
    method.logit_scale.clip()
    return loss.detach()


def optimizer(method: Method) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("method", METHODS)
def test_two_steps_equal_a_step_and_a_resumed_one(method, tower):
    made = allowed(method, tower).eval()
    moved = optimizer(made)
    first = step(made, moved)
    state, moments = copy.deepcopy(made.trained_state()), copy.deepcopy(moved.state_dict())
    second = step(made, moved)
    assert torch.isfinite(first) and first != second
    again = allowed(method, tower).eval()
    again.load_trained_state(state)
    resumed = optimizer(again)
    resumed.load_state_dict(moments)
    assert torch.equal(step(again, resumed), second)
    assert all(torch.equal(p, again.trained_state()[n]) for n, p in made.trained_state().items())


def double(tower: str) -> Method:
    """DiscoVLA, where the pool allows with fusion, in float64 and with no weights of zero."""
    made = allowed("discovla", tower)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    made.compute_dtype = torch.float64
    return made.double().eval()


@pytest.mark.parametrize("tower", QUICK_FIRST)
def test_gradient_caching_and_recording_give_the_losses_and_gradients_of_the_step(tower):
    method = double(tower)
    given = dataclasses.replace(batch(method.architecture), valid=None)
    whole = steps.take(TrainStep(method, ALONE, "exact"), given)
    cached = steps.take(TrainStep(method, ALONE, "exact", grad_cache_chunks=2), given)
    step = TrainStep(method, ALONE, "exact")
    trained = [p for p in step.parameters() if p.requires_grad]
    recorder = Rerun(lambda: [*step.parameters(), *step.buffers(), *graphs.buffers.values()])
    step.recorded = graphs = Capture(step.losses, trained, recorder)
    for _ in range(3):
        replayed = steps.take(step, given)
    assert recorder.replayed
    for name, value in whole.items():
        for other in (cached, replayed):
            assert relative_error(other[name], value) <= 1e-10 or value.abs().max() < 1e-12, name


@pytest.mark.parametrize("tower", QUICK_FIRST)
def test_a_step_of_each_tower_records_without_reading_values_from_the_device(tower):
    step = TrainStep(double(tower).float().to("meta"), ALONE, "exact")
    step.method.compute_dtype = torch.float32
    given = dataclasses.replace(batch(step.method.architecture), valid=None)
    recorder = Unwatched()
    step.recorded = Capture(step.losses, [p for p in step.parameters() if p.requires_grad], recorder)
    for _ in range(3):
        step(given.to("meta")).total.backward()
    assert recorder.replayed == 2


@pytest.mark.parametrize(("method", "tower"), REFUSED)
def test_what_the_towers_do_not_allow_is_refused_by_its_option(method, tower):
    with pytest.raises(ValueError, match=REFUSED[method, tower]):
        make(method, TOWERS[tower])


def test_more_than_the_pool_of_a_tower_without_a_class_row_is_refused():
    with pytest.raises(ValueError, match="expected 0, or 1 for the pool of a tower without a class row"):
        make("discovla", TOWERS["siglip"], fused_vision_blocks=2)


@pytest.mark.parametrize("tower", ["pe", "siglip"])
def test_an_untrained_pool_that_fuses_reads_the_whole_video(tower):
    method = make("clip", TOWERS[tower], tune="frozen", fused_vision_blocks=1, mask_padded_frames=False)
    given = batch(TOWERS[tower])
    pixels = method.pixels(given.frames)
    fused, own = method.vision.with_unfused(pixels)
    if tower == "siglip":  # with a class row the blocks fuse too, and rows differ between frames
        torch.testing.assert_close(fused[:, :1].expand_as(fused), fused)
    plain = make("clip", TOWERS[tower], tune="frozen")
    unfused = plain.vision(pixels)
    if tower == "siglip":
        assert relative_error(own, unfused) <= 1e-6
    assert relative_error(fused, unfused) > 1e-3
    one = method.vision.with_unfused(pixels[:, :1])  # a video of one frame
    torch.testing.assert_close(*one)


def test_alternatives_of_fusion_in_the_pool_leave_out_its_adapters():
    given = batch(TOWERS["pe"])
    outputs = {}
    for fused_pool, adapters in {
        "own_query": {"adapter", "query_adapter"},
        "shared_query": {"adapter"},
    }.items():
        method = make("discovla", TOWERS["pe"], fused_pool=fused_pool).eval()
        names = {name.split(".")[2] for name in method.trained_state() if name.startswith("vision.pool.")}
        assert names == adapters
        outputs[fused_pool] = method.vision.with_unfused(method.pixels(given.frames))
    for found, want in zip(outputs["shared_query"], outputs["own_query"], strict=True):
        assert relative_error(found, want) <= 1e-6  # the adapters start at zero
    method = make("discovla", TOWERS["pe"], fused_pool="none").eval()
    assert not any(name.startswith("vision.pool.") for name in method.trained_state())
    fused, own = method.vision.with_unfused(method.pixels(given.frames))
    assert torch.equal(fused, own) and relative_error(fused, outputs["own_query"][1]) <= 1e-6
    for tower, message in {"clip": "where no attention pool fuses", "siglip": "without a class row"}.items():
        with pytest.raises(ValueError, match=f"method.fused_pool: expected 'own_query'.*{message}"):
            make("discovla", TOWERS[tower], fused_pool="none")


def test_a_pool_does_not_read_hidden_frames():
    method = make("clip", TOWERS["siglip"], tune="frozen", fused_vision_blocks=1)
    given = batch(TOWERS["siglip"])
    mask = torch.arange(3) < torch.tensor([[2], [3], [2], [1]])
    other = torch.where(mask[..., None, None, None], given.frames, 255 - given.frames)
    found = [method.encode_video(frames, mask).pooled for frames in (given.frames, other)]
    torch.testing.assert_close(*found)


def test_alignment_compares_frames_that_the_pool_saw_alone():
    method = make("discovla", TOWERS["siglip"], fused_text_blocks=0).eval()
    given = batch(TOWERS["siglip"])
    video = method.encode_videos(given)
    plain = make("clip", TOWERS["siglip"], tune="frozen").eval()
    assert relative_error(video.frames, plain.encode_videos(given).frames) <= 1e-6
    assert relative_error(video.pooled, plain.encode_videos(given).pooled) > 1e-3


def test_the_place_of_a_frame_reaches_the_pool():
    method = make("clip", TOWERS["siglip"], tune="frozen", fused_vision_blocks=1, frame_position=True)
    with torch.no_grad():
        method.vision.pool.frame_position.normal_()
    given = batch(TOWERS["siglip"])
    backwards = method.encode_video(given.frames.flip(1), given.frame_mask).pooled
    assert relative_error(backwards, method.encode_video(given.frames, given.frame_mask).pooled) > 1e-3


def test_sigmoid_loss_is_that_of_all_pairs():
    method = make("clip", TOWERS["siglip"], loss="sigmoid")
    text, video = method.encode(batch(TOWERS["siglip"]))
    found = method.losses(text, video).total
    scale, bias = method.logit_scale(), method.logit_scale.bias
    t, v = (x.pooled / x.pooled.norm(dim=-1, keepdim=True) for x in (text, video))
    want = 0.0
    for i in range(4):
        for j in range(4):
            logit = scale * t[i] @ v[j] + bias
            want = want + torch.nn.functional.softplus(-logit if i == j else logit) / 4
    torch.testing.assert_close(found, want)
    assert {"logit_scale.log", "logit_scale.bias"} <= set(method.trained_state())
    assert "logit_scale.bias" not in make("clip", TOWERS["siglip"]).trained_state()


def test_sigmoid_loss_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match="expected 'softmax' for towers without a logit bias"):
        make("clip", TOWERS["clip"], loss="sigmoid")
    with pytest.raises(ValueError, match="expected 'softmax' with the scores of t2vparser"):
        make("t2vparser", TOWERS["siglip"], loss="sigmoid", stan_layers=0)


def test_alignment_goes_with_the_sigmoid_loss():
    method = make("discovla", TOWERS["siglip"], loss="sigmoid")
    losses = method.losses(*method.encode(batch(TOWERS["siglip"])))
    losses.total.backward()
    assert set(losses.terms) == {"video", "frame", "distill"}
    reached = {n for n, p in method.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {"vision.pool.adapter.up.weight", "vision.pool.query_adapter.up.weight"} <= reached


@pytest.mark.parametrize("tower", ["siglip", "coca", "clipa"])
def test_a_text_tower_that_reads_padding_refuses_a_shorter_context(tower):
    method = make("clip", TOWERS[tower], tune="frozen")
    given = batch(TOWERS[tower])
    with pytest.raises(ValueError, match="expected 12 tokens, of which padding is read, got 8"):
        method.encode_text(given.text_ids[:, :8], given.text_mask[:, :8])


@pytest.mark.parametrize("tower", ["siglip", "coca", "clipa"])
def test_padding_that_is_read_is_computed(tower):
    method = make("clip", TOWERS[tower], tune="frozen")
    given = batch(TOWERS[tower])
    mask = given.text_mask
    want = method.text(given.text_ids, None)
    assert relative_error(method.encode_text(given.text_ids, mask).pooled, want) == 0
    changed = given.text_ids.masked_fill(~mask, 3)
    assert relative_error(method.encode_text(changed, mask).pooled, want) > 1e-3


@pytest.mark.parametrize("memory", ["recompute_mlp", "recompute_projections", "recompute_blocks"])
@pytest.mark.parametrize("tower", TOWERS)
def test_memory_modes_give_the_same_gradients(tower, memory):
    grads = []
    for mode in ("keep", memory):
        method = make("clip", TOWERS[tower]).double()
        method.compute_dtype = torch.float64
        method.vision.memory = method.text.memory = mode
        method.losses(*method.encode(batch(TOWERS[tower]))).total.backward()
        grads.append({n: p.grad for n, p in method.named_parameters() if p.grad is not None})
    assert all(relative_error(grads[1][name], grads[0][name]) <= 1e-9 for name in grads[0])
    assert set(grads[0]) >= set(clip_names(TOWERS[tower])) & {"vision.blocks.0.attention.qkv.bias"}


@pytest.mark.parametrize("tower", TOWERS)
def test_blocks_of_kernels_give_the_same_features(tower):
    found = []
    for impl in ("torch", "reference"):
        method = make("discovla" if (("discovla", tower) not in REFUSED) else "clip", TOWERS[tower]).double()
        method.compute_dtype = torch.float64
        method.vision.impl = method.text.impl = impl
        text, video = method.encode(batch(TOWERS[tower]))
        found.append((text.pooled, video.pooled))
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) <= 1e-9


# merging within frames needs positions that a merged token can have, across frames also class rows
MERGES = {
    "tome": {"merge": "tome", "merging": {"per_block": 1}},
    "tempme": {"merge": "tempme", "merging": {"per_block": 1, "layers": [1], "factors": [3], "frames": 3}},
}
CANNOT_MERGE = {
    **{(merge, tower): "with rotary positions" for merge in MERGES for tower in ("pe", "eva")},
    **{("tempme", tower): "is read from no class row" for tower in ("siglip", "coca", "clipa")},
}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("merge", MERGES)
def test_merging_trains_and_resumes_on_every_tower_or_is_refused_by_name(merge, tower):
    options = {"tune": "full", **MERGES[merge]}
    if (merge, tower) in CANNOT_MERGE:
        with pytest.raises(ValueError, match=f"method.merge: expected.*{CANNOT_MERGE[merge, tower]}"):
            make("clip", TOWERS[tower], **options)
        return
    made = make("clip", TOWERS[tower], **options).eval()
    moved = optimizer(made)
    first = step(made, moved)
    state, moments = copy.deepcopy(made.trained_state()), copy.deepcopy(moved.state_dict())
    again = make("clip", TOWERS[tower], **options).eval()
    again.load_trained_state(state)
    resumed = optimizer(again)
    resumed.load_state_dict(moments)
    second = step(made, moved)
    assert torch.isfinite(first) and first != second
    assert torch.equal(step(again, resumed), second)


@pytest.mark.parametrize("tower", ["clip", "siglip", "coca", "clipa"])
def test_merging_equal_patches_changes_no_feature(tower):
    """Proportional attention counts a merged token like the tokens in it, in the blocks and in the pool."""
    architecture = dataclasses.replace(TOWERS[tower], image_size=TOWERS[tower].image_size * 2)
    plain = make("clip", architecture, tune="frozen").double()
    merging = make("clip", architecture, tune="frozen", merge="tome", merging={"per_block": 3}).double()
    for method in (plain, merging):
        method.compute_dtype = torch.float64
        with torch.no_grad():
            method.vision.position_embedding.zero_()
    merging.load_state_dict(plain.state_dict())
    frames = torch.full((2, 3, *[architecture.image_size] * 2, 3), 77, dtype=torch.uint8)
    mask = torch.ones(2, 3, dtype=torch.bool)
    want, got = (method.encode_video(frames, mask).pooled for method in (plain, merging))
    assert relative_error(got, want) <= 1e-12


def test_the_fingerprint_has_the_statistics_of_a_stem():
    method = make("clip", TOWERS["mobileclip"], tune="frozen")
    before = method.fingerprint()["frozen"]
    with torch.no_grad():
        method.vision.stem[0].bn.running_mean.add_(1)
    assert method.fingerprint()["frozen"] != before
