"""Experiments on the drawn world, in small."""

import json
import zlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import experiments
from benchmarks.drawn_figures import DrawnEvaluation, choices, reversal_by_event
from benchmarks.experiments import (
    ABLATION_RUNS,
    EXPERIMENTS,
    FUSION_RUNS,
    LADDER,
    MEAN_POOLING,
    METHOD_RUNS,
    PRECISION_RUNS,
    RATE_RUNS,
    STAGE_RUNS,
    TIME_RUNS,
    TOKEN_RUNS,
    Experiment,
    Run,
    Setting,
    loss_differences,
    measure_costs,
    run_experiment,
)
from benchmarks.measure import read_rows
from discovla.batch import Embedding
from discovla.drawn_world.probes import Probe
from discovla.drawn_world.synthetic import WorldSizes, draw_world
from discovla.methods import build
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.testing import tiny_architecture
from discovla.towers.weights import DRAWN, DRAWN_CLIP, initialise

ALL_RUNS = {
    "methods": METHOD_RUNS,
    "rates": RATE_RUNS,
    "ablation": ABLATION_RUNS,
    "precision": PRECISION_RUNS,
    "stages": STAGE_RUNS,
    "time": TIME_RUNS,
    "tokens": TOKEN_RUNS,
}
SMALL = ("batch_size=4", "steps=2", "evaluate_every=1", "data.workers=0")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    sizes = WorldSizes(train=20, val=4, test=6, siblings=4)
    manifest = draw_world(tmp_path_factory.mktemp("world") / "world", sizes=sizes, workers=1)
    return Setting(manifest=manifest, words=SMALL, fresh_clips=4)


def small(name: str, folder) -> Experiment:
    """An experiment whose results are in another file."""
    return replace(EXPERIMENTS[name], results=folder / "results.jsonl")


def named(runs, name: str) -> Run:
    return next(run for run in runs if run.name == name)


@pytest.mark.parametrize(
    "run", [run for runs in ALL_RUNS.values() for run in runs if run.seed == 0], ids=lambda run: run.name
)
def test_every_run_is_a_valid_config(run, setting):
    words = run.words.replace("steps=0", "")
    config = setting.config(replace(run, words=words, seed=1))
    assert (config.seed, config.batch_size, config.data.manifest) == (1, 4, setting.manifest)


@pytest.mark.parametrize("name", ALL_RUNS)
def test_the_runs_of_an_experiment_have_different_identities(name):
    identities = [run.identity for run in ALL_RUNS[name]]
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize("name", ["methods", "ablation", "precision"])
def test_every_committed_result_is_of_a_run(name):
    rows = read_rows(EXPERIMENTS[name].results)
    assert rows
    assert {r["identity"] for r in rows if r["kind"] in ("run", "errors", "curve")} == {
        run.identity for run in ALL_RUNS[name]
    }


def test_runs_of_fusion_start_from_their_tower(setting):
    assert len({run.identity for run in FUSION_RUNS}) == len(FUSION_RUNS) == 35
    for run in FUSION_RUNS:
        config = setting.config(replace(run, words=run.words.replace("steps=0", "")))
        assert config.model.pretrained == f"drawn_{run.tower}"
        if run.seed == 0 and run.name.endswith(("LoRA + mean pooling", "fusion, 1 block")):
            method = build(config.model, config.method)
            assert (method.vision.pool.adapter is None) == ("mean pooling" in run.name)


@pytest.mark.slow
def test_fusion_of_a_tower_is_measured_after_training(setting, tmp_path):
    (row,) = run_experiment(small("fusion", tmp_path), setting, [named(FUSION_RUNS, "pe: fusion, 2 blocks")])
    assert row["tower"] == "pe" and row["weights"] == zlib.crc32(DRAWN["drawn_pe"].read_bytes())
    assert row["last steps"]["video"] > 0 and "judges" not in row["figures"]


def test_the_weights_of_the_distillation_are_those_of_the_names(setting):
    weights = {}
    for run in ABLATION_RUNS:
        config = replace(setting, words=()).config(replace(run, words=run.words.replace("steps=0", "")))
        assert config.data.val_split == ""
        norm = {"official": 100 / config.batch_size, "fixed": 100 / 128}
        weights[run.name] = norm.get(getattr(config.method, "kl_norm", ""), 0) * getattr(
            config.method, "beta", 0
        )
    assert weights["+ distillation, official (w 2.08)"] == pytest.approx(2.083, abs=1e-3)
    assert weights["+ distillation, w 0.78"] == pytest.approx(0.78, abs=1e-3)
    assert weights["+ distillation, w 0.2"] == pytest.approx(0.2)
    assert weights["+ alignment"] == 0
    assert set(LADDER) <= set(weights)


def test_known_results_are_not_measured_again(setting, tmp_path, capsys):
    measured = []

    def measure(run, _):
        measured.append(run.name)
        return [{"test": {way: {"R@1": 50.0} for way in ("t2v", "v2t")}}]

    runs = [Run(name="a", words="x=1"), Run(name="b", words="x=2")]
    experiment = Experiment(results=tmp_path / "r.jsonl", runs=runs, measure=measure)
    rows = run_experiment(experiment, setting, runs[:1])
    assert capsys.readouterr().out == "a, seed 0: t2v R@1 50.0, v2t R@1 50.0\n"
    assert read_rows(tmp_path / "r.jsonl") == json.loads(json.dumps(rows))
    assert rows[0]["weights"] == zlib.crc32(DRAWN_CLIP.read_bytes())
    run_experiment(experiment, setting, runs)
    assert measured == ["a", "b"]
    run_experiment(experiment, replace(setting, words=()), runs)
    assert measured == ["a", "b", "a", "b"], "other overrides are other runs"


