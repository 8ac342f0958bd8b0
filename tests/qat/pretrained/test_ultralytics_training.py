"""docs/examples/ultralytics_qat.py: quantization-aware training in the trainer of Ultralytics itself."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ONE_THREAD, ROOT
from torch import Tensor, nn

import qat
from benchmarks.detection_set import CLASSES, write
from export import export_onnx
from export.session import run, session
from qat.fake_quantize.prepare import activation_quantizers

INSTALLED = importlib.util.find_spec("ultralytics") is not None
pytestmark = pytest.mark.skipif(not INSTALLED, reason="ultralytics is not installed: pip install ultralytics")
PIXELS, EXAMPLES = 96, str(ROOT / "docs/examples")
SETTINGS = {
    "imgsz": PIXELS,
    "epochs": 2,
    "batch": 8,
    "nbs": 8,  # each batch is a step
    "optimizer": "AdamW",
    "lr0": 1e-4,
    "warmup_epochs": 0,
    "device": "cpu",
    "amp": False,
    "workers": 0,
    "plots": False,
    "exist_ok": True,
    "verbose": False,
}
# Ultralytics trains with several processes on GPUs alone: what it takes of them is replaced, the rest is its own.
SEVERAL_PROCESSES = f"""
import sys
sys.path[:0] = [{EXAMPLES!r}, {str(ROOT)!r}]
import torch
from torch import nn

Parallel = nn.parallel.DistributedDataParallel
nn.parallel.DistributedDataParallel = lambda module, device_ids, **options: Parallel(module, **options)
from ultralytics_qat import QatTrainer

class OnCPU(QatTrainer):
    def __init__(self, **options):
        super().__init__(**options)
        self.world_size = 2

    def _setup_ddp(self):
        torch.distributed.init_process_group("gloo")

    def final_eval(self):
        torch.save(self.model.module.state_dict(), self.save_dir / f"{{torch.distributed.get_rank()}}.state")

given = dict(zip(("model", "data", "project"), sys.argv[1:]), name="run")
OnCPU(overrides={{**{SETTINGS!r}, **given}}).train()
torch.distributed.destroy_process_group()
"""


class StoppedError(Exception):
    pass


def write_model(name: str, path: Path, classes: int = CLASSES) -> Path:
    """A checkpoint of Ultralytics with random weights, through which signals reach the end."""
    from ultralytics import YOLO

    torch.manual_seed(0)
    yolo = YOLO(f"{name}.yaml")
    yolo.model = type(yolo.model)(f"{name}.yaml", nc=classes, verbose=False)
    for norm in (module for module in yolo.model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.constant_(norm.weight, 1.7)
    yolo.save(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set in YOLO's format, whose boxes are written as outlines: they serve for boxes and for masks."""
    folder = tmp_path_factory.mktemp("set")
    for split, count in (("train", 16), ("val", 4)):
        write(folder, split, count, PIXELS, seed=0)
        for file in (folder / split / "labels").iterdir():
            rows = [[float(value) for value in line.split()] for line in file.read_text().splitlines()]
            file.write_text("\n".join(f"{row[0]:.0f} {outline(*row[1:])}" for row in rows))
    names = "\n".join(f"  {label}: '{label}'" for label in range(CLASSES))
    (folder / "set.yaml").write_text(f"path: {folder}\ntrain: train/images\nval: val/images\nnames:\n{names}\n")
    return folder / "set.yaml"


def outline(x: float, y: float, width: float, height: float) -> str:
    left, right, top, bottom = x - width / 2, x + width / 2, y - height / 2, y + height / 2
    return " ".join(f"{value:.6f}" for value in (left, top, right, top, right, bottom, left, bottom))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("yolov8n", tmp_path_factory.mktemp("model") / "float.pt")


