"""Weight files of other programs are taken where they have one reading, else refused in one line."""

from __future__ import annotations

import argparse
import datetime
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from discovla.methods import build
from discovla.methods.clip import CLIPConfig
from discovla.towers.weights import ModelConfig
from tests.towers.test_weights import ODD_QUICK, reference

MODEL = reference(ODD_QUICK)
STATE = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}


def renamed(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in STATE.items()}


def compiled_inside() -> dict[str, torch.Tensor]:
    """Names of a model whose vision tower alone is compiled."""
    return {name.replace("visual.", "visual._orig_mod."): tensor for name, tensor in STATE.items()}


def arrays() -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in STATE.items()}


def of_torch(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def as_npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays())
    return file.getvalue()


TAKEN = {
    "bare": STATE,
    "net": {"net": STATE},
    "parallel and compiled": renamed("_orig_mod.module."),
    "arrays of the other byte order": {name: array.astype(">f4") for name, array in arrays().items()},
    ".npz": as_npz(),
    "pickled arrays": pickle.dumps({"params": arrays(), "epoch": 3}),
    "numpy scalar": {"state_dict": STATE, "best": np.float64(0.5), "epoch": np.int64(3)},
    "arguments": {"model": STATE, "args": argparse.Namespace(lr=0.1), "out": Path("runs/1")},
    "model_state_dict": {"epoch": 3, "model_state_dict": STATE, "loss": 0.1},
    "model": {"epoch": 3, "model": STATE},
    "any name": {"my_net": STATE, "history": [1.0]},
    "nested twice": {"checkpoint": {"state_dict": STATE}, "epoch": 1},
    "beside a head": {"model": STATE, "criterion": {"weight": torch.ones(3)}},
    "optimizer by name": {"state_dict": STATE, "optimizer": {"state": {"visual.positional": torch.ones(2)}}},
    "compiled": renamed("_orig_mod."),
    "compiled and parallel": renamed("module._orig_mod."),
    "parallel twice": renamed("module.module."),
    "FSDP": renamed("_fsdp_wrapped_module."),
    "compiled inside": compiled_inside(),
    "part of a model": renamed("backbone.clip."),
    "with a counter": {**STATE, "epoch": 3},
    "arrays": arrays(),
    "scale of one": {**STATE, "logit_scale": STATE["logit_scale"].reshape(1)},
    "sparse": {**STATE, "visual.proj": STATE["visual.proj"].to_sparse()},
    "a date": {"state_dict": STATE, "saved": datetime.datetime(2024, 1, 1), "took": datetime.timedelta(1)},
    "parameters": {name: torch.nn.Parameter(tensor) for name, tensor in STATE.items()},
}


def load(path: Path) -> torch.nn.Module:
    architecture = path.with_name("arch.json")
    architecture.write_text(json.dumps(ODD_QUICK))
    return build(ModelConfig(architecture=str(architecture), pretrained=str(path)), CLIPConfig())


