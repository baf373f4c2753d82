import pytest

from discovla.data.tokens import Tokenizer
from discovla.drawn_world.probes import ceiling, make_probes
from discovla.drawn_world.scenes import backwards, make_scene
from discovla.drawn_world.synthetic import first_caption
from discovla.drawn_world.wording import CONTEXT_LENGTH, WORDS, holds, phrase, tell, token_ids

COUNT = 120


@pytest.fixture(scope="module")
def probes():
    return make_probes(0, "test", COUNT)


def gallery(split, count=COUNT):
    scenes, statements, _ = zip(*(first_caption(0, split, i) for i in range(count)), strict=True)
    return scenes, statements


@pytest.mark.parametrize("facts", ["all", "orderless", "actors"])
@pytest.mark.parametrize("split", ["test", "siblings"])
def test_every_caption_is_true_of_its_clip(split, facts):
    assert all(holds(statement, scene, facts) for scene, statement in zip(*gallery(split), strict=True))


def test_a_statement_true_with_all_facts_is_true_with_fewer():
    scenes, statements = gallery("siblings")
    for statement in statements:
        for scene in scenes:
            if holds(statement, scene):
                assert holds(statement, scene, "orderless")
            if holds(statement, scene, "orderless"):
                assert holds(statement, scene, "actors")


def test_the_ceiling_is_near_100_with_all_facts_and_far_below_with_the_actors_alone():
    scenes, statements = gallery("test", 300)
    assert ceiling(scenes, statements) > 99
    assert ceiling(scenes, statements, "orderless") > 99
    assert 65 < ceiling(scenes, statements, "actors") < 90


def test_the_ceiling_of_siblings_with_the_actors_alone_is_one_in_four():
    scenes, statements = gallery("siblings")
    assert ceiling(scenes, statements) > 98
    assert 20 < ceiling(scenes, statements, "actors") <= 25


def test_the_ceiling_of_equal_scenes_is_chance():
    scene, statement, _ = first_caption(0, "test", 0)
    assert ceiling([scene] * 4, [statement] * 4) == 25


def test_playing_a_clip_backwards_twice_plays_it_forwards():
    for i in range(COUNT):
        scene = make_scene(0, "test", i)
        twice = backwards(backwards(scene))
        assert twice.facts == scene.facts
        for a, b in zip(twice.actors, scene.actors, strict=True):
            assert (a.start, a.end) == pytest.approx((b.start, b.end))


def test_a_clip_played_backwards_shows_its_frames_in_reverse():
    for i in range(COUNT):
        scene = make_scene(0, "test", i)
        reverse = backwards(scene)
        for time in (0.003, 0.251, 0.502, 0.749, 0.997):
            forth = sorted(
                (t.shape, t.colour, round(t.x, 6), round(t.radius, 6)) for t in scene.seen(time)[0]
            )
            back = sorted(
                (t.shape, t.colour, round(t.x, 6), round(t.radius, 6)) for t in reverse.seen(1 - time)[0]
            )
            assert forth == back


def test_every_kind_of_probe_is_made_for_most_clips(probes):
    for kind, least in (("verb", COUNT), ("bind", 0.85 * COUNT), ("reversal", 1.9 * COUNT)):
        assert sum(probe.kind == kind for probe in probes) >= least


def test_the_false_caption_of_a_probe_differs_from_the_true_one(probes):
    assert all(probe.true != probe.false for probe in probes)


def test_the_true_caption_is_the_plain_one_of_its_clip(probes):
    for probe in probes:
        scene = make_scene(0, "test", probe.clip)
        scene = backwards(scene) if probe.played_backwards else scene
        assert probe.true == phrase(tell(scene))


def test_the_two_probes_of_a_reversal_have_opposite_answers(probes):
    reversals = [probe for probe in probes if probe.kind == "reversal"]
    for forth, back in zip(reversals[::2], reversals[1::2], strict=True):
        assert (forth.clip, forth.true, forth.false) == (back.clip, back.false, back.true)
        assert back.played_backwards
        assert not forth.played_backwards


def test_the_control_of_a_probe_is_another_clip(probes):
    assert all(probe.control != probe.clip and 0 <= probe.control < COUNT for probe in probes)


def test_a_bind_probe_keeps_the_words_and_exchanges_the_events(probes):
    for probe in probes:
        if probe.kind == "bind":
            assert sorted(probe.true.split()) == sorted(probe.false.split())


def test_probe_captions_fit_the_context_and_the_vocabulary(probes):
    tokenizer = Tokenizer(CONTEXT_LENGTH)
    texts = {text for probe in probes for text in (probe.true, probe.false)}
    assert max(map(tokenizer.length, texts)) <= CONTEXT_LENGTH - 2
    assert {word for text in texts for word in text.split()} <= set(WORDS)


def test_a_single_clip_without_a_control_is_refused():
    with pytest.raises(ValueError, match="count: expected at least 2 clips"):
        make_probes(0, "test", 1)


def test_the_token_ids_are_those_of_all_captions_with_padding_start_and_end(probes):
    ids, _ = Tokenizer(CONTEXT_LENGTH).encode([probe.true for probe in probes])
    found = token_ids()
    assert set(ids.unique().tolist()) <= set(found)
    assert {0, 49406, 49407} <= set(found)
    assert len(found) == len(WORDS) + 4  # "shrinks" is two tokens
