"""Recorded steps give the numbers of unrecorded ones, read only their buffers, and are few."""

import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Launches
from discovla import trainer
from discovla.batch import Batch, Losses
from discovla.config import read_config
from discovla.engine import capture
from discovla.engine.capture import (
    Capture,
    CaptureLimits,
    check_capture,
    make_capture,
    max_over_ranks,
    record_graph,
)
from discovla.engine.config import EngineConfig
from discovla.engine.distributed import World
from discovla.engine.optim import OptimConfig
from discovla.engine.strategies import make_strategy
from discovla.engine.strategy import StepPlan
from discovla.engine.transfers import BatchCopier, LateNumbers
from discovla.ops import dispatch
from discovla.testing import noise_batch, relative_error, tiny_architecture
from discovla.train_step import TrainStep
from discovla.trainer import run
from tests import runs, steps
from tests.engine.recorder import Rerun, Unwatched

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def recorded(step: TrainStep, **options) -> tuple[Capture, Rerun]:
    """Record the step with a recorder that runs it again."""
    trained = [p for p in step.parameters() if p.requires_grad]
    recorder = Rerun(lambda: [*step.parameters(), *step.buffers(), *made.buffers.values()])
    made = step.recorded = Capture(step.losses, trained, recorder, CaptureLimits(**options))
    return made, recorder


def made(variant: str = "discovla", **options) -> tuple[TrainStep, Capture, Rerun]:
    step = TrainStep(steps.make(variant), ALONE, "exact")
    return step, *recorded(step, **options)


def batch(seed: int = 0, size: int = 4) -> Batch:
    return replace(noise_batch(tiny_architecture(), size=size, seed=seed), valid=None)


def unrecorded(step: TrainStep, batch: Batch) -> dict[str, Tensor]:
    kept, step.recorded = step.recorded, None
    results = steps.take(step, batch)
    step.recorded = kept
    return results


