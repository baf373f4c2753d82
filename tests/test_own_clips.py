"""Runs on few clips of a user's own: without a test split, with fewer pairs than a batch, with a rhythm."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from discovla import terminal
from discovla.cli import main
from discovla.commands import draw
from discovla.commands.train import make_drawn_shards
from discovla.config import read_config
from discovla.data.manifest import read_manifest, write_manifest
from tests import runs
from tests.test_bad_input import error_line


@pytest.fixture(scope="module")
def own(tmp_path_factory, drawn) -> tuple[Path, str]:
    """Return the folder and the output of a run on 21 clips without a test split, at the default batch."""
    folder = tmp_path_factory.mktemp("own")
    clips = {split: read_manifest(drawn, split=split) for split in ("train", "val")}
    write_manifest(folder / "few.jsonl", clips["train"][:13] + clips["val"][:8])
    config = runs.write_config(folder, folder / "few.jsonl")
    config.write_text(re.sub(r"^batch_size.*\n", "", config.read_text(), flags=re.M))
    words = ["steps=5", "evaluate_every=2", "checkpoint_every=3", "method.alpha=0", "method.beta=0"]
    return folder, runs.train([config, *words]).output()


def test_figures_of_the_validation_split_are_said_to_be_optimistic(own):
    folder, output = own
    assert output.count("no test split: the final figures are of 'val', on which the best step is") == 2
    assert "\nno test split: the final figures are of 'val'" in output.partition("has a standard error of")[2]
    config = read_config(folder / "run/config.json")
    assert config.data.test_split == config.data.val_split == "val"


def test_a_default_batch_size_is_reduced_to_the_data(own):
    folder, output = own
    (line,) = [line for line in output.splitlines() if line.startswith("warning: batch_size: ")]
    size, default, pairs = map(int, re.findall(r"\d+", line))
    assert default == 128 and pairs - 8 < size <= pairs and size % 8 == 0
    assert read_config(folder / "run/config.json").batch_size == size


def test_a_run_with_a_reduced_batch_and_no_test_split_resumes(own):
    folder, _ = own
    words = [folder / "small.toml", "steps=5", "method.alpha=0", "method.beta=0", "resume=true"]
    assert "resuming at step 5 of 5" in runs.train(words).output()


def test_clips_that_are_drawn_before_training_leave_stdout_to_the_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(draw, "draw_world", lambda out, **_: print("drawn") or out / "manifest.jsonl")
    config = read_config("quickstart", ["data.manifest=data/drawn_world/manifest.jsonl"])
    terminal.start()
    make_drawn_shards(config, "quickstart")
    terminal.close()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"{tmp_path}/data/drawn_world: no clips there yet, drawing them\n"


@pytest.mark.slow
def test_training_prints_json_lines_or_only_the_table_if_asked_to(tmp_path, drawn):
    def train(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "discovla", "train", *map(str, words)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True)

    config = runs.write_config(tmp_path, drawn)
    events = [
        json.loads(line)
        for line in train(config, "--json", "steps=2", "evaluate_every=1").stdout.splitlines()
    ]
    events = [event for event in events if event["kind"] != "progress"]
    kinds = [event["kind"] for event in events if event["kind"] != "checkpoint"]
    assert kinds == ["start", "val", "train", "val", "train", "val", "results"]
    assert events[0]["splits"]["test"]["clips"] == 8 and events[0]["total_steps"] == 2
    assert events[-1]["rows"] == json.loads((tmp_path / "run/results.json").read_text())
    done = train(config, "steps=2", "evaluate_every=1", "resume=true", "--quiet")
    assert done.stderr == ""
    assert [line.split()[0] for line in done.stdout.splitlines()[3:5]] == ["zero-shot,", "zero-shot,"]


def test_a_batch_size_that_the_user_set_is_refused_if_too_large(own):
    folder, _ = own
    line = error_line(runs.start([folder / "small.toml", "batch_size=100", f"directory={folder}/other"]))
    assert re.search(r"batch_size: expected at most the \d+ training pairs, found 100", line)


def test_evaluate_every_is_the_only_rhythm_besides_the_last_step(own):
    assert [record["step"] for record in runs.records(own[0] / "run", "val")] == [0, 2, 4, 5]


def test_training_prints_what_runs_each_validation_and_where_the_results_are(own):
    folder, output = own
    for name in ("run", "model", "parameters", "device", "kernels", "clips", "steps", "losses", "report"):
        assert re.search(rf"^{name}  +\S", output, flags=re.M), name
    assert re.search(r"^steps +5 of 32 pairs, 5 epochs$", output, flags=re.M)
    assert re.search(r"^losses +video$", output, flags=re.M)
    validations = re.findall(r"^step (\d+): val R@1 [\d.]+ t2v, [\d.]+ v2t \((.*)\)$", output, flags=re.M)
    assert [step for step, _ in validations] == ["0", "2", "4", "5"]
    assert [note for _, note in validations][:2] == ["before training", "best so far"]
    assert f"evaluate    discovla evaluate {folder}/run\n" in output


def test_evaluate_uses_the_split_of_the_run_and_may_leave_re_ranking_and_clips_out(own, capsys, tmp_path):
    folder, _ = own
    words = ["evaluate", str(folder / "run"), "--json", "--device", "cpu"]
    assert main(words) == 0
    rows = json.loads(capsys.readouterr().out)
    assert set(rows) == {"evaluation", "raw", "dual softmax", "QB-Norm"}
    step = rows["evaluation"].pop("step")
    numbers = {"split": "val", "clips": 6, "captions": 6}
    assert rows["evaluation"] == {"run": f"{folder}/run", "method": "discovla", **numbers}
    assert step in (2, 4, 5)
    assert main([*words, "--no-rerank"]) == 0
    assert json.loads(capsys.readouterr().out)["raw"] == rows["raw"]
    assert main([*words[:2], *words[3:], "--no-rerank"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{folder}/run: discovla, step {step}", "6 clips, 6 captions of split 'val'"]
    assert re.fullmatch(r"R@1 of 6 clips has a standard error of \d+\.\d points", lines[-1])
    val = read_manifest(folder / "few.jsonl", split="val")
    quarantine = tmp_path / "quarantine.jsonl"
    bad = [{"id": clip.id, "video": "v", "reason": "r"} for clip in val[1:]]
    quarantine.write_text("".join(json.dumps(row) + "\n" for row in bad))
    assert main([*words, "--no-rerank", "--quarantine", str(quarantine)]) == 0
    assert json.loads(capsys.readouterr().out)["raw"]["t2v"]["R@1"] == 100.0


def test_the_packaged_config_for_own_clips_needs_no_frame_captions_and_leaves_the_batch_size_open():
    config = read_config("own")
    assert config.method.alpha == config.method.beta == 0
    assert "batch_size" not in config.model_fields_set
    assert config.data.test_split == "test" and "test_split" not in config.data.model_fields_set


def test_a_finished_run_in_the_same_directory_is_kept_after_a_line_that_says_so(own):
    folder, _ = own
    words = [folder / "small.toml", "steps=1", "method.alpha=0", "method.beta=0"]
    lines = runs.train(words).output().splitlines()
    kept = f"{folder}/run holds a finished run: it is kept as {folder}/run.1, and a new run starts here; "
    (line,) = [line for line in lines if line.startswith(f"warning: {kept}")]
    assert "resume=true" in line and "directory=PATH" in line
    assert len(runs.records(folder / "run.1")) == 5 and len(runs.records(folder / "run")) == 1
