"""The report says what a run's files hold, also of a killed run, of several runs, and of damaged files."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest

from discovla.cli import main
from discovla.report.data import RunFacts, SplitFacts
from discovla.report.writer import save_record, save_reliability, try_report, write_comparison, write_report
from discovla.retrieval.metrics import retrieval_metrics
from discovla.retrieval.ranks import text_to_video_ranks, video_to_text_ranks
from discovla.retrieval.record import EvaluatedClip, ScoreCollector

CLIPS = 30
EVIL = '</p><script>alert("x")</script>'


class Page(HTMLParser):
    """Collects the text of a page, and fails on elements that are not closed."""

    void = frozenset({"meta", "br", "img", "link", "hr"})

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.tags = [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in {"style", "script"}:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def scored(seed, lead, videos):
    """Return a matrix whose diagonal leads by `lead`, its ranks and its record."""
    matrix = np.random.default_rng(seed).normal(size=(CLIPS, CLIPS)) + lead * np.eye(CLIPS)
    groups = np.arange(CLIPS)
    collector = ScoreCollector(groups, CLIPS)
    collector.add(groups, slice(0, CLIPS), matrix)
    both = {"t2v": text_to_video_ranks(matrix), "v2t": video_to_text_ranks(matrix)}
    clips = tuple(
        EvaluatedClip(
            id=f"clip{i}{EVIL if i == 0 else ''}",
            video=str(videos[i]),
            captions=(f"q{i} {EVIL}",),
            split="test",
        )
        for i in range(CLIPS)
    )
    return retrieval_metrics(matrix), replace(collector.record({"raw": both}), clips=clips)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return paths of clips, of which the first ten are videos and the others are missing."""
    folder = tmp_path_factory.mktemp("videos")
    paths = [folder / f"{i}.mp4" for i in range(CLIPS)]
    for path in paths[:10]:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=5)
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
            for frame in np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return paths


def make_run(directory: Path, videos, *, seed=0, lr=0.001, finished=True) -> Path:
    """Write the files of a run."""
    directory.mkdir(parents=True)
    config = {"directory": str(directory), "method": {"name": "discovla"}, "optim": {"lr": lr}}
    config["data"] = {"manifest": str(directory / "m.jsonl"), "frames": 4, "test_split": EVIL}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "versions.json").write_text(json.dumps({"torch": "2.13", "git_commit": "abc123"}))
    numbers = {"train": 50, "val": 30, "test": 30}
    RunFacts(
        splits={use: SplitFacts(name=use, clips=n, captions=2 * n) for use, n in numbers.items()},
        pairs=100,
        total_steps=40,
        steps_per_epoch=10,
        parameters=1000,
        trained_parameters=77,
        device="cpu",
        weights={"name": "PE-Core-B-16 meta", "source": EVIL, "licence": "Apache-2.0"},
    ).save(directory)
    lines = []
    rows = {}
    for name, lead in (("test-untrained", 1.0), ("val-start", 1.0), ("val", 3.0), ("test", 3.0)):
        metrics, record = scored(seed, lead, videos)
        step = 0 if lead == 1.0 else 40
        title = "zero-shot, discovla untrained" if name == "test-untrained" else f"discovla, step {step}"
        if finished or name != "test":
            save_record(directory, name, record, title=title, step=step)
        if "test" in name:
            rows[title] = metrics
        else:
            lines.append({"kind": "val", "step": step, **metrics, "seconds": 1.0 + step})
    for step in range(40 if finished else 25):
        values = {"loss": 2 / (step + 1), "video": 1.0, "frame": 0.5, "lr": lr, "grad_norm": 1.0}
        lines.append(
            {"kind": "train", "step": step, **values, "clips_per_second": 12.5, "seconds": 1.0 + step}
        )
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bad = {"id": f"bad{EVIL}", "video": "/x/<b>.mp4", "reason": "no video stream"}
    (directory / "quarantine.jsonl").write_text(json.dumps(bad) + "\n")
    if finished:
        (directory / "results.json").write_text(json.dumps(rows))
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory, videos):
    directory = make_run(tmp_path_factory.mktemp("runs") / "one", videos)
    write_report(directory)
    return directory


@pytest.fixture(scope="module")
def page(run):
    return (run / "report.html").read_text()


def test_a_report_says_what_the_files_of_the_run_hold(run, page):
    text = Page(page).text
    results = json.loads((run / "results.json").read_text())
    for name, metrics in results.items():
        assert name in text
        for direction in ("t2v", "v2t"):
            assert f"{metrics[direction]['R@1']:.1f}" in text
    for claim in (
        "Finished: 40 of 40 steps",
        "30 captions, 30 clips",
        "before training",
        "1 clips were refused",
        "no video stream",
        "1,000, of which 77 train",
        "PE-Core-B-16 meta",
        "licence of the weights",
        "12.5 (median of steps",
        "abc123",
        "100 training pairs",
        "optim.lr",
        "Gradient norm",
        "method.name",
    ):
        assert claim in text, claim
    assert text.index("optim.lr") < text.index("All keys")


