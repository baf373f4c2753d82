import json

import pytest
import torch
from safetensors.torch import load_file

from discovla.nn.decomposition import Decomposition, DecompositionLayer, FeedForward, MemoryAttention
from discovla.testing import relative_error

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float64, id="fp64")]
NAMES = (  # ours -> the released code's
    ("tokens", "query_tokens"),
    ("itself", "self_attn_layers"),
    ("memory", "cross_attn_layers"),
    ("ffn", "ffn_layers"),
    ("up.", "net.0."),
    ("down.", "net.3."),
    ("qkv.", "in_proj_"),
    ("out.", "out_proj."),
)


def released(name: str) -> str:
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    parts = name.split(".")
    if parts[0] not in ("text", "video"):
        return name
    stack = {"text": "textBlock", "video": "visionBlock"}[parts[0]]
    _, _, layer, kind, *rest = parts
    return ".".join([stack, kind, layer, *rest])


def load(module, tensors, dtype):
    weights = {n.removeprefix("w."): t for n, t in tensors.items() if n.startswith("w.")}
    module.to(dtype).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights.pop(released(name)).view_as(parameter))
    assert not weights
    return module


def read(golden, name):
    folder = golden / "t2vparser"
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())[
        "config"
    ]


def limit(dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-8


def direction(x):
    return torch.arange(x.numel(), dtype=x.dtype).view_as(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_views_states_and_gradients(golden, dtype):
    tensors, c = read(golden, "decomposition")
    model = load(Decomposition(c["D"], c["Q"], c["depth"], c["heads"]), tensors, dtype)
    states = {}
    for side, name in (("video", "visionBlock"), ("text", "textBlock")):
        for i, layer in enumerate(getattr(model, side).layers):
            layer.register_forward_hook(lambda m, x, y, key=f"state.{name}.{i}": states.update({key: y}))
    frames, words = (tensors[n].to(dtype, copy=True).requires_grad_() for n in ("vision", "text"))
    video, text = model.views_of_video(frames), model.views_of_text(words)
    ((video * direction(video).cos()).sum() + (text * direction(text).sin()).sum()).backward()
    found = {"multiview_v": video, "multiview_t": text, "grad.vision": frames.grad, "grad.text": words.grad}
    found |= {"grad.query_tokens": model.tokens.grad[None]} | states
    assert len(states) == 2 * c["depth"]
    for name, got in found.items():
        assert relative_error(got, tensors[name]) <= limit(dtype), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_frame_ffn(golden, dtype):
    tensors, c = read(golden, "video_mlp")
    model = load(FeedForward(c["D"]), tensors, dtype)
    x = tensors["x"].to(dtype, copy=True).requires_grad_()
    y = model(x)
    (y * direction(y).cos()).sum().backward()
    for got, want in ((y, tensors["y"]), (x.grad, tensors["grad.x"])):
        assert relative_error(got, want) <= limit(dtype)


def test_a_layer_of_full_size_has_as_many_parameters_as_released():
    with torch.device("meta"):
        assert sum(p.numel() for p in DecompositionLayer(512).parameters()) == 4_200_960


def test_initial_values_have_the_released_bounds():
    width = 64
    attention = MemoryAttention(width, 4, dropout=0.1)
    bounds = {
        "qkv.weight": (6 / (4 * width)) ** 0.5,
        "qkv.bias": 0.0,
        "out.weight": width**-0.5,
        "out.bias": 0.0,
    }
    for name, parameter in attention.named_parameters():
        largest = parameter.abs().max().item()
        assert bounds[name] * 0.95 <= largest <= bounds[name] * (1 + 1e-6), name
    for name, parameter in FeedForward(width).named_parameters():
        bound = (4 * width if name.startswith("down") else width) ** -0.5
        assert 0.9 * bound <= parameter.abs().max().item() <= bound * (1 + 1e-6), name
    assert Decomposition(256, 64, 1).tokens.std().item() == pytest.approx(0.1, rel=0.05)


def test_masked_memory_changes_no_view():
    model = Decomposition(16, 3, 2).eval()
    memory, mask = torch.randn(2, 5, 16), torch.tensor([[True] * 5, [True, True, False, False, False]])
    views = model.views_of_text(memory, mask)
    other = torch.where(mask[..., None], memory, torch.randn_like(memory))
    torch.testing.assert_close(model.views_of_text(other, mask), views)
    torch.testing.assert_close(model.views_of_text(memory[1:, :2]), views[1:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("part", "drops"), [("itself", False), ("memory", True), ("ffn", True)])
def test_training_drops_attention_weights_over_the_memory_and_in_the_ffn_only(part, drops):
    module = getattr(DecompositionLayer(16), part).train()
    x = torch.randn(2, 5, 16)
    inputs = (x,) if part == "ffn" else (x, x)
    assert torch.equal(module(*inputs), module(*inputs)) != drops


def test_dropped_attention_keeps_its_mean():
    module = MemoryAttention(16, 4, dropout=0.1)
    x, memory = torch.randn(1, 2, 16), torch.randn(1, 6, 16)
    want = module.eval()(x, memory)
    got = module.train()(x.expand(20000, -1, -1), memory.expand(20000, -1, -1)).mean(0)
    torch.testing.assert_close(got, want[0], atol=0.01, rtol=0)


def test_a_width_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="divisible by 4 heads, got 18"):
        Decomposition(18, 2, 1)
