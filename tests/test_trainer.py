"""Runs have equal losses on any number of processes and in any strategy; selection ignores the test split."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

from discovla.data.manifest import read_manifest, write_manifest
from discovla.retrieval.record import EvaluationRecord
from tests import runs
from tests.engine.launch import LAUNCHER, ROOT, free_port

ZERO = {stage: ("engine.strategy=deepspeed", f"engine.zero_stage={stage}") for stage in range(4)}
WAYS = {"torch": ("engine.strategy=torch",), **{f"zero{stage}": words for stage, words in ZERO.items()}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, drawn) -> Path:
    """Return the directory of a run on one process with plain torch."""
    folder = tmp_path_factory.mktemp("alone")
    runs.train([runs.write_config(folder, drawn), "evaluate_every=2"], report=True)
    return folder / "run"


def few(path):
    return [pytest.param(way, marks=[] if way in path else pytest.mark.slow) for way in WAYS]


@pytest.mark.parametrize("way", few(["torch", "zero2"]))
def test_two_processes_have_the_losses_of_one(way, tmp_path, drawn, alone):
    job = runs.train([runs.write_config(tmp_path, drawn), *WAYS[way]], size=2)
    assert_close(runs.losses(tmp_path / "run"), runs.losses(alone), rtol=1e-5, atol=0)
    found, wanted = (runs.records(directory) for directory in (tmp_path / "run", alone))
    norms = [torch.tensor([record["grad_norm"] for record in records]) for records in (found, wanted)]
    assert_close(*norms, rtol=1e-4, atol=0)
    assert not job.output(rank=1), "a rank > 0 printed something"


# T2VParser and tightTransf have dropout, which each rank draws for its own rows and columns;
# tests/test_sharded_step.py compares them without it
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in runs.METHODS if n not in ("t2vparser", "tightTransf", "meanP")])
def test_two_processes_have_the_losses_of_one_with_every_method(name, tmp_path, drawn):
    # a small learning rate, because Adam turns the rounding error of a gradient near zero into a full step
    schedule = ("steps=3", "optim.lr=1e-4", "data.val_split=")
    words = [runs.write_config(tmp_path, drawn), *runs.METHODS[name], *schedule]
    runs.train([*words, f"directory={tmp_path}/one"])
    runs.train(words, size=2)
    assert_close(runs.losses(tmp_path / "run"), runs.losses(tmp_path / "one"), rtol=1e-5, atol=0)


@pytest.mark.parametrize("way", few(["zero0"])[1:])
def test_every_strategy_has_the_losses_of_plain_torch(way, tmp_path, drawn, alone):
    runs.train([runs.write_config(tmp_path, drawn), *WAYS[way]])
    assert_close(runs.losses(tmp_path / "run"), runs.losses(alone), rtol=1e-5, atol=0)


def test_the_official_gradient_of_two_processes_is_half_the_exact_one(tmp_path, drawn, alone):
    words = [runs.write_config(tmp_path, drawn), "engine.grad_scale=official", "stop_at=1"]
    runs.train(words, size=2)
    (found,), wanted = runs.records(tmp_path / "run"), runs.records(alone)[0]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"] / 2, rel=1e-5)


def test_one_process_resumes_a_checkpoint_of_two_with_zero_2(tmp_path, drawn, alone):
    config = runs.write_config(tmp_path, drawn)
    runs.train([config, *ZERO[2], "stop_at=3"], size=2)
    runs.train([config, *ZERO[0], "resume=true"])
    assert_close(runs.losses(tmp_path / "run"), runs.losses(alone), rtol=1e-5, atol=0)


@pytest.mark.parametrize("way", few(["torch", "zero2"]))
def test_bf16_stays_near_fp32_and_keeps_trained_parameters_in_fp32(way, tmp_path, drawn, alone):
    runs.train([runs.write_config(tmp_path, drawn), *WAYS[way], "engine.precision=bf16"])
    found, wanted = runs.losses(tmp_path / "run"), runs.losses(alone)
    assert found.isfinite().all()
    assert not torch.equal(found, wanted), "losses equal those of fp32"
    assert_close(found, wanted, rtol=0.05, atol=0)
    trained = {n: x for n, x in runs.tensors(tmp_path / "run", 6).items() if n.startswith("trained/")}
    assert {x.dtype for x in trained.values()} == {torch.float32}
    assert any((x != x.bfloat16().float()).any() for x in trained.values()), "values are those of bf16"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_trained_logit_scale_stays_at_most_100(way, tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), *WAYS[way], "method=clip", "optim.lr=3", "steps=4"]
    runs.train(words)
    found = runs.tensors(tmp_path / "run", 4)["trained/logit_scale.log"]
    assert found.item() <= math.log(100) + 1e-6


def test_selection_does_not_depend_on_the_test_split(tmp_path, drawn, alone):
    """With another test split the training and validation records stay equal."""
    clips = [clip for clip in read_manifest(drawn) if clip.split != "test" or clip.id.endswith("0")]
    manifest = tmp_path / "fewer.jsonl"
    write_manifest(manifest, clips)
    words = ["evaluate_every=2", f"data.manifest={manifest}"]
    runs.train([runs.write_config(tmp_path, drawn), *words])
    for kind in ("train", "val"):
        assert runs.records(tmp_path / "run", kind) == runs.records(alone, kind)
    best = [json.loads((d / "checkpoints/best.json").read_text()) for d in (tmp_path / "run", alone)]
    assert best[0] == best[1]
    assert runs.records(tmp_path / "run", "test") == []


def test_the_first_step_with_the_highest_validation_score_is_selected(alone):
    scores = {r["step"]: r["t2v"]["R@1"] + r["v2t"]["R@1"] for r in runs.records(alone, "val") if r["step"]}
    best = json.loads((alone / "checkpoints/best.json").read_text())
    step = max(scores, key=lambda step: (scores[step], -step))
    assert (best["checkpoint"], best["score"]) == (f"step-{step:08d}", scores[step])
    assert f"discovla, step {step}" in json.loads((alone / "results.json").read_text())


def test_results_have_rows_before_and_after_training(alone):
    names = list(json.loads((alone / "results.json").read_text()))
    assert names[:2] == ["zero-shot, mean pooling", "zero-shot, discovla untrained"]
    assert len(names) == 5
    after = names[2]
    assert names[3:] == [f"{after} + dual softmax", f"{after} + QB-Norm"]


def test_a_run_keeps_the_results_of_every_query_and_writes_its_report(alone):
    rows = json.loads((alone / "results.json").read_text())
    for name in ("test-plain", "test-untrained", "test", "val-start", "val"):
        record = EvaluationRecord.load(alone / f"evaluation-{name}.npz")
        ranks = record.ranks["raw"]
        if name.startswith("test"):
            for direction in ("t2v", "v2t"):
                assert ranks[direction].mean() == pytest.approx(rows[record.title][direction]["MnR"])
    page = (alone / "report.html").read_text()
    assert "Finished: 6 of 6 steps" in page and "Validation R@1" in page
    assert page.count('<div class="query">') and "data:image/jpeg" in page
    assert all(name in page for name in rows)


def test_tensorboard_has_the_test_metrics_and_the_pictures_of_the_report(alone):
    events = EventAccumulator(str(alone / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    metrics = json.loads((alone / "results.json").read_text())
    trained = next(name for name in metrics if ", step " in name and "+" not in name)
    (test,) = events.Scalars("test/t2v/R@1")
    assert test.value == pytest.approx(metrics[trained]["t2v"]["R@1"])
    assert {"report/Losses", "report/Similarities", "report/Validation R@1"} <= set(events.Tags()["images"])


def test_a_killed_run_has_a_report_of_its_last_validation(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "evaluate_every=2"]
    job = runs.start(words, fault="kill:discovla.trainer:learning_rate:4", report=True)
    assert job.wait() == [-signal.SIGKILL]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Not finished: 2 of 6 steps" in page
    assert "Validation split" in page and '<div class="query">' in page


def test_without_a_validation_split_the_last_step_is_selected(tmp_path, drawn):
    runs.train([runs.write_config(tmp_path, drawn), "data.val_split=", "steps=2"])
    assert "discovla, step 2" in json.loads((tmp_path / "run/results.json").read_text())
    assert not (tmp_path / "run/checkpoints/best.json").exists()


def test_a_new_run_keeps_the_earlier_one_under_another_name(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "steps=1"]
    for seed in range(3):
        runs.train([*words, f"seed={seed}"])
    kept = [tmp_path / "run.1", tmp_path / "run.2", tmp_path / "run"]
    seeds = [json.loads((directory / "config.json").read_text())["seed"] for directory in kept]
    assert seeds == [0, 1, 2]
    assert all(len(runs.losses(directory)) == 1 for directory in kept)


def launch(launcher: str, program: Path, words: list) -> subprocess.Popen:
    """Start a program on two processes by a launcher."""
    here = Path(sys.executable).parent
    commands = {
        "deepspeed": ["deepspeed", "-q", "--num_accelerators", 2, "--master_port", free_port()],
        "torchrun": ["torchrun", "--nproc-per-node", 2, "--master-port", free_port()],
    }
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    env |= {"PATH": f"{here}{os.pathsep}{env['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [str(word) for word in (*commands[launcher], program, *words)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=env, cwd=ROOT, **pipe)


def launched(launcher: str, program: Path, words: list) -> tuple[int, str]:
    """Return exit status and output; fail after 150 seconds."""
    with launch(launcher, program, words) as process:
        try:
            output, _ = process.communicate(timeout=150)
        finally:
            process.terminate()  # the launcher ends its processes
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_one_process_resumes_a_run_of_each_launcher(launcher, tmp_path, drawn, alone):
    words = [runs.write_config(tmp_path, drawn), *ZERO[2]]
    status, output = launched(launcher, ROOT / "train.py", [*words, "stop_at=3"])
    assert status == 0, output
    assert len(runs.losses(tmp_path / "run")) == 3
    runs.train([*words, "resume=true"])
    assert_close(runs.losses(tmp_path / "run"), runs.losses(alone), rtol=1e-5, atol=0)


FAILING = """
import os, sys
from discovla.trainer import Trainer
from train import main

