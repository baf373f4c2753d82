"""Blocks as chains of ops against blocks in plain torch: the same losses and gradients."""

from dataclasses import replace

import pytest
import torch

from discovla.batch import Batch
from discovla.engine.config import EngineConfig
from discovla.methods import METHODS
from discovla.methods.base import Method
from discovla.nn.block import Block, BlockShape
from discovla.nn.fusion import FusionAttention
from discovla.nn.layout import SequenceLayout
from discovla.ops.dispatch import Impl, KernelUnavailable
from discovla.testing import noise_batch, relative_error, tiny_architecture
from discovla.towers.weights import initialise
from discovla.train_step import set_kernels

FUSED = {"fused_vision_blocks": 1, "fused_text_blocks": 1}
CASES = {
    "published": ("discovla", {**FUSED, "lora_rank": 3}, "quick_gelu"),
    "every block fused, positions, masks": (
        "discovla",
        {
            "fused_vision_blocks": 2,
            "fused_text_blocks": 2,
            "frame_position": True,
            "mask_padded_frames": True,
        },
        "gelu",
    ),
    "fine-tuned in full": ("discovla", {**FUSED, "tune": "full"}, "quick_gelu"),
    "frozen": ("discovla", {**FUSED, "tune": "frozen"}, "gelu"),
    "words": ("clip", {"similarity": "tokens", "tune": "lora"}, "quick_gelu"),
    "branch": ("t2vparser", {"stan_layers": 1, "decomposition_layers": 1}, "quick_gelu"),
}


def made(case: str, dtype: torch.dtype) -> tuple[Method, Batch]:
    """A small model in which everything that trains has a gradient, and a batch with padded frames."""
    name, options, activation = CASES[case]
    architecture = tiny_architecture(activation)
    method = METHODS[name](architecture, METHODS[name].Config(**options)).eval()
    initialise(method, architecture, seed=0)
    method.initialise_from_clip()
    method.freeze()
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.05 * torch.randn_like(p))
    method.compute_dtype = dtype
    real = torch.tensor([[True, True], [True, False], [True, True]])
    return method.to(dtype), replace(noise_batch(architecture, size=3, frames=2), frame_mask=real)


def results(method: Method, batch: Batch, impl: Impl) -> dict[str, torch.Tensor]:
    """The loss and the gradient of all that trains."""
    method.vision.impl = method.text.impl = impl
    method.zero_grad()
    loss = method.losses(*method.encode(batch)).total
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in method.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("case", CASES)
def test_ops_give_the_losses_and_gradients_of_plain_torch(case):
    method, batch = made(case, torch.float64)
    want, got = (results(method, batch, impl) for impl in ("torch", "reference"))
    assert got.keys() == want.keys() and len(want) > 4
    for name, value in want.items():
        assert relative_error(got[name], value) <= 1e-9 or value.abs().max() < 1e-12, name


@pytest.mark.parametrize("case", ["every block fused, positions, masks"])
def test_kernels_give_the_losses_and_gradients_of_plain_torch(case):
    method, batch = made(case, torch.float64)
    want, got = (results(method, batch[:2], impl) for impl in ("torch", "triton"))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert relative_error(got[name], value) <= 1e-9, name


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_frames_of_another_size_are_refused(impl):
    method, batch = made("published", torch.float32)
    method.vision.impl = impl
    with pytest.raises(ValueError, match=r"^frames: expected .*3"):
        method.encode_videos(replace(batch, frames=batch.frames[:, :, :8]))


@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
@pytest.mark.parametrize("readout_only", [False, True], ids=["all rows", "readout rows"])
def test_every_implementation_takes_a_key_mask_for_each_head(fused, readout_only):
    shape = BlockShape(width=8, heads=2, mlp_width=16)
    block = Block(shape, FusionAttention(shape, 2) if fused else None).double()
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    mask = torch.rand(4, 2, 3) < 0.5
    mask[..., 0] = True
    layout = SequenceLayout(
        key_mask=mask, group=2, readout=torch.zeros(4, dtype=torch.long), readout_only=readout_only
    )
    want, got = (block(x, replace(layout, impl=impl)) for impl in ("torch", "reference"))
    torch.testing.assert_close(got, want)


def test_an_impl_that_cannot_run_is_refused(monkeypatch):
    method, batch = made("published", torch.float32)
    method.vision.impl = "triton"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelUnavailable, match="block: impl='triton': it needs a CUDA device, or TRITON_"):
        method.encode_videos(batch)


def test_the_engine_config_sets_implementation_and_memory_of_both_towers(monkeypatch):
    method, _ = made("published", torch.float32)
    cpu = torch.device("cpu")
    set_kernels(method, EngineConfig(impl="triton", memory="recompute_mlp", distinct_captions=True), cpu)
    assert method.text.distinct
    for tower in (method.vision, method.text):
        assert (tower.impl, tower.memory) == ("triton", "recompute_mlp")
    method.compute_dtype = torch.bfloat16
    with pytest.raises(ValueError, match=r"^engine\.impl: block: .* interpreter computes bfloat16 wrongly"):
        set_kernels(method, EngineConfig(impl="triton"), cpu)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^engine\.impl: block: impl='triton': it needs a CUDA device"):
        set_kernels(method, EngineConfig(impl="triton"), cpu)
