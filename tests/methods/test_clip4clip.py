import dataclasses
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from discovla.methods import clip4clip
from discovla.methods.clip4clip import CLIP4Clip, CLIP4ClipConfig
from discovla.methods.released import load_released
from discovla.nn.features import unit
from discovla.ops.column_shard import ColumnShard
from discovla.ops.info_nce import contrastive_loss
from discovla.testing import noise_batch, tiny_architecture
from discovla.towers.architecture import TowerShape
from discovla.towers.weights import initialise
from tests.methods import golden_clip2video as golden_file
from tests.methods.golden_clip2video import FEATURES, LOSSES, PER_SCALE, TIGHT_LOGITS, Golden

HEADS = ["meanP", "seqLSTM", "seqTransf", "tightTransf"]
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float64, id="fp64")]


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def heads(golden: Path) -> Golden:
    return golden_file.read(golden, "clip4clip_heads")


def tiny(head: str = "meanP", *, layers: int = 2, **options) -> CLIP4Clip:
    """A small model whose joint width is that of its text tower."""
    text = TowerShape(width=16, layers=2, heads=2, mlp_width=64)
    architecture = dataclasses.replace(tiny_architecture(), text=text)
    method = CLIP4Clip(architecture, CLIP4ClipConfig(head=head, head_layers=layers, **options))
    initialise(method, architecture, 0)
    method.initialise_from_clip()
    method.freeze()
    return method


@pytest.mark.parametrize("mode", ["full", "ragged"])
@pytest.mark.parametrize("head", HEADS)
def test_golden_similarity_loss_and_gradients(heads, head, mode, dtype):
    layers = heads.sidecar["case"]["tight_layers" if head == "tightTransf" else "layers"]
    config = CLIP4ClipConfig(head=head, head_layers=layers)
    method = golden_file.load(heads, CLIP4Clip, config, dtype)
    frames = heads.get("in.frames", dtype).requires_grad_()
    caption = heads.get("in.text", dtype).requires_grad_()
    mask = heads.get(f"in.frame_mask_{mode}", dtype)
    text = method.embed_text(caption[:, 0], None, mask)
    video = method.embed_video(frames, mask)
    limit = TIGHT_LOGITS if head == "tightTransf" else PER_SCALE * math.exp(heads.sidecar["logit_scale"])
    heads.check(f"{head}.{mode}.sim", method.similarity(text, video), dtype, limit)
    if head != "tightTransf":
        heads.check(f"{head}.{mode}.video_emb", unit(video.pooled), dtype, FEATURES)
    loss = method.losses(text, video).total
    heads.check(f"{head}.{mode}.loss", loss, dtype, LOSSES)
    loss.backward()
    for name, tensor in {"frames": frames, "text": caption}.items():
        heads.check_gradient(f"{head}.{mode}.grad.in.{name}", tensor.grad, dtype)
    golden_file.check_gradients(heads, f"{head}.{mode}.grad.param.", method, dtype)


def test_golden_symmetric_cross_entropy(golden, dtype):
    file = golden_file.read(golden, "loss")
    logits = file.get("sim", dtype).requires_grad_()
    loss = contrastive_loss(logits)
    loss.backward()
    file.check("loss", loss, dtype, LOSSES)
    file.check_gradient("grad", logits.grad, dtype)


@pytest.mark.parametrize("head", HEADS)
def test_padded_frames_change_nothing(head):
    method = tiny(head).double().eval()
    frames = torch.randn(3, 5, 16, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[2], [5], [1]])
    text = method.embed_text(torch.randn(2, 16, dtype=torch.float64), None, mask)
    other = torch.where(mask[..., None], frames, torch.randn_like(frames))
    first, second = (method.similarity(text, method.embed_video(x, mask)) for x in (frames, other))
    assert torch.equal(first, second)


