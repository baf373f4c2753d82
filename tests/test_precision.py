"""The precision of a config, the errors of `set_precision`, and resuming a run in FP8."""

import pytest
import torch

from discovla.config import packaged_configs, read_config
from discovla.engine.config import EngineConfig, resolve_precision, set_tf32
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


def test_auto_is_bf16_on_a_gpu_that_has_it_and_fp32_elsewhere(monkeypatch):
    has_bf16 = iter((True, False))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: next(has_bf16))
    for expected in ("bf16", "fp32"):
        assert resolve_precision(EngineConfig(), torch.device("cuda")).precision == expected
        assert resolve_precision(EngineConfig(), CPU).precision == "fp32"
    given = EngineConfig(precision="fp32", tf32=False)
    assert resolve_precision(given, torch.device("cuda")) == given
    method = made(tune="lora")
    set_precision(method, EngineConfig(), CPU)
    assert method.compute_dtype == torch.float32


@pytest.fixture
def tf32_kept():
    """Restore what a test sets for the whole process."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_tf32_is_set_for_gpus_only(tf32_kept):
    before = torch.backends.cuda.matmul.allow_tf32
    set_tf32(EngineConfig(tf32=not before), CPU)
    assert torch.backends.cuda.matmul.allow_tf32 == before
    for wanted in (True, False):
        set_tf32(EngineConfig(tf32=wanted), torch.device("cuda"))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == wanted


def test_each_recipe_names_the_words_that_compute_as_released():
    recipes = {name: path for name, path in packaged_configs().items() if "_m" in name or "clip" in name}
    assert len(recipes) >= 11
    for path in recipes.values():
        header = path.read_text().partition("\n\n")[0]
        assert "engine.precision=fp32 engine.tf32=false" in header, path
        engine = read_config(path, ["engine.precision=fp32", "engine.tf32=false"]).engine
        assert (engine.precision, engine.tf32) == ("fp32", False)
        assert read_config(path).engine.precision == "auto", path


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