def fail(*_):
    raise {error}

if os.environ["RANK"] == "1":
    Trainer.report = fail
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ValueError('only here')", "train.py: error (rank 1): only here"),
        ("TypeError('a bug')", "TypeError: a bug"),
    ],
    ids=["error", "bug"],
)
def test_a_rank_that_fails_alone_prints_its_error_and_ends_the_job(launcher, error, message, tmp_path, drawn):
    program = tmp_path / "failing.py"
    program.write_text(FAILING.format(error=error))
    status, output = launched(launcher, program, [runs.write_config(tmp_path, drawn)])
    assert status != 0
    assert message in output
    assert "RuntimeError" not in output, "rank 0 printed its lost connection as the error"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_an_error_on_all_ranks_is_printed_once(launcher, tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "data.context_length=40"]
    status, output = launched(launcher, ROOT / "train.py", words)
    assert status != 0
    assert output.count("data.context_length: expected at most 32, found 40") == 1, output


@pytest.mark.slow
def test_a_run_of_the_deepspeed_launcher_resumes_bit_for_bit_after_kill_9(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), *ZERO[2], "checkpoint_every=2", "resume=true"]
    runs.train([*words, f"directory={tmp_path}/whole"], size=2)
    with launch("deepspeed", ROOT / "train.py", words) as process:
        metrics = tmp_path / "run/metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b'"train"') < 3:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.002)
        os.kill(rank_of(process, 1), signal.SIGKILL)
        process.communicate(timeout=100)
    assert process.returncode != 0
    assert len(runs.records(tmp_path / "run")) < 6
    status, output = launched("deepspeed", ROOT / "train.py", words)
    assert status == 0, output
    assert runs.records(tmp_path / "run") == runs.records(tmp_path / "whole")
    found, wanted = (runs.tensors(tmp_path / name, 6) for name in ("run", "whole"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def rank_of(launcher: subprocess.Popen, rank: int) -> int:
    """Return the pid of a rank; the DeepSpeed launcher starts a process that starts the ranks."""
    parents, words = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words[int(folder.name)] = (folder / "cmdline").read_text().split("\0")
        except (OSError, ValueError):
            continue  # it has just ended
    inner = [number for number, parent in parents.items() if parent == launcher.pid]
    ranks = [number for number, parent in parents.items() if parent in inner]
    (pid,) = [number for number in ranks if f"--local_rank={rank}" in words[number]]
    return pid
