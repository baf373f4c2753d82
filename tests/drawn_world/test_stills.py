import pickle
import re

import numpy as np
import pytest

from discovla.data.tokens import Tokenizer
from discovla.drawn_world.drawing import COLOURS, PLACES, SHAPES
from discovla.drawn_world.stills import Stills, caption, make_things
from discovla.drawn_world.wording import CONTEXT_LENGTH, EMPTY, VERBS, WORDS

STILLS = Stills(count=400, seed=3, easy_epochs=1)
HARD = [STILLS.sample(i, 1) for i in range(400)]
EASY = [STILLS.sample(i, 0) for i in range(60)]


def coloured(frame, colour):
    """Return the mask of the pixels that have a colour of the world."""
    return np.abs(frame.astype(int) - COLOURS[colour]).max(-1) < 30


def test_a_still_depends_on_seed_epoch_and_index_alone():
    again = Stills(count=999, seed=3, easy_epochs=1).sample(5, 1)
    assert again.text == HARD[5].text
    assert np.array_equal(again.frames, HARD[5].frames)


@pytest.mark.parametrize(
    ("seed", "epoch", "index"), [(4, 1, 5), (3, 2, 5), (3, 1, 6)], ids=["seed", "epoch", "index"]
)
def test_another_seed_epoch_or_index_draws_another_still(seed, epoch, index):
    other = Stills(count=400, seed=seed, easy_epochs=1).sample(index, epoch)
    assert not np.array_equal(other.frames, HARD[5].frames)


def test_a_still_has_one_frame_and_its_index():
    assert HARD[7].frames.shape == (1, 64, 64, 3)
    assert HARD[7].frames.dtype == np.uint8
    assert HARD[7].video_index == 7


def test_an_easy_still_shows_the_colour_of_its_caption_at_the_place_of_its_caption():
    placed = 0
    for sample in EASY:
        words = sample.text.split()
        (colour,) = [word for word in words if word in COLOURS]
        found = coloured(sample.frames[0], colour)
        assert found.sum() > 25, sample.text
        if words[-1] in SHAPES:
            continue
        placed += 1
        place = " ".join(words[words.index("the") + 1 :])
        x, y = np.argwhere(found).mean(0)[::-1]
        assert min(PLACES, key=lambda p: np.hypot(PLACES[p][0] - x, PLACES[p][1] - y)) == place, sample.text
    assert placed > 20


def test_a_still_of_the_end_shows_the_second_place_and_colour():
    changed = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        (thing,) = make_things(rng, 1)
        text = caption([thing], rng, end=True)
        if match := re.search(r"(?:to the (.+)|(?:turns|becomes) (\w+).*)$", text):
            assert match[1] in (None, thing.place) and match[2] in (None, thing.colour), text
            changed += 1
    assert changed > 20


def test_easy_stills_have_one_noun_and_no_verb():
    verbs = {way for ways in VERBS.values() for way in ways}
    for sample in EASY:
        words = sample.text.split()
        assert sum(word in SHAPES for word in words) == 1
        assert not verbs & set(words)


def test_a_big_object_is_bigger_than_a_small_one():
    area = {"small": [], "big": []}
    for sample in EASY:
        words = sample.text.split()
        for size in area:
            if size in words:
                colour = next(word for word in words if word in COLOURS)
                area[size].append(coloured(sample.frames[0], colour).sum())
    assert np.mean(area["big"]) > 2 * np.mean(area["small"])


def test_stills_train_every_word_of_the_world():
    assert {word for sample in HARD for word in sample.text.split()} == set(WORDS)


def test_still_captions_leave_two_tokens_of_the_context_free():
    tokenizer = Tokenizer(CONTEXT_LENGTH)
    assert max(tokenizer.length(sample.text) for sample in HARD) <= CONTEXT_LENGTH - 2


def test_about_a_third_of_the_clauses_have_a_verb():
    words = [word for sample in HARD for word in sample.text.split()]
    verbs = {way for ways in VERBS.values() for way in ways}
    share = sum(word in verbs for word in words) / sum(word in SHAPES for word in words)
    assert 0.24 < share < 0.36


def test_only_a_picture_without_objects_is_called_empty():
    empty = [sample for sample in HARD if sample.text == EMPTY]
    assert empty
    for sample in empty:
        assert not any(coloured(sample.frames[0], colour).sum() > 25 for colour in COLOURS)


def test_stills_can_be_pickled():
    assert pickle.loads(pickle.dumps(STILLS)).sample(5, 1).text == HARD[5].text


@pytest.mark.parametrize("index", [-1, 400])
def test_an_index_out_of_range_is_refused(index):
    with pytest.raises(IndexError, match=r"index: expected 0\.\.399"):
        STILLS.sample(index, 0)


def test_a_count_of_zero_is_refused():
    with pytest.raises(ValueError, match="count: expected at least 1 still, got 0"):
        Stills(count=0)
