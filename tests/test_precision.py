"""The precision of a config, the errors of `set_precision`, and resuming a run in FP8."""

import pytest
import torch

from discovla.engine.config import EngineConfig
from discovla.methods.clip4clip import CLIP4Clip, CLIP4ClipConfig
from discovla.nn.block import Block, Linear
from discovla.testing import tiny_architecture
from discovla.train_step import set_precision
from tests import runs

CPU = torch.device("cpu")


def made(**options) -> CLIP4Clip:
    method = CLIP4Clip(tiny_architecture(), CLIP4ClipConfig(head="meanP", **options))
    method.freeze()
    return method


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8", "fp8_backward"])
@pytest.mark.parametrize("residual", ["bf16", "fp32"])
def test_towers_compute_in_the_precision_of_the_config(precision, residual):
    method = made(tune="lora")
    set_precision(method, EngineConfig(precision=precision, residual_dtype=residual), CPU)
    short = precision != "fp32"
    assert method.compute_dtype == (torch.bfloat16 if short else torch.float32)
    for p in method.parameters():  # the logit scale, a single number, stays fp32
        assert p.dtype == (torch.bfloat16 if short and not p.requires_grad and p.dim() else torch.float32)
    layers = [x for x in method.modules() if isinstance(x, Linear)]
    assert {layer.fp8 is not None for layer in layers} == {precision.startswith("fp8")}
    assert {layer.fp8_transposed is not None for layer in layers} == {precision == "fp8_backward"}
    wide = {x.ln_2.compute_dtype for x in method.modules() if isinstance(x, Block)}
    assert wide == {torch.bfloat16 if short and residual == "fp32" else None}


def test_a_method_or_device_without_fp8_is_one_line_with_the_key(monkeypatch):
    config = EngineConfig(precision="fp8")
    with pytest.raises(ValueError, match=r"^engine\.precision: fp8: expected frozen linear layers, found no"):
        set_precision(made(tune="full"), config, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"^engine\.precision: fp8: vision.*Hopper.*NVIDIA A100 with 8\.0$"):
        set_precision(made(tune="lora"), config, torch.device("cuda"))
    for precision in ("fp8", "fp8_backward"):
        with pytest.raises(
            ValueError, match=f"expected 'fp32' or 'bf16' at zero_stage 3, found '{precision}'"
        ):
            EngineConfig.model_validate({"precision": precision, "zero_stage": 3})


@pytest.mark.slow
def test_a_run_in_fp8_resumes_bit_for_bit(tmp_path, drawn):
    words = ["engine.precision=fp8", "engine.residual_dtype=fp32", "steps=4"]
    folders = [tmp_path / name for name in ("whole", "parts", "bf16")]
    for folder in folders:
        folder.mkdir()
    whole, parts, other = (runs.write_config(folder, drawn) for folder in folders)
    runs.train([whole, *words])
    runs.train([parts, *words, "stop_at=2"])
    runs.train([parts, *words, "resume=true"])
    runs.train([other, "engine.precision=bf16", "steps=4"])
    found, resumed, bf16 = (runs.losses(folder / "run") for folder in folders)
    assert found.isfinite().all() and torch.equal(found, resumed)
    assert not torch.equal(found, bf16)
    # before the first update: from random weights the curves diverge
    torch.testing.assert_close(found[:1], bf16[:1], rtol=0.05, atol=0)
