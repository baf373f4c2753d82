import json
import subprocess
import sys

import av
import numpy as np
import pytest

from discovla.cli import COMMANDS, main
from discovla.data.manifest import read_manifest
from discovla.methods import METHODS


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for level in range(0, 240, 20):
            picture = np.full((32, 32, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_evaluate_prints_one_json_object_with_the_promised_keys(tmp_path, capsys):
    np.save(tmp_path / "s.npy", np.array([[1.0, 1.0], [0.0, 2.0]]))
    assert main(["evaluate", "--matrix", str(tmp_path / "s.npy"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    keys = ["R@1", "R@5", "R@10", "R@50", "MdR", "MnR"]
    assert list(found) == ["t2v", "v2t"]
    for direction in found.values():
        assert list(direction) == [*keys, "optimistic"]
        assert list(direction["optimistic"]) == keys
    assert found["t2v"]["R@1"] == 50
    assert found["t2v"]["MdR"] == 1.5
    assert found["t2v"]["optimistic"]["R@1"] == 100


def test_evaluate_takes_groups(tmp_path, capsys):
    np.save(tmp_path / "s.npy", np.array([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0]]))
    (tmp_path / "g.json").write_text("[0, 1, 1]")
    words = ["--matrix", str(tmp_path / "s.npy"), "--groups", str(tmp_path / "g.json"), "--json"]
    assert main(["evaluate", *words]) == 0
    assert json.loads(capsys.readouterr().out)["t2v"]["MnR"] == pytest.approx(4 / 3)


def test_evaluate_without_json_prints_a_table(tmp_path, capsys):
    np.save(tmp_path / "s.npy", np.eye(3))
    assert main(["evaluate", "--matrix", str(tmp_path / "s.npy")]) == 0
    assert "text to video" in capsys.readouterr().out


def test_frames_writes_what_the_model_sees(video, tmp_path, capsys):
    assert main(["frames", str(video), "--num-frames", "3", "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    assert json.loads((tmp_path / "out/frames.json").read_text())
    assert "wrote 3 frames" in capsys.readouterr().out


def test_prepare_turns_a_table_into_a_manifest(video, tmp_path, capsys):
    (tmp_path / "t.csv").write_text(f"video,caption\n{video.name},a square turns grey\n")
    assert main(["prepare", "csv", str(tmp_path / "t.csv"), "--out", str(tmp_path / "m.jsonl")]) == 0
    assert read_manifest(tmp_path / "m.jsonl")[0].captions == ("a square turns grey",)
    assert "train: 1 clips, 1 captions" in capsys.readouterr().out


def test_draw_writes_a_world_of_the_sizes_asked_for(tmp_path, capsys):
    sizes = ["--train", "2", "--val", "1", "--test", "1", "--siblings", "0"]
    assert main(["draw", str(tmp_path / "world"), "--workers", "1", *sizes]) == 0
    clips = read_manifest(tmp_path / "world/manifest.jsonl")
    assert [clip.split for clip in clips] == ["train", "train", "val", "test"]
    assert all(clip.video.is_file() for clip in clips)
    assert "manifest.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["evaluate", "--matrix", "no.npy"],
            "no.npy: expected a matrix of similarities (texts x videos), found none",
        ),
        (["frames", "no.mp4", "--out", "o"], "no.mp4"),
        (["draw", "w", "--train", "-1"], "train: expected at least 0 clips, got -1"),
        (["prepare", "csv", "no.csv", "--out", "m.jsonl"], "no.csv"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("discovla: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def run_python(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def test_python_m_discovla_is_the_command():
    done = run_python("-m", "discovla", "--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert command in done.stdout


def test_help_does_not_import_torch():
    code = "import sys, discovla.cli as c\ntry: c.main(['--help'])\nfinally: print('torch' in sys.modules)"
    assert run_python("-c", code).stdout.endswith("\nFalse\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_text(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"usage: discovla {command} " in capsys.readouterr().out


def test_config_prints_where_each_value_is_from(tmp_path, capsys):
    (tmp_path / "c.toml").write_text(
        'directory = "x"\nseed = 42\n[method]\nname = "clip"\n[data]\nmanifest = "m"\nframes = 4\n'
    )
    assert main(["config", str(tmp_path / "c.toml"), "optim.lr=1e-3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "data.frames = 4  (file; default 12)" in lines
    assert "seed = 42  (file)" in lines
    assert "optim.lr = 0.001  (override; default 0.0006)" in lines
    assert "resume = false" in lines


def test_config_without_a_file_prints_the_defaults_of_a_method(capsys):
    assert main(["config", "method.name=clip4clip", "--json"]) == 0
    keys = {key["key"]: key for key in json.loads(capsys.readouterr().out)}
    assert keys["directory"]["default"] == "(required)"
    assert keys["method.name"] | {"doc": ""} == {
        "key": "method.name",
        "value": "clip4clip",
        "default": "clip4clip",
        "type": '"clip4clip"',
        "doc": "",
        "source": "override",
    }
    assert keys["method.head"]["source"] == "default"
    assert keys["batch_size"]["type"] == "integer >= 1"


def test_config_as_markdown_has_a_row_for_every_key_of_every_method(capsys):
    assert main(["config", "--markdown"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    for name, method in METHODS.items():
        for field in method.Config.model_fields:
            assert any(row.startswith(f"| `method.{field}` |") for row in rows), (name, field)
    assert len([row for row in rows if row.startswith("| `method.name`")]) == len(METHODS)
    assert any(row.startswith("| `data.stills.count` | `(required)` | `integer >= 1` |") for row in rows)


def test_config_of_a_wrong_override_is_one_line(capsys):
    assert main(["config", "optim.lrr=1"]) == 2
    assert capsys.readouterr().err == (
        "discovla: error: config: optim.lrr: unknown key; did you mean 'lr'?\n"
    )
