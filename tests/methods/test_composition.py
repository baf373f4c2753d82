"""Parts of one method on another: tuning, fusion, alignment, similarities; and a method of one's own."""

import dataclasses
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from discovla import methods
from discovla.batch import Batch
from discovla.config import ConfigError, RunConfig, parse_config
from discovla.engine.config import EngineConfig
from discovla.engine.distributed import World
from discovla.engine.optim import OptimConfig
from discovla.engine.strategies import make_strategy
from discovla.engine.strategy import StepPlan
from discovla.methods.base import Method
from discovla.nn.features import unit
from discovla.ops.frame_similarity import frame_similarity
from discovla.ops.info_nce import contrastive_loss
from discovla.ops.token_similarity import TokenInputs, token_similarity
from discovla.testing import noise_batch, tiny_architecture
from discovla.towers.weights import clip_names, initialise
from discovla.train_step import TrainStep

VARIANTS = {
    "clip": {"name": "clip"},
    "discovla": {"name": "discovla", "fused_vision_blocks": 1, "fused_text_blocks": 1},
    "meanP": {"name": "clip4clip"},
    "seqLSTM": {"name": "clip4clip", "head": "seqLSTM"},
    "seqTransf": {"name": "clip4clip", "head": "seqTransf", "head_layers": 2},
    "tightTransf": {"name": "clip4clip", "head": "tightTransf", "head_layers": 2},
    "clip2video": {"name": "clip2video", "head_layers": 2},
    "t2vparser": {
        "name": "t2vparser",
        "stan_layers": 1,
        "views": 2,
        "decomposition_layers": 1,
        "decomposition_heads": 2,
    },
}
# tiny frames have four patches: each block of two merges one, or pairs of frames are joined before the second
MERGES = {
    "tome": {"merge": "tome", "merging": {"per_block": 1}},
    "tempme": {
        "merge": "tempme",
        "merging": {"per_block": 1, "layers": [1], "factors": [2], "frames": 4, "join_share": 0.4},
    },
}
SCORED_AS_TRAINED = [name for name in VARIANTS if name != "t2vparser"]  # its two similarities differ
ALIGNED = {"alpha": 0.3, "beta": 0.5}


def config(variant: str, **options) -> RunConfig:
    values = {**VARIANTS[variant], **options}
    return parse_config({"directory": "runs/x", "data": {"manifest": "m.jsonl"}, "method": values})


def make(variant: str, **options) -> Method:
    """A small method off its start, where adapters that begin at zero would hide what they do."""
    torch.manual_seed(0)
    options = config(variant, **options).method
    method = methods.METHODS[options.name](tiny_architecture(), options)
    initialise(method, method.architecture, 0)
    method.initialise_from_clip()
    method.freeze()
    with torch.no_grad():
        for name, p in method.named_parameters():
            if ".lora." in name or ".adapter." in name:
                p.add_(torch.randn(p.shape) * 0.1)
    return method


def batch(frames: int = 4) -> Batch:
    """Noise whose captions have at least a start, a word and an end, so that each has words to align."""
    made = noise_batch(tiny_architecture(), frames=frames)
    mask = made.text_mask.clone()
    mask[:, :2] = True
    return dataclasses.replace(made, text_mask=mask)


