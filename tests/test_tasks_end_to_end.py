"""A tiny detector and a tiny segmenter: float training, quantization, export, engine, figures, report and picture."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import export
import qat
from deploy import build_engine
from deploy.evaluation import evaluate_file
from deploy.report import ReportOptions
from deploy.report import main as report
from deploy.task_evaluation import TaskEvaluation
from deploy.who_answers import FLOAT, ONNX_RUNTIME, PYTORCH
from export.session import run, session
from qat.base.artifact import read_sidecar, write_result
from qat.data.preprocessing import Preprocessing
from qat.models import ModelSpec, build_model

pytestmark = pytest.mark.slow
PIXELS, CLASSES, STRIDE = 64, 2, 8
NETWORKS = '''"""A detector that answers boxes, and a segmenter."""

import torch
from torch import nn


def layer(i, o, stride=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Detector(nn.Module):
    """detections [N, 4 + classes, cells]: centre, width and height in pixels, and scores, as Ultralytics has them."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(layer(3, 16, 2), layer(16, 32, 2), layer(32, 64, 2), layer(64, 64))
        self.scores, self.boxes = nn.Conv2d(64, num_classes, 1), nn.Conv2d(64, 4, 1)
        cells = torch.arange(8) * 8.0 + 4
        self.register_buffer("centres", torch.stack(torch.meshgrid(cells, cells, indexing="xy")).flatten(1)[None])

    def forward(self, x):
        x = self.body(x)
        moved, size = self.boxes(x).flatten(2).chunk(2, 1)
        boxes = torch.cat((self.centres + 8 * moved, 8 * size.exp()), 1)
        return {"detections": torch.cat((boxes, self.scores(x).flatten(2).sigmoid()), 1)}


class Segmenter(nn.Module):
    """out [N, classes and background, H, W]."""

    def __init__(self, num_classes):
        super().__init__()
        self.down, self.inner = layer(3, 16, 2), nn.Sequential(layer(16, 32, 2), layer(32, 16))
        self.up, self.head = nn.Upsample(scale_factor=2), layer(32, 16)
        self.out = nn.Conv2d(16, num_classes + 1, 1)

    def forward(self, x):
        x = self.down(x)
        x = self.out(self.head(torch.cat((x, self.up(self.inner(x))), 1)))
        return {"out": nn.functional.interpolate(x, scale_factor=2, mode="bilinear")}
