"""A run that was killed and resumed equals one that was never interrupted."""

import json
import random
import time

import pytest
import torch

from discovla.engine import checkpoint
from tests import runs

STEPS = 10  # of 16 pairs; an epoch has 4 steps
WAYS = {
    "torch": ("engine.strategy=torch",),
    "zero0": ("engine.strategy=deepspeed", "engine.zero_stage=0"),
    "zero2": ("engine.strategy=deepspeed", "engine.zero_stage=2"),
}
SCHEDULE = (f"steps={STEPS}", "checkpoint_every=3", "evaluate_every=5", "keep_checkpoints=1")
CHECKPOINT = "kill:discovla.engine.checkpoint"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, drawn):
    """Return the directory of an uninterrupted run of a strategy, trained on first use."""
    folder = tmp_path_factory.mktemp("whole")
    config = runs.write_config(folder, drawn)

    def whole(way):
        directory = folder / way
        if not directory.exists():
            runs.train([config, *SCHEDULE, *WAYS[way], f"directory={directory}"])
        return directory

    return whole


def kill_after(job, directory, step):
    """Kill -9 the run once `step` steps are logged."""
    path = directory / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b'"train"') < step:
        assert job.processes[0].is_alive(), f"ended before step {step}:\n{job.output()}"
        time.sleep(0.002)
    job.processes[0].kill()
    assert job.wait() == [-9]


def assert_same(resumed, expected):
    """Compare every number that two runs wrote."""
    for kind in ("train", "val"):
        assert runs.records(resumed, kind) == runs.records(expected, kind)
    assert [record["step"] for record in runs.records(resumed)] == list(range(STEPS))
    ours, theirs = runs.tensors(resumed, STEPS), runs.tensors(expected, STEPS)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    for name in ("results.json", "before.json", "checkpoints/best.json"):
        assert json.loads((resumed / name).read_text()) == json.loads((expected / name).read_text()), name


@pytest.mark.parametrize(
    "way", ["torch", *(pytest.param(way, marks=pytest.mark.slow) for way in ("zero0", "zero2"))]
)
def test_a_run_killed_at_random_steps_equals_an_uninterrupted_one(way, tmp_path, drawn, uninterrupted):
    words = [runs.write_config(tmp_path, drawn), *SCHEDULE, *WAYS[way], "resume=true"]
    for step in sorted(random.Random(f"kill {way}").sample(range(1, STEPS), 3)):
        kill_after(runs.start(words), tmp_path / "run", step)
    runs.train(words)
    assert_same(tmp_path / "run", uninterrupted(way))


@pytest.mark.slow
def test_a_run_killed_at_any_write_equals_an_uninterrupted_one(tmp_path, drawn, uninterrupted):
    words = [runs.write_config(tmp_path, drawn), *SCHEDULE, "resume=true"]
    for kill in (
        "kill:discovla.trainer:write_json:1",  # the zero-shot metrics
        f"{CHECKPOINT}:_write_tensors:3",  # nothing of the second checkpoint is written
        f"{CHECKPOINT}:_write_tensors:2",  # one of its two files is written
        f"{CHECKPOINT}:_put_in_place:1",  # all files are written, not yet renamed
        f"{CHECKPOINT}:set_best:1",  # renamed, not yet marked as the best
        f"{CHECKPOINT}:prune:1",  # older ones are not removed
        "kill:discovla.trainer:write_json:1",  # the results
    ):
        job = runs.start(words, fault=kill)
        assert job.wait() == [-9], f"{kill}:\n{job.output()}"
    runs.train(words)
    assert_same(tmp_path / "run", uninterrupted("torch"))
    assert not list((tmp_path / "run/checkpoints").glob(".*")), "half-written files are left"


def test_a_run_that_ends_before_or_while_it_validates_loses_no_step(tmp_path, drawn, uninterrupted):
    words = [runs.write_config(tmp_path, drawn), *SCHEDULE, "resume=true"]
    checkpoints = tmp_path / "run/checkpoints"
    for fault, status in (
        ("SIGTERM:discovla.trainer:learning_rate:5", 75),  # in step 5, after which it would validate
        ("kill:discovla.trainer:evaluate:1", -9),  # in the validation of that step
    ):
        job = runs.start(words, fault=fault)
        assert job.wait() == [status], f"{fault}:\n{job.output()}"
        newest = checkpoint.latest(checkpoints)
        assert newest is not None and newest.step == 5
        assert [record["step"] for record in runs.records(tmp_path / "run", "val")] == [0]
        assert checkpoint.best(checkpoints) is None
    runs.train(words)
    assert_same(tmp_path / "run", uninterrupted("torch"))


