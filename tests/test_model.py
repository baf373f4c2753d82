"""A run, an export or a plain CLIP can be loaded, embed videos and texts, be evaluated and exported."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from safetensors.torch import load_file

import discovla
from discovla import evaluate as evaluation
from discovla.cli import main
from discovla.config import ConfigError, read_config
from discovla.data.manifest import Clip, read_manifest
from discovla.data.sampling import clip_sampling
from discovla.data.tokens import Tokenizer
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import read_frames, resize_and_crop
from discovla.export import export, export_programs, measure_loss, parts_beyond_clip
from discovla.methods import build
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.model import LoadedRun, load_run, merge_tokens
from discovla.retrieval.record import EvaluationRecord
from discovla.retrieval.similarity import similarity_matrix
from discovla.tensor_files import write_tensors
from discovla.testing import relative_error
from discovla.towers.weights import load_weights, read_drawn_clip
from tests.runs import METHODS, TINY, train, write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory, drawn) -> Path:
    """Return the directory of a short run."""
    folder = tmp_path_factory.mktemp("run")
    train([write_config(folder, drawn), "steps=2"])
    return folder / "run"


def test_a_loaded_run_has_the_results_of_its_best_checkpoint(run, capsys):
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kept = json.loads((run / "results.json").read_text())
    name = next(name for name in kept if name.startswith("discovla, step") and "+" not in name)
    assert found["raw"] == kept[name]
    assert {"dual softmax", "QB-Norm"} <= set(found)


def test_evaluate_adds_the_results_of_every_query_to_an_older_run(run, capsys):
    (run / "evaluation-test.npz").unlink(missing_ok=True)
    (run / "report.html").unlink(missing_ok=True)
    assert main(["evaluate", str(run), "--report", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    record = EvaluationRecord.load(run / "evaluation-test.npz")
    assert record.ranks["raw"]["t2v"].mean() == pytest.approx(metrics["raw"]["t2v"]["MnR"])
    assert record.title in (run / "report.html").read_text()


@pytest.mark.parametrize("words", [("--split", "train"), ("--manifest", "other.jsonl")])
def test_a_report_is_of_the_test_or_val_split_of_the_run(run, words, capsys):
    assert main(["evaluate", str(run), "--report", *words]) == 2
    assert "expected the test or val split of the run's own clips" in capsys.readouterr().err


def test_a_single_checkpoint_can_be_loaded(run):
    checkpoint = next((run / "checkpoints").glob("step-*"))
    loaded = load_run(checkpoint)
    assert loaded.step == int(checkpoint.name.removeprefix("step-"))
    stored = load_file(checkpoint / "trained.safetensors")
    assert all(torch.equal(stored[n], p) for n, p in loaded.method.trained_state().items())


def test_a_lossy_export_is_refused_with_the_measured_recalls_unless_asked_for(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out"), "--open-clip", "--device", "cpu"]) == 2
    line = capsys.readouterr().err
    figures = r"\d+\.\d / \d+\.\d"
    assert "cannot hold fusion of frames in the vision tower (method.fused_vision_blocks); R@1 text" in line
    measured = (
        f"on 6 clips of val: the run {figures}, the plain CLIP {figures}, before training {figures}; --los"
    )
    assert re.search(measured, line)
    assert not (tmp_path / "out").exists()
    assert main(["export", str(run), str(tmp_path / "out"), "--open-clip", "--lossy", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("wrote ") == 3 and "the plain CLIP lacks fusion of frames" in printed.err
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/out")
    loaded, ids = load_run(run), open_clip.SimpleTokenizer(context_length=32)(["a red circle", "a box"])
    with torch.no_grad():
        ours = loaded.method.encode_text(ids, ids > 0).pooled
        assert relative_error(ours, model.eval().encode_text(ids)) <= 1e-5


def test_recalls_of_a_loss_are_those_of_evaluate(run):
    loaded = load_run(run)
    loss = measure_loss(loaded, "cpu")
    options = evaluation.EvalOptions(data=loaded.config.data, batch_size=loaded.config.eval_batch_size)
    clips = read_manifest(loaded.config.data.manifest, split="val")
    raw = evaluation.evaluate(loaded.method, clips, options)["raw"]
    assert loss.recalls["the run"] == (raw["t2v"]["R@1"], raw["v2t"]["R@1"])
    absent = loaded.config.data.model_copy(update={"manifest": Path("/absent.jsonl")})
    moved = replace(loaded, config=loaded.config.model_copy(update={"data": absent}))
    assert "not measured: /absent.jsonl" in str(measure_loss(moved, "cpu"))


LOSSLESS = ["method.fused_vision_blocks=0"]


@pytest.mark.parametrize("name", ["plain", "fusion", "lossless", "temporal", *METHODS])
def test_what_a_plain_clip_cannot_hold_is_known_for_every_method(name, tmp_path, drawn, clips):
    words = METHODS | {
        "plain": ["method=clip"],
        "fusion": [],
        "lossless": LOSSLESS,
        "temporal": [*LOSSLESS, "method.temporal=basis"],
    }
    config = read_config(write_config(tmp_path, drawn), words[name])
    method = build(config.model, config.method)
    for parameter in method.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    plain = CLIP(method.architecture, CLIPConfig(tune="frozen"))
    load_weights(plain, method.architecture, method.plain_weights())
    ours, theirs = (discovla.Model(m, config.data, device="cpu") for m in (method, plain))
    equal = np.allclose(similarity(ours, clips), similarity(theirs, clips), atol=1e-4)
    assert equal == (parts_beyond_clip(method) == ())
    assert equal == (name in {"plain", "lossless", "meanP"})


def test_an_export_without_loss_loads_in_open_clip_with_its_preprocessing(tmp_path, drawn, clips):
    train([write_config(tmp_path, drawn), "steps=1", *LOSSLESS])
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), str(out), "--open-clip"]) == 0
    reference, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    model = discovla.load(tmp_path / "run", device="cpu")
    frames = full_size_frames(model, clips[0])
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.fromarray(frame)) for frame in frames])
        features = reference.eval().encode_image(pixels, normalize=True).mean(0, keepdim=True)
    ours = torch.nn.functional.normalize(model.embed_videos([frames]).pooled)
    assert relative_error(ours, torch.nn.functional.normalize(features)) <= 1e-4
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~current_umask()}


def test_a_loaded_export_has_the_features_of_the_run_bit_for_bit(run, model, clips, tmp_path, monkeypatch):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    monkeypatch.chdir(tmp_path)
    exported = discovla.load(tmp_path / "out", device="cpu")
    np.testing.assert_array_equal(similarity(exported, clips), similarity(model, clips))
    assert exported.run.step == model.run.step


def test_an_export_of_other_pretrained_weights_is_refused(run, tmp_path):
    loaded = load_run(run)
    other = loaded.config.model.model_copy(update={"seed": 7})
    export(replace(loaded, config=loaded.config.model_copy(update={"model": other})), tmp_path)
    with pytest.raises(ValueError, match=r"adapter\.safetensors"):
        discovla.load(tmp_path)
    write_tensors(tmp_path / "adapter.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ConfigError, match="expected the config of a run in its metadata"):
        discovla.load(tmp_path)


def test_options_of_export_that_do_not_fit_are_named(run, tmp_path, capsys):
    for words, message in [
        (["--merge"], "--merge: renamed; use --open-clip"),
        (["--lossy"], "with --open-clip"),
    ]:
        assert main(["export", str(run), str(tmp_path / "out"), *words]) == 2
        assert message in capsys.readouterr().err


def test_a_drawn_export_has_the_format_of_the_shipped_asset(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "drawn.safetensors"), "--drawn"]) == 0
    assert read_drawn_clip(tmp_path / "drawn.safetensors").architecture == load_run(run).method.architecture


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(ConfigError, match="expected a run directory, a checkpoint or an export"):
        load_run(tmp_path)
    assert main(["evaluate", str(tmp_path / "nothing")]) == 2
    assert "found no checkpoint there" in capsys.readouterr().err


def test_evaluating_needs_a_run_or_a_matrix(capsys):
    assert main(["evaluate"]) == 2
    assert "expected either a RUN or --matrix" in capsys.readouterr().err


@pytest.fixture(scope="module")
def clips(drawn) -> list[Clip]:
    """Return the test clips of the drawn world."""
    return read_manifest(drawn, split="test")


@pytest.fixture(scope="module")
def model(run) -> discovla.Model:
    """Return the model of the run."""
    return discovla.load(run, device="cpu")


def full_size_frames(model, clip) -> np.ndarray:
    """Return the sampled frames of a clip at the size of the file."""
    return read_frames(clip.video, clip_sampling(model.data, clip)).frames


def test_import_discovla_imports_no_torch():
    code = "import sys, discovla; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        discovla.lode  # noqa: B018 (the access is the test)


def current_umask() -> int:
    """Return the umask of this process."""
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


@pytest.fixture
def ranked(monkeypatch) -> list[np.ndarray]:
    """Return the list of matrices that `evaluate` ranks, which grows as it is called."""
    matrices = []

    def kept(*arguments):
        matrices.append(similarity_matrix(*arguments))
        return matrices[-1]

    monkeypatch.setattr(evaluation, "similarity_matrix", kept)
    return matrices


def similarity(model, clips) -> np.ndarray:
    """Return the scores of all captions and clips."""
    text = model.embed_texts([caption for clip in clips for caption in clip.captions])
    video = model.embed_videos([(clip.video, clip.start, clip.end) for clip in clips])
    return model.similarity(text, video).numpy()


def test_similarity_is_bit_for_bit_what_evaluate_ranks_a_run_by(run, model, clips, ranked):
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    np.testing.assert_array_equal(similarity(model, clips), ranked[0])


@pytest.mark.parametrize("words", [METHODS["t2vparser"], METHODS["tightTransf"]], ids=["tokens", "pairs"])
def test_similarity_is_the_method_s_own_bit_for_bit(words, tmp_path, drawn, clips, ranked):
    config = read_config(write_config(tmp_path, drawn), words)
    method = build(config.model, config.method)
    options = evaluation.EvalOptions(data=config.data, batch_size=3, rerank=True)
    evaluation.evaluate(method, clips, options)
    model = discovla.Model(method, config.data, batch_size=3, device="cpu")
    np.testing.assert_array_equal(similarity(model, clips), ranked[0])


def test_paths_spans_and_frames_of_a_video_have_one_embedding(model, clips):
    frames = [full_size_frames(model, clip) for clip in clips[:3]]
    by_path = model.embed_videos([clip.video for clip in clips[:3]])
    mixed = [str(clips[0].video), (clips[1].video, None, None), torch.from_numpy(frames[2])]
    for videos in (frames, mixed):
        assert torch.equal(model.embed_videos(videos).pooled, by_path.pooled)
    first_half = model.embed_videos([(clips[0].video, 0.0, 1.0)])
    assert not torch.equal(first_half.pooled[0], by_path.pooled[0])


def test_more_frames_than_the_model_sees_are_thinned_out_evenly(model, clips):
    frames = np.repeat(full_size_frames(model, clips[0]), 5, axis=0)[2:-2]
    kept = [round(i * (len(frames) - 1) / (model.data.frames - 1)) for i in range(model.data.frames)]
    few, many = model.embed_videos([frames[kept]]), model.embed_videos([frames])
    assert torch.equal(few.pooled, many.pooled)


def test_bad_videos_are_an_error_or_left_out_with_reasons(model, clips, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    videos = [clips[0].video, broken, clips[1].video, tmp_path / "absent.mp4"]
    with pytest.raises(DecodeError, match=r"broken\.mp4"):
        model.embed_videos(videos)
    kept = model.embed_videos(videos, on_error="skip")
    assert kept.index.tolist() == [0, 2] and len(kept) == 2
    assert [(clip.id, Path(clip.video).name) for clip in kept.refused] == [
        ("1", "broken.mp4"),
        ("3", "absent.mp4"),
    ]
    assert "no such file" in kept.refused[1].reason
    good = model.embed_videos([clips[0].video, clips[1].video])
    assert torch.equal(kept.pooled, good.pooled)
    with pytest.raises(ValueError, match=r"at least one that can be read, found none; the first .*broken"):
        model.embed_videos([broken], on_error="skip")


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ([], "at least one, found none"),
        ([3], r"videos\[0\]: expected a path, .* found int"),
        (
            ["a.mp4", np.zeros((4, 8, 8), np.uint8)],
            r"videos\[1\]: expected frames f y x 3 of uint8, found shape",
        ),
        ([np.zeros((4, 8, 8, 3), np.float32)], "of float32"),
        ([np.zeros((0, 8, 8, 3), np.uint8)], r"found shape \(0, 8, 8, 3\)"),
        ([("a.mp4", "0:10", None)], r"videos\[0\]: expected start and end in seconds, found '0:10', None"),
    ],
)
def test_inputs_that_are_no_videos_are_named(model, videos, message):
    with pytest.raises(ValueError, match=message):
        model.embed_videos(videos)


def test_texts_that_cannot_be_embedded_are_named(model, run):
    for texts, message in [
        ([], "found none"),
        ("a dot", "a list of strings"),
        (["x " * 99], "expected at most 32 tokens each, found"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.embed_texts(texts)
    cut = discovla.load(run, device="cpu", data={"long_captions": "truncate"})
    assert len(cut.embed_texts(["x " * 99])) == 1


def test_embeddings_are_sliced_joined_saved_and_read(model, clips, tmp_path):
    videos = [clips[0].video, tmp_path / "absent.mp4", clips[1].video, clips[2].video]
    whole = model.embed_videos(videos, on_error="skip")
    joined = discovla.Embeddings.concatenate([whole[:1], whole[[1, 2]]])
    assert torch.equal(joined.pooled, whole.pooled) and joined.index.tolist() == [0, 2, 3]
    assert torch.equal(whole[torch.tensor([False, True, False])].pooled, whole.pooled[1:2])
    assert whole.numpy().shape == (3, 32)
    whole.save(tmp_path / "e.safetensors")
    read = discovla.Embeddings.load(tmp_path / "e.safetensors")
    assert torch.equal(read.pooled, whole.pooled) and read.refused == whole.refused
    write_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"other\.safetensors: expected embeddings, found the tensors x"):
        discovla.Embeddings.load(tmp_path / "other.safetensors")


def test_a_plain_clip_equals_open_clip(tmp_path, clips):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    reference = open_clip.CLIP(**TINY).eval()
    write_tensors(tmp_path / "weights.safetensors", reference.state_dict())
    model = discovla.load(f"clip:{tmp_path}/tiny.json@{tmp_path}/weights.safetensors", device="cpu")
    ids = open_clip.SimpleTokenizer(context_length=32)(["a red circle", "two blue boxes"])
    frames = model.embed_videos([full_size_frames(model, clips[0])[:1]])
    assert model.run is None
    with torch.no_grad():
        expected = reference.encode_text(ids)
        image = resize_and_crop(Image.fromarray(full_size_frames(model, clips[0])[0]), 64)
        mean, std = (torch.tensor(x)[:, None, None] for x in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
        pixels = (torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 - mean) / std
        feature = reference.encode_image(pixels[None], normalize=True)
    assert relative_error(model.embed_texts(["a red circle", "two blue boxes"]).pooled, expected) <= 1e-5
    assert relative_error(frames.pooled, feature) <= 1e-4


def test_the_drawn_clip_is_a_model_and_wrong_names_are_named(clips):
    model = discovla.load("clip:drawn", device="cpu", data={"frames": 4})
    scores = model.similarity(model.embed_texts(["a red circle"]), model.embed_videos([clips[0].video]))
    assert scores.shape == (1, 1)
    for name in ("clip:", "clip:ViT-B-32", "clip:@openai"):
        with pytest.raises(ConfigError, match="expected clip:ARCH@TAG, clip:ARCH@FILE or clip:drawn"):
            discovla.load(name)
    with pytest.raises(ValueError, match="expected a name open_clip knows"):
        discovla.load("clip:NoSuch@openai")
    with pytest.raises(ConfigError, match=r"data\.frames: .* found 0"):
        discovla.load("clip:drawn", data={"frames": 0})


@pytest.mark.parametrize(
    ("words", "per_block", "message"),
    [
        ("method=clip", 0, "x: merge: expected at least 1 token a block, found 0"),
        (
            "method=clip method.merge=tome",
            2,
            "x: merge: expected a model that was trained with all tokens, found method.merge = 'tome'",
        ),
        (
            "method=t2vparser method.stan_layers=2 method.decomposition_layers=2",
            2,
            "x: merge: expected method.stan_layers = 0 with 'tome', since STAN reads every patch, found 2",
        ),
    ],
)
def test_models_whose_tokens_cannot_merge_are_refused_by_name(words, per_block, message, tmp_path, drawn):
    config = read_config(write_config(tmp_path, drawn), words.split())
    with pytest.raises(ConfigError) as error:
        merge_tokens(build(config.model, config.method), per_block, "x")
    assert str(error.value) == message


def test_evaluate_merges_the_tokens_of_a_run(run, clips, capsys):
    assert main(["evaluate", str(run), "--merge", "2", "--no-rerank", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    merged = discovla.load(run, device="cpu", merge=2)
    options = evaluation.EvalOptions(data=merged.data, batch_size=merged.batch_size)
    assert found["raw"] == evaluation.evaluate(merged.method, clips, options)["raw"]
    assert found["evaluation"]["merge"] == 2 and merged.method.config.merge == "tome"


def test_bf16_is_near_fp32(run, model, clips):
    narrow = discovla.load(run, device="cpu", precision="bf16").embed_videos([clips[0].video]).pooled
    wide = model.embed_videos([clips[0].video]).pooled
    assert narrow.dtype == torch.float32
    assert 0 < relative_error(narrow, wide) < 0.05


def test_new_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
        write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


WITHOUT_DISCOVLA = """
import sys
sys.modules["discovla"] = None  # any import of it fails
import torch
data = torch.load("inputs.pt")
results = {}
for side, inputs in data.items():
    encoder = torch.export.load(f"out/{side}_encoder.pt2").module()
    for n in (1, 3):
        results[f"{side} {n}"] = encoder(*(x[:n] for x in inputs))