def test_a_report_is_one_file_without_scripts_or_other_addresses(page):
    tags = Page(page).tags
    assert not {"script", "link", "img", "iframe", "object"} & set(tags)
    addresses = re.findall(r'(?:href|src|url)\s*[=(]\s*"?([^")>]*)', page)
    assert addresses
    assert all(address.startswith(("#", "data:image/jpeg;base64,")) for address in addresses)
    assert "prefers-color-scheme:dark" in page


def test_captions_names_and_reasons_are_escaped(page):
    assert EVIL not in page
    text = Page(page).text
    assert f"q0 {EVIL}" in text and f"clip0{EVIL}" in text and f"bad{EVIL}" in text


def test_the_ten_best_and_worst_queries_show_five_clips_and_mark_the_true_one(page):
    queries = page.split('<div class="query">')[1:]
    assert len(queries) == 20
    for query in queries:
        clips = query.split('<div class="clip')[2:]
        assert len(clips) in {5, 6}
        assert sum(clip.startswith(" own") for clip in clips) == 1
        assert query.count('class="tag">true') == 1
    ranks = [int(re.search(r"rank (\d+)", query).group(1)) for query in queries]
    assert set(ranks[:10]) == {1} and ranks[10:] == sorted(ranks[10:], reverse=True)


def test_clips_that_cannot_be_read_are_said_in_one_sentence(page, run):
    assert re.search(r"\d+ clips are shown without frames: \S*\.mp4", Page(page).text)
    assert page.count("data:image/jpeg") == len(list((run / "report_frames").glob("*.jpg"))) > 0
    assert "no frames</span>" in page


def test_frames_are_decoded_once(run, monkeypatch):
    for path in (run / "report_frames").glob("*.jpg"):
        path.write_bytes(b"kept")
    write_report(run)
    page = (run / "report.html").read_text()
    assert page.count("base64,a2VwdA==") == len(list((run / "report_frames").glob("*.jpg")))


def test_a_report_is_equal_on_every_call(run, tmp_path):
    pages = [write_report(run, tmp_path / f"{i}.html")[0].read_text() for i in range(2)]
    assert pages[0] == pages[1]


def test_a_killed_run_has_a_report_of_its_validation(tmp_path, videos):
    run = make_run(tmp_path / "killed", videos, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    rows = {"zero-shot, mean pooling": scored(0, 1.0, videos)[0]}
    (run / "before.json").write_text(json.dumps({"rows": rows, "fingerprint": {"a": 1}}))
    pictures = try_report(run)
    text = Page((run / "report.html").read_text()).text
    assert "Not finished: 25 of 40 steps" in text
    assert "Validation split: 30 captions" in text
    assert "optimistic" in text
    assert "zero-shot, mean pooling" in text and "fingerprint" not in text
    assert {
        "Losses",
        "Learning rate",
        "Gradient norm",
        "Validation R@1",
        "Similarities",
        "Worst queries",
    } <= set(pictures)
    assert all(pixels.dtype == np.uint8 and pixels.shape[2] == 3 for pixels in pictures.values())


def test_a_run_before_its_first_step_says_what_is_missing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    write_report(tmp_path)
    text = Page((tmp_path / "report.html").read_text()).text
    for claim in (
        "No step taken yet",
        "No split was measured yet",
        "No step was recorded yet",
        "no config.json",
    ):
        assert claim in text


def test_the_reliability_of_an_index_is_a_plot(tmp_path, videos):
    run = make_run(tmp_path / "run", videos)
    bins = [
        {"low": 0.0, "high": 0.1, "queries": 30, "probability": 0.05, "right": 0.0},
        {"low": 0.9, "high": 1.0, "queries": 10, "probability": 0.95, "right": 0.9},
    ]
    save_reliability(run, bins)
    text = Page(write_report(run)[0].read_text()).text
    assert "Best hits of 40 queries, half of them without an answer in the index" in text


def test_damaged_files_become_notes(tmp_path, videos):
    run = make_run(tmp_path / "damaged", videos)
    (run / "evaluation-test.npz").write_bytes(b"x")
    (run / "facts.json").write_text("[1]")
    (run / "versions.json").write_text("{")
    (run / "config.json").write_text(json.dumps({"method": {"name": "gone"}}))
    write_report(run)
    text = Page((run / "report.html").read_text()).text
    for name in ("evaluation-test.npz", "facts.json", "versions.json", "cannot read the stored config"):
        assert name in text, name


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    assert try_report(tmp_path) == {}
    assert "report.html not written" in caplog.text


def test_several_runs_are_shown_side_by_side(tmp_path, videos, capsys, monkeypatch):
    runs = [make_run(tmp_path / name, videos, seed=i, lr=0.001 * (i + 1)) for i, name in enumerate("ab")]
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'both.html'}\n"
    text = Page((tmp_path / "both.html").read_text()).text
    assert "a: discovla, step 40" in text and "b: discovla, step 40" in text
    assert "test: b minus a" in text
    assert "optim.lr 0.001 0.002" in text


def test_runs_of_equal_names_are_shown_by_their_paths(tmp_path, videos):
    runs = [make_run(tmp_path / name / "run", videos) for name in "ab"]
    text = Page(write_comparison(runs, tmp_path / "both.html").read_text()).text
    assert f"test: {runs[1]} minus {runs[0]}" in text


def test_one_run_is_reported_by_the_command(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"


def test_another_folder_is_an_error_in_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "expected a run directory" in capsys.readouterr().err
