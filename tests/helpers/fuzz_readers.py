"""Every reader of files that strangers make, with small seeds and how they are spoiled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import qdq_models
import torch
import untrained
from hypothesis import strategies as st
from mutations import Mutation
from PIL import Image

from deploy.calibration_cache_file import CacheKey, CalibrationCacheFile
from deploy.dynamic_ranges import RangeTable
from deploy.report_page.artifacts import gather
from export.float_network import read_float_network
from export.linter import lint_onnx
from export.network_inputs import load_inputs
from export.onnx_network import network_from_onnx
from export.read import blaming_inconsistencies, is_quantized, read_onnx
from export.session import run, runs_in_onnx_runtime, session
from qat.base.artifact import Sidecar, TensorSpec, read_sidecar, sha256_of, sidecar_path, write_artifact
from qat.base.calibration_cache import CalibrationCache
from qat.base.image_files import read_image
from qat.checkpoint import load_checkpoint, load_state, save_state
from qat.data import coco_sets, yolo_sets
from qat.data.mask_folders import read_mask
from qat.data.sources import read_source
from qat.pretrained.weights_file import read_weights_file
from qat.rules import kernel_profile
from qat.rules.float_steps import read_float_steps
from qat.rules.kernel_profile import KernelProfile
from qat.rules.place import place
from qat.rules.tuned import TunedPlacement

SAVED_TYPES = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


@dataclass(frozen=True)
class Reader:
    """``make(folder)`` writes the seeds, of which ``read(path)`` takes each; mutations spoil it beforehand."""

    make: Callable[[Path], Sequence[Path]]
    read: Callable[[Path], object]
    mutation: st.SearchStrategy[Mutation]


def _content(name: str, content: bytes | str) -> Callable[[Path], Sequence[Path]]:
    def make(folder: Path) -> Sequence[Path]:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [path]

    return make


# --- seeds


def _onnx_files(folder: Path) -> Sequence[Path]:
    return [
        qdq_models.convolution(folder / "conv.onnx", batch=1),
        qdq_models.residual(folder / "residual.onnx"),
        qdq_models.residual(folder / "float.onnx", quantize=False),
    ]


def _weights(folder: Path) -> Sequence[Path]:
    import safetensors.torch

    tensors = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2, dtype=torch.float16)}
    safetensors.torch.save_file(tensors, folder / "w.safetensors", {"format": "pt"})
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "w.pt")
    torch.save(tensors, folder / "old.pt", _use_new_zipfile_serialization=False)
    return [folder / "w.safetensors", folder / "w.pt", folder / "old.pt"]


def _state(folder: Path) -> Sequence[Path]:
    save_state(folder / "run.state", {"x": torch.ones(3)}, {"epoch": 1, "best": {"top1": 0.5}})
    return [folder / "run.state"]


def _checkpoint(folder: Path) -> Sequence[Path]:
    (folder / "net.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(),"
        " nn.Linear(4 * 14 * 14, 10))\n"
    )
    return [untrained.checkpoint_of(folder, f"{folder / 'net.py'}:net")]


def _sidecar(folder: Path) -> Sequence[Path]:
    path = folder / "m.onnx"
    sidecar = Sidecar(
        "onnx",
        inputs=(TensorSpec("x", (-1, 3, 8, 8), "float32"),),
        outputs=(TensorSpec("y", (-1, 2), "float32"),),
        preprocessing={"height": 8, "width": 8, "resize": 8, "mean": [0.5] * 3, "std": [0.25] * 3},
        class_names=("a", "b"),
        figures={"nodes": 3},
        details={"placement": _PLACEMENT, "network": _NETWORK, "precision": "int8", "input": "float32-nchw"},
    )
    write_artifact(path, sidecar, lambda file: file.write_bytes(b"content"))
    return [sidecar_path(path)]


def _results(folder: Path) -> Sequence[Path]:
    (onnx_json,) = _sidecar(folder)
    path = folder / "evaluation.json"
    about = {
        "onnx": sha256_of(onnx_json.with_suffix("")),
        "images": 4,
        "source": "x",
        "agreement": {},
        "top1": {"ONNX Runtime": 50.0},
    }
    path.write_text(json.dumps({"made_by": {"command": ["x"]}, **about}))
    return [path]


def _arrays(folder: Path) -> Sequence[Path]:
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1])
    splits: dict[str, Any] = {
        "train_images": images,
        "train_labels": labels,
        "test_images": images,
        "test_labels": labels,
    }
    np.savez(folder / "a.npz", **splits)
    np.savez_compressed(folder / "b.npz", **splits, class_names=np.array(["x", "y"]))
    return [folder / "a.npz", folder / "b.npz"]


def _inputs(folder: Path) -> Sequence[Path]:
    np.save(folder / "x.npy", np.ones((4, 3, 8, 8), np.float32))
    return [folder / "x.npy"]


def _images(folder: Path) -> Sequence[Path]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    paths = [folder / f"x.{kind.lower()}" for kind in SAVED_TYPES]
    for kind, path in zip(SAVED_TYPES, paths, strict=True):
        image.save(path, kind)
    Image.fromarray(np.arange(63, dtype=np.int32).reshape(9, 7) * 4).save(folder / "deep.tif")
    return [*paths, folder / "deep.tif"]


def _mask(folder: Path) -> Sequence[Path]:
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(folder / "m.png")
    return [folder / "m.png"]


def _set_of_images(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images" / "a.png")
    (folder / "labels" / "a.txt").write_text("0 0.5 0.5 0.25 0.25\n1 0.1 0.1 0.2 0.1 0.2 0.2\n")


def _yolo(folder: Path) -> Sequence[Path]:
    _set_of_images(folder)
    (folder / "set.yaml").write_text("path: .\ntrain: images\nval: images\nnames: {0: cat, 1: dog}\n")
    return [folder / "set.yaml", folder / "labels" / "a.txt"]


def _coco(folder: Path) -> Sequence[Path]:
    _set_of_images(folder)
    boxes = [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 1, 4, 4], "iscrowd": 0}]
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 8, "height": 8}],
        "annotations": boxes,
        "categories": [{"id": 3, "name": "cat"}],
    }
    (folder / "images" / "set.json").write_text(json.dumps(content))
    return [folder / "images" / "set.json"]


def _calibration_cache(folder: Path) -> Sequence[Path]:
    path = folder / "c.cache"
    CalibrationCacheFile(path, _CACHE_KEY).save(_CACHE.encode(), 96)
    return [path, sidecar_path(path)]


_PROFILE = sorted(Path(kernel_profile.__file__).with_name("profiles").glob("*.json"))[0].read_text()
_SENSITIVITY = {
    "float": {"top1": 90.0},
    "quantized": {"top1": 80.0},
    "keep_float": [{"label": "conv", "top1": 85.0}],
}
_CACHE = "TRT-8600-EntropyCalibration2\ninput: 3c010a14\nconv1: 3d2e4f10\n"
_CACHE_KEY = CacheKey("a" * 64, "b" * 64, "entropy2", "8.6.0")
_OPS = {
    "x": {"kind": "input", "inputs": [], "shape": [-1, 3, 8, 8], "weight": None},
    "conv": {"kind": "convolution", "inputs": ["x"], "shape": [-1, 2, 8, 8], "weight": [2, 3, 3, 3]},
    "y": {"kind": "output", "inputs": ["conv"], "shape": None, "weight": None},
}
_NETWORK = [{"name": name, "label": name, **op} for name, op in _OPS.items()]
_PLACEMENT = {
    "tensors": [{"tensor": "x", "quantizer": "x", "reads": [{"reader": "conv", "rule": "int8-layer"}]}],
    "decisions": [{"op": "conv", "label": "conv", "kind": "convolution", "quantized": True, "rule": "convolution"}],
    "keep_float": [],
}
_TUNED = {
    "gpu": "NVIDIA H200",
    "tensorrt": "8.6.0",
    "batch": 32,
    "keep_float": ["conv"],
    "layers": ["conv", "fc"],
    "int8_ms": 1.0,
    "float_ms": 2.0,
    "tuned_ms": 0.9,
    "trials": [{"what": "conv", "milliseconds": 1.0, "kept": True}],
    "frontier": [],
}


# --- readers


def _lint_and_run(path: Path) -> None:
    with blaming_inconsistencies(path):
        if is_quantized(read_onnx(path)):
            lint_onnx(path)
        else:
            network = read_float_network(path)
            place(network_from_onnx(network).network)
    with runs_in_onnx_runtime(path):
        running = session(path)
        given = running.get_inputs()
        extents = [1 if one == "N" else one for one in given[0].shape] if given else []
        if len(given) == 1 and given[0].type == "tensor(float)" and all(one in (1, 3, 8, 16, 32) for one in extents):
            run(running, np.ones(extents, np.float32))


def _cache_with_sidecar(path: Path) -> None:
    CalibrationCacheFile(path.with_name("c.cache"), replace(_CACHE_KEY, images=None))


def _read_yolo(path: Path) -> None:
    root = path.parent if path.suffix == ".yaml" else path.parent.parent
    yolo_sets.read(root / "set.yaml", "train")


def _read_inputs(path: Path) -> None:
    others: dict[str, Any] = {"mean": None, "std": None, "seed": 0, "data_root": path.parent}
    load_inputs("x", (-1, 3, 8, 8), path.with_name("m.onnx"), str(path), limit=4, **others)


_BYTES, _JSON = mutations.of_bytes(), mutations.of_json() | mutations.of_bytes()

READERS: Mapping[str, Reader] = {
    "onnx": Reader(_onnx_files, _lint_and_run, mutations.of_onnx() | _BYTES),
    "weights": Reader(_weights, read_weights_file, _BYTES),
    "state": Reader(_state, load_state, _BYTES),
    "checkpoint": Reader(_checkpoint, load_checkpoint, _BYTES),
    "calibration cache": Reader(_content("c.cache", _CACHE), CalibrationCache.read, _BYTES),
    "calibration cache with sidecar": Reader(_calibration_cache, _cache_with_sidecar, _BYTES),
    "ranges in CSV": Reader(_content("r.csv", "tensor,min,max\nconv1,-1,2\nfc,0,3\n"), RangeTable.read, _BYTES),
    "ranges in JSON": Reader(_content("r.json", '{"conv1": [-1, 2], "fc": [0, 3]}'), RangeTable.read, _JSON),
    "npz": Reader(_arrays, lambda path: read_source(str(path), path.parent), _BYTES),
    "npy": Reader(_inputs, _read_inputs, _BYTES),
    "image": Reader(_images, lambda path: read_image(str(path)), _BYTES),
    "mask": Reader(_mask, lambda path: read_mask(str(path)), _BYTES),
    "YOLO set": Reader(_yolo, _read_yolo, _BYTES),
    "COCO set": Reader(_coco, coco_sets.read, _JSON),
    "kernel profile": Reader(_content("p.json", _PROFILE), KernelProfile.read, _JSON),
    "tuned placement": Reader(_content("t.json", json.dumps(_TUNED)), TunedPlacement.read, _JSON),
    "sensitivity": Reader(_content("s.json", json.dumps(_SENSITIVITY)), read_float_steps, _JSON),
    "sidecar": Reader(_sidecar, lambda path: read_sidecar(path.with_suffix(""), "onnx"), _JSON),
    "results": Reader(_results, lambda path: gather(path.with_name("m.onnx"), [path]), _JSON),
}
