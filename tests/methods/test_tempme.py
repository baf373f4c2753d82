"""TempMe against numbers of the released code, and its options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from discovla.engine.optim import OptimConfig, learning_rate, make_optimizer, set_learning_rate
from discovla.methods import load_released
from discovla.methods.tempme import TempMe, TempMeConfig, released_name
from discovla.nn import layout as layout_module
from discovla.nn.token_merging import MergeConfig, plan_merges
from discovla.ops.merge_tokens import source_count
from discovla.testing import relative_error, tiny_architecture
from discovla.towers.architecture import Architecture
from discovla.towers.weights import initialise
from tests.methods import golden_tempme as golden_file
from tests.methods.golden_tempme import Golden

TOLERANCE_64 = 1e-8
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float64, id="fp64")]
VARIANTS = list(
    json.loads((Path(__file__).parents[1] / "golden" / "tempme" / "variants.json").read_text())["variants"]
)


def limit(dtype: torch.dtype, single: float = 2e-5) -> float:
    return single if dtype == torch.float32 else TOLERANCE_64


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def model_file(golden: Path) -> Golden:
    return golden_file.read(golden, "model")


@pytest.fixture(scope="module")
def variants(golden: Path) -> Golden:
    return golden_file.read(golden, "variants")


def check(golden: Golden, name: str, got: Tensor | None, most: float) -> None:
    assert got is not None, name
    error = relative_error(got, golden.tensors[name].view(got.shape))
    assert error <= most, f"{name}: error {error:.2e}, allowed {most:.0e}"


def cosine(text: Tensor, video: Tensor) -> Tensor:
    return torch.nn.functional.normalize(text, dim=-1) @ torch.nn.functional.normalize(video, dim=-1).T


def released_gradients(model: TempMe) -> dict[str, Tensor]:
    return {f"clip.{released_name(n)}": p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_features_similarities_and_losses_equal_the_golden_ones(model_file, dtype):
    model, batch = golden_file.build(model_file, dtype), golden_file.batch(model_file, dtype)
    text, video = model.encode(batch)
    check(model_file, "feat.text", text.pooled, limit(dtype))
    check(model_file, "feat.video", video.pooled, limit(dtype))
    units = torch.nn.functional.normalize(video.frames, dim=-1)
    check(model_file, "feat.frames", units, limit(dtype))
    check(model_file, "sim.cosine", cosine(text.pooled, video.pooled), limit(dtype))
    check(model_file, "eval.sim", model.similarity(text, video), limit(dtype))
    check(model_file, "loss.total", model.losses(text, video).total, limit(dtype))
    whole = replace(batch, frame_mask=torch.ones_like(batch.frame_mask))
    text, video = model.encode(whole)
    check(model_file, "allframes.feat.video", video.pooled, limit(dtype))
    check(model_file, "allframes.loss.total", model.losses(text, video).total, limit(dtype))


def test_blocks_and_merges_equal_the_golden_ones(model_file, dtype, monkeypatch):
    model, batch = golden_file.build(model_file, dtype), golden_file.batch(model_file, dtype)
    merges, outputs, counts = [], [], []
    merge = layout_module.merge_tokens

    def recorded(x, sizes, metric, count, **options):
        merged = merge(x, sizes, metric, count, **options)
        merges.append((merged, options["fixed"], count, x.shape[1]))
        return merged

    monkeypatch.setattr(layout_module, "merge_tokens", recorded)

    def record(module, inputs, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    for block in model.vision.blocks:
        block.register_forward_hook(record)
    tower, frames = model.vision, batch.frames.shape[1]
    x = tower.embed(model.pixels(batch.frames).flatten(0, 1))
    cls, state = tower.merging(tower.blocks, x, tower.layout(x, frames), readout_only=False, trace=True)
    for layer, (rows, expected) in enumerate(zip(outputs, model_file.sidecar["block_counts"], strict=True)):
        clips, fixed = expected["clips"], expected["cls_per_clip"]
        assert rows.shape[:2] == (len(batch.frames) * clips, expected["tokens_per_clip_out"])
        want = model_file.tensors[f"tokens.{layer}"]
        assert relative_error(rows[: len(want)], want) <= limit(dtype), layer
        if f"layer.vision.{layer}.cls" in model_file.tensors:
            class_rows = rows[:, :fixed].unflatten(0, (-1, clips)).flatten(1, 2)
            check(model_file, f"layer.vision.{layer}.cls", class_rows, limit(dtype))
    for (merged, fixed, count, length), info in zip(merges, model_file.sidecar["matching"], strict=True):
        name = info["merge"]
        assert (count, fixed, length) == (info["rho"], info["cls"], info["tokens_in"]), name
        assert torch.equal(merged.sizes.float(), model_file.tensors[f"{name}.size"].view(merged.sizes.shape))
        left = source_count(length, fixed) - count
        of_sources = merged.target[:, fixed + fixed % 2 :: 2] - fixed
        for row in range(len(of_sources)):
            sources = model_file.tensors[f"{name}.src"][row]
            assert torch.equal(of_sources[row, sources] - left, model_file.tensors[f"{name}.dst"][row]), name
        if f"{name}.tokens" in model_file.tensors:
            want = model_file.tensors[f"{name}.tokens"]
            assert relative_error(merged.rows[: len(want)], want) <= limit(dtype), name
        counts.append(name)
    assert len(counts) == 15
    # every token that a clip had at first lies in a row that counts it
    last = merges[-1][0].sizes
    for sequence in range(len(state.places)):
        assert torch.equal(
            torch.bincount(state.places[sequence], minlength=last.shape[1]), last[sequence].long()
        )
    assert cls.shape == (len(batch.frames) * frames, tower.blocks[0].ln_1.weight.shape[0])


def test_gradients_of_every_parameter_equal_the_golden_ones(model_file, dtype):
    model = golden_file.build(model_file, dtype)
    text, video = model.encode(golden_file.batch(model_file, dtype))
    text.pooled.retain_grad()
    video.pooled.retain_grad()
    model.losses(text, video).total.backward()
    check(model_file, "grad.feat.text", text.pooled.grad, limit(dtype, 2e-4))
    check(model_file, "grad.feat.video", video.pooled.grad, limit(dtype, 2e-4))
    got = released_gradients(model)
    wanted = {n.removeprefix("grad.param.") for n in model_file.tensors if n.startswith("grad.param.")}
    assert set(got) == wanted - {"clip.logit_scale"}
    for name, gradient in got.items():
        check(model_file, f"grad.param.{name}", gradient, limit(dtype, 2e-4))


def test_steps_of_training_equal_the_golden_ones(model_file, dtype):
    recipe = model_file.sidecar["train_trajectory"]
    config = OptimConfig(
        name="adamw_released",
        lr=recipe["lr"],
        betas=tuple(recipe["betas"]),
        eps=recipe["eps"],
        weight_decay=recipe["weight_decay"],
        clip_grad_norm=recipe["clip_grad_norm"],
        warmup=recipe["warmup_proportion"],
    )
    model, batch = golden_file.build(model_file, dtype), golden_file.batch(model_file, dtype)
    optimizer = make_optimizer(model, config)
    for step, want in enumerate(recipe["losses"]):
        loss = model.losses(*model.encode(batch)).total
        assert loss.item() == pytest.approx(want, rel=limit(dtype, 1e-4))
        if step == recipe["steps"]:
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_grad_norm"])
        set_learning_rate(optimizer, learning_rate(step, recipe["total_steps"], config))
        optimizer.step()
    for name, value in model.trained_state().items():
        want = model_file.tensors[f"train.final.clip.{released_name(name)}"]
        assert (value - want.view(value.shape)).abs().max() <= limit(dtype, 5e-5), name


# a few variants for the implementations that take longer
CASES = [
    *((name, "torch") for name in VARIANTS),
    *((name, "reference") for name in ("first_layer", "no_propattn")),
    pytest.param("first_layer", "triton", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "impl"), CASES)
def test_variants_of_the_options_equal_the_golden_ones(model_file, variants, name, impl):
    dtype = torch.float64
    about = variants.sidecar["variants"][name]
    prefix = f"variant.{name}.pos.clip."
    tables = {n.removeprefix(prefix): t for n, t in variants.tensors.items() if n.startswith(prefix)}
    model = golden_file.build(model_file, dtype, about["changes"], tables)
    model.vision.impl = impl
    text, video = model.encode(golden_file.batch(model_file, dtype))
    check(variants, f"variant.{name}.feat.video", video.pooled, TOLERANCE_64)
    check(variants, f"variant.{name}.sim.cosine", cosine(text.pooled, video.pooled), TOLERANCE_64)
    loss = model.losses(text, video).total
    check(variants, f"variant.{name}.loss.total", loss, TOLERANCE_64)
    loss.backward()
    gradients = released_gradients(model)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    assert norm == pytest.approx(about["grad_norm"], rel=1e-8)
    wanted = f"variant.{name}.grad.param."
    for key in variants.tensors:
        if (
            key.startswith(wanted) and variants.tensors[key].any()
        ):  # the release has tables that it does not use
            check(variants, key, gradients[key.removeprefix(wanted)], TOLERANCE_64)


def test_token_counts_equal_those_of_official_runs(golden):
    cases = json.loads((golden / "tempme" / "token_counts.json").read_text())["cases"]
    for case in cases:
        c = case["config"]
        plan = plan_merges(
            "tempme",
            golden_file.merging(c),
            tokens=c["grid"] ** 2 + 1,
            frames=c["frames"],
            blocks=c["layers"],
        )
        assert [[b.sequences, b.fixed, b.left] for b in plan] == case["blocks"], c
        merges = []
        for b in plan:
            if b.at_join:
                merges.append(["join", b.at_join, b.fixed, b.attended + b.at_join])
            if b.inner:
                merges.append(["inner", b.inner, b.fixed, b.attended])
        assert merges == case["merges"], c


SIZES = {"tokens": 26, "frames": 4, "blocks": 3}
SMALL = MergeConfig(frames=4, layers=(1, 2), factors=(2, 2), join_share=0.5)


def left(**changes) -> list[tuple[int, int, int]]:
    """Tokens merged at the join and within, and left, for each of three blocks of 25 patches."""
    plan = plan_merges("tempme", SMALL.model_copy(update=changes), **SIZES)
    return [(b.at_join, b.inner, b.left) for b in plan]


def test_repairs_change_the_counts_as_they_say():
    assert left() == [(0, 2, 24), (23, 2, 23), (21, 2, 23)]
    assert left(join_share=0.4) == [(0, 2, 24), (19, 2, 27), (21, 3, 30)]
    assert left(join_share=0.4, count="patches") == [(0, 2, 24), (18, 2, 28), (20, 3, 33)]
    assert left(factors=(2, 1)) == [(0, 2, 24), (23, 2, 23), (0, 1, 22)]
    assert left(factors=(2, 1), single_join="plain") == [(0, 2, 24), (23, 2, 23), (0, 2, 21)]
    assert left(per_block=40, clamp=True) == [(0, 12, 14), (13, 1, 14), (12, 1, 15)]
    with pytest.raises(ValueError, match=r"per_block: expected at most 12 in block 0.*found 40"):
        left(per_block=40)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"factors": (3, 2)}, "expected factors that divide the 4 frames"),
        ({"layers": (1, 3)}, r"layers: expected blocks 0 to 2, found \[1, 3\]"),
        ({"per_block": ()}, "per_block: expected 1 numbers, one a block, found 0"),
    ],
)
def test_merges_that_cannot_be_are_refused(changes, line):
    with pytest.raises(ValueError, match=line):
        left(**changes)


@pytest.mark.parametrize(
    "options", [{"layers": (9, 8, 10)}, {"factors": (2, 2)}, {"factors": (2, 0, 3)}, {"join_share": 1.5}]
)
def test_options_that_contradict_each_other_are_refused(options):
    with pytest.raises(ValidationError, match=r"layers|factors|join_share"):
        MergeConfig(**options)


def test_joined_frames_cannot_fuse():
    with pytest.raises(ValidationError, match=r"expected method\.fused_vision_blocks = 0"):
        TempMeConfig(fused_vision_blocks=1)


def small(architecture: Architecture, **options) -> TempMe:
    """A TempMe of three blocks in float64 with a gradient for everything that trains."""
    merging = SMALL.model_copy(update=options.pop("merging", {}))
    model = TempMe(architecture, TempMeConfig(merging=merging, **options)).double()
    initialise(model, architecture, seed=0)
    model.freeze()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.compute_dtype = torch.float64
    return model


@pytest.fixture
def three_blocks() -> Architecture:
    """25 patches a frame."""
    tiny = tiny_architecture()
    return replace(tiny, image_size=20, patch_size=4, vision=replace(tiny.vision, layers=3))


def frames_of(architecture: Architecture, clips: int = 2) -> tuple[Tensor, Tensor]:
    size = architecture.image_size
    frames = torch.randint(0, 256, (clips, 4, size, size, 3), dtype=torch.uint8)
    return frames, torch.tensor([[True] * 4, [True, True, False, False]])[:clips]


def test_masked_frames_change_nothing_when_they_are_hidden(three_blocks):
    frames, mask = frames_of(three_blocks)
    other = frames.clone()
    other[1, 2:] = torch.randint(0, 256, other[1, 2:].shape, dtype=torch.uint8)
    for hidden, same in ((True, True), (False, False)):
        model = small(three_blocks, mask_padded_frames=hidden)
        first, second = (model.encode_video(x, mask).pooled for x in (frames, other))
        assert torch.equal(first[0], second[0])
        assert torch.allclose(first[1], second[1], rtol=1e-10, atol=0) == same


def test_positions_are_added_at_joins_that_merge_nothing_only_if_asked(three_blocks):
    frames, mask = frames_of(three_blocks)
    for rule, moves in (("merged", False), ("always", True)):
        model = small(three_blocks, merging={"join_share": 0.0, "join_position": rule})
        before = model.encode_video(frames, mask).pooled
        with torch.no_grad():
            model.vision.merging.positions["1"].add_(torch.randn(4, 1).double())
        assert (not torch.equal(before, model.encode_video(frames, mask).pooled)) == moves


def test_a_join_by_keys_finds_other_tokens(three_blocks):
    frames, mask = frames_of(three_blocks)
    torch.manual_seed(0)
    rows = small(three_blocks)
    torch.manual_seed(0)
    keys = small(three_blocks, merging={"join_metric": "keys"})
    assert not torch.equal(rows.encode_video(frames, mask).pooled, keys.encode_video(frames, mask).pooled)


@pytest.mark.parametrize("memory", ["recompute_mlp", "recompute_projections", "recompute_blocks"])
def test_memory_modes_keep_losses_and_gradients(three_blocks, memory):
    frames, mask = frames_of(three_blocks)
    model = small(three_blocks)
    probe = torch.randn(2, three_blocks.embed_dim, dtype=torch.float64)
    gradients = []
    for mode in ("keep", memory):
        model.vision.memory = mode
        model.zero_grad()
        (model.encode_video(frames, mask).pooled * probe).sum().backward()
        gradients.append({n: p.grad for n, p in model.vision.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 8
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_repeated_frames_and_other_frames_than_the_plan_says(three_blocks):
    frames, mask = frames_of(three_blocks, clips=1)
    model = small(three_blocks)
    still = frames[:, :1].expand_as(frames).contiguous()
    assert model.encode_video(still, mask[:1]).pooled.isfinite().all()
    with pytest.raises(ValueError, match=r"frames: expected 4 a clip \(method.merging.frames\), found 3"):
        model.encode_video(frames[:, :3], mask[:1, :3])


def test_merging_within_frames_keeps_frames_apart(three_blocks):
    frames, mask = frames_of(three_blocks)
    model = small(three_blocks, merge="tome")
    whole = model.encode_video(frames, mask).frames
    for frame in range(4):
        alone = model.encode_video(frames[:, [frame]], mask[:, :1]).frames
        assert relative_error(alone[:, 0], whole[:, frame]) <= 1e-12


def test_a_checkpoint_of_the_release_is_read_by_its_names(three_blocks, tmp_path):
    model, other = small(three_blocks), small(three_blocks)
    state = {f"clip.{released_name(n)}": p.detach().float() for n, p in model.named_parameters()}
    state = {n: p[None, :, None] if "Positional" in n and "TVPt" in n else p for n, p in state.items()}
    save_file({n: p.contiguous() for n, p in state.items()}, tmp_path / "best.safetensors")
    load_released(other, tmp_path / "best.safetensors")
    for (name, want), got in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(got.float(), want.float()), name
