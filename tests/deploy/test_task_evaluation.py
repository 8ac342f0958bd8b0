"""deploy.evaluate on boxes and masks, in ONNX Runtime and PyTorch: from qat.calibrate on such a set to the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from annotated import Boxes, write_coco, write_image, write_masks, write_yolo
from safetensors.torch import save_file

from deploy.evaluate import EvaluateOptions, main
from deploy.reference import read_reference
from deploy.report import ReportOptions
from deploy.report import main as report
from export import export_onnx
from qat.base.artifact import read_sidecar
from qat.base.errors import UserError
from qat.calibrate import main as calibrate
from qat.options import CalibrateOptions

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=4, padding=1)
        self.conv2 = nn.Conv2d(16, outputs, 1)

    def forward(self, x):
        return {"out": self.conv2(self.conv1(x).relu())}

class Heads(Net):
    def forward(self, x):
        x = self.conv1(x).relu()
        return {"maps": self.conv2(x), "mean": x.mean((2, 3))}

def segmenter(num_classes):
    return Net(num_classes)

def detector(num_classes):
    return Heads(num_classes)
"""
# What is found does not depend on the network: one box of each class at a place of the input, which is known.
DECODER = """
def boxes(outputs, size):
    assert outputs["maps"].shape == (3, 8, 8) and outputs["mean"].shape == (16,) and size == (32, 32)
    return [[3, 4, 13, 20], [20, 8, 30, 24]], [0.9, 0.8], [0, 2]
"""
FACTOR, CROPPED = 48 / 32, 5  # images of 64x48 become 42x32, and 5 columns at each side are cut off
SCALE_X = 64 / 42