@pytest.mark.slow
def test_a_killed_run_with_loader_workers_equals_an_uninterrupted_one(tmp_path, drawn, uninterrupted):
    words = [runs.write_config(tmp_path, drawn), *SCHEDULE, *WAYS["zero0"], "resume=true", "data.workers=2"]
    for step in (2, 7):
        kill_after(runs.start(words), tmp_path / "run", step)
    runs.train(words)
    assert_same(tmp_path / "run", uninterrupted("zero0"))


def test_a_run_stopped_at_a_step_and_resumed_equals_an_uninterrupted_one(tmp_path, drawn, uninterrupted):
    words = [runs.write_config(tmp_path, drawn), *SCHEDULE]
    job = runs.train([*words, "stop_at=2"])
    assert "text to video" not in job.output(), "an unfinished run printed a table"
    assert len(runs.losses(tmp_path / "run")) == 2
    runs.train([*words, "stop_at=7", "resume=true"])
    runs.train([*words, "resume=true"])
    assert_same(tmp_path / "run", uninterrupted("torch"))


def test_a_finished_run_that_is_resumed_writes_the_same_results(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "steps=2"]
    runs.train(words)
    before = (tmp_path / "run/results.json").read_bytes()
    runs.train([*words, "resume=true"])
    assert (tmp_path / "run/results.json").read_bytes() == before
    assert len(runs.losses(tmp_path / "run")) == 2


@pytest.mark.slow
def test_a_resumed_run_with_random_frame_sampling_sees_the_same_frames(tmp_path, drawn):
    sampling = ("data.sampling=clip2video", "data.sample_rate=5", "data.frames=4")
    words = [runs.write_config(tmp_path, drawn), "method=clip2video", "steps=5", *sampling]
    runs.train([*words, f"directory={tmp_path}/whole"])
    runs.train([*words, "stop_at=2"])
    runs.train([*words, "resume=true"])
    assert torch.equal(runs.losses(tmp_path / "run"), runs.losses(tmp_path / "whole"))
    job = runs.start([*words, "resume=true", "data.sampling_divisor=2"])
    assert job.wait() == [2]
    assert "data.sampling_divisor: the run began with 1, found 2" in job.output()


def test_a_checkpoint_older_than_an_option_counts_as_trained_with_its_default(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "steps=3", "method=clip4clip"]
    runs.train([*words, "stop_at=1"])
    (path,) = (tmp_path / "run/checkpoints").glob("step-*/state.json")
    state = json.loads(path.read_text())
    del state["sha256"]
    assert state["meta"]["schedule"].pop("data.sampling") == "discovla"
    path.write_text(json.dumps(state | {"sha256": checkpoint._state_checksum(state)}))
    job = runs.start([*words, "resume=true", "data.sampling=clip4clip"])
    assert job.wait() == [2]
    assert "data.sampling: the run began with 'discovla', found 'clip4clip'" in job.output()
    runs.train([*words, "resume=true"])
    assert len(runs.losses(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps=9", "steps: the run began with 10, found 9"),
        ("optim.lr=0.1", "optim.lr: the run began with 0.001, found 0.1"),
        ("batch_size=8", "batch_size: the run began with 16, found 8"),
        ("data.augment=none", "data.augment: the run began with 'light', found 'none'"),
        ("method.lora_rank=4", "another architecture: method.lora_rank: expected 4, found 2"),
        ("model.seed=1", "another architecture: frozen: expected"),
    ],
)
def test_resuming_with_other_options_is_refused(word, message, tmp_path, drawn, uninterrupted):
    config, directory = runs.write_config(tmp_path, drawn), uninterrupted("torch")
    before = (directory / "metrics.jsonl").read_bytes()
    job = runs.start([config, *SCHEDULE, f"directory={directory}", "resume=true", word])
    assert job.wait() == [2]
    assert job.output().splitlines()[-1].startswith("train.py: error: ")
    assert message in job.output()
    assert (directory / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", runs.METHODS)
def test_every_method_resumes_bit_for_bit(name, tmp_path, drawn):
    schedule = ("steps=4", "checkpoint_every=2")
    words = [runs.write_config(tmp_path, drawn), *runs.METHODS[name], *schedule]
    runs.train([*words, f"directory={tmp_path}/whole"])
    runs.train([*words, "stop_at=2"])
    runs.train([*words, "resume=true"])
    assert runs.records(tmp_path / "run") == runs.records(tmp_path / "whole")
    ours, theirs = runs.tensors(tmp_path / "run", 4), runs.tensors(tmp_path / "whole", 4)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("run", "whole")]
    assert results[0] == results[1]
