"""Our step has the losses and gradients of the published one, with less work."""

import dataclasses

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from benchmarks import step_inputs
from benchmarks.measure import SEVERAL, Launches, bytes_kept, flops
from benchmarks.step_baselines import ReferenceStep
from benchmarks.step_inputs import size_of, step
from benchmarks.step_work import kept_bytes, needed_flops, reference_flops
from discovla.batch import Batch
from discovla.data.tokens import Tokenizer
from discovla.engine.config import EngineConfig
from discovla.engine.distributed import World
from discovla.engine.optim import OptimConfig
from discovla.engine.strategies import make_strategy
from discovla.engine.strategy import StepPlan, cast_frozen
from discovla.engine.transfers import BatchCopier, LateNumbers
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.nn.memory import WIDTHS
from discovla.testing import noise_batch, random_captions, relative_error, tiny_architecture
from discovla.towers.architecture import Architecture
from discovla.train_step import TrainStep
from tests.ops.kernels import DEVICE

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float64, id="fp64")]
CAPTIONS = [
    "a man is playing a guitar",
    "dogs run",
    "A woman in a red dress walks along the beach, and her two children follow her slowly at sunset",
    "someone slices an onion",
    "a band performs",
    "a cartoon character jumps over several barrels",
]


def small(activation="quick_gelu", layers=3) -> Architecture:
    """The tiny CLIP with a plain block below two fused ones."""
    tiny = tiny_architecture(activation)
    vision = dataclasses.replace(tiny.vision, layers=layers)
    return dataclasses.replace(tiny, vision=vision, text=dataclasses.replace(tiny.text, layers=layers))


def make(architecture: Architecture, dtype=torch.float32, fused=(2, 1), rank=4) -> DiscoVLA:
    """Make a DiscoVLA of noise in which every trained parameter has a gradient."""
    config = DiscoVLAConfig(lora_rank=rank, fused_vision_blocks=fused[0], fused_text_blocks=fused[1])
    method = DiscoVLA(architecture, config)
    with torch.no_grad():
        for name, p in method.named_parameters():
            p.normal_(std=0.15).add_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        method.logit_scale.log.fill_(3.0)
    method.freeze()
    method.compute_dtype = dtype
    return method.to(dtype)