def in_image(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
    return (left + CROPPED) * SCALE_X, top * FACTOR, (right + CROPPED) * SCALE_X, bottom * FACTOR


IMAGES: list[Boxes] = [
    [(0, *in_image(3, 4, 13, 20)), (2, *in_image(20, 8, 30, 24))],
    [(0, *in_image(3, 4, 13, 20)), (2, *in_image(12, 8, 22, 24))],
] * 3


def made(folder: Path, name: str, data: Path) -> Path:
    """model.onnx and model.qat in ``folder``, calibrated on ``data``."""
    (folder / "net.py").write_text(NETS)
    torch.manual_seed(0)
    names: dict = {}
    exec(NETS, names)
    save_file(names[name](3).state_dict(), folder / "w.safetensors")
    options = {"model": f"{folder / 'net.py'}:{name}", "weights": str(folder / "w.safetensors"), "classes": 3}
    calibrate(
        CalibrateOptions(**options, data=str(data), image_size=32, output=folder / "model.qat", device="cpu", seed=0)
    )
    export_onnx(folder / "model.qat")
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    (folder / "decode.py").write_text(DECODER)
    write_coco(folder / "coco", IMAGES)
    return made(folder, "detector", write_yolo(folder / "yolo", IMAGES))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmenter")
    masks = np.random.default_rng(0).integers(0, 3, (6, 48, 64)).astype(np.uint8)
    return made(folder, "segmenter", write_masks(folder / "data", list(masks)))


def evaluated(onnx: Path, **options: object) -> dict:
    result = onnx.parent / "result.json"
    assert main(EvaluateOptions(**{"engine": onnx, "json": result, **options})) == 0  # type: ignore[arg-type]
    return json.loads(result.read_text())


def test_boxes_in_both_formats(detector: Path) -> None:
    """Class 0 is right everywhere. Of class 2 half is: the others are 8 of 10 pixels beside, whose overlap is 1/9."""
    decoder = f"{detector.parent / 'decode.py'}:boxes"
    found = [
        evaluated(detector, data=str(detector.parent / data), decoder=decoder)
        for data in ("yolo/set.yaml", "coco/instances.json")
    ]
    assert found[0]["scores"] == found[1]["scores"]
    assert found[0]["scores"].keys() == {"ONNX Runtime", "PyTorch", "PyTorch in float"}
    # All 6 boxes of class 2 have one score: 3 right and 3 wrong in turn, so precision at a recall up to 1/2 is
    # 1 (to 1/6), then the best that follows.
    scores = found[0]["scores"]["ONNX Runtime"]
    right = [True, False] * 3
    precision = np.cumsum(right) / np.arange(1, 7)
    recall = np.cumsum(right) / 6
    best = np.array([precision[recall >= at].max(initial=0.0) for at in np.linspace(0, 1, 101)])
    assert scores["by_class"] == {"square": pytest.approx(100), "bar": None, "dot": pytest.approx(100 * best.mean())}
    assert scores["figures"]["mAP50-95"] == pytest.approx(50 + 50 * best.mean())
    assert found[0]["how"]["decoder"] == decoder
    assert found[0]["onnx"] == read_sidecar(detector, "onnx").sha256
    outputs = found[0]["outputs"]
    assert {name.removeprefix("ONNX Runtime, ") for name in outputs} == {
        f"{who}, {output}" for who in ("PyTorch", "PyTorch in float") for output in ("maps", "mean")
    }
    same = outputs["ONNX Runtime, PyTorch, maps"]["sqnr_db"]
    assert same is None or same > outputs["ONNX Runtime, PyTorch in float, maps"]["sqnr_db"] + 10


def test_few_images_and_without_pytorch(detector: Path) -> None:
    decoder = f"{detector.parent / 'decode.py'}:boxes"
    data = str(detector.parent / "yolo/set.yaml")
    found = evaluated(detector, data=data, decoder=decoder, images=1, pytorch=False)
    assert found["images"] == 1
    assert found["scores"].keys() == {"ONNX Runtime"}
    assert found["scores"]["ONNX Runtime"]["figures"]["mAP50-95"] == pytest.approx(100)


def test_images_without_labels_and_the_reference_file(detector: Path) -> None:
    """A network of several outputs is compared output by output."""
    for name in ("0.png", "1.png"):
        write_image(detector.parent / "photos" / name)
    found = evaluated(detector, data=str(detector.parent / "photos"))
    assert (found["images"], "scores" in found) == (2, False)
    assert len(found["outputs"]) == 4

    reference = read_reference(detector, read_sidecar(detector, "onnx"))
    assert {name: values.shape[1:] for name, values in reference.outputs.items()} == {"maps": (3, 8, 8), "mean": (16,)}
    found = evaluated(detector)
    assert found["images"] == len(reference.images)
    assert found["outputs"].keys() == {"ONNX Runtime, PyTorch, maps", "ONNX Runtime, PyTorch, mean"}


def test_what_does_not_fit_is_refused(detector: Path, segmenter: Path, tmp_path: Path) -> None:
    def refused(onnx: Path, **options: object) -> str:
        with pytest.raises(UserError) as caught:
            main(EvaluateOptions(**{"engine": onnx, "pytorch": False, **options}))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    data = str(detector.parent / "yolo/set.yaml")
    assert "no decoder is built in for the outputs maps" in refused(detector, data=data)
    assert "--decoder makes boxes to count" in refused(detector, decoder="x.py:y")
    assert "no folder digits" in refused(detector, data="digits")
    masks = write_masks(tmp_path / "masks", [np.full((48, 64), 7, np.uint8)])
    assert "masks have class 7, and the network tells 3 classes" in refused(segmenter, data=str(masks))
    other = write_masks(tmp_path / "other", [np.zeros((48, 64), np.uint8)])
    write_image(other / "images" / "0.png", (32, 32))
    assert "has 64x48 pixels, its image 32x32" in refused(segmenter, data=str(other))


def test_masks_and_the_report(segmenter: Path) -> None:
    """ONNX Runtime's mIoU is that of its own maps, resized to the input; the report shows it."""
    folder = segmenter.parent / "run"
    folder.mkdir()
    for name in ("model.qat", "model.qat.json", "model.onnx", "model.onnx.json", "model.reference.npz"):
        shutil.copy(segmenter.parent / name, folder)
    found = evaluated(folder / "model.onnx", data=str(segmenter.parent / "data"))
    scores = found["scores"]
    assert scores.keys() == {"ONNX Runtime", "PyTorch", "PyTorch in float"}
    assert scores["ONNX Runtime"]["figures"].keys() == {"mIoU", "pixel accuracy"}
    assert 5 < scores["ONNX Runtime"]["figures"]["mIoU"] < 40  # the classes of the masks are random
    assert len(scores["ONNX Runtime"]["by_class"]) == 3
    page = folder / "report.html"
    short = folder / "summary.md"
    report(ReportOptions(runs=(folder,), output=page, markdown=short, json=folder / "summary.json"))
    figure = f"{scores['ONNX Runtime']['figures']['mIoU']:.2f} %"
    text = page.read_text()
    assert "mIoU of 3 classes" in text
    assert text.count(figure) >= 2  # in the answer and in the table
    assert f"mIoU is {figure} on 6 images, against" in text
    assert f"| ONNX Runtime, mIoU on 6 images | {figure} |" in short.read_text()
    assert json.loads((folder / "summary.json").read_text())["scores"] == scores


@pytest.mark.slow
def test_a_detector_of_torchvision(tmp_path: Path) -> None:
    """Its own code makes the boxes. Of four classes the first is the background."""
    name = "ssdlite320_mobilenet_v3_large"
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    data = str(write_coco(tmp_path, IMAGES))
    options = {"data": data, "image_size": 64, "device": "cpu", "output": tmp_path / "model.qat"}
    calibrate(CalibrateOptions(model=name, weights=str(tmp_path / "w.safetensors"), **options))  # type: ignore[arg-type]
    export_onnx(tmp_path / "model.qat", parity_images=2)
    found = evaluated(tmp_path / "model.onnx", data=data, images=2, least_sqnr=-50.0)
    assert found["how"] == {
        "decoder": f"torchvision's {name}",
        "least_score": 0.001,
        "most_overlap": 0.55,
        "most_boxes": 300,
    }
    assert found["scores"].keys() == {"ONNX Runtime", "PyTorch", "PyTorch in float"}
    assert found["scores"]["ONNX Runtime"]["by_class"].keys() == {"square", "bar", "dot"}