@pytest.fixture
def trainer_type(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    from ultralytics_qat import QatTrainer

    return QatTrainer


def train(kind: Any, model: Path, data: Path, project: Path, **options: Any) -> Any:
    """The trainer after its training; ``options`` are settings, and functions for its events."""
    from ultralytics import YOLO

    yolo = YOLO(model)
    for name in [name for name in options if name.startswith("on_")]:
        yolo.add_callback(name, options.pop(name))
    yolo.train(trainer=kind, data=str(data), project=str(project), name="run", **{**SETTINGS, **options})
    return yolo.trainer


def loaded(path: Path) -> Any:
    from ultralytics.nn.tasks import load_checkpoint

    return load_checkpoint(path)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def batch(seed: int, count: int = 4) -> dict[str, Tensor]:
    """As the trainer gives it to a model: each image has one box."""
    torch.manual_seed(seed)
    boxes = torch.cat((torch.full((count, 2), 0.5), torch.rand(count, 2) / 2 + 0.2), 1)
    classes = torch.randint(CLASSES, (count, 1)).float()
    images = torch.rand(count, 3, PIXELS, PIXELS)
    return {"img": images, "cls": classes, "bboxes": boxes, "batch_idx": torch.arange(count).float()}


@pytest.fixture
def quantized(checkpoint: Path) -> Any:
    from ultralytics.cfg import get_cfg

    from qat.training.ultralytics_model import quantize_ultralytics

    model = quantize_ultralytics(str(checkpoint), PIXELS)
    qat.calibrate_ranges(model.prepared, [batch(0)["img"]])
    model.args = get_cfg()
    return model


def test_training_goes_on_after_a_stop_and_ends_in_checkpoints(
    trainer_type: Any, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    stopped: list[Any] = []

    def stop(trainer: Any) -> None:
        stopped.append(trainer)
        raise StoppedError

    with pytest.raises(StoppedError):
        train(trainer_type, checkpoint, data, tmp_path, on_model_save=stop)
    (first,) = stopped
    saved, content = loaded(first.last)
    before = copy.deepcopy(saved.state_dict())
    assert same(before, first.ema.ema.state_dict())
    assert not same(before, first.model.state_dict())  # which it is the average of
    assert "metrics/mAP50-95(B)" in first.metrics

    started: list[dict[str, Tensor]] = []

    def note(trainer: Any) -> None:
        assert (trainer.start_epoch, trainer.ema.updates) == (1, content["updates"])
        assert same(trainer.ema.ema.state_dict(), before)
        assert trainer.optimizer.state_dict()["state"]
        started.append(copy.deepcopy(trainer.model.state_dict()))

    second = train(trainer_type, first.last, data, tmp_path, resume=True, on_train_start=note)
    assert same(started[0], before)
    after, ranges = second.ema.ema.state_dict(), "prepared.activation_quantizers."
    assert not same(after, before)
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith(ranges))
    assert len((tmp_path / "run/results.csv").read_text().splitlines()) == 3

    validated = loaded(second.last)[0]
    assert same(validated.state_dict(), after)
    found = qat.load_checkpoint(second.last.with_suffix(".qat"))
    images = torch.rand(2, 3, PIXELS, PIXELS)
    with torch.no_grad():
        (decoded, _), answer = validated(images), found.model(images)["detections"]
    assert torch.equal(decoded, answer)
    assert found.preprocessing.letterbox
    assert second.best.with_suffix(".qat").exists()

    exported = export_onnx(found.path)
    assert [(spec.name, spec.shape) for spec in exported.outputs] == [("detections", (-1, 4 + CLASSES, 189))]
    computed = torch.from_numpy(run(session(found.path.with_suffix(".onnx")), images.numpy())["detections"])
    noise = (computed - answer).square().sum() / answer.square().sum()
    assert noise < 1e-3  # 30 dB: a code at the edge may differ


@pytest.mark.slow
def test_masks_are_trained_too(trainer_type: Any, data: Path, tmp_path: Path) -> None:
    from ultralytics.models.yolo.segment import SegmentationTrainer

    kind = type("QatSegmentationTrainer", (trainer_type, SegmentationTrainer), {})
    model = write_model("yolo11n-seg", tmp_path / "float.pt")
    trainer = train(kind, model, data, tmp_path, epochs=1)
    assert "metrics/mAP50-95(M)" in trainer.metrics
    found = qat.load_checkpoint(trainer.best.with_suffix(".qat"))
    with torch.no_grad():
        assert found.model(torch.rand(1, 3, PIXELS, PIXELS)).keys() == {"detections", "proto"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolo11n-obb", "yolo11n-pose", "yolo26n", "yolov10n"])
def test_other_networks_decode_as_their_float_model(name: str, tmp_path: Path) -> None:
    from qat.training.ultralytics_model import quantize_ultralytics, save_ultralytics

    path = write_model(name, tmp_path / "float.pt", 5)
    model, own = quantize_ultralytics(str(path), 64).eval(), loaded(path)[0].eval()
    images = torch.rand(2, 3, 64, 64)
    qat.calibrate_ranges(model.prepared, [images])
    with torch.no_grad():
        (decoded, _), (expected, _) = model(images), own(images)
        save_ultralytics(tmp_path / "m.qat", model)
        assert torch.equal(qat.load_checkpoint(tmp_path / "m.qat").model(images)["detections"], decoded)
        for module in model.modules():
            if hasattr(module, "enabled"):
                module.enabled = False  # quantizers let pass
        assert torch.equal(model(images)[0], expected)
    assert not torch.equal(decoded, expected)


def test_other_classes_are_refused(trainer_type: Any, data: Path, tmp_path: Path) -> None:
    model = write_model("yolov8n", tmp_path / "float.pt", 3)
    with pytest.raises(qat.UserError, match="has 3 classes, and the data 10"):
        train(trainer_type, model, data, tmp_path)


def test_autocast_computes_the_same_loss(quantized: Any) -> None:
    loss, _ = quantized.train()(batch(1))
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = quantized(batch(1))
    rounded.sum().backward()
    assert rounded.sum().item() == pytest.approx(loss.sum().item(), rel=0.05)
    assert all(
        torch.isfinite(parameter.grad).all() for parameter in quantized.parameters() if parameter.grad is not None
    )


def test_copies_and_pickles_hold_all(quantized: Any, tmp_path: Path) -> None:
    copied = copy.deepcopy(quantized)
    torch.save(quantized, tmp_path / "m.pt")
    again = torch.load(tmp_path / "m.pt", weights_only=False)
    with torch.no_grad():
        for other in (copied, again):
            assert same(other.state_dict(), quantized.state_dict())
            assert torch.equal(other.eval()(batch(2)["img"])[0], quantized.eval()(batch(2)["img"])[0])
    next(iter(activation_quantizers(copied.prepared).values())).amax.fill_(9)
    assert not same(copied.state_dict(), quantized.state_dict())


def test_several_processes_train_one_network(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    script = tmp_path / "several.py"
    script.write_text(SEVERAL_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    variables = {**os.environ, **ONE_THREAD}
    given = [str(checkpoint), str(data), str(tmp_path)]
    done = subprocess.run([*launch, *given], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    one, other = (torch.load(tmp_path / f"run/{rank}.state") for rank in range(2))
    parted = {name for name in one if not torch.equal(one[name], other[name])}
    assert all("running_" in name for name in parted), parted  # as with its float networks
    assert not same(one, loaded(tmp_path / "run/weights/last.pt")[0].state_dict())
