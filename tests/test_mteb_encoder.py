"""MTEB evaluates a model on a task of drawn clips as `discovla.Model` ranks them."""

from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import discovla
from discovla.data.manifest import read_manifest

mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install 'discovla[mteb]'")
datasets = pytest.importorskip("datasets")

RATE = 4.0  # frames a second that are sampled


class Decoder:
    """Stand-in for torchcodec's decoder, which needs FFmpeg's libraries."""

    def __init__(self, path: str) -> None:
        with av.open(path) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            seconds = len(frames) / float(container.streams.video[0].average_rate)
        self.frames = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        self.metadata = SimpleNamespace(num_frames=len(frames), end_stream_seconds=seconds)

    def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
        return SimpleNamespace(data=self.frames[indices])


def decoded(rows: dict[str, list]) -> dict[str, list]:
    return rows | {"video": [Decoder(path) for path in rows["video"]]} if "video" in rows else rows


@pytest.fixture
def task(drawn):
    """Return a task, text to video on drawn clips, and the clips."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    clips = read_manifest(drawn)[:12]
    ids = [str(i) for i in range(len(clips))]

    class Drawn(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Drawn",
            description="Clips of moving shapes.",
            dataset={"path": "local", "revision": "1"},
            type="Any2AnyRetrieval",
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            category="t2v",
            modalities=["text", "video"],
        )

        def load_data(self, num_proc=None, **options) -> None:
            captions = [clip.captions[0] for clip in clips]
            videos = datasets.Dataset.from_dict({"id": ids, "video": [str(clip.video) for clip in clips]})
            split = RetrievalSplitData(
                queries=datasets.Dataset.from_dict({"id": ids, "text": captions}),
                corpus=videos.with_transform(decoded),
                relevant_docs={i: {i: 1} for i in ids},
                top_ranked=None,
            )
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Drawn(), clips


def test_mteb_ranks_as_the_model_does(task):
    from mteb.models.modality_collators import FramesCollator

    from discovla.mteb_encoder import MTEBEncoder

    task, clips = task
    encoder = MTEBEncoder("clip:drawn", device="cpu", data={"frames": 8, "sample_rate": RATE})
    (result,) = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False).task_results
    (scores,) = result.scores["test"]
    model = discovla.load("clip:drawn", device="cpu", data={"frames": 8, "sample_rate": RATE})
    sampled = [
        FramesCollator.resample_video(Decoder(str(clip.video)), fps=RATE, max_frames=8) for clip in clips
    ]
    video = model.embed_videos([frames.permute(0, 2, 3, 1).numpy() for frames in sampled])
    similarity = model.similarity(model.embed_texts([clip.captions[0] for clip in clips]), video)
    rank = (similarity > similarity.diagonal()[:, None]).sum(1)
    assert abs(scores["recall_at_1"] - (rank < 1).double().mean().item()) < 1e-4
    assert abs(scores["recall_at_5"] - (rank < 5).double().mean().item()) < 1e-4
    assert 0 < scores["recall_at_1"] < 1 and result.task_name == "Drawn"
    assert encoder.mteb_model_meta.name == "discovla/clip:drawn"


def test_rows_of_another_kind_are_refused(task):
    from discovla.mteb_encoder import MTEBEncoder

    encoder = MTEBEncoder("clip:drawn", device="cpu")
    rows = datasets.Dataset.from_dict({"text": ["a"], "image": ["b"]})
    with pytest.raises(ValueError, match="Drawn: expected rows with a text or a video, found image, text"):
        encoder.encode(
            SimpleNamespace(dataset=rows), task_metadata=task[0].metadata, hf_split="", hf_subset=""
        )
