"""Reading T2VParser's golden files into our model, by the released names; sizes come from the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discovla.batch import Embedding
from discovla.methods.t2vparser import HEAD_RULES, STAN_RULES, T2VParser, T2VParserConfig
from discovla.nn.stan import MAX_FRAMES
from discovla.testing import tiny_architecture
from discovla.towers.architecture import Architecture, TowerShape
from discovla.towers.hugging_face import Rules, from_hugging_face
from tests.methods import golden_files


class Golden(golden_files.Golden):
    def get(self, name: str, dtype: torch.dtype) -> Tensor:
        """A copy, differentiable where it is floating point."""
        tensor = self.tensors[name]
        return tensor.to(dtype, copy=True).requires_grad_() if tensor.is_floating_point() else tensor

    def weights(self) -> dict[str, Tensor]:
        return {n.removeprefix("w."): t for n, t in self.tensors.items() if n.startswith("w.")}

    def check(self, name: str, got: Tensor | None, limit: float, *, absolute: bool = False) -> None:
        """|got - wanted| at most `limit`, by default times the largest |wanted|."""
        want = self.tensors[name].double()
        assert got is not None and got.shape == want.shape, name
        error = (got.detach().double() - want).abs().max()
        error = error if absolute else error / want.abs().max()
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.0e}"


def read(folder: Path, name: str) -> Golden:
    return Golden.read(folder / "t2vparser", name)


def architecture(folder: Path) -> Architecture:
    """The sizes that the files of the towers state."""
    stan, text = read(folder, "stan"), read(folder, "text_tower")
    return Architecture(
        embed_dim=stan.config["P"],
        image_size=stan.config["img"],
        patch_size=stan.config["patch"],
        context_length=text.config["ctx"],
        vocab_size=text.config["vocab"],
        activation="quick_gelu",
        vision=_tower(stan.weights(), "layers.", stan.config["vh"]),
        text=_tower(text.weights(), "text_model.encoder.layers.", text.config["th"]),
    )


def _tower(weights: dict[str, Tensor], prefix: str, heads: int) -> TowerShape:
    mlp_width, width = weights[f"{prefix}0.mlp.fc1.weight"].shape
    layers = len({n.removeprefix(prefix).split(".")[0] for n in weights if n.startswith(prefix)})
    return TowerShape(width=width, layers=layers, heads=heads, mlp_width=mlp_width)


def tower_state(folder: Path) -> dict[str, Tensor]:
    """A checkpoint of both towers as released; the file has the first rows of the time table only."""
    state = {**read(folder, "stan").weights(), **read(folder, "text_tower").weights()}
    table = state["STAN_time_embed.weight"]
    return {
        **state,
        "STAN_time_embed.weight": torch.cat(
            [table, table.new_zeros(MAX_FRAMES - len(table), table.shape[1])]
        ),
    }


def towers(folder: Path, dtype: torch.dtype, **options: Any) -> T2VParser:
    """The golden towers under small random heads, which the files of the towers know nothing of."""
    depth = read(folder, "stan").config["depth"]
    config = T2VParserConfig(stan_layers=depth, decomposition_layers=1, decomposition_heads=1, **options)
    model = T2VParser(architecture(folder), config)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in model.released_parameters(tower_state(folder)).items():
            own[name].copy_(tensor)
    model.compute_dtype = dtype
    return model.to(dtype).eval()


def heads(folder: Path, dtype: torch.dtype, **options: Any) -> T2VParser:
    """The golden decomposition and FFN over tiny random towers."""
    c = read(folder, "head").config
    model = T2VParser(replace(tiny_architecture(), embed_dim=c["D"]), _head_config(c, **options))
    state = {f"video_mlp.{n}": t for n, t in read(folder, "video_mlp").weights().items()}
    state |= {f"multiview_dis.{n}": t for n, t in read(folder, "decomposition").weights().items()}
    own = head_parameters(model)
    with torch.no_grad():
        for name, tensor in from_hugging_face(own, HEAD_RULES, state).items():
            own[name].copy_(tensor.view_as(own[name]))
    return model.to(dtype).eval()


def loss_head(folder: Path, dtype: torch.dtype, **options: Any) -> T2VParser:
    """A model for its losses and similarities alone: the options of the golden head, random weights."""
    options = {"decomposition_layers": 1, "decomposition_heads": 1, **options}
    return T2VParser(tiny_architecture(), _head_config(read(folder, "head").config, **options)).to(dtype)


def _head_config(c: dict[str, Any], **options: Any) -> T2VParserConfig:
    config = {
        "stan_layers": 0,
        "views": c["Q"],
        "decomposition_layers": c["depth"],
        "decomposition_heads": c["heads"],
        "plus": c["plus"],
        "concat": c["concat"],
        "concat_local": c["concat_local"],
        "kappa": c["sim_tau"],
        "tau": 1 / c["loss_scale"],
        "diversity": c["multiview_weight"],
        "padding": "official",
    }
    return T2VParserConfig(**{**config, **options})


def head_parameters(model: T2VParser) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if n.startswith(("decomposition.", "video_mlp."))}


def head_gradients(model: T2VParser, names: Iterable[str]) -> dict[str, Tensor]:
    """Gradients of the heads' parameters by their released names."""
    return released_gradients(head_parameters(model), HEAD_RULES, names)


def tower_gradients(model: T2VParser, names: Iterable[str]) -> dict[str, Tensor]:
    """Gradients of the vision tower and of STAN by their released names."""
    own = {n: p for n, p in model.named_parameters() if n.startswith(("vision.", "stan."))}
    return released_gradients(own, STAN_RULES, names)


def released_gradients(own: Mapping[str, Tensor], rules: Rules, names: Iterable[str]) -> dict[str, Tensor]:
    """Gradients of our parameters by released names; queries, keys and values are released apart."""
    numbers = {name: torch.tensor([[float(i)]]) for i, name in enumerate(names)}
    found, released = {}, list(numbers)
    for ours, places in from_hugging_face(own, rules, numbers).items():
        grad = own[ours].grad
        assert grad is not None, ours
        grad = grad.T if ours.endswith("projection") else grad
        for place, part in zip(places.flatten().tolist(), grad.chunk(len(places)), strict=True):
            found[released[int(place)]] = part
    return found


def embed(
    model: T2VParser, golden: Golden, dtype: torch.dtype, prefix: str = ""
) -> tuple[dict, Embedding, Embedding]:
    """The inputs of a file of heads, and what the model makes of them."""
    x = {name: golden.get(prefix + name, dtype) for name in ("frames", "tokens", "text", "token_ids")}
    text = model.embed_text(x["text"], x["tokens"], x["token_ids"] != 0)
    video = model.embed_video(x["frames"], torch.ones(x["frames"].shape[:2], dtype=torch.bool))
    return x, text, video
