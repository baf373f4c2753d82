from pathlib import Path

import pytest
import torch
from torch import Tensor

from discovla.batch import Embedding
from discovla.engine.optim import OptimConfig, learning_rate, make_optimizer, set_learning_rate
from discovla.methods.discovla import DiscoVLA
from discovla.ops.frame_similarity import frame_similarity
from discovla.ops.info_nce import cosine_similarity
from discovla.testing import relative_error
from tests.methods import golden_discovla as golden_file
from tests.methods.golden_discovla import Golden, released_name

# the files are rounded to float32, so a float64 implementation meets 1e-6 of a tensor's maximum
TOLERANCE_64 = 1e-6
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float64, id="fp64")]


def tolerance(golden: Golden, kind: str, dtype: torch.dtype) -> float:
    return golden.sidecar["tolerance_float32"][kind] if dtype == torch.float32 else TOLERANCE_64


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def model_file(golden: Path) -> Golden:
    return golden_file.read(golden, "model")


@pytest.fixture(scope="module")
def encoded(model_file: Golden, dtype: torch.dtype) -> tuple[DiscoVLA, Embedding, Embedding]:
    model = golden_file.build(model_file, dtype)
    return model, *model.encode(golden_file.batch(model_file, dtype))


def features(text: Embedding, video: Embedding) -> dict[str, Tensor]:
    assert text.frames is not None and video.frames is not None
    return {
        "video_L": text.pooled,
        "frame_L": text.frames,
        "framevideo_V": video.pooled,
        "frame_V": video.frames,
    }


def check(golden: Golden, name: str, got: Tensor | None, limit: float) -> None:
    assert got is not None, name
    error = relative_error(got, golden.tensors[name])
    assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.0e}"


def test_features_equal_the_golden_ones(model_file, encoded, dtype):
    _, text, video = encoded
    for name, feature in features(text, video).items():
        check(model_file, f"feat.{name}", feature, tolerance(model_file, "feat_layer_sim_eval", dtype))


def test_every_blocks_readout_rows_equal_the_golden_ones(model_file, dtype):
    model = golden_file.build(model_file, dtype)
    batch = golden_file.batch(model_file, dtype)
    rows: dict[str, Tensor] = {}

    def record(block, name):
        def hook(module, inputs, output):
            rows[name] = inputs[1].read(output)

        return block.register_forward_hook(hook)

    def run(tower, prefix, suffix, call):
        hooks = [record(b, f"layer.{prefix}.{i}.{suffix}") for i, b in enumerate(tower.blocks)]
        call()
        for hook in hooks:
            hook.remove()

    run(model.vision, "vision", "cls", lambda: model.encode_video(batch.frames, batch.frame_mask))
    run(model.text, "text_caption", "eot", lambda: model.encode_text(batch.text_ids, batch.text_mask))
    run(model.text, "text_pseudo", "eot", lambda: model.encode_frame_captions(batch))
    wanted = {name for name in model_file.tensors if name.startswith("layer.")}
    assert set(rows) == wanted
    for name, got in rows.items():
        want = model_file.tensors[name]
        check(model_file, name, got.view(want.shape), tolerance(model_file, "feat_layer_sim_eval", dtype))


def test_similarities_equal_the_golden_ones(model_file, encoded, dtype):
    model, text, video = encoded
    limit = tolerance(model_file, "feat_layer_sim_eval", dtype)
    check(model_file, "sim.video", cosine_similarity(text.pooled, video.pooled), limit)
    check(model_file, "sim.frame", frame_similarity(text.frames, video.frames, model.logit_scale()), limit)


def test_losses_equal_the_golden_ones(model_file, encoded, dtype):
    model, text, video = encoded
    losses = model.losses(text, video)
    for name, got in {"total": losses.total, **losses.terms}.items():
        check(model_file, f"loss.{name}", got, tolerance(model_file, "loss", dtype))


def test_gradients_of_every_parameter_equal_the_golden_ones(model_file, dtype):
    model = golden_file.build(model_file, dtype)
    model.logit_scale.log.requires_grad_(True)  # an extra check of the file
    model.losses(*model.encode(golden_file.batch(model_file, dtype))).total.backward()
    wanted = {name for name in model_file.tensors if name.startswith("grad.param.")}
    got = {f"grad.param.{released_name(n)}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert set(got) == wanted
    for name, gradient in got.items():
        kind = "grad_logit_scale" if name.endswith("logit_scale") else "grad_param"
        check(model_file, name, gradient, tolerance(model_file, kind, dtype))


@pytest.mark.parametrize("file", ["model", "loss_only"])
def test_gradients_of_the_features_equal_the_golden_ones(golden, file, dtype):
    data = golden_file.read(golden, file)
    model = golden_file.loss_head(data, dtype)
    inputs = {
        name: data.get(f"feat.{name}", dtype).requires_grad_()
        for name in ("video_L", "frame_L", "framevideo_V", "frame_V")
    }
    text = Embedding(pooled=inputs["video_L"], frames=inputs["frame_L"])
    video = Embedding(pooled=inputs["framevideo_V"], frames=inputs["frame_V"])
    losses = model.losses(text, video)
    losses.total.backward()
    for name, got in {"total": losses.total, **losses.terms}.items():
        check(data, f"loss.{name}", got, tolerance(data, "loss", dtype))
    for name, tensor in inputs.items():
        check(data, f"grad.feat.{name}", tensor.grad, tolerance(data, "grad_feat", dtype))
    if "grad.logit_scale" in data.tensors:
        limit = tolerance(data, "grad_logit_scale", dtype)
        check(data, "grad.logit_scale", model.logit_scale.log.grad, limit)


def test_six_steps_of_training_equal_the_golden_ones(model_file, dtype):
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
    model = golden_file.build(model_file, dtype)
    batch = golden_file.batch(model_file, dtype)
    optimizer = make_optimizer(model, config)
    exact = dtype == torch.float64
    limits = model_file.sidecar["tolerance_float32"]
    for step in range(recipe["steps"] + 1):
        loss = model.losses(*model.encode(batch)).total
        limit = TOLERANCE_64 if exact else limits["train_losses_relative"]
        assert loss.item() == pytest.approx(recipe["losses"][step], rel=limit)
        if step == recipe["steps"]:
            break
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_grad_norm"])
        limit = TOLERANCE_64 if exact else limits["train_grad_norms_relative"]
        assert norm.item() == pytest.approx(recipe["grad_norms"][step], rel=limit)
        lr = learning_rate(step, recipe["total_steps"], config)
        assert lr == pytest.approx(recipe["lr_per_step"][step], rel=1e-12)
        set_learning_rate(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
    final = {f"train.final.{released_name(name)}": p for name, p in model.trained_state().items()}
    assert set(final) == {name for name in model_file.tensors if name.startswith("train.final.")}
    for name, parameter in final.items():
        error = (parameter.double() - model_file.tensors[name].double()).abs().max().item()
        assert error <= (TOLERANCE_64 if exact else limits["train_final_abs"]), name


def test_evaluation_equals_the_golden_one(model_file, dtype):
    model = golden_file.build(model_file, dtype)
    batch = golden_file.batch(model_file, dtype)
    text = model.encode_text(batch.text_ids, batch.text_mask)
    video = model.encode_video(batch.frames, batch.frame_mask)
    limit = tolerance(model_file, "feat_layer_sim_eval", dtype)
    check(model_file, "eval.text", text.pooled, limit)
    check(model_file, "eval.video", video.pooled, limit)
    check(model_file, "eval.sim", model.similarity(text, video), limit)
