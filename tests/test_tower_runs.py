"""Runs of a whole trainer on towers that are no plain CLIP: resumed, evaluated and opened."""

import json

import pytest
import torch

import discovla
from discovla.testing import tiny_towers
from tests import runs

STEPS = ("steps=4", "checkpoint_every=2", "evaluate_every=4", "batch_size=8", "data.frames=8")
# killed while the checkpoint of step 4 is written, which leaves that of step 2
KILL = "kill:discovla.engine.checkpoint:_write_tensors:3"


def words_of(tower, folder, drawn, directory):
    """Config and overrides of a run on the tiny towers of a family, whose architecture is a file."""
    architecture = tiny_towers()[tower].to_dict() | {"vocab_size": 49408 if tower == "pe" else 60}
    config = runs.write_config(folder, drawn)
    (folder / "tiny.json").write_text(json.dumps(architecture))
    words = [
        config,
        *STEPS,
        f"directory={directory}",
        "data.context_length=12",
        "data.long_captions=truncate",
    ]
    if tower == "siglip":
        tokenizers = pytest.importorskip("tokenizers")
        words_known = ["<pad>", "</s>", "<unk>", "red", "circle", "moves", "left"]
        vocabulary = {word: i for i, word in enumerate(words_known)}
        library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
        library.save(str(folder / "tokenizer.json"))
        words += [f"data.tokenizer=gemma:{folder}/tokenizer.json", "method.loss=sigmoid"]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["pe", "siglip"])
def test_a_run_on_other_towers_resumes_and_opens(tower, tmp_path, drawn):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    runs.train(words_of(tower, tmp_path, drawn, whole), timeout=300)
    words = [*words_of(tower, tmp_path, drawn, resumed), "resume=true"]
    job = runs.start(words, fault=KILL)
    assert job.wait(300) == [-9], job.output()
    runs.train(words, timeout=300)
    ours, theirs = runs.tensors(resumed, 4), runs.tensors(whole, 4)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((resumed / "results.json").read_text()) == json.loads(
        (whole / "results.json").read_text()
    )
    model = discovla.load(resumed, device="cpu")
    assert len(model.embed_texts(["red circle moves left", "left circle"])) == 2