def test_results_from_other_pretrained_weights_are_refused(setting, tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps({"weights": -1, "identity": ""}) + "\n")
    with pytest.raises(ValueError, match="found other weights"):
        run_experiment(small("ablation", tmp_path), setting, ABLATION_RUNS[:1])


@pytest.mark.slow
def test_a_method_is_measured_from_its_reloaded_checkpoint(setting, tmp_path):
    (row,) = run_experiment(small("methods", tmp_path), setting, [named(METHOD_RUNS, "CLIP2Video, LoRA")])
    assert row["test"]["t2v"]["R@10"] == 100
    assert row["cpu_seconds"] > 1
    assert row["peak_rss_mb"] > 100
    (row,) = run_experiment(small("rates", tmp_path), setting, RATE_RUNS[:1])
    assert [score["step"] for score in row["val"]] == [0, 1, 2]


@pytest.mark.slow
def test_a_part_is_measured_at_its_last_step_with_another_logit_scale(setting, tmp_path):
    runs = [named(ABLATION_RUNS, name) for name in ("zero-shot, mean pooling", "official, scale 100")]
    frozen, scaled = run_experiment(small("ablation", tmp_path), setting, runs)
    for row in (frozen, scaled):
        assert row["figures"]["flip"] < 1e-5
        assert row["figures"]["probes"]["reversal"]["clip"] == 50
    assert scaled["logit_scale"] == pytest.approx(100)
    assert scaled["last steps"]["distill"] > 0


@pytest.mark.slow
def test_precisions_differ_by_their_errors(setting, tmp_path):
    setting = replace(setting, words=("batch_size=8",))
    runs = [run for run in PRECISION_RUNS if run.kind == "errors"]
    errors = run_experiment(small("precision", tmp_path), setting, runs)
    for name in ("captions", "frames", "frame_captions", "loss", "gradients"):
        fp32, bf16, wide, fp8, both = (row[name] for row in errors)
        assert fp32 < 1e-4 < 1e-3 < bf16 < 0.1 and wide > 1e-4, name
        # the residual's dtype affects features; the error of gradients comes mostly from products in bf16
        assert name in ("loss", "gradients") or wide < bf16, name
        assert name == "loss" or max(wide, bf16) < fp8 < 0.5, name
        # gradients in 8 bits add little to the error of the features, which is the same
        assert fp8 != both < 1.3 * fp8 if name == "gradients" else both == fp8, name
    run = replace(named(PRECISION_RUNS, "bf16"), kind="curve")
    (curve,) = run_experiment(small("precision", tmp_path), replace(setting, words=SMALL), [run])
    assert len(curve["losses"]) == 2


def test_costs_are_relative_to_a_step_of_mean_pooling(setting, monkeypatch):
    first_two = dict(list(experiments.METHODS.items())[:2])
    monkeypatch.setattr(experiments, "METHODS", first_two)
    plain, lstm = measure_costs(Run(name="costs", words=""), setting, rounds=1)
    assert (plain["name"], plain["step_over_meanP"]) == (MEAN_POOLING, 1.0)
    assert lstm["saved_mb"] > plain["saved_mb"] > 1


@pytest.mark.slow
def test_a_failing_run_shows_its_output(setting, tmp_path):
    with pytest.raises(RuntimeError, match=r"unknown key; did you mean 'steps'"):
        experiments.train(METHOD_RUNS[0], replace(setting, words=("stepz=1",)), tmp_path / "run")


def test_losses_are_compared_step_by_step():
    assert loss_differences([4.0, 2.5, 1.0], [4.0, 2.0, 1.0]) == {
        "largest": 0.25,
        "at_step": 1,
        "largest_of_first_ten": 0.25,
    }
    with pytest.raises(ValueError, match="expected those of 2 steps, found 1"):
        loss_differences([1.0], [1.0, 2.0])


class Reader(CLIP):
    """Prefer, on the second clip alone, texts with an odd number of tokens."""

    def similarity(self, text: Embedding, video: Embedding) -> Tensor:
        return text.pooled @ video.pooled.T

    def encode_text(self, ids: Tensor, mask: Tensor) -> Embedding:
        return Embedding(pooled=(mask.sum(-1, keepdim=True) % 2).float())


def test_choices_count_on_the_clip_and_on_its_control():
    architecture = tiny_architecture()
    method = Reader(architecture, CLIPConfig())
    initialise(method, architecture, 0)
    clips = Embedding(pooled=torch.tensor([[0.0], [1.0]]))
    odd, even = "red", "red red"  # three and four tokens with start and end
    probes = [
        Probe(kind="verb", clip=1, control=0, true=odd, false=even),
        Probe(kind="verb", clip=0, control=1, true=odd, false=even),
        Probe(kind="verb", clip=1, control=0, true=even, false=odd),
        Probe(kind="reversal", clip=0, control=0, true=odd, false=even, played_backwards=True),
    ]
    figures = choices(method, probes, clips, clips.map(lambda x: 1 - x))
    assert figures["verb"] == {"count": 3, "clip": pytest.approx(100 / 3), "control": pytest.approx(100 / 3)}
    assert figures["reversal"] == {"count": 1, "clip": 100, "control": 100}


def test_a_blind_method_guesses_at_every_kind_of_event(setting):
    config = setting.config(TIME_RUNS[0])
    figures = reversal_by_event(
        build(config.model, CLIPConfig(tune="frozen")),
        DrawnEvaluation(manifest=setting.manifest, data=config.data, fresh_clips=0),
    )
    assert {x["clip"] for x in figures.values()} == {50.0}
    assert sum(x["count"] for x in figures.values()) == 2 * figures["all"]["count"] > 0
