"""The benchmark of a training step, in small."""

import dataclasses
import re

import pytest
import torch

from benchmarks import step, step_baselines, step_inputs
from benchmarks.step import IMPLS, Comparison, compare, component
from benchmarks.step_baselines import MatmulStep, PeftStep, ReferenceStep
from benchmarks.step_inputs import size_of
from benchmarks.step_work import needed_flops
from discovla.data.config import DataConfig
from discovla.engine.capture import Capture
from discovla.methods.discovla import DiscoVLAConfig
from discovla.testing import relative_error
from discovla.towers.architecture import Architecture, TowerShape
from discovla.tune import Measurement
from tests.engine.recorder import Unwatched


@pytest.fixture
def architecture() -> Architecture:
    tower = TowerShape(width=32, layers=4, heads=2, mlp_width=64)
    return dataclasses.replace(
        step_inputs.architecture("ViT-B/32"),
        embed_dim=16, image_size=32, patch_size=16, vision=tower, text=tower,
    )  # fmt: skip


def test_every_implementation_has_figures_or_a_reason(architecture):
    rows = compare(Comparison(rounds=3, frames=2), "cpu", architecture)
    assert [row["impl"] for row in rows] == list(IMPLS)
    timed = {row["impl"]: row for row in rows if "left_out" not in row}
    assert {"reference", "reference anomaly", "reference bf16 sdpa", "ours", "ours bf16"} <= timed.keys()
    assert {row["impl"] for row in rows if "GPU" in row.get("left_out", "")} == {
        *("reference bf16 sdpa compiled", "reference bf16 sdpa compiled whole", "ours bf16 triton"),
        *("ours bf16 compiled whole", "ours bf16 triton captured whole", "ours bf16 tuned whole"),
        *("ours bf16 compiled", "ours bf16 compiled captured"),
        *("ours bf16 captured", "ours bf16 triton captured"),
    }
    for row in timed.values():
        assert row["n"] == len(row["ratios"]) == 3 and row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["samples_s"] == pytest.approx(2000 / row["ms_p50"])
        assert row["tflops_needed"] * row["ms_p50"] / 1000 == pytest.approx(row["needed_tflop"])
        products = row["impl"].startswith("matmul")
        assert row["dispatched"] > 50 and (row["kept_mb"] == 0 if products else row["kept_mb"] > 0)
    assert timed["reference"]["ratios"] == [1.0] * 3
    assert timed["ours"]["needed_tflop"] < timed["ours"]["reference_tflop"]
    assert timed["ours bf16"]["kept_mb"] < timed["ours"]["kept_mb"] < timed["reference"]["kept_mb"]


def test_a_tuned_step_takes_what_is_measured_and_keeps_the_candidates(architecture, monkeypatch):
    taken, problem = [], ("block bfloat16 5x32", 6)
    slow = Measurement(name="block", impl="torch", problem=problem, error=(0.0, 0.0), ms=2.0)
    fast = dataclasses.replace(slow, impl="triton", ms=1.0)
    monkeypatch.setattr(step, "unavailable", lambda *given: "")
    monkeypatch.setattr(step, "measured", lambda plans, **options: [slow, fast] if len(plans) > 9 else [])
    monkeypatch.setattr(step, "use_choices", taken.append)
    comparison = Comparison(rounds=1, frames=2, impls=["ours bf16 tuned whole"])
    (row,) = compare(comparison, "cpu", architecture)
    assert taken == [{problem[0]: {"6": "triton"}}] and row["n"] == 1
    assert [(x["impl"], x["ms"]) for x in row["candidates"]] == [("torch", 2.0), ("triton", 1.0)]


def test_every_implementation_starts_from_equal_weights(architecture):
    first, second = (step_inputs.method(architecture).state_dict() for _ in range(2))
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_full_captions_have_no_padding(architecture):
    sizes = [size_of(step_inputs.noise(architecture, 50, full=full)) for full in (False, True)]
    assert sizes[0].tokens == pytest.approx(12, abs=0.2) and sizes[0].longest == 16
    assert (sizes[1].tokens, sizes[1].longest, sizes[1].length) == (32, 32, 32)
    assert Comparison(full_captions=True).name == "step ViT-B/32 b2 full captions"


def test_an_implementation_that_does_not_fit_is_left_out_and_the_rest_timed(architecture, monkeypatch):
    def full(name, *rest):
        if name == "reference":
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return make(name, *rest)

    make = step.make_step
    monkeypatch.setattr(step, "make_step", full)
    reference, ours = compare(
        Comparison(rounds=1, frames=2, impls=["reference", "ours"]), "cpu", architecture
    )
    assert reference["left_out"] == "CUDA out of memory."
    assert ours["n"] == 1 and "ratios" not in ours


def test_rounds_end_at_the_time_limit_and_a_step_is_profiled(architecture, capsys):
    comparison = Comparison(rounds=50, seconds=0, frames=2, impls=["ours"], profile=True)
    (row,) = compare(comparison, "cpu", architecture)
    assert row["n"] == step.LEAST
    assert {"products", "attention", "low-rank products", "layer norms"} <= row["profile_ms"].keys()
    step.show(row)
    assert re.search(r"low-rank products +\d+\.\d ms +\d+\.\d%", capsys.readouterr().out)


