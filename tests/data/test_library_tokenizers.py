"""Tokenizers of Hugging Face, beside open_clip's use of them."""

import json

import pytest
import torch

from discovla.data.config import DataConfig
from discovla.data.tokens import LIBRARY_KINDS, LibraryTokenizer, make_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
TEXTS = [
    "A man, who rides: a horse!",
    "two   dogs\nrun",
    "Don't stop",
    "man man man man man man man man man man man man",
    "",
]


def write_tokenizer(folder, kind):
    """A word-level tokenizer with an end token, and a start token where the kind has one."""
    words = ["a", "man", "who", "rides", "horse", "two", "dogs", "run", "dont", "stop"]
    words += ["A", "Don't", "stop,", "man,", "rides:", "horse!"]
    special = {"siglip": ["<pad>x", "<pad>"], "xlm-v": ["<s>", "<pad>", "</s>"], "bert": ["[PAD]"]}
    first = special.get(kind, ["<pad>", "</s>"])
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*first, "</s>", "<unk>", *words]))}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    single = "<s> $A </s>" if kind == "xlm-v" else "$A </s>"
    tokens = [(token, vocabulary[token]) for token in ("<s>", "</s>") if token in vocabulary]
    library.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=tokens)
    library.save(str(folder / "tokenizer.json"))
    padding = first[LIBRARY_KINDS[kind].padding]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": padding, "sep_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", ["siglip", "gemma", "xlm-v"])
def test_ids_are_those_of_open_clip(kind, tmp_path):
    from open_clip.tokenizer import HFTokenizer

    file = write_tokenizer(tmp_path, kind)
    clean = "canonicalize" if LIBRARY_KINDS[kind].canonical else "whitespace"
    want = HFTokenizer(str(tmp_path), context_length=8, clean=clean)(TEXTS)
    ids, mask = make_tokenizer(8, f"{kind}:{file}").encode(TEXTS)
    assert torch.equal(ids, want)
    assert torch.equal(mask, torch.arange(8) < mask.sum(1, keepdim=True))
    assert mask[3].all() and mask.sum(1)[1] == (5 if kind == "xlm-v" else 4)


def test_the_length_of_a_caption_is_that_before_the_cut(tmp_path):
    tokenizer = LibraryTokenizer(8, "gemma", str(write_tokenizer(tmp_path, "gemma")))
    tokenizer.encode(TEXTS)
    assert tokenizer.length(TEXTS[3]) == 13


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"expected a tokenizer.json, found no file {tmp_path}/none.json"):
        make_tokenizer(8, f"gemma:{tmp_path}/none.json").encode(["a"])


def test_without_a_connection_the_message_says_what_to_fetch_and_where_to_put_it(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"huggingface\.co/facebook/xlm-v-base.*data\.tokenizer=xlm-v:/path"):
        make_tokenizer(8, "xlm-v").encode(["a"])


@pytest.mark.parametrize("value", ["gema", "clip:/x.json"])
def test_an_unknown_tokenizer_is_refused_by_the_config(value):
    with pytest.raises(ValueError, match=r"expected one of clip, siglip, .*, or KIND:FILE but for clip"):
        DataConfig.model_validate({"manifest": "m.jsonl", "tokenizer": value})
