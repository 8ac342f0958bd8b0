"""Models of Ultralytics: a stand-in with its interface, and the package itself where it is installed."""

from __future__ import annotations

import ast
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import qat.calibrate
from export import export_onnx
from export.session import run, session
from qat.base.artifact import read_sidecar
from qat.base.errors import UserError
from qat.checkpoint import load_checkpoint
from qat.data.preprocessing import ImagePreset
from qat.graph.outputs import leaves
from qat.models import ModelSpec, build_model
from qat.options import CalibrateOptions
from qat.pretrained.ultralytics_models import NamedOutputs, build_ultralytics, classes_of
from qat.weights import preset_of_weights

INSTALLED = importlib.util.find_spec("ultralytics") is not None
STAND_IN = '''"""Models answer (decoded, raw) in evaluation and raw in training, of one head or of two."""

import torch
from torch import nn

SHARED = nn.SiLU()


class Layer(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.act = nn.Conv2d(inputs, outputs, 3, 2, 1), SHARED

    def forward(self, x):
        return self.act(self.conv(x))


class DetectionModel(nn.Module):
    def __init__(self, cfg, nc=None, verbose=True):
        super().__init__()
        self.yaml = {**cfg, "nc": nc or cfg["nc"]}
        self.stride, self.names = torch.tensor([4.0]), {n: str(n) for n in range(self.yaml["nc"])}
        self.anchors, self.shape = 4, (1, 3, 640, 640)  # of the last image that it saw
        self.model = nn.Sequential(Layer(3, 16), Layer(16, 32))
        self.boxes, self.scores = nn.Conv2d(32, 4, 1), nn.Conv2d(32, self.yaml["nc"], 1)

    def forward(self, x):
        if isinstance(x, dict):
            return x["img"].sum()
        y = self.model(x)
        raw = {"boxes": self.boxes(y).flatten(2), "scores": self.scores(y).flatten(2), "feats": [y]}
        if self.yaml["two"]:
            raw = {"one2many": raw, "one2one": {name: part + 1 for name, part in raw.items() if name != "feats"}}
        if not self.training and self.shape != x.shape:
            self.anchors, self.shape = 4, x.shape
        one = raw.get("one2one", raw)
        decoded = torch.cat((self.anchors * one["boxes"], one["scores"].sigmoid()), 1)
        return raw if self.training else ((decoded, y) if self.yaml["masks"] else decoded, raw)


class YOLO:
    kind = "detect"

    def __init__(self, source, verbose=True):
        if source not in ("one.yaml", "two.yaml", "masks.yaml", "own.pt"):
            raise FileNotFoundError(source)
        kind = {"two": source == "two.yaml", "masks": source == "masks.yaml"}
        self.task = "segment" if source == "masks.yaml" else self.kind
        self.model = DetectionModel({"nc": 7 if source == "own.pt" else 80, **kind})
        if source == "own.pt":
            self.model = self.model.half().requires_grad_(False)
'''


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "library" / "ultralytics").mkdir(parents=True)
    (tmp_path / "library" / "ultralytics" / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "library")
    for name in [name for name in sys.modules if name.partition(".")[0] == "ultralytics"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    sys.modules.pop("ultralytics", None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images of several shapes."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for index in range(20):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((90 + 3 * index, 70)).save(folder / f"{index}.png")
    return folder


def answer(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(leaves(model(x)))


@pytest.mark.usefixtures("stand_in")
def test_outputs_have_names_and_training_is_left_alone() -> None:
    x = torch.randn(2, 3, 32, 32)
    model = build_ultralytics("one.yaml", 5)
    assert {name: tuple(part.shape) for name, part in answer(model, x).items()} == {
        "boxes": (2, 4, 64),
        "scores": (2, 5, 64),
    }
    assert answer(model.eval(), x).keys() == {"boxes", "scores"}
    assert model({"img": x}) == x.sum()
    assert (type(model).__name__, isinstance(model, NamedOutputs)) == ("DetectionModel", True)
    assert set(model.state_dict()) == {
        f"{layer}.{kind}"
        for layer in ("model.0.conv", "model.1.conv", "boxes", "scores")
        for kind in ("weight", "bias")
    }
    assert model.get_submodule("model.0.act") is not model.get_submodule("model.1.act")


@pytest.mark.usefixtures("stand_in")
def test_of_two_heads_the_one_that_needs_no_nms_is_taken() -> None:
    torch.manual_seed(0)
    two = build_ultralytics("two.yaml", 5).eval()
    found = answer(two, torch.ones(1, 3, 32, 32))
    with torch.no_grad():
        _, whole = super(NamedOutputs, two).forward(torch.ones(1, 3, 32, 32))
    assert torch.equal(found["boxes"], whole["one2one"]["boxes"])
    assert not torch.equal(found["boxes"], whole["one2many"]["boxes"])


@pytest.mark.usefixtures("stand_in")
def test_decoded_outputs_are_asked_for() -> None:
    x = torch.randn(2, 3, 32, 32)
    found = answer(build_ultralytics("one.yaml", 5, decoded=True).eval(), x)
    assert {name: tuple(part.shape) for name, part in found.items()} == {"detections": (2, 9, 64)}
    assert answer(build_ultralytics("masks.yaml", 5, decoded=True).eval(), x).keys() == {"detections", "proto"}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("training", [True, False])
def test_what_a_loss_reads_is_asked_for(training: bool) -> None:
    x = torch.randn(2, 3, 32, 32)
    one, two = (build_ultralytics(f"{name}.yaml", 5, for_loss=True).train(training)(x) for name in ("one", "two"))
    assert one.keys() == {"boxes", "scores", "feats"}
    assert two.keys() == {"one2many", "one2one"}
    assert two["one2many"].keys() == one.keys()


@pytest.mark.usefixtures("stand_in")
def test_classes_are_the_files_own_unless_they_are_given() -> None:
    assert classes_of("one.yaml") == 80
    assert build_model(ModelSpec("ultralytics/one.yaml", 3)).scores.out_channels == 3
    own = build_model(ModelSpec("ultralytics/own.pt", 80))
    assert own.scores.out_channels == 7
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in own.parameters())
    with pytest.raises(UserError, match=r"ultralytics cannot make a model of no\.yaml \(FileNotFoundError: no\.yaml\)"):
        build_model(ModelSpec("ultralytics/no.yaml", 3))


@pytest.mark.usefixtures("stand_in")
def test_a_classifier_is_not_fed_letterboxes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preset_of_weights("ultralytics/one.yaml", None) == ImagePreset(
        640, 640, (0.0,) * 3, (1.0,) * 3, letterbox=True
    )
    monkeypatch.setattr(sys.modules["ultralytics"].YOLO, "kind", "classify")
    assert preset_of_weights("ultralytics/one.yaml", None) == ImagePreset(224, 224, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.skipif(INSTALLED, reason="ultralytics is installed")
def test_without_the_package_one_line_says_so() -> None:
    with pytest.raises(UserError, match=r"ultralytics/a\.yaml needs ultralytics, which is not installed: pip install"):
        build_model(ModelSpec("ultralytics/a.yaml", 3))


@pytest.mark.usefixtures("stand_in")
def test_a_checkpoint_is_calibrated_and_exported(photos: Path, tmp_path: Path) -> None:
    options = {"data": str(photos), "image_size": 32, "device": "cpu"}
    output = tmp_path / "m.qat"
    with pytest.raises(UserError, match="--weights is missing"):
        qat.calibrate.main(CalibrateOptions(model="ultralytics/one.yaml", output=output, **options))
    with pytest.raises(UserError, match="--decode is for Ultralytics' models, and resnet18 is none: leave it out"):
        qat.calibrate.main(CalibrateOptions(model="resnet18", weights="w", decode=True, output=output, **options))
    qat.calibrate.main(CalibrateOptions(model="ultralytics/own.pt", decode=True, output=output, **options))
    sidecar = read_sidecar(output, "checkpoint")
    assert sidecar.preprocessing == {
        "height": 32,
        "width": 32,
        "resize": 32,
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
        "letterbox": True,
        "interpolation": "bilinear",
        "color": "RGB",
    }
    assert [one["tensor"] for one in sidecar.figures["agreement"]["outputs"]] == ["detections"]
    exported = export_onnx(output)
    assert [(spec.name, spec.shape) for spec in exported.outputs] == [("detections", (-1, 11, 64))]
    stated = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert (stated["task"], stated["stride"], stated["imgsz"]) == ("detect", "4", "[32, 32]")
    assert ast.literal_eval(stated["names"]) == {n: str(n) for n in range(7)}
    x = torch.rand(3, 3, 32, 32)
    (expected,) = answer(load_checkpoint(output).model, x).values()
    found = run(session(tmp_path / "m.onnx"), x.numpy())["detections"]
    assert np.abs(found - expected.numpy()).max() < 1e-4


@pytest.mark.skipif(not INSTALLED, reason="ultralytics is not installed: pip install ultralytics")
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo11n-seg", "yolo11n-obb", "yolo26n", "yolov10n"])
def test_the_packages_own_models(name: str, photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_ultralytics(f"{name}.yaml", 5)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.constant_(norm.weight, 1.7)  # so that signals reach the end
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    options = {"data": str(photos), "image_size": 64, "device": "cpu", "classes": 5}
    weights, output = str(tmp_path / "w.safetensors"), tmp_path / "m.qat"
    qat.calibrate.main(CalibrateOptions(model=f"ultralytics/{name}.yaml", weights=weights, output=output, **options))
    found = {one["tensor"]: one for one in read_sidecar(output, "checkpoint").figures["agreement"]["outputs"]}
    assert {"boxes", "scores"} <= found.keys()
    assert all(math.isfinite(one["sqnr_db"]) and one["sqnr_db"] > 5 for one in found.values())
    exported = export_onnx(output)
    assert {spec.name for spec in exported.outputs} == found.keys()