def test_blocks_of_pairs_score_like_all_pairs_at_once(monkeypatch):
    method = tiny("tightTransf").double()
    frames = torch.randn(3, 4, 16, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    caption = torch.randn(5, 16, dtype=torch.float64)
    found: list[Tensor] = []
    for hidden in (1 << 25, 1500):  # all fifteen pairs, or a few at once
        monkeypatch.setattr(clip4clip, "HIDDEN", hidden)
        method.eval()
        x = caption.clone().requires_grad_()
        scores = method.similarity(method.embed_text(x, None, mask), method.embed_video(frames, mask))
        scores.square().sum().backward()
        assert x.grad is not None
        found += [scores, x.grad]
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("own", [0, 1, 3])
def test_all_processes_score_the_same_number_of_blocks(monkeypatch, own):
    method, calls = tiny("tightTransf"), []
    method.scorer.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(clip4clip, "HIDDEN", 1500)
    text, video = method.encode(noise_batch(method.architecture, size=5))
    columns = ColumnShard(first_text=0, all_reduce=lambda *x: x, all_reduce_max=lambda x: x.clamp(min=4))
    method.video_losses(text, video[:own], None, columns)
    most = len(calls)
    calls.clear()
    method.video_losses(text, video[:4], None, columns)
    assert most == len(calls) > 1


def test_a_tight_head_drops_out_in_training_only():
    method = tiny("tightTransf")
    batch = noise_batch(method.architecture)
    encoded = method.encode(batch)
    assert not torch.equal(*(method.train().similarity(*encoded) for _ in range(2)))
    assert torch.equal(*(method.eval().similarity(*encoded) for _ in range(2)))


@pytest.mark.parametrize("head", ["seqTransf", "tightTransf"])
def test_the_head_starts_from_the_text_tower(head):
    method = tiny(head)
    part = method if head == "seqTransf" else method.scorer
    assert torch.equal(part.positions.weight, method.text.position_embedding)
    for own, text in zip(part.transformer.blocks, method.text.blocks, strict=True):
        assert all(torch.equal(p, text.get_parameter(name)) for name, p in own.named_parameters())


def test_a_text_tower_that_does_not_fit_the_head_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        tiny("seqTransf", layers=2)
        assert not caplog.records
        method = tiny("seqTransf", layers=3)
    assert "starts at random" in caplog.text
    weight = method.transformer.blocks[2].mlp.up.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_the_recipe_freezes_the_embeddings_and_slows_clip():
    method = tiny("seqTransf")
    frozen = {name for name, p in method.named_parameters() if not p.requires_grad}
    assert frozen == {
        "text.position_embedding",
        "text.token_embedding.weight",
        "vision.class_embedding",
        "vision.ln_pre.bias",
        "vision.ln_pre.weight",
        "vision.patch_embedding",
        "vision.position_embedding",
    }
    slow, slow_bias, new_bias = "vision.projection", "text.ln_final.bias", "transformer.blocks.1.mlp.up.bias"
    found = {n: (g.lr_scale, g.weight_decay) for g in method.parameter_groups() for n in g.names}
    assert found[slow] == found["logit_scale.log"] == (1e-3, None)
    assert found[slow_bias] == (1e-3, 0.0)
    assert found[new_bias] == (1.0, 0.0)
    assert "positions.weight" not in found  # neither slow nor without decay


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_checkpoint_loads_by_its_names(tmp_path, head, prefix):
    source, target = tiny(head), tiny(head)
    with torch.no_grad():
        for p in source.parameters():
            p.copy_(torch.randn(p.shape))
    own = dict(source.named_parameters())
    state = {prefix + theirs: own[ours].detach() for ours, theirs in golden_file.names(source).items()}
    if head == "seqLSTM":
        state[f"{prefix}frame_position_embeddings.weight"] = torch.zeros(12, 16)
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "c.safetensors")
    load_released(target, tmp_path / "c.safetensors")
    assert all(torch.equal(p, own[name]) for name, p in target.named_parameters())


def test_a_checkpoint_without_the_prefix_of_clip_loads(tmp_path):
    source, target = tiny(), tiny()
    names = golden_file.names(source)
    torch.save(
        {names[n].removeprefix("clip."): p + 1 for n, p in source.state_dict().items()}, tmp_path / "c.bin"
    )
    load_released(target, tmp_path / "c.bin")
    torch.testing.assert_close(target.vision.projection, source.vision.projection + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("clip.visual.proj"), r"missing clip\.visual\.proj"),
        (lambda s: s.update({"transformerClip.x": torch.ones(1)}), r"unexpected transformerClip\.x"),
        (lambda s: s.update({"clip.visual.proj": torch.ones(2)}), r"vision\.projection: expected \(32, 16\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change, message):
    method = tiny()
    names = golden_file.names(method)
    state = {names[n]: p.detach().clone() for n, p in method.named_parameters()}
    change(state)
    torch.save(state, tmp_path / "c.bin")
    with pytest.raises(ValueError, match=message):
        load_released(method, tmp_path / "c.bin")


def test_a_video_without_a_frame_is_refused():
    method = tiny()
    batch = noise_batch(method.architecture)
    mask = batch.frame_mask.clone()
    mask[2] = False
    with pytest.raises(ValueError, match="video 2: expected at least one entry that is no padding"):
        method.encode_video(batch.frames, mask)


def test_a_caption_without_a_token_is_refused():
    method = tiny()
    batch = noise_batch(method.architecture)
    with pytest.raises(ValueError, match="caption 0: expected at least one entry that is no padding"):
        method.encode_text(batch.text_ids, torch.zeros_like(batch.text_mask))


def test_padding_before_a_frame_is_refused_where_order_matters():
    mask = torch.tensor([[True, True], [False, True]])
    with pytest.raises(ValueError, match="video 1: expected padding at the end only"):
        tiny("seqLSTM").embed_video(torch.randn(2, 2, 16), mask)