def check(method: DiscoVLA, batch: Batch, limit: float) -> None:
    """Compare losses, terms and the gradient of every trained parameter with the reference."""
    reference = ReferenceStep(method)
    want, got = reference(batch), step_inputs.step(method, batch)
    for name, value in {"total": got.total, **got.terms}.items():
        assert relative_error(value, want[name]) <= limit, name
    gradients = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    assert gradients.keys() == reference.trained.keys()
    for name, grad in gradients.items():
        assert grad is not None and reference.trained[name].grad.abs().max() > 0, name
        assert relative_error(grad, reference.trained[name].grad) <= limit, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_losses_and_gradients_equal_the_reference_on_ragged_captions(dtype, activation):
    architecture = small(activation)
    check(make(architecture, dtype), noise_batch(architecture), LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients_equal_the_reference_on_real_captions(dtype):
    tokenizer = Tokenizer(context_length=32)
    architecture = dataclasses.replace(small(), context_length=32, vocab_size=49408)
    ids, mask = tokenizer.encode(CAPTIONS[:2])
    frame_ids, frame_mask = tokenizer.encode(CAPTIONS)
    batch = dataclasses.replace(
        noise_batch(architecture, size=2, frames=3),
        text_ids=ids,
        text_mask=mask,
        frame_text_ids=frame_ids.unflatten(0, (2, 3)),
        frame_text_mask=frame_mask.unflatten(0, (2, 3)),
    )
    assert len(set(frame_mask.sum(1).tolist())) > 3, "the captions are ragged"
    check(make(architecture, dtype), batch, LIMITS[dtype])


@pytest.mark.parametrize("seed", range(8))
def test_losses_and_gradients_equal_the_reference_at_drawn_lengths_frames_and_masks(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    architecture = small(layers=draw(1, 3))
    depth = architecture.vision.layers
    pairs, frames = draw(2, 4), draw(1, 5)
    batch = noise_batch(architecture, size=pairs, frames=frames, seed=seed)
    real = torch.arange(frames) < torch.randint(1, frames + 1, (pairs, 1), generator=generator)
    ids, mask = random_captions(architecture, pairs * frames, generator)
    if draw(0, 1):  # the same caption for all frames, and no padding anywhere
        ids[:], mask[:] = ids[mask.sum(1).argmax()], mask[mask.sum(1).argmax()]
    batch = dataclasses.replace(
        batch,
        frame_mask=real,
        frame_text_ids=ids.unflatten(0, (pairs, frames)),
        frame_text_mask=mask.unflatten(0, (pairs, frames)),
    )
    method = make(architecture, torch.float64, fused=(draw(1, depth), draw(1, depth)))
    check(method, batch, LIMITS[torch.float64])


def test_anomaly_detection_and_fused_attention_do_not_change_the_reference():
    architecture = small()
    method, batch = make(architecture, torch.float64), noise_batch(architecture)
    plain, other = ReferenceStep(method), ReferenceStep(method, sdpa=True, anomaly=True)
    assert relative_error(other(batch)["total"], plain(batch)["total"]) <= 1e-12
    for name, p in plain.trained.items():
        assert relative_error(other.trained[name].grad, p.grad) <= 1e-10, name


def test_a_method_with_other_options_is_refused():
    method = DiscoVLA(
        tiny_architecture(), DiscoVLAConfig(fused_vision_blocks=1, fused_text_blocks=1, kl_norm="fixed")
    )
    with pytest.raises(ValueError, match="method: expected the published DiscoVLA, found one with other"):
        ReferenceStep(method)


@pytest.fixture
def meta_device(monkeypatch) -> torch.device:
    """Return the meta device, with the original torch.empty, which meta tensors need."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, getattr(torch._C._VariableFunctions, name))
    _device_constructors.cache_clear()
    return torch.device("meta")


def published(name: str, meta: torch.device, pairs: int = 2) -> tuple[DiscoVLA, Batch]:
    """Make the published model on meta tensors, with captions of 12 tokens padded to 32."""
    architecture = step_inputs.architecture(name)
    with meta:
        method = DiscoVLA(architecture, DiscoVLAConfig())
    method.freeze()
    mask = torch.arange(32) < 12
    batch = dataclasses.replace(
        step_inputs.noise(architecture, 1),
        text_mask=mask.expand(pairs, 32),
        frame_text_mask=mask.expand(pairs, 12, 32),
        text_ids=torch.empty(pairs, 32, dtype=torch.long, device="meta"),
        frame_text_ids=torch.empty(pairs, 12, 32, dtype=torch.long, device="meta"),
        frames=torch.empty(pairs, 12, 224, 224, 3, dtype=torch.uint8, device="meta"),
        frame_mask=torch.ones(pairs, 12, dtype=torch.bool),
    )
    return method, batch


@pytest.mark.parametrize(
    ("name", "share"),
    [
        pytest.param("ViT-B/32", 0.81, id="B/32"),
        pytest.param("ViT-B/16", 0.92, id="B/16", marks=pytest.mark.slow),
        pytest.param("ViT-L/14", 0.97, id="L/14", marks=pytest.mark.slow),
    ],
)
def test_counted_work_equals_its_closed_form_and_is_a_share_of_the_published(name, share, meta_device):
    method, batch = published(name, meta_device)
    architecture, size = method.architecture, size_of(batch)
    needed, whole = (form(architecture, method.config, size) for form in (needed_flops, reference_flops))
    assert flops(lambda: step(method, batch.to("meta"))) == pytest.approx(needed, rel=0.005)
    assert flops(lambda: ReferenceStep(method)(batch.to("meta"))) == pytest.approx(whole, rel=0.005)
    assert needed / whole <= share


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_counted_work_equals_its_closed_form_at_small_sizes(layers):
    architecture = small(layers=layers)
    method = make(architecture, fused=(min(2, layers), 1))
    batch = noise_batch(architecture, size=3, frames=2)
    size = size_of(batch)
    reference = ReferenceStep(method)
    whole = reference_flops(architecture, method.config, size)
    assert flops(lambda: reference(batch)) == pytest.approx(whole, rel=0.005)
    needed = needed_flops(architecture, method.config, size)
    empty = method.to("meta")
    assert flops(lambda: step(empty, batch.to("meta"))) == pytest.approx(needed, rel=0.005)


def loss(method: DiscoVLA, batch: Batch) -> torch.Tensor:
    """Compute the loss without backward."""
    return method.losses(*method.encode(batch)).total


@pytest.mark.parametrize("memory", [mode for mode in WIDTHS if mode != "keep"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_every_memory_mode_keeps_its_number_of_widths_a_token_and_layer(impl, memory, meta_device):
    """With 128 clips; the kernels also keep [W | B], 126 MB in float32."""
    method, batch = published("ViT-B/32", meta_device, pairs=128)
    for tower in (method.vision, method.text):
        tower.impl, tower.memory = impl, memory
    kept = bytes_kept(lambda: loss(method, batch.to("meta")), list(method.parameters()))
    size, element = size_of(batch), torch.float32.itemsize
    assert kept == pytest.approx(
        kept_bytes(method.architecture, method.config, size, element, memory), rel=0.05
    )


@pytest.mark.parametrize(
    ("memory", "more"),
    [("recompute_mlp", 0.17), ("recompute_projections", 0.31), ("recompute_blocks", 0.34)],
)
def test_a_memory_mode_recomputes_only_what_it_must(memory, more, meta_device):
    """8, 14 and 16 of the 48 squared widths of a token and block; one product of the MLP is spared."""
    method, batch = published("ViT-B/32", meta_device)
    needed = needed_flops(method.architecture, method.config, size_of(batch))
    method.vision.memory = method.text.memory = memory
    assert flops(lambda: step(method, batch.to("meta"))) <= (1 + more) * needed


@pytest.mark.parametrize(("dtype", "less"), [(torch.float32, 2), (torch.bfloat16, 4)], ids=["fp32", "bf16"])
def test_nine_widths_a_token_and_layer_are_kept_for_backward(dtype, less, meta_device):
    method, batch = published("ViT-B/32", meta_device)
    meta = batch.to("meta")
    reference = ReferenceStep(method)
    whole = bytes_kept(lambda: reference.losses(meta), list(reference.weights.values()))
    method.compute_dtype = dtype
    cast_frozen(method, dtype)
    kept = bytes_kept(lambda: loss(method, meta), list(method.parameters()))
    limit = kept_bytes(method.architecture, method.config, size_of(batch), dtype.itemsize)
    assert kept <= 1.05 * limit
    assert whole >= less * kept


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 450), (torch.bfloat16, 457)], ids=str)
def test_the_number_of_launches_with_the_kernels_does_not_grow(dtype, most, meta_device):
    """The target is 450: 24 layers with 7 forward and 11 backward, and 18 others."""
    architecture = small(layers=12)
    method, batch = make(architecture, fused=(4, 2), rank=8).to("meta"), noise_batch(architecture).to("meta")
    method.vision.impl = method.text.impl = "triton"
    method.compute_dtype = dtype
    cast_frozen(method, dtype)
    with Launches("meta") as ours:
        step_inputs.step(method, batch)
    assert ours.count <= most, dict(ours.ops)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_step_with_its_copies_and_its_update_starts_at_most_500_kernels(dtype, meta_device):
    """Batch to the device, forward, backward, clipping and update of 72 tensors, numbers for the log."""
    architecture = small(layers=12)
    method = make(architecture, fused=(4, 2), rank=8).to("meta")
    method.vision.impl = method.text.impl = "triton"
    method.compute_dtype = dtype
    cast_frozen(method, dtype)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("meta"))
    batch = dataclasses.replace(noise_batch(architecture), valid=None)
    plan = StepPlan(engine=EngineConfig(), optim=OptimConfig(), world=world, batch_size=len(batch))
    strategy = make_strategy(TrainStep(method, world, "exact"), plan)
    assert len(strategy.trained) == 72
    with Launches("meta") as whole:
        losses, norm = strategy.take(BatchCopier(world.device)(batch), 1e-3)
        LateNumbers({"loss": losses.total, **losses.terms, "grad_norm": norm})
    with Launches("meta") as update:
        strategy.step(1e-3)
    assert whole.count + 1 <= 500, dict(whole.ops)  # the numbers are copied to the host
    assert update.count <= 30, dict(update.ops)


class Started(TorchDispatchMode):
    """Return how many kernels each of our ops starts, those of Triton and of torch."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.started: dict[str, set[int]] = {}
        self.kernels, run = 0, GridExecutor.__call__

        def counted(grid, *args, **kwargs):
            self.kernels += 1
            with _disable_current_modes():  # the interpreter copies what it is given
                return run(grid, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "discovla":
            return func(*args, **(kwargs or {}))
        before = self.kernels
        with Launches() as inside:
            out = OPDEFS[func.name().removesuffix(".default")]._init_fn(*args, **(kwargs or {}))
        started = self.kernels - before + inside.count
        self.started.setdefault(func.overloadpacket.__name__, set()).add(started)
        return out


@pytest.mark.usefixtures("meta_device")  # for what is allocated is not filled then
def test_the_count_of_an_op_is_the_number_of_kernels_it_starts(monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("counts what triton's interpreter is asked for, which runs where there is no GPU")
    monkeypatch.setattr("discovla_kernels.temporal_fusion.PROGRAMS", 1)  # 128 clips need no splitting
    architecture = small(layers=2)
    method = make(architecture, fused=(2, 1), rank=8)
    method.vision.impl = method.text.impl = "triton"
    with Started(monkeypatch) as mode:
        step_inputs.step(method, noise_batch(architecture, size=2, frames=2))
    assert mode.started == {name: {SEVERAL.get(name, 1)} for name in mode.started}
    assert mode.started.keys() >= {
        "lora_norm",
        "short_attention",
        "temporal_fusion_backward",
        *SEVERAL,
    }


def test_the_number_of_launches_in_plain_torch_does_not_grow():
    """Plain torch starts one kernel for each op."""
    architecture = small(layers=12)
    method, batch = make(architecture, fused=(4, 2)), noise_batch(architecture)
    with Launches() as ours:
        step_inputs.step(method, batch)
    reference = ReferenceStep(method, sdpa=True)
    with Launches() as published:
        reference(batch)
    assert ours.count <= 1900 < published.count