def assert_same(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(result[name], value) <= 1e-10 or value.abs().max() < 1e-12, name


QUICK = ("discovla", "t2vparser")
# captions with exchanges differ in number from batch to batch: a run that records refuses them
RECORDED = [name for name, options in steps.VARIANTS.items() if not options.get("swapped_captions")]
EVERY = [v if v in QUICK else pytest.param(v, marks=pytest.mark.slow) for v in RECORDED]


@pytest.mark.parametrize("variant", EVERY)
def test_losses_and_gradients_equal_the_step_and_come_from_the_buffers_only(variant):
    step, _, recorder = made(variant, min_rows=64)
    for seed in (0, 1, 2, 1):  # other captions and frames, of the same number of rows
        assert_same(steps.take(step, batch(seed)), unrecorded(step, batch(seed)))
    assert recorder.recorded == 1 and recorder.replayed == 3


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", EVERY)
def test_a_step_records_without_reading_values_from_the_device(variant, impl, monkeypatch):
    for choices in dispatch.AUTO.values():
        monkeypatch.setitem(choices, "meta", choices["cuda"])
    step = TrainStep(steps.make(variant).float().to("meta"), ALONE, "exact")
    step.method.compute_dtype = torch.float32
    step.method.vision.impl = step.method.text.impl = impl
    recorder = Unwatched()
    trained = [p for p in step.parameters() if p.requires_grad]
    step.recorded = graphs = Capture(step.losses, trained, recorder)
    for _ in range(3):
        step(batch().to("meta")).total.backward()
    assert recorder.replayed == 2
    (one,) = graphs.recordings.values()
    assert all(x.is_meta for x in graphs.buffers.values())
    assert one.batch.text_mask.is_meta and one.batch.frames.is_meta


def test_a_shape_with_its_caption_rows_is_recorded_at_its_second_batch():
    step, graphs, recorder = made(min_rows=8)
    for count, (seed, size) in enumerate([(0, 4), (1, 4), (0, 3), (0, 4), (0, 3)]):
        assert recorder.recorded == max(0, count - 3)
        assert_same(steps.take(step, batch(seed, size)), unrecorded(step, batch(seed, size)))
    assert len(graphs.recordings) == recorder.recorded == 2
    assert len(graphs.buffers) == 14, "seven of each size, whatever the rows"


def test_a_step_gives_bitwise_the_same_numbers_before_it_is_recorded():
    """A resumed run, whose first steps are not recorded, therefore repeats an uninterrupted one."""
    step, _, recorder = made(min_rows=16)
    first, second, third = (steps.take(step, batch()) for _ in range(3))
    assert recorder.replayed == 2
    for name, value in first.items():
        assert torch.equal(second[name], value) and torch.equal(third[name], value), name


def test_recordings_are_dropped_for_an_unrecorded_step_if_memory_is_short(caplog):
    short: list[bool] = [False]
    step, graphs, recorder = made(memory_short=lambda: short[0])
    for _ in range(2):
        step(batch())
    other = batch(size=3)
    step(other)
    assert len(graphs.recordings) == 1
    short[0] = True
    bad = replace(batch(), valid=torch.tensor([True, False, True, True]))
    for given_batch in (bad, bad):
        assert_same(steps.take(step, given_batch), unrecorded(step, given_batch))
        assert not graphs.recordings and not graphs.buffers
    assert caplog.text.count("recordings are dropped") == 1
    assert_same(steps.take(step, batch()), unrecorded(step, batch()))
    assert recorder.recorded == 2 and len(graphs.recordings) == 1


def test_of_many_shapes_the_least_recently_used_is_dropped(caplog):
    step, graphs, recorder = made(max_recordings=2)
    sizes = [2, 2, 3, 3, 2, 4, 4, 2, 3]
    with caplog.at_level(logging.WARNING):
        for size in sizes:
            assert_same(steps.take(step, batch(size=size)), unrecorded(step, batch(size=size)))
            assert len(graphs.recordings) <= 2 and len(graphs.buffers) <= 2 * 7
    assert recorder.recorded == 4, "size 3 was dropped for 4 and replaced it again"
    assert caplog.text.count("batches of more than 2 shapes") == 1


def test_bad_clips_and_evaluation_run_unrecorded(caplog):
    step, _, recorder = made()
    full = batch()
    for _ in range(2):
        step(full)
    bad = replace(full, valid=torch.tensor([True, False, True, True]))
    for _ in range(3):
        assert_same(steps.take(step, bad), unrecorded(step, bad))
    expected = unrecorded(step, full)["loss"]
    with torch.no_grad():
        assert relative_error(step(full).total, expected) <= 1e-12
    assert recorder.recorded == recorder.replayed == 1
    assert caplog.text.count("with unreadable clips") == 1


def test_captions_encoded_between_steps_use_the_rows_of_their_own_tokens():
    step, _, recorder = made(min_rows=1)
    for _ in range(2):
        step(batch())
    assert recorder.recorded == 1
    long = batch(1)
    long.text_mask[:], long.text_ids[:, -1] = True, long.text_ids.max()
    expected = steps.make("discovla").text(long.text_ids, long.text_mask, dtype=torch.float64)
    assert torch.equal(step.method.text(long.text_ids, long.text_mask, dtype=torch.float64), expected)


@pytest.mark.parametrize(
    ("name", "row"),
    [("text_mask", "caption 2"), ("frame_mask", "video 2"), ("frame_text_mask", "frame caption 7")],
)
def test_an_empty_mask_row_is_named_before_a_replay(name, row):
    step = TrainStep(steps.make("discovla").float().to("meta"), ALONE, "exact")
    step.method.compute_dtype = torch.float32
    recorder = Unwatched()
    trained = [p for p in step.parameters() if p.requires_grad]
    step.recorded = Capture(step.losses, trained, recorder)
    for _ in range(2):
        step(batch().to("meta"))
    bad = batch().to("meta")
    getattr(bad, name).flatten(0, -2)[int(row.split()[-1])] = False
    with pytest.raises(ValueError, match=f"^{row}: expected at least one entry that is no padding"):
        step(bad)
    assert recorder.replayed == 1


def test_a_replay_reads_parameters_that_changed_in_place():
    step, _, _ = made()
    for _ in range(2):
        steps.take(step, batch())
    with torch.no_grad():
        for p in step.parameters():
            p.mul_(1.1)
    assert_same(steps.take(step, batch()), unrecorded(step, batch()))


def test_results_outlive_the_next_replay_but_backward_must_precede_it():
    step, _, _ = made()
    step(batch())
    first, kept = step(batch(0)), unrecorded(step, batch(0))
    first.total.backward(retain_graph=True)
    trained = next(p for p in step.parameters() if p.requires_grad)
    assert trained.grad is not None
    gradient = trained.grad.clone()
    second = step(batch(1))
    assert relative_error(first.total, kept["loss"]) <= 1e-10
    assert not torch.equal(first.total, second.total)
    for name, term in first.terms.items():
        assert relative_error(term, kept[name]) <= 1e-10
    assert torch.equal(gradient, trained.grad)
    with pytest.raises(RuntimeError, match=r"engine\.capture: expected the backward of a step before the ne"):
        first.total.backward()


def test_gradients_scale_with_the_loss_and_unreached_parameters_have_none():
    used, unused = (torch.nn.Parameter(torch.tensor([2.0, 3.0])) for _ in range(2))

    def step(batch: Batch, rows: object) -> Losses:
        return Losses(total=(used * batch.frame_mask.sum()).sum(), terms={})

    graphs = Capture(step, [used, unused], Rerun(lambda: [used, unused, *graphs.buffers.values()]))
    for _ in range(2):
        used.grad = None
        (graphs(batch()).total * 3).backward()
        assert used.grad is not None and used.grad.tolist() == [36.0, 36.0] and unused.grad is None


def whole_steps(*, included: bool, watched: bool) -> tuple[dict[str, Tensor], list[float], Rerun]:
    """Take steps of two shapes, one with an unreadable clip and one with a gradient that is not finite.

    Returns:
        States and norms; the update is part of the recorded steps or follows them.
    """
    step = TrainStep(steps.make("discovla").float(), ALONE, "exact")
    step.method.compute_dtype = torch.float32
    plan = StepPlan(engine=EngineConfig(strategy="torch"), optim=OptimConfig(), world=ALONE, batch_size=4)
    strategy = make_strategy(step, plan)
    optimizer = strategy.recordable
    assert optimizer is not None

    def known() -> list[Tensor]:
        own = [x for x in vars(optimizer).values() if isinstance(x, Tensor)]
        return [*step.parameters(), *step.buffers(), *own, *graphs.buffers.values()]

    recorder = Rerun(known) if watched else Unwatched()
    graphs = step.recorded = Capture(
        step.losses,
        tuple(strategy.trained.values()),
        recorder,
        CaptureLimits(min_rows=64),
        optimizer if included else None,
    )
    norms = []
    for number, (seed, size) in enumerate([(0, 4), (1, 4), (2, 4), (3, 3), (0, 4), (4, 3), (5, 4)]):
        given_batch = batch(seed, size)
        if number == 2:
            valid = torch.tensor([True, False, True, True])
            given_batch = replace(given_batch, valid=valid)
        if number == 4:
            frames = given_batch.frames.float() / 255
            given_batch = replace(given_batch, frames=frames.permute(0, 1, 4, 2, 3) * float("nan"))
        norms.append(strategy.take(given_batch, 1e-2 * (number + 1))[1].item())
    return {**strategy.trained_state(), **strategy.optimizer_state()}, norms, recorder


def test_a_recorded_step_may_include_its_update():
    states, norms, recorder = whole_steps(included=True, watched=True)
    expected, expected_norms, _ = whole_steps(included=False, watched=False)
    assert recorder.recorded == 2 and recorder.replayed == 3
    assert [norm == norm for norm in norms] == [True] * 4 + [False] + [True] * 2
    torch.testing.assert_close(norms, expected_norms, rtol=0, atol=0, equal_nan=True)
    for name, value in expected.items():
        assert torch.equal(states[name], value), name


class Silent(Unwatched):
    """A recorder whose replays start nothing, as those of a CUDA graph take one launch."""

    def __call__(self, function):
        result, _ = super().__call__(function)
        return result, lambda: None


def test_a_recorded_step_starts_twelve_copies_and_kernels_beside_its_graph():
    """Copies to the device, into the graph's buffers, of the rates, and of the numbers for the log."""
    world = replace(ALONE, device=torch.device("meta"))
    step = TrainStep(steps.make("discovla").float(), world, "exact")
    step.method.compute_dtype = torch.float32
    plan = StepPlan(engine=EngineConfig(), optim=OptimConfig(), world=world, batch_size=4)
    strategy = make_strategy(step, plan)
    trained = tuple(strategy.trained.values())
    step.recorded = Capture(step.losses, trained, Silent(), None, strategy.recordable)
    copy_batch = BatchCopier(world.device)
    for number in range(3):
        with Launches("meta") as launches:
            losses, norm = strategy.take(copy_batch(batch(number)), 1e-3)
            LateNumbers({"loss": losses.total, **losses.terms, "grad_norm": norm})
    assert losses.grad_norm is norm
    # 4 tensors to the device, 3 masks and the rates into buffers, frames and ids into buffers, and the stack
    # of numbers for the log; the twelfth is its copy to the host
    assert launches.ops == {"_to_copy": 4, "copy_": 3 + 1, "_foreach_copy_": 2, "stack": 1}, launches.ops


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"grad_cache_chunks": 2}, "grad_cache_chunks = 2"),
        ({"distinct_captions": True}, "distinct_captions = True"),
        ({"impl": "reference"}, "impl = 'reference'"),
        ({"zero_stage": 3}, "zero_stage = 3"),
        ({"zero_stage": 1}, "zero_stage = 1"),
        ({"bf16_parameters": True, "precision": "bf16"}, "bf16_parameters = True"),
    ],
)
def test_settings_that_prevent_recording_are_refused(options, setting):
    with pytest.raises(ValueError, match=f"capture: expected 'none' with {setting}, found 'graph'"):
        EngineConfig(capture="graph", **options)
    assert EngineConfig(**options).capture == "none"