@pytest.mark.parametrize("tune", ["full", "lora", "frozen"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_trains_what_it_declares(variant, tune):
    method = make(variant, tune=tune, **ALIGNED)
    losses = method.losses(*method.encode(batch()))
    if any(p.requires_grad for p in method.parameters()):
        losses.total.backward()
    clip = set(clip_names(method.architecture))
    reached = {n for n, p in method.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    assert reached <= trained
    assert bool(trained & clip) == (tune == "full")
    assert any(".lora." in name for name in trained) == (tune == "lora")
    added = {n for n, _ in method.named_parameters()} - clip
    assert added <= trained
    # gradients that are zero by their nature: a bias before a softmax, types and positions beyond the frames
    assert {n.split(".")[0] for n in reached} >= {n.split(".")[0] for n in added}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("variant", [*VARIANTS, "parser without STAN"])
def test_merging_trains_and_resumes_under_every_method_or_is_refused_by_name(variant, merge):
    options = {**MERGES[merge], **ALIGNED, "tune": "lora"}
    if variant == "parser without STAN":
        variant, options = "t2vparser", {**options, "stan_layers": 0}
    elif variant == "t2vparser" or (variant == "discovla" and merge == "tempme"):
        with pytest.raises(
            ConfigError, match=r"config: method\.merge: expected method\.(stan|fused_vision)\w+ = 0"
        ):
            config(variant, **options)
        return

    def step(method: Method) -> float:
        loss = method.losses(*method.encode(batch())).total
        method.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in method.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
        return loss.item()

    method = make(variant, **options).eval()
    losses = [step(method), step(method)]
    assert losses[1] != losses[0]
    resumed = make(variant, **options).eval()
    resumed.load_trained_state(method.trained_state())
    assert step(method) == step(resumed)


@pytest.mark.parametrize("variant", SCORED_AS_TRAINED)
def test_alignment_is_added_to_the_loss_of_any_method(variant):
    plain, aligned = make(variant, alpha=0, beta=0).eval(), make(variant, **ALIGNED).eval()
    text, video = aligned.encode(batch())
    assert text.frames is not None and video.frames is not None
    own = plain.losses(dataclasses.replace(text, frames=None), video)
    found = aligned.losses(text, video)
    scale = aligned.logit_scale()
    mask = video.frame_mask if aligned.config.mask_padded_frames else None
    frame = scale * frame_similarity(text.frames, video.frames, scale, text_mask=mask, video_mask=mask)
    student = aligned.similarity(text, video)
    kl = [
        (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum()
        for p, q in ((frame, student), (frame.T, student.T))
    ]
    distill = 100 / len(frame) ** 2 * (kl[0] + kl[1]) / 2
    want = own.total + 0.3 * contrastive_loss(frame) + 0.5 * distill
    torch.testing.assert_close(found.total, want, rtol=1e-5, atol=1e-6)
    assert set(found.terms) == {*own.terms, "frame", "distill"}


@pytest.mark.parametrize("options", [{}, ALIGNED], ids=["plain", "aligned"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_total_is_the_sum_of_the_terms_by_their_weights(variant, options):
    method = make(variant, **options).eval()
    losses = method.losses(*method.encode(batch()))
    assert set(method.loss_weights) <= set(losses.terms)
    total = sum(weight * losses.terms[name] for name, weight in method.loss_weights.items())
    torch.testing.assert_close(total, losses.total.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["meanP", "seqTransf", "tightTransf", "clip2video"])
def test_padded_frames_do_not_reach_the_loss_of_a_combination(variant):
    method = make(variant, fused_vision_blocks=2, **ALIGNED).eval()
    given = batch(frames=5)
    mask = torch.arange(5) < torch.tensor([[3], [5], [4], [2]])
    noise = torch.randint(0, 256, given.frames.shape, dtype=torch.uint8)
    other = torch.where(mask[..., None, None, None], given.frames, noise)
    found = [
        method.losses(*method.encode(dataclasses.replace(given, frames=f, frame_mask=mask))).total.item()
        for f in (given.frames, other)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("variant", ["discovla", "meanP", "seqTransf"])
def test_words_and_frames_are_scored_by_their_matches(variant):
    method = make(variant, similarity="tokens", alpha=0, beta=0).eval()
    given = batch()
    text, video = method.encode(given)
    assert text.tokens is not None and video.tokens is not None
    assert text.tokens.shape == (*given.text_ids.shape, 16)
    end = torch.arange(len(text)), given.text_ids.argmax(1)
    torch.testing.assert_close(text.tokens[end], text.pooled)
    inputs = TokenInputs(text=text.tokens, video=video.tokens, text_mask=text.mask, video_mask=video.mask)
    want = method.logit_scale() * token_similarity(inputs)
    torch.testing.assert_close(method.similarity(text, video), want)
    losses = method.losses(text, video)
    torch.testing.assert_close(losses.total, contrastive_loss(want))
    plain = make(variant, alpha=0, beta=0).eval()
    assert plain.encode(given)[0].tokens is None
    torch.testing.assert_close(plain.encode(given)[1].pooled, video.pooled)


def test_same_video_captions_are_no_negatives_of_any_method():
    same = torch.eye(4, dtype=torch.bool)
    same[0, 3] = same[3, 0] = True
    for variant in ("meanP", "tightTransf", "clip2video"):
        method = make(variant, exclude_same_video=True).eval()
        encoded = method.encode(batch())
        first, second = (method.losses(*encoded, same_video=s).total.item() for s in (None, same))
        assert first != second, variant


def test_frame_positions_start_without_effect_and_then_tell_order():
    given = batch(frames=5)
    backward = dataclasses.replace(given, frames=given.frames.flip(1))
    without, positioned = make("discovla"), make("discovla", frame_position=True)
    positioned.load_state_dict(without.state_dict(), strict=False)

    def video(method: Method, b: Batch) -> Tensor:
        return method.encode_video(b.frames, b.frame_mask).pooled

    assert torch.equal(video(positioned, given), video(without, given))
    torch.testing.assert_close(video(positioned, given), video(positioned, backward), rtol=1e-4, atol=1e-5)
    table = positioned.vision.blocks[1].attention.frame_position
    positioned.losses(*positioned.encode(given)).total.backward()
    assert table.grad[:5].abs().max() > 0 and not table.grad[5:].any()
    with torch.no_grad():
        table.normal_()
    assert (video(positioned, given) - video(positioned, backward)).abs().max() > 1e-3


def test_more_frames_than_positions_are_refused():
    with pytest.raises(ValueError, match="frames: expected at most 128 with positions, got 129"):
        given = batch(frames=129)
        make("meanP", fused_vision_blocks=1, frame_position=True).encode_video(given.frames, given.frame_mask)


@pytest.mark.parametrize("variant", ["seqTransf", "clip2video"])
def test_order_aware_heads_tell_a_reversed_clip(variant):
    method, given = make(variant), batch(frames=5)
    with torch.no_grad():
        method.get_parameter("positions.weight").normal_()  # at the start they are too small to matter
    forward, backward = (
        method.encode_video(frames, given.frame_mask).pooled
        for frames in (given.frames, given.frames.flip(1))
    )
    assert (unit(forward) - unit(backward)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("meanP", {"frame_position": True}, r"method\.frame_position: .*method\.fused_vision_blocks >= 1"),
        ("tightTransf", {"similarity": "tokens"}, r"method\.head: .*expected method\.similarity = 'pooled'"),
        ("clip2video", {"similarity": "tokens"}, r"method\.similarity: expected 'pooled', found 'tokens'"),
        ("clip2video", {"sim_type": "meanP"}, r"method\.sim_type: .*method\.temporal_type = 'none'"),
        ("discovla", {"head": "seqLSTM"}, r"method\.head: unknown key"),
        ("meanP", {"tune": "half"}, r"method\.tune: expected 'full', 'text', 'lora' or 'frozen'"),
    ],
    ids=str,
)
def test_contradictory_options_are_one_line_that_names_the_keys(variant, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        config(variant, **options)
    assert "\n" not in str(error.value)


def test_the_example_method_of_contributing_trains(monkeypatch):
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    code = guide.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 40
    module = types.ModuleType("gated_max")
    exec(code, module.__dict__)
    monkeypatch.setitem(methods.METHODS, "gated_max", module.GatedMax)
    monkeypatch.setitem(VARIANTS, "gated_max", {"name": "gated_max"})
    method, world = (
        make("gated_max", **ALIGNED),
        World(rank=0, size=1, local_rank=0, device=torch.device("cpu")),
    )
    plan = StepPlan(
        engine=EngineConfig(strategy="torch", device="cpu"),
        optim=OptimConfig(warmup=0),
        world=world,
        batch_size=4,
    )
    strategy = make_strategy(TrainStep(method, world, "exact"), plan)
    totals = []
    for _ in range(8):
        losses = strategy(batch())
        strategy.backward(losses.total)
        strategy.step(5e-3)
        totals.append(losses.total.item())
    assert totals[-1] < totals[0]
    assert set(losses.terms) == {"video", "frame", "distill"}
    assert {n.split(".")[0] for n in strategy.trained_state()} == {"method"}
