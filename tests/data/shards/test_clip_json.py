from pathlib import Path

from discovla.data.manifest import Clip
from discovla.data.shards.layout import clip_from_json, clip_to_json


def test_every_field_of_a_clip_is_read_back():
    clip = Clip(
        id="a",
        video=Path("/a.mp4"),
        captions=("one", "two"),
        split="train",
        start=0.5,
        end=2.0,
        frame_captions=(("x", "y"), None),
        caption_order=(1, 0),
        reversed_captions=("eno",),
    )
    assert clip_from_json({**clip_to_json(clip), "video": "/a.mp4"}) == clip
