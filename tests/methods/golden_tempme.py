"""Reading TempMe's golden files into our model; sizes come from the sidecar, names from the release."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discovla.batch import Batch
from discovla.methods.tempme import TempMe, TempMeConfig, released_name
from discovla.nn.token_merging import MergeConfig
from discovla.towers.weights import load_weights
from tests.methods.golden_files import Golden


def read(folder: Path, name: str) -> Golden:
    return Golden.read(folder / "tempme", name)


def merging(options: Mapping[str, Any]) -> MergeConfig:
    """Our options of the released ones."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, str(text).split("-")))

    join, inner = numbers(options["merge_token_proportion"])
    return MergeConfig(
        per_block=options["tome_r"],
        layers=numbers(options["merge_layer"]),
        factors=numbers(options["merge_frame_num"]),
        join_share=join / 100,
        inner_share=inner / 100,
        frames=options["frames"],
        positions=bool(options.get("frame_pos", 1)),
        proportional_attention=options.get("tome_propattn", True),
    )


def build(
    golden: Golden,
    dtype: torch.dtype,
    changes: Mapping[str, Any] | None = None,
    positions: Mapping[str, Tensor] | None = None,
) -> TempMe:
    """The golden model; changes: released options of a variant, positions: its tables by released name."""
    options = {**golden.config, **(changes or {})}
    config = TempMeConfig(lora_rank=options["lora_dim"], merging=merging(options))
    model = TempMe(golden.architecture, config).to(dtype)
    model.compute_dtype = dtype
    weights = {
        n.removeprefix("weights.clip."): t for n, t in golden.tensors.items() if n.startswith("weights.")
    }
    load_weights(model, model.architecture, {n: t for n, t in weights.items() if "TVPt" not in n})
    model.freeze()
    tables = {**weights, **(positions or {})}
    trained = {n: tables[released_name(n)].to(dtype) for n in model.trained_state()}
    if changes is None:
        assert len(trained) == sum("TVPt" in n for n in weights)
    model.load_trained_state({n: t.flatten(0, 2) if t.dim() == 4 else t for n, t in trained.items()})
    return model


def batch(golden: Golden, dtype: torch.dtype) -> Batch:
    n = len(golden.tensors["in.text_ids"])
    empty = torch.zeros(n, golden.config["frames"], 1, dtype=torch.long)
    return Batch(
        text_ids=golden.tensors["in.text_ids"],
        text_mask=golden.tensors["in.text_mask"].bool(),
        frames=golden.get("in.video", dtype),
        frame_mask=golden.tensors["in.video_mask"].bool(),
        frame_text_ids=empty,
        frame_text_mask=empty.bool(),
        video_index=torch.arange(n),
        valid=torch.ones(n, dtype=torch.bool),
    )
