import json
import subprocess
import sys

import av
import numpy as np
import pytest

from discovla.cli import main
from discovla.data.manifest import read_manifest


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
        (["evaluate", "--matrix", "no.npy"], "no.npy: No such file or directory"),
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


def test_the_command_runs_as_a_process():
    code = "import sys; from discovla.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in ("frames", "prepare", "draw", "evaluate"):
        assert command in done.stdout
