"""Captions to token ids."""

from __future__ import annotations

import json

import pytest

from discovla.data.tokens import Tokenizer, _bpe, _tokens, special_ids


def test_ids_and_masks_are_those_of_the_golden_file(golden):
    expected = json.loads((golden / "discovla/tokenisation.json").read_text())
    assert special_ids() == (expected["sot"], expected["eot"])
    assert expected["cases"]
    for case in expected["cases"]:
        ids, mask = Tokenizer(case["max_words"]).encode([case["text"]])
        assert ids[0].tolist() == case["ids"], case["text"]
        assert mask[0].int().tolist() == case["mask"], case["text"]


def test_special_tokens_spelled_in_a_caption_become_the_special_ids():
    start, end = special_ids()
    ids, _ = Tokenizer(8).encode(["a <|startoftext|> <|ENDOFTEXT|>"])
    assert ids[0].tolist()[2:5] == [start, end, end]


def test_a_cut_caption_ends_with_the_end_token():
    ids, mask = Tokenizer(6).encode(["one two three four five six seven eight"])
    assert ids[0, -1] == special_ids()[1]
    assert mask.all()


def test_length_counts_the_tokens_before_the_cut():
    assert Tokenizer(4).length("a man is driving a car") == 8


def test_rows_keep_the_order_of_the_texts():
    tokenizer = Tokenizer(16)
    ids, _ = tokenizer.encode(["a red circle", "a blue square"])
    assert ids[1].equal(tokenizer.encode(["a blue square"])[0][0])
    assert not ids[0].equal(ids[1])


def test_no_texts_give_no_rows():
    ids, mask = Tokenizer(7).encode([])
    assert ids.shape == mask.shape == (0, 7)


def test_a_context_without_room_for_start_and_end_is_refused():
    with pytest.raises(ValueError, match="context_length: expected at least 2"):
        Tokenizer(1)


@pytest.mark.parametrize(
    "text",
    [
        "A Man  is driving, a car!!",
        "it's 2008's best: rock'n'roll (live) #1 @home",
        " leading\tand trailing \n",
        "snake_case-and-dashes...and/slashes \\ ^ ~ `",
        "<b>markup</b> & &amp; &lt;3",
        "caf\u00e9 na\u00efve \u4e2d\u6587 \U0001f600 \u201cquoted\u201d \ufb01ne \u00a0x",
        "a\x1b[31mred\x1b[0m \x00 b",
        "<|startoftext|> <|EndOfText|>",
        "",
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_ids_equal_those_of_the_uncached_tokenizer(text):
    assert list(_tokens(text)) == _bpe().encode(text)


def test_every_pair_of_printable_ascii_characters_gives_the_same_ids():
    for first in map(chr, range(32, 127)):
        for second in map(chr, range(32, 127)):
            text = f"a{first}{second}b {second}{first}"
            assert list(_tokens(text)) == _bpe().encode(text), text