def test_a_captured_step_is_timed_after_its_shape_is_recorded(architecture, monkeypatch):
    """With a recorder that runs the step again instead of replaying a graph."""
    monkeypatch.setattr(step, "unavailable", lambda *_: "")
    recorders = []

    def again(losses, trained, *_):
        recorders.append(Unwatched())
        return Capture(losses, trained, recorders[-1])

    monkeypatch.setattr(step, "make_capture", again)
    (row,) = compare(Comparison(rounds=3, frames=2, impls=["ours bf16 captured"]), "cpu", architecture)
    assert row["n"] == 3 and "left_out" not in row
    (recorder,) = recorders
    assert recorder.recorded == 1 and recorder.replayed == 1 + 2 + 3 + 1, "warm-up, rounds, counts"


@pytest.mark.gpu
def test_steps_are_timed_on_a_gpu(architecture):
    names = ["reference", "ours bf16", "ours bf16 captured"]
    rows = compare(Comparison(rounds=3, frames=2, impls=names), "cuda", architecture)
    assert all(row["launches"] > 0 and row["peak_gb"] > 0 for row in rows)


def test_times_with_the_loader_include_the_wait_for_batches(architecture, drawn):
    data = DataConfig(manifest=drawn, frames=8, workers=0)
    comparison = Comparison(rounds=2, impls=["reference", "ours"], data=data, frames=8)
    reference, ours = compare(comparison, "cpu", architecture)
    assert reference["name"] == "step ViT-B/32 b2 with loader" and ours["n"] == 2
    assert ours["caption_tokens"] < 32 and ours["samples_s"] <= 2000 / ours["ms_p20"]


def test_the_matmul_only_lower_bound_is_most_of_the_needed_work():
    architecture = step_inputs.architecture("ViT-B/32")
    batch = step_inputs.noise(architecture, 2)
    listed = MatmulStep(architecture, dtype=torch.float32, device="meta").products(batch)
    work = sum(2 * rows * i * o * (1 + backward) for rows, i, o, backward in listed)
    needed = needed_flops(architecture, DiscoVLAConfig(), step_inputs.size_of(batch))
    assert 0.93 * needed <= work <= needed


def test_an_unknown_implementation_is_refused(architecture):
    with pytest.raises(ValueError, match=r"impl: expected one of reference, .*, found 'theirs'"):
        compare(Comparison(impls=["theirs"]), "cpu", architecture)


def test_missing_peft_is_one_line(monkeypatch):
    monkeypatch.setattr(
        step_baselines.importlib.util, "find_spec", lambda name: None if name == "peft" else name
    )
    assert step.unavailable("peft", "cpu") == (
        "peft not installed: pip install --no-deps peft transformers accelerate tokenizers"
    )


@pytest.mark.slow
def test_peft_computes_the_published_step(architecture):
    if reason := step_baselines.peft_missing():
        pytest.skip(reason)
    method = step_inputs.method(architecture).double()
    batch = step_inputs.noise(architecture, 3, frames=2)
    plain, other = ReferenceStep(method), PeftStep(method)
    assert relative_error(other(batch)["total"], plain(batch)["total"]) <= 1e-12
    name = "vision.blocks.1.attention"
    down, up = (
        [other.trained[f"{name}.{part}.lora_{kind}.default.weight"].grad for part in "qkv"] for kind in "AB"
    )
    assert relative_error(sum(down), plain.trained[f"{name}.lora.a"].grad) <= 1e-10
    assert relative_error(torch.cat(up), plain.trained[f"{name}.lora.b"].grad) <= 1e-10
    assert other.trained.keys() - plain.trained.keys() == {
        f"{side}.blocks.{layer}.attention.{part}.lora_{kind}.default.weight"
        for side in ("vision", "text")
        for layer in range(4)
        for part in "qkv"
        for kind in "AB"
    }


@pytest.mark.parametrize(
    ("name", "shapes", "want"),
    [
        ("aten::addmm", [[96], [40, 32], [32, 96]], "products"),
        ("aten::mm", [[40, 32], [32, 8]], "low-rank products"),
        ("aten::bmm", [[4, 5, 16], [4, 16, 5]], "attention"),
        ("aten::native_layer_norm", [[40, 32]], "layer norms"),
        ("aten::silu_backward", [[40, 32]], "activations"),
        ("aten::add_", [[40, 32], [40, 32]], "sums and products of elements"),
        ("aten::_to_copy", [], "copies, casts, rows"),
        ("autograd::engine::evaluate_function: AddmmBackward0", [], "other"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", (), "products"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", (), "sums and products"
         " of elements"),
        ("Memcpy DtoD (Device -> Device)", (), "copies, casts, rows"),
    ],
)  # fmt: skip
def test_ops_and_kernels_have_a_component(name, shapes, want):
    assert component(name, shapes) == want
