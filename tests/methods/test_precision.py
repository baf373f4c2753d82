"""The residual stream in float32 and frozen weights in FP8, through a whole method."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch

from benchmarks import step_inputs
from benchmarks.measure import relative_frobenius
from discovla.engine.strategy import cast_frozen
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.nn import precision
from discovla.nn.block import Block, Linear
from discovla.nn.precision import quantise_frozen, widen_residual
from discovla.ops import fp8_linear
from discovla.testing import noise_batch, relative_error, tiny_architecture
from discovla.towers.architecture import TowerShape

CPU = torch.device("cpu")
SHAPE = TowerShape(width=64, layers=6, heads=2, mlp_width=128)
BATCH = noise_batch(dataclasses.replace(tiny_architecture(), vision=SHAPE, text=SHAPE))


def made(dtype: torch.dtype = torch.float32, impl: str = "auto") -> DiscoVLA:
    """DiscoVLA of six layers with noise for weights, computing in `dtype`; frozen ones are held in it."""
    torch.manual_seed(1)
    architecture = dataclasses.replace(tiny_architecture(), vision=SHAPE, text=SHAPE)
    config = DiscoVLAConfig(lora_rank=4, fused_vision_blocks=2, fused_text_blocks=1)
    method = DiscoVLA(architecture, config)
    with torch.no_grad():
        for name, p in method.named_parameters():
            p.normal_(std=0.12).add_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        method.logit_scale.log.fill_(2.0)
    method.freeze()
    method.vision.impl = method.text.impl = impl
    return computing(method, dtype)


def computing(method: DiscoVLA, dtype: torch.dtype) -> DiscoVLA:
    method.compute_dtype = dtype
    cast_frozen(method, dtype)
    return method


def gradients(method: DiscoVLA) -> torch.Tensor:
    step_inputs.step(method, BATCH)
    found = [p.grad for p in method.parameters() if p.requires_grad]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in found)
    return torch.cat([grad.flatten() for grad in found]).double()


def exact(method: DiscoVLA) -> tuple[torch.Tensor, torch.Tensor]:
    """Frame features and gradients in float64 of the numbers that the method holds."""
    truth = copy.deepcopy(method).double()
    truth.compute_dtype = torch.float64
    step_inputs.step(truth, BATCH)
    found = torch.cat([p.grad.flatten() for p in truth.parameters() if p.requires_grad])
    return truth.encode_frames(BATCH.frames, BATCH.frame_mask).detach(), found


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_float32_residual_stream_changes_nothing_in_float32(impl):
    plain, wide = made(impl=impl), made(impl=impl)
    widen_residual(wide, torch.float32)
    assert relative_error(gradients(wide), gradients(plain)) <= 1e-6


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_float32_residual_stream_is_more_accurate_with_blocks_in_bfloat16(impl):
    seen: dict[str, set] = {"block": set(), "linear": set()}
    plain, wide = made(torch.bfloat16, impl), made(torch.bfloat16, impl)
    for side in (wide.vision, wide.text):
        widen_residual(side, torch.bfloat16)
    truth, true_gradients = exact(plain)
    for module in wide.modules():
        if isinstance(module, Block):
            module.register_forward_hook(
                lambda _, x, y: seen["block"].add((y[0] if isinstance(y, tuple) else y).dtype)
            )
        elif isinstance(module, Linear):
            module.register_forward_pre_hook(lambda _, x: seen["linear"].add(x[0].dtype))
    frames = [m.encode_frames(BATCH.frames, BATCH.frame_mask) for m in (wide, plain)]
    errors = [relative_error(x, truth) for x in frames]  # products in bfloat16 leave most of it
    assert errors[0] < 0.9 * errors[1] < 0.05
    assert seen == {"block": {torch.float32}, "linear": {torch.bfloat16}}
    # of all gradients, for which is worst is chance; products in bfloat16 leave nearly all of their error
    far = [relative_frobenius(gradients(m), true_gradients) for m in (wide, plain)]
    assert far[0] < 1.05 * far[1] < 0.06


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_frozen_weights_in_fp8_cost_little_accuracy_and_trained_ones_are_unchanged(impl):
    method = made(impl=impl)
    truth, true_gradients = exact(method)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    names = list(method.state_dict())
    assert quantise_frozen(method, CPU) == 2 * 6 * 4
    computing(method, torch.bfloat16)
    for name, p in method.named_parameters():
        layer = method.get_submodule(name.rpartition(".")[0]) if "." in name else None
        rounded = isinstance(layer, Linear) and not p.requires_grad and name.endswith("weight")
        if p.requires_grad:
            assert torch.equal(p, before[name]), name
        elif rounded:
            assert layer.fp8 is not None and not torch.equal(p.float(), before[name]), name
            error = (p.float() - before[name]).abs()
            assert (error <= 2**-4 * before[name].abs() + layer.fp8_scale[:, None] * 2**-10).all(), name
    assert list(method.state_dict()) == names, "what is saved has the same names"
    frames = method.encode_frames(BATCH.frames, BATCH.frame_mask)
    assert 0.005 < relative_error(frames, truth) < 0.1
    assert relative_error(gradients(method), true_gradients) < 0.3


def test_gradients_in_fp8_need_as_many_products_and_cost_little_accuracy(monkeypatch):
    """One product a layer and direction; queries, keys and values of the first blocks need no gradient."""
    products, errors = Counter(), {}
    monkeypatch.setattr(fp8_linear, "_reference", counting(fp8_linear._reference, products))
    method = made()
    _, true_gradients = exact(method)
    for backward in (False, True):
        rounded = copy.deepcopy(method)
        layers = quantise_frozen(rounded, CPU, backward=backward)
        computing(rounded, torch.bfloat16)
        products.clear()
        errors[backward] = relative_frobenius(gradients(rounded), true_gradients)
        outs = products[True]
        assert layers <= outs, "some are passed twice: queries apart from keys and values"
        assert products[False] == (outs - 2 if backward else 0)
    assert errors[True] < 1.3 * errors[False] < 0.3


def counting(product, counts):
    """The product, counted by whether it has a bias, which those of backward have not."""

    def counted(rows, bits, columns, bias, dtype):
        counts[bias is not None] += 1
        return product(rows, bits, columns, bias, dtype)

    return counted


def test_every_implementation_of_blocks_gives_the_same_in_fp8():
    found = []
    for impl in ("auto", "reference"):
        method = made(impl=impl)
        quantise_frozen(method, CPU)
        found.append(method.encode_frames(BATCH.frames, BATCH.frame_mask))
    assert relative_error(found[0], found[1]) <= 0.02, "rows that round differently make it more than 1e-6"


def test_an_fp8_weight_moves_with_its_layer():
    layer = Linear(32, 16).requires_grad_(False)
    quantise_frozen(torch.nn.ModuleList([layer]), CPU, backward=True)
    moved = layer.to("meta").fp8
    assert all(x.is_meta for x in (moved.bits, moved.scale, moved.plain, moved.transposed))


def test_a_model_or_device_without_fp8_is_refused_in_one_line(monkeypatch):
    trained = torch.nn.ModuleList([Linear(16, 16)])
    with pytest.raises(ValueError, match=r"^fp8: expected frozen linear layers, found none \(.*\)$"):
        quantise_frozen(trained, CPU)
    monkeypatch.setattr(
        precision, "fp8_unsupported", lambda device, sizes: "expected a GPU of Hopper, found none"
    )
    with pytest.raises(ValueError, match=r"^fp8: 0: expected a GPU of Hopper, found none$"):
        quantise_frozen(trained.requires_grad_(False), CPU)
    assert trained[0].fp8 is None
