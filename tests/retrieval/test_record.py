import numpy as np
import pytest

from discovla.data.manifest import Clip
from discovla.retrieval.ranks import Tiles, streamed_ranks, text_to_video_ranks, video_to_text_ranks
from discovla.retrieval.record import EvaluationRecord, ScoreCollector, negative_pairs, with_clips


def scores(texts=23, videos=9):
    """Return a matrix with ties and the video of each text."""
    generator = np.random.default_rng(1)
    groups = generator.permutation(np.concatenate([np.arange(videos), np.arange(texts - videos) % videos]))
    return generator.integers(0, 30, (texts, videos)).astype(np.float32), groups


def collected(matrix, groups, block):
    collector = ScoreCollector(groups, matrix.shape[1], scale=10.0)
    ranks = streamed_ranks(
        lambda rows, columns: matrix[rows, columns],
        *matrix.shape,
        groups,
        block=block,
        on_tile=collector.add,
    )
    return collector.record({"raw": {"t2v": ranks[0], "v2t": ranks[1]}})


@pytest.mark.parametrize("block", [1, 4, 100])
def test_the_record_of_tiles_is_that_of_the_matrix(block):
    matrix, groups = scores()
    record = collected(matrix, groups, block)
    order = np.argsort(-matrix, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(
        np.take_along_axis(matrix, record.top, 1), np.take_along_axis(matrix, order, 1)
    )
    np.testing.assert_allclose(record.top_scores, np.take_along_axis(matrix, record.top, 1) / 10)
    np.testing.assert_allclose(record.positive, matrix[np.arange(len(matrix)), groups] / 10)
    texts, videos = negative_pairs(groups, matrix.shape[1])
    np.testing.assert_allclose(record.negative, matrix[texts, videos] / 10)
    np.testing.assert_array_equal(
        record.ranks["raw"]["t2v"], text_to_video_ranks(matrix, groups).ties_against
    )
    np.testing.assert_array_equal(
        record.ranks["raw"]["v2t"], video_to_text_ranks(matrix, groups).ties_against
    )
    assert Tiles(groups=groups, videos=matrix.shape[1], block=block).videos == record.top.max() + 1


def test_negative_pairs_never_belong_together():
    _, groups = scores(400, 7)
    texts, videos = negative_pairs(groups, 7)
    assert len(texts) == 8000 and set(videos) == set(range(7))
    assert (groups[texts] != videos).all()
    assert not len(negative_pairs(np.zeros(3, np.int64), 1)[0])


def test_a_record_survives_its_file(tmp_path):
    matrix, groups = scores()
    captions = [tuple(f"caption {i} ü\0<b>" for i in np.flatnonzero(groups == v)) for v in range(9)]
    clips = [
        Clip(id=f"c{v}", video=tmp_path / f"{v}.mp4", captions=captions[v], split="val", start=1.5)
        for v in range(9)
    ]
    record = with_clips(collected(matrix, groups, 4), clips, title="a title", step=7)
    record.save(tmp_path / "evaluation-val.npz")
    found = EvaluationRecord.load(tmp_path / "evaluation-val.npz")
    assert (found.clips, found.title, found.step) == (record.clips, "a title", 7)
    for name in ("groups", "top", "top_scores", "positive", "negative"):
        np.testing.assert_array_equal(getattr(found, name), getattr(record, name))
    np.testing.assert_array_equal(found.ranks["raw"]["v2t"], record.ranks["raw"]["v2t"])
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation-val.npz"]


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04"])
def test_another_file_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npz: expected a record of an evaluation"):
        EvaluationRecord.load(tmp_path / "x.npz")