torch.save(results, "results.pt")
assert not any(name.startswith("discovla.") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fusion", "seqTransf", "t2vparser"])
def test_exported_programs_run_without_discovla_at_any_batch_size(name, tmp_path, drawn):
    config = read_config(write_config(tmp_path, drawn), ({"fusion": []} | METHODS)[name])
    method = build(config.model, config.method).eval()
    export_programs(LoadedRun(config=config, method=method, step=1), tmp_path / "out")
    frames = torch.randint(0, 256, (3, 8, 64, 64, 3), dtype=torch.uint8)
    frame_mask = torch.arange(8) < torch.tensor([[8], [5], [1]])
    ids, mask = Tokenizer(32).encode(["a red circle", "a", "a blue box turns to the left and then right"])
    torch.save({"video": (frames, frame_mask), "text": (ids,)}, tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_DISCOVLA], cwd=tmp_path, check=True)
    results = torch.load(tmp_path / "results.pt")
    with torch.no_grad():
        expected = {"video": method.encode_video(frames, frame_mask), "text": method.encode_text(ids, mask)}
    for side, embedding in expected.items():
        for n in (1, 3):
            outputs = results[f"{side} {n}"]
            assert relative_error(outputs["pooled"], embedding.pooled[:n]) <= 1e-4
            assert ("tokens" in outputs) == (embedding.tokens is not None)
            if embedding.tokens is not None:
                real = embedding.mask[:n]
                assert torch.equal(outputs["mask"], real)
                assert relative_error(outputs["tokens"][real], embedding.tokens[:n][real]) <= 1e-4


def test_a_method_that_torch_export_cannot_follow_is_named(tmp_path, drawn):
    config = read_config(write_config(tmp_path, drawn), METHODS["seqLSTM"])
    method = build(config.model, config.method)
    with pytest.raises(ValueError, match=r"torch\.export cannot follow clip4clip, video"):
        export_programs(LoadedRun(config=config, method=method, step=1), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert method.vision.impl == method.text.impl == "auto"
