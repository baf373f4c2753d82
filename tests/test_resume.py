"""A run that was killed and taken up again is the run that was never stopped."""

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
def wholes(tmp_path_factory, drawn):
    """Directories of runs never stopped, by strategy; each is trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("whole")
    config = runs.write_config(folder, drawn)

    def whole(way):
        directory = folder / way
        if not directory.exists():
            runs.train([config, *SCHEDULE, *WAYS[way], f"directory={directory}"])
        return directory

    return whole


def kill_after(job, directory, step):
    """Kill -9 once `step` steps are written down."""
    path = directory / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b'"train"') < step:
        assert job.processes[0].is_alive(), f"ended before step {step}:\n{job.output()}"
        time.sleep(0.002)
    job.processes[0].kill()
    assert job.wait() == [-9]


def assert_same(found, wanted):
    """Every number two runs wrote is the same."""
    for kind in ("train", "val"):
        assert runs.records(found, kind) == runs.records(wanted, kind)
    assert [record["step"] for record in runs.records(found)] == list(range(STEPS))
    ours, theirs = runs.tensors(found, STEPS), runs.tensors(wanted, STEPS)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    for name in ("results.json", "before.json", "checkpoints/best.json"):
        assert json.loads((found / name).read_text()) == json.loads((wanted / name).read_text()), name


@pytest.mark.parametrize(
    "way", [*(pytest.param(way, marks=pytest.mark.slow) for way in ("torch", "zero0")), "zero2"]
)
def test_a_run_killed_at_random_steps_ends_bit_for_bit_as_one_never_stopped(way, tmp_path, drawn, wholes):
    words = [runs.write_config(tmp_path, drawn), *SCHEDULE, *WAYS[way], "resume=true"]
    for step in sorted(random.Random(f"kill {way}").sample(range(1, STEPS), 3)):
        kill_after(runs.start(words), tmp_path / "run", step)
    runs.train(words)
    assert_same(tmp_path / "run", wholes(way))


def test_a_run_killed_wherever_it_writes_ends_as_one_never_stopped(tmp_path, drawn, wholes):
    words = [runs.write_config(tmp_path, drawn), *SCHEDULE, "resume=true"]
    for kill in (
        "kill:discovla.trainer:write_json:1",  # the figures before training
        f"{CHECKPOINT}:_write_tensors:3",  # of the second checkpoint nothing is there
        f"{CHECKPOINT}:_write_tensors:2",  # one file of two
        f"{CHECKPOINT}:_put_in_place:1",  # all files, not in place
        f"{CHECKPOINT}:set_best:1",  # in place, not yet known as the best
        f"{CHECKPOINT}:keep:1",  # older ones not removed
        "kill:discovla.trainer:write_json:1",  # the results
    ):
        job = runs.start(words, fault=kill)
        assert job.wait() == [-9], f"{kill}:\n{job.output()}"
    runs.train(words)
    assert_same(tmp_path / "run", wholes("torch"))
    assert not list((tmp_path / "run/checkpoints").glob(".*")), "what was half-written is still there"


@pytest.mark.slow
def test_workers_that_read_change_nothing_when_their_run_is_killed(tmp_path, drawn, wholes):
    words = [runs.write_config(tmp_path, drawn), *SCHEDULE, *WAYS["zero0"], "resume=true", "data.workers=2"]
    for step in (2, 7):
        kill_after(runs.start(words), tmp_path / "run", step)
    runs.train(words)
    assert_same(tmp_path / "run", wholes("zero0"))


def test_stopping_at_a_step_and_going_on_is_the_same_run(tmp_path, drawn, wholes):
    words = [runs.write_config(tmp_path, drawn), *SCHEDULE]
    job = runs.train([*words, "stop_at=2"])
    assert "text to video" not in job.output(), "a run that left early has no table"
    assert len(runs.losses(tmp_path / "run")) == 2
    runs.train([*words, "stop_at=7", "resume=true"])
    runs.train([*words, "resume=true"])
    assert_same(tmp_path / "run", wholes("torch"))


def test_a_finished_run_taken_up_again_gives_its_results_again(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "steps=2"]
    runs.train(words)
    before = (tmp_path / "run/results.json").read_bytes()
    runs.train([*words, "resume=true"])
    assert (tmp_path / "run/results.json").read_bytes() == before
    assert len(runs.losses(tmp_path / "run")) == 2


def test_a_run_on_frames_drawn_anew_goes_on_with_the_same_frames(tmp_path, drawn):
    sampling = ("data.sampling=clip2video", "data.sample_rate=5", "data.frames=4")
    words = [runs.write_config(tmp_path, drawn), "method=clip2video", "steps=5", *sampling]
    runs.train([*words, f"directory={tmp_path}/whole"])
    runs.train([*words, "stop_at=2"])
    runs.train([*words, "resume=true"])
    assert torch.equal(runs.losses(tmp_path / "run"), runs.losses(tmp_path / "whole"))
    job = runs.start([*words, "resume=true", "data.sampling_divisor=2"])
    assert job.wait() == [2]
    assert "data.sampling_divisor: the run began with 1, found 2" in job.output()


def test_a_checkpoint_older_than_an_option_of_the_data_began_with_its_default(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "steps=3", "method=clip4clip"]
    runs.train([*words, "stop_at=1"])
    (path,) = (tmp_path / "run/checkpoints").glob("step-*/state.json")
    state = json.loads(path.read_text())
    del state["sha256"]
    assert state["meta"]["schedule"].pop("data.sampling") == "discovla"
    path.write_text(json.dumps(state | {"sha256": checkpoint._sum_of_state(state)}))
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
def test_going_on_otherwise_than_the_run_began_is_refused(word, message, tmp_path, drawn, wholes):
    config, directory = runs.write_config(tmp_path, drawn), wholes("torch")
    before = (directory / "metrics.jsonl").read_bytes()
    job = runs.start([config, *SCHEDULE, f"directory={directory}", "resume=true", word])
    assert job.wait() == [2]
    assert job.output().splitlines()[-1].startswith("train.py: error: ")
    assert message in job.output()
    assert (directory / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", runs.METHODS)
def test_every_method_goes_on_as_if_never_stopped(name, tmp_path, drawn):
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