@pytest.mark.parametrize("content", TAKEN.values(), ids=TAKEN)
def test_a_file_with_one_reading_is_taken(content, tmp_path):
    (tmp_path / "w.pt").write_bytes(content if isinstance(content, bytes) else of_torch(content))
    model = load(tmp_path / "w.pt")
    assert torch.equal(model.vision.projection, STATE["visual.proj"])
    assert torch.equal(model.text.position_embedding, STATE["positional_embedding"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_any_floating_point_become_float32(dtype, tmp_path):
    torch.save({name: tensor.to(dtype) for name, tensor in STATE.items()}, tmp_path / "w.pt")
    projection = load(tmp_path / "w.pt").vision.projection
    assert projection.dtype == torch.float32 and torch.equal(
        projection, STATE["visual.proj"].to(dtype).float()
    )


@pytest.mark.parametrize("name", ["w.ckpt", "w.bin", "weights", "w.safetensors"])
def test_the_content_and_not_the_name_tells_the_format(name, tmp_path):
    torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=name != "w.bin")
    load(tmp_path / name)
    save_file(STATE, tmp_path / name)
    load(tmp_path / name)


def with_bad(name: str, value: float) -> dict[str, torch.Tensor]:
    changed = {key: tensor.clone() for key, tensor in STATE.items()}
    changed[name].view(-1)[0] = value
    return changed


def zip_of(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "text")
    return file.getvalue()


REFUSED = {
    "empty": (b"", "found an empty file"),
    "zeros": (bytes(4096), "found only zero bytes"),
    "half a download": (of_torch(STATE)[:5000], "found 5,000 bytes of an archive without its end"),
    "half of safetensors": (save(STATE)[:9000], "found 9,000 of .* bytes of a safetensors file"),
    "half a header": (save(STATE)[:300], "found 300 of .* bytes of a safetensors file"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n", "git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html>404</html>", "found a web page"),
    "text": (b"Not Found", "found a text file that begins with 'Not Found'"),
    "archive": (b"\x1f\x8b\x08\x00abc", "found a gzip archive"),
    "noise": (bytes(range(128, 256)) * 9, "found "),
    "cut pickle": (b"\x80\x04\x95", "found "),
    "module": (of_torch(MODEL), "an object of class open_clip.model.CLIP, .*save the model's state_dict"),
    "layer": (of_torch({"model": torch.nn.Linear(2, 2)}), "an object of class torch.nn.*Linear"),
    "no model": (of_torch({"epoch": 3}), "found a dict of epoch"),
    "list": (of_torch([1, 2]), "found a list of 2 values"),
    "tensor": (of_torch(torch.ones(3, 2)), r"found an array of shape \(3, 2\)"),
    "two models": (of_torch({"model": STATE, "ema": STATE}), "found 2: model, ema"),
    "model and model_ema": (of_torch({"model": STATE, "model_ema": STATE}), "found 2: model, model_ema"),
    "int8": (
        of_torch({**STATE, "visual.proj": STATE["visual.proj"].to(torch.int8)}),
        "visual.proj: expected floating point numbers, found quantised values, int8",
    ),
    "complex": (
        of_torch({**STATE, "visual.proj": STATE["visual.proj"] + 0j}),
        "visual.proj: expected floating point numbers, found complex numbers, complex64",
    ),
    "float8": (
        of_torch({**STATE, "visual.proj": STATE["visual.proj"].to(torch.float8_e4m3fn)}),
        "visual.proj: expected floating point numbers, found quantised values, float8_e4m3fn",
    ),
    "bool": (
        of_torch({**STATE, "visual.proj": STATE["visual.proj"] > 0}),
        "visual.proj: expected floating point numbers, found bool",
    ),
    "tar": (b"weights.pt" + bytes(247) + b"ustar" + bytes(250), "found a tar archive; unpack it"),
    "meta": (
        of_torch({**STATE, "visual.proj": STATE["visual.proj"].to("meta")}),
        "visual.proj: expected floating point numbers, found no values",
    ),
    "index of shards": (
        json.dumps({"weight_map": {"visual.proj": "model-00001-of-00002.safetensors"}}).encode(),
        "found an index of several files of weights; join them in one",
    ),
    "pickled class": (pickle.dumps({"model": Path}), "found not a pickle of plain values: it names pathlib"),
    "other zip": (zip_of("readme.txt"), "found a zip archive of readme.txt; unpack it"),
    "nan": (of_torch(with_bad("visual.proj", float("nan"))), "visual.proj: expected finite.*found 1 of 1024"),
    "inf": (of_torch(with_bad("logit_scale", float("inf"))), "logit_scale: expected finite numbers, found 1"),
    "another model": (
        of_torch({f"encoder.{name}.x": tensor for name, tensor in STATE.items()}),
        r"missing visual.conv1.weight, .* and \d+ more; unexpected encoder\..* more",
    ),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_file_without_one_reading_is_refused_in_one_line_that_names_it(content, reason, tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"w\.pt: expected a file of CLIP weights"):
        load(tmp_path / "w.pt")
    with pytest.raises(ValueError, match="found a folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "text that is not JSON"),
        ("[1]", "found a list of 1 values"),
        ("{}", "expected vision_cfg and text_cfg, found nothing"),
        (
            json.dumps({**ODD_QUICK, "embed_dim": "x"}),
            "embed_dim: expected a whole number above 0, found 'x'",
        ),
        (
            json.dumps({**ODD_QUICK, "vision_cfg": {"layers": 1}}),
            "vision_cfg.image_size: expected a whole number",
        ),
    ],
)
def test_a_bad_architecture_file_is_named(text, reason, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json: .*{reason}"):
        build(ModelConfig(architecture=str(tmp_path / "a.json"), pretrained="random"), CLIPConfig())
