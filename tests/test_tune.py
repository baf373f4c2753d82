"""Implementations that prove themselves: checked, timed, chosen, kept, and agreed on by all ranks."""

import json
import logging
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from discovla import tune
from discovla.candidates import cases_of_run, partial_case, planned
from discovla.engine.distributed import World
from discovla.nn.precision import quantise_frozen
from discovla.ops import dispatch
from discovla.ops.tower_cases import row_case
from discovla.ops.unit_mean import unit_mean
from discovla.tune import (
    Candidate,
    Measurement,
    chosen,
    format_table,
    machine_key,
    measured,
    measurements_of,
    read_table,
    table_path,
)
from tests import steps, tune_candidates
from tests.ops.counting import counted

KEY = {"gpu": "NVIDIA Test", "torch": torch.__version__, "cases": "fake"}
PROBLEM = ("fake float32 3", 8)
OPTIONS = {"device": "cpu", "clock": tune_candidates.clock}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("DISCOVLA_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    dispatch.use_choices({})


def only(monkeypatch, *impls: str) -> None:
    monkeypatch.setitem(dispatch.CANDIDATES, "fake", dict.fromkeys(impls, "stand-in"))


def row(impl: str, ms: float | None, failure: str = "", **options) -> Measurement:
    given = {"name": "fake", "problem": PROBLEM, "error": (1e-7, 1e-6)} | options
    return Measurement(impl=impl, ms=ms, failure=failure, **given)


def test_the_fastest_right_candidate_is_chosen_and_each_other_one_named(monkeypatch, caplog):
    only(
        monkeypatch, "reference", "wrong_fast", "wrong_gradient", "full", "crash", "right_slow", "right_fast"
    )
    with caplog.at_level(logging.WARNING):
        results = measured([tune_candidates.plan()], limit=60, seconds=600, **OPTIONS)
    failures = {x.impl: x.failure for x in results}
    assert failures["wrong_fast"].startswith("wrong: errors of value and gradients 5.0e-03")
    assert failures["wrong_gradient"].startswith("wrong: ")
    assert failures["full"] == "failed: out of memory"
    assert failures["crash"] == "failed: its process died of SIGSEGV"
    assert [name for name, failure in failures.items() if not failure] == [
        "reference",
        "right_slow",
        "right_fast",
    ]
    assert chosen([results]) == {PROBLEM[0]: {"8": "right_fast"}}
    assert all(f"{name}: {failure}" in caplog.text for name, failure in failures.items() if failure)
    lines = format_table(results).splitlines()[1:]
    assert [line.split()[-1] for line in lines if not failures[line.split()[5]]] == [
        "slower",
        "slower",
        "chosen",
    ]


@pytest.mark.slow
def test_a_candidate_that_hangs_or_leaves_no_usable_gpu_costs_itself_alone(monkeypatch):
    only(monkeypatch, "reference", "hang", "fails", "right_fast")
    results = measured([tune_candidates.plan()], limit=20, seconds=600, **OPTIONS)
    assert [x.failure for x in results] == [
        "",
        "failed: took longer than 20 s",
        "failed: RuntimeError: CUDA error: an illegal memory access was encountered",
        "",
    ]
    assert chosen([results]) == {PROBLEM[0]: {"8": "right_fast"}}


def test_candidates_past_the_time_are_named_and_the_default_stays(monkeypatch):
    only(monkeypatch, "reference", "right_fast")
    results = measured([tune_candidates.plan()], seconds=-1, **OPTIONS)
    assert [x.failure for x in results] == ["not measured: the time is up"] * 2
    assert chosen([results]) == {}


def test_another_implementation_has_to_be_clearly_faster_than_the_default():
    assert chosen([[row("reference", 5.0), row("other", 4.9)]]) == {PROBLEM[0]: {"8": "reference"}}
    assert chosen([[row("reference", 5.0), row("other", 4.8)]]) == {PROBLEM[0]: {"8": "other"}}
    assert chosen([[row("reference", None, "failed: x"), row("other", 9.0)]]) == {PROBLEM[0]: {"8": "other"}}


def test_gpus_that_differ_take_what_is_right_on_both_and_fastest_on_the_slower():
    first = [row("reference", 5.0), row("a", 1.0), row("b", 2.0), row("c", 4.0)]
    second = [row("reference", 9.0), row("a", None, "wrong: x"), row("b", 8.0), row("c", 4.0)]
    for kinds in ([first, second], [second, first]):
        assert chosen(kinds) == {PROBLEM[0]: {"8": "c"}}


def test_all_ranks_use_the_choices_of_the_first_of_their_kind(monkeypatch, caplog):
    """Two ranks, played one after the other: each sees what both of them gather."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(tune, "cases_of_run", lambda *given: [tune_candidates.plan()])
    data = type("Data", (), {"frames": 2, "context_length": 32})
    engine = type("Engine", (), {"tune": "auto", "tf32": True})
    config = type("Config", (), {"engine": engine, "data": data, "batch_size": 4})
    own = {"gpu 0": [row("reference", 5.0), row("a", 1.0)], "gpu 1": [row("reference", 9.0), row("a", 10.0)]}
    for gpus, expected, measuring in (
        (("gpu 0", "gpu 0"), "a", [["gpu 0"], []]),
        (("gpu 0", "gpu 1"), "reference", [["gpu 0"], ["gpu 1"]]),
    ):
        for rank in (0, 1):
            asked: list[str] = []

            def measure(option, key, plans, asked=asked, **options):
                asked.append(key["gpu"])
                return own[key["gpu"]]

            def gather(value, world, gpus=gpus):
                if isinstance(value, dict):
                    return [value | {"gpu": gpu} for gpu in gpus]
                return [own[gpu] if gpus.index(gpu) == i else None for i, gpu in enumerate(gpus)]

            monkeypatch.setattr(tune, "machine_key", lambda device, gpus=gpus, rank=rank: {"gpu": gpus[rank]})
            monkeypatch.setattr(tune, "measurements_of", measure)
            monkeypatch.setattr(tune, "gather_objects", gather)
            world = World(rank=rank, size=2, local_rank=rank, device=cuda)
            assert tune.tune(config, None, world) == own[gpus[rank]]
            assert asked == measuring[rank]
            assert dispatch._choices == {PROBLEM[0]: {8: expected}}
    assert "ranks differ (gpu 0, gpu 1)" in caplog.text


MEASURED = {
    "gpu 0": [row("reference", 5.0), row("a", 1.0), row("b", 3.0)],
    "gpu 1": [row("reference", 9.0), row("a", None, "wrong: x"), row("b", 4.0)],
}


def tune_on_rank(world: World) -> dict[str, float]:
    """Tune as a rank whose measurements are its own; the loss stands for the choice that it uses."""
    data = type("Data", (), {"frames": 2, "context_length": 32})
    engine = type("Engine", (), {"tune": "auto", "tf32": True})
    config = type("Config", (), {"engine": engine, "data": data, "batch_size": 4})
    tune.cases_of_run = lambda *given: [tune_candidates.plan()]
    tune.machine_key = lambda device: {"gpu": f"gpu {world.rank}"}
    tune.measurements_of = lambda option, key, plans, **options: MEASURED[key["gpu"]]
    assert (
        tune.tune(config, None, replace(world, device=torch.device("cuda"))) == MEASURED[f"gpu {world.rank}"]
    )
    return {"loss": ["reference", "a", "b"].index(dispatch._choices[PROBLEM[0]][8])}


def test_two_processes_whose_gpus_measure_differently_take_one_choice(tmp_path):
    """`a` is the fastest on the first and wrong on the second; `on_ranks` compares what both use."""
    assert chosen([MEASURED["gpu 0"]]) == {PROBLEM[0]: {"8": "a"}}
    assert steps.on_ranks(tune_on_rank, 2, tmp_path, start="fork") == {"loss": 2}


def test_choices_are_kept_and_read_without_measuring_again(monkeypatch, own_cache):
    results = [row("reference", 5.0), row("crash", None, "failed: x", problem=None, error=None)]
    monkeypatch.setattr(tune, "measured", lambda plans, **options: results)
    assert measurements_of("auto", KEY, [tune_candidates.plan()]) == results
    monkeypatch.setattr(tune, "measured", lambda plans, **options: pytest.fail("measured again"))
    assert measurements_of("auto", KEY, [tune_candidates.plan()]) == results
    path = table_path(KEY)
    assert measurements_of(str(path), KEY, []) == results, "a file that was sent to another machine"
    assert json.loads(path.read_text())["choices"] == {PROBLEM[0]: {"8": "reference"}}
    assert [x.name for x in path.parent.iterdir()] == [path.name], "neither lock nor part is left"


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"key": KEY, "measurements": [{"name": 1}]}'])
def test_a_stale_or_broken_file_is_measured_anew_and_refused_by_name(content, monkeypatch):
    path = table_path(KEY)
    path.parent.mkdir(parents=True)
    path.write_text(content.replace("KEY", json.dumps(KEY)))
    assert read_table(path, KEY) is None
    with pytest.raises(ValueError, match=r"^engine\.tune: .*json: expected choices .* on NVIDIA Test with"):
        measurements_of(str(path), KEY, [])
    monkeypatch.setattr(tune, "measured", lambda plans, **options: [row("reference", 5.0)])
    assert measurements_of("auto", KEY, []) == read_table(path, KEY) == [row("reference", 5.0)]
    assert read_table(path, KEY | {"gpu": "another"}) is None


def test_a_cache_that_cannot_be_written_is_named_and_the_choices_hold(monkeypatch, caplog, own_cache):
    own_cache.write_text("a file in place of the folder")
    monkeypatch.setattr(tune, "measured", lambda plans, **options: [row("reference", 5.0)])
    assert measurements_of("auto", KEY, []) == [row("reference", 5.0)]
    assert "tuning: the choices are not kept" in caplog.text


def test_the_key_has_the_versions_and_a_hash_of_the_source():
    key = machine_key(torch.device("cpu"))
    assert key["torch"] == torch.__version__ and len(key["source"]) == 16


def test_a_measured_choice_is_taken_at_the_nearest_size_and_for_its_dtype_alone(monkeypatch):
    monkeypatch.setattr(dispatch, "MEASURED_ON", ("cpu",))
    dispatch.use_choices({"layer_norm float32 8": {"16": "triton", "4096": "reference"}})

    def choose(rows: int, **options) -> str:
        return dispatch.choose("layer_norm", "auto", "cpu", operands=(torch.zeros(rows, 8, **options),))

    assert [choose(1), choose(16), choose(200), choose(300), choose(10**5)] == [
        *("triton", "triton", "triton", "reference", "reference")
    ]
    assert choose(16, dtype=torch.float16) == "reference"
    monkeypatch.setattr(dispatch, "MEASURED_ON", ("cuda",))
    assert choose(16) == "reference", "a CPU takes what it took before"
    assert "triton for layer_norm" in dispatch.describe("auto", "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_a_real_op_is_measured_in_the_interpreter_and_then_runs_as_chosen(monkeypatch):
    monkeypatch.setattr(dispatch, "MEASURED_ON", ("cpu",))
    monkeypatch.setitem(dispatch.CANDIDATES, "unit_mean", dict.fromkeys(("reference", "triton"), ""))
    monkeypatch.setitem(tune_candidates.MS, "triton", 1.0)
    plan = planned(partial_case(row_case, "unit_mean"), 9, 3, 5, dtype=torch.float32)
    results = measured([plan], limit=100, seconds=600, device="cpu", clock=tune_candidates.triton_first)
    assert [(x.impl, x.failure) for x in results] == [("reference", ""), ("triton", "")]
    dispatch.use_choices(chosen([results]))
    x = torch.randn(7, 12, 5)
    with counted() as counts:
        mean = unit_mean(x)
    assert counts.stores > 0, "the kernel ran"
    torch.testing.assert_close(mean, unit_mean(x, impl="reference"))


def test_the_cases_of_a_run_can_be_sent_checked_and_timed():
    """Each case with plain torch, and blocks with each implementation that a CPU has."""
    method = steps.make("discovla").float()
    method.compute_dtype = torch.float32
    plans = cases_of_run(method, pairs=2, frames=2, context_length=32)
    ops = [plan.case.op for plan in plans]
    assert set(ops) == {
        *("mlp", "lora_norm", "layer_norm", "fusion_norm", "attention", "short_attention"),
        *("readout_attention", "unit_mean", "alignment_losses", "block"),
    }
    costs = [plan.cost for plan in plans if plan.case.op != "block"]
    assert costs == sorted(costs, reverse=True)
    assert ops[-2:] == ["block", "block"] and "block" not in ops[:-2]
    for plan in plans:
        for impl in ("torch", "ops", "reference") if plan.case.op == "block" else ("reference",):
            candidate = Candidate(
                case=plan.case,
                checked=plan.checked,
                impl=impl,
                device="cpu",
                clock=tune_candidates.triton_first,
            )
            result = tune.measure(pickle.loads(pickle.dumps(candidate)))
            assert not result.failure, (plan.case.name, impl, result)
            assert result.ms == 5.0 and result.problem[0].split()[0] == plan.case.op


def test_fp8_layers_are_measured_by_their_own_product_with_each_kind_of_scales():
    method = steps.make("discovla").float()
    quantise_frozen(method, torch.device("cpu"), backward=True)
    plans = [p for p in cases_of_run(method, 2, 2, 32) if p.case.op in ("mlp", "fp8_linear")]
    assert {plan.case.op for plan in plans} == {"fp8_linear"}
    checked = plans[0].checked
    checked = replace(checked, dtype=torch.float32)
    leaves = checked.leaves("cpu")
    truth = checked.truth(leaves)
    for impl in ("reference", "fast", "tensor"):
        errors = checked.errors(impl, leaves, truth)
        assert 1e-2 < errors["err_fro"] < checked.limits[0], impl
        assert 1e-2 < errors["err_gradient"] < checked.limits[1], impl


def test_a_method_that_compares_tokens_measures_their_similarity_at_its_numbers_of_rows():
    method = steps.make("t2vparser")
    plans = cases_of_run(method, pairs=2, frames=3, context_length=32)
    (plan,) = (plan for plan in plans if plan.case.op.startswith("token"))
    config = method.config
    assert plan.case.op == method.token_op and plan.case.frames == method.token_rows(32, 3)
    assert method.token_rows(32, 3)[1] == config.concat + 3 * config.concat_local + config.views
    leaves = plan.checked.leaves("cpu")
    assert plan.checked.errors("torch", leaves, plan.checked.truth(leaves))["err_gradient"] < 1e-4


def test_blocks_are_timed_as_graphs_too_and_the_graph_recommended_if_it_is_faster(monkeypatch):
    """Candidates answer in this process, with made-up milliseconds."""

    class Answers:
        def __init__(self, work, *, limit):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def __call__(self, candidate):
            problem = ("block float32 3", candidate.case.n)
            given = {"name": candidate.case.name, "impl": candidate.impl, "error": (0.0, 0.0)}
            return Measurement(**given, problem=problem, ms=candidate.clock(None, candidate.impl))

    monkeypatch.setattr(tune, "Sandbox", Answers)
    monkeypatch.setattr(dispatch, "implementations", lambda op: ("compiled", "torch", "triton"))
    monkeypatch.setattr(dispatch, "unavailable", lambda *given: "")
    fake = tune_candidates.plan()
    plan = replace(fake, case=replace(fake.case, op="block"), default="compiled")
    for graph, advised in ((1.2, True), (1.99, False)):
        options = {
            "clock": lambda call, name: {"torch": 2.0}.get(name, 5.0),
            "graph_clock": lambda call, name, ms=graph: ms,
        }
        results = measured([plan], **options)
        assert [(x.impl, x.ms) for x in results] == [
            *(("compiled", 5.0), ("torch", 2.0), ("triton", 5.0), ("torch, graph", graph))
        ]
        assert chosen([results]) == {"block float32 3": {"8": "torch"}}
        assert ("take 60% of their time: consider engine.capture=graph" in format_table(results)) == advised


def test_a_run_on_a_cpu_measures_nothing():
    config = type("Config", (), {"engine": type("Engine", (), {"tune": "auto"})})
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    assert tune.tune(config, None, world) == []
    off = type("Config", (), {"engine": type("Engine", (), {"tune": "off"})})
    assert tune.tune(off, None, replace(world, device=torch.device("cuda"))) == []