'''
Batch = tuple[Tensor, list[list[tuple[int, int, int, int, int]]], Tensor]
"""Images in 0..1 [N, 3, 64, 64], the class, left, top, right and bottom of each shape, masks [N, 64, 64]."""


def shapes(count: int, seed: int) -> Batch:
    """One or two shapes in each image: squares of class 0 are red, flat bars of class 1 are green."""
    random = np.random.default_rng(seed)
    images = random.normal(0.3, 0.05, (count, PIXELS, PIXELS, 3)).clip(0, 1)
    masks, found = np.zeros((count, PIXELS, PIXELS), np.int64), []
    for image, mask in zip(images, masks, strict=True):
        of_image = []
        for column in range(0, PIXELS, PIXELS // 2)[: random.integers(1, 3)]:
            label, size = int(random.integers(2)), int(random.integers(12, 25))
            height = size if label == 0 else size // 2
            left, top = column + int(random.integers(0, 32 - size + 1)), int(random.integers(0, PIXELS - height + 1))
            image[top : top + height, left : left + size] = ((0.9, 0.2, 0.2), (0.2, 0.8, 0.2))[label]
            mask[top : top + height, left : left + size] = label + 1
            of_image.append((label, left, top, left + size, top + height))
        found.append(of_image)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float(), found, torch.from_numpy(masks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """networks.py, set.yaml with images and boxes, and masks beside the images."""
    root = tmp_path_factory.mktemp("tasks")
    (root / "networks.py").write_text(NETWORKS)
    for split, count, seed in (("train", 16, 1), ("val", 24, 2)):
        images, boxes, masks = shapes(count, seed)
        for kind in ("images", "labels", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            pixels = (255 * images[index].permute(1, 2, 0).numpy()).round().astype(np.uint8)
            Image.fromarray(pixels).save(root / split / "images" / f"{index}.png")
            Image.fromarray(masks[index].numpy().astype(np.uint8)).save(root / split / "masks" / f"{index}.png")
            lines = [
                f"{label} {(left + right) / 128} {(top + bottom) / 128} {(right - left) / 64} {(bottom - top) / 64}"
                for label, left, top, right, bottom in boxes[index]
            ]
            (root / split / "labels" / f"{index}.txt").write_text("\n".join(lines))
    (root / "set.yaml").write_text("train: train/images\nval: val/images\nnames: [square, bar]\n")
    return root


def batches(steps: int, seed: int) -> Iterator[Batch]:
    return (shapes(16, seed + step) for step in range(steps))


def box_loss(answer: Any, boxes: list[list[tuple[int, int, int, int, int]]]) -> Tensor:
    """Of each cell whose middle lies in a shape: its box; of all cells: whether it does."""
    found = answer["detections"]
    wanted, inside = torch.zeros_like(found), torch.zeros(found.shape[0], found.shape[2], dtype=torch.bool)
    y, x = (STRIDE * torch.arange(PIXELS // STRIDE) + STRIDE / 2).expand(2, -1).unbind()
    for index, of_image in enumerate(boxes):
        for label, left, top, right, bottom in of_image:
            cells = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
            cells = cells.flatten()
            box = torch.tensor([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
            wanted[index, :4, cells] = box[:, None]
            wanted[index, 4 + label, cells] = 1.0
            inside[index] |= cells
    scores = F.binary_cross_entropy(found[:, 4:].clamp(1e-6, 1 - 1e-6), wanted[:, 4:], reduction="sum") / inside.sum()
    apart = (found[:, :4] - wanted[:, :4]).abs().mean(1)[inside].mean()
    return scores + 0.2 * apart


def train(model: nn.Module, loss: Callable[[Any, Batch], Tensor], steps: int, rate: float, seed: int) -> None:
    """Adam, on new images at each step."""
    optimizer = torch.optim.Adam(model.train().parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for batch in batches(steps, seed):
        optimizer.zero_grad()
        loss(model(batch[0]), batch).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def exported(folder: Path, name: str, loss: Callable[[Any, Batch], Tensor]) -> Path:
    """Trains in float and quantized, exports, and builds the engine; returns the ONNX file."""
    torch.manual_seed(0)
    spec = ModelSpec(f"{folder}/networks.py:{name}", CLASSES)
    model = build_model(spec)
    train(model, loss, 150, 1e-2, 100)
    prepared = qat.prepare(model, input_shape=(3, PIXELS, PIXELS))
    qat.calibrate_ranges(prepared, [batch[0] for batch in batches(4, 500)])
    train(prepared, loss, 40, 1e-3, 600)
    preprocessing = Preprocessing(PIXELS, PIXELS, (0.0,) * 3, (1.0,) * 3, PIXELS, letterbox=True)
    checkpoint = folder / name / "model.qat"
    checkpoint.parent.mkdir()
    qat.save_checkpoint(checkpoint, prepared, spec, preprocessing)
    export.export_onnx(checkpoint)
    built = build_engine(checkpoint.with_suffix(".onnx"))
    assert not built.audit.broken
    return checkpoint.with_suffix(".onnx")


def page(path: Path, found: TaskEvaluation) -> str:
    """The report of the network, with its figures."""
    write_result(path.with_name("evaluation.json"), found.to_json())
    report(ReportOptions(runs=(path.parent,), output=path.with_name("report.html")))
    return path.with_name("report.html").read_text()


class InOnnxRuntime:
    """In the place of an engine."""

    def __init__(self, path: Path) -> None:
        self._session = session(path)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        (answer,) = run(self._session, images).values()
        return answer


def check_scores(path: Path, data: Path, figure: str, least: float, apart: float, lost: float) -> None:
    """All are good enough in ``figure``, ONNX Runtime is as PyTorch, INT8 as float, and the report has the figure."""
    found = evaluate_file(path, data=str(data))
    assert isinstance(found, TaskEvaluation)
    scores = {who: score.figures[figure] for who, score in found.scores.items()}
    assert min(scores.values()) > least
    assert abs(scores[ONNX_RUNTIME] - scores[PYTORCH]) < apart
    assert scores[PYTORCH] > scores[FLOAT] - lost
    assert f"{scores[ONNX_RUNTIME]:.2f}" in page(path, found)


def test_a_detector_from_training_to_the_drawn_picture(folder: Path) -> None:
    path = exported(folder, "Detector", lambda answer, batch: box_loss(answer, batch[1]))
    check_scores(path, folder / "set.yaml", "mAP50-95", least=40, apart=2, lost=5)
    example = runpy.run_path(str(Path(__file__).parents[1] / "docs/examples/draw_boxes.py"))
    photo, sidecar = folder / "val/images/0.png", read_sidecar(path, "onnx")
    boxes, likely, labels = example["detect"](InOnnxRuntime(path), sidecar, photo)
    truth = shapes(24, 2)[1][0]
    assert sorted(labels.tolist()) == sorted(label for label, *_ in truth)
    for label, *corners in truth:
        nearest = (boxes[labels == label] - torch.tensor(corners)).abs().amax(1).min()
        assert nearest < 4  # pixels
    picture = example["draw"](photo, boxes, likely, labels)
    picture.save(folder / "drawn.png")
    assert not np.array_equal(np.asarray(picture), np.asarray(Image.open(photo)))


def test_a_segmenter_from_training_to_its_classes_of_pixels(folder: Path) -> None:
    def loss(answer: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(answer["out"], batch[2])

    path = exported(folder, "Segmenter", loss)
    check_scores(path, folder, "mIoU", least=85, apart=1, lost=2)