def test_a_cpu_is_refused_alone_and_with_several_processes():
    engine = EngineConfig(capture="graph")
    with pytest.raises(ValueError, match=r"^engine\.capture: expected 'none' on a cpu, found 'graph'$"):
        make_capture(lambda batch, rows: Losses(total=torch.ones(()), terms={}), [], engine, ALONE)
    with pytest.raises(ValueError, match=r"^engine\.capture: expected 'none' on a cpu, found 'graph'$"):
        check_capture(engine, replace(ALONE, size=2))
    check_capture(engine, replace(ALONE, size=2, device=torch.device("cuda")))
    check_capture(EngineConfig(), ALONE)


@pytest.mark.slow
def test_a_recorded_run_has_the_losses_of_an_unrecorded_one(tmp_path, drawn, monkeypatch):
    recorder = Unwatched()
    for module in (capture, trainer):
        monkeypatch.setattr(module, "check_capture", lambda *_: None)
    monkeypatch.setattr(capture, "record_graph", lambda device: recorder)
    monkeypatch.setattr(capture, "memory_is_short", lambda device: False)
    path = runs.write_config(tmp_path, drawn)
    for name in ("none", "graph"):
        run(read_config(path, [f"engine.capture={name}", f"directory={tmp_path}/{name}"]))
    assert 1 <= recorder.recorded <= recorder.replayed <= 5
    results, expected = (runs.records(tmp_path / name) for name in ("graph", "none"))
    for key in ("loss", "grad_norm"):
        ours, theirs = (torch.tensor([record[key] for record in every]) for every in (results, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def every_strategy(world: World) -> dict:
    """Return losses and parameters after four steps, by plain torch and DeepSpeed, recorded or not."""
    results: dict = {}
    for name in ("torch", "deepspeed"):
        for mode in ("eager", "recorded"):
            step = TrainStep(steps.make("discovla").float(), world, "exact")
            step.method.compute_dtype = torch.float32
            engine = EngineConfig.model_validate({"strategy": name, "device": "cpu"})
            plan = StepPlan(engine=engine, optim=OptimConfig(), world=world, batch_size=4)
            strategy = make_strategy(step, plan)
            if mode == "recorded":
                step.recorded = Capture(step.losses, tuple(strategy.trained.values()), Unwatched())
            losses = []
            for number in range(4):
                total = strategy(batch(number)).total
                losses.append(total.item())
                strategy.backward(total)
                strategy.step(1e-3)
            results[name, mode] = {"losses": torch.tensor(losses), **strategy.trained_state()}
    return {"loss": [x["losses"].tolist() for x in results.values()], "found": results}


def test_batches_that_differ_between_processes_run_unrecorded(caplog):
    answers = iter([[7, -8, 48, 48, -48, -144], [7, -7, 49, 48, -48, -144], [7, -7, 48, 96, -48, -144]])
    step, _, recorder = made(max_over_ranks=lambda values: next(answers), min_rows=16)
    for _ in range(2):  # different shapes; then more rows than one process has capacity for
        assert_same(steps.take(step, batch()), unrecorded(step, batch()))
    assert caplog.text.count("whose shapes differ between processes") == 1
    passed = []
    step.method.text.blocks[0].register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
    step(batch())
    assert passed == [48 + 96], "the rows of the largest"
    assert recorder.recorded == 0


def on_two(world: World) -> dict:
    """Return losses and gradients of steps recorded by two processes whose captions differ in length."""
    step = TrainStep(steps.make("discovla"), world, "exact")
    recorder = Unwatched()
    trained = [p for p in step.parameters() if p.requires_grad]
    bounds = CaptureLimits(max_over_ranks=partial(max_over_ranks, world), min_rows=8)
    results: dict = {"recorded": [], "plain": [], "sum": torch.zeros(())}
    for kind in ("plain", "recorded"):
        step.recorded = Capture(step.losses, trained, recorder, bounds) if kind == "recorded" else None
        for seed in (0, 1, 0, 1, 2):
            full = batch(seed, size=8)
            results[kind].append(steps.take(step, steps.share(full, world)))
    losses = [x["loss"].item() for x in (*results["plain"], *results["recorded"])]
    return {**results, "loss": losses, "counts": (recorder.recorded, recorder.replayed)}


@pytest.mark.slow
def test_processes_record_the_same_shapes_at_the_same_steps(tmp_path):
    results = steps.on_ranks(on_two, 2, tmp_path)
    for result, expected in zip(results["recorded"], results["plain"], strict=True):
        assert_same(result, expected)
    recorded, replayed = results["counts"]
    assert 1 <= recorded <= replayed <= 3


@pytest.mark.slow
def test_recorded_steps_train_the_same_with_every_strategy(tmp_path):
    results = steps.on_ranks(every_strategy, 1, tmp_path)["found"]
    expected = results["torch", "eager"]
    assert expected["losses"][3] != expected["losses"][2]
    for key, values in results.items():
        for name, value in values.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=f"{key} {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("variant", RECORDED)
def test_a_cuda_graph_gives_the_losses_and_gradients_of_the_step(variant, impl):
    """t2vparser trains with dropout: with the same seed its graph drops the same."""
    world = replace(ALONE, device=torch.device("cuda", torch.cuda.current_device()))
    step = TrainStep(steps.make(variant).float().cuda(), world, "exact")
    step.method.compute_dtype = torch.float32
    step.method.train()
    step.method.vision.impl = step.method.text.impl = impl
    trained = [p for p in step.parameters() if p.requires_grad]
    graphs = step.recorded = Capture(step.losses, trained, record_graph(world.device))
    for number, seed in enumerate((0, 1, 2, 1)):
        given_batch = batch(seed).to("cuda")
        torch.manual_seed(seed)
        results = steps.take(step, given_batch)
        torch.manual_seed(seed)
        expected = unrecorded(step, given_batch)
        assert len(graphs.recordings) == (number > 0)
        for name, value in expected.items():
            assert relative_error(results[name], value) <= 1e-4 or value.abs().max() < 1e-6, name


@pytest.mark.gpu
def test_a_replay_does_not_sync_and_allocates_nothing():
    world = replace(ALONE, device=torch.device("cuda", torch.cuda.current_device()))
    step = TrainStep(steps.make("discovla").float().cuda(), world, "exact")
    step.method.compute_dtype = torch.float32
    trained = [p for p in step.parameters() if p.requires_grad]
    step.recorded = Capture(step.losses, trained, record_graph(world.device))
    given_batch = batch().to("cuda").map(lambda x: x if x.is_cuda else x.pin_memory())
    for _ in range(3):
        step(given_batch).total.backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            step(given_batch).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
