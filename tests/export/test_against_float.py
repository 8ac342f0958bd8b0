"""An exported file against the float network as it was given, and against the figures that training recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qat
from export.against_float import Recorded, against_recorded
from export.from_checkpoint import export_onnx
from export.reference import Sample
from export.session import run, session, sqnr_db
from qat.checkpoint import load_checkpoint, training_data
from qat.data.batches import first_batches


def test_the_file_is_compared_with_the_models_own_code(chain: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(chain / "model.qat")
    network = checkpoint.float_network()
    assert network is not None
    assert type(network).__name__ == "Net"  # not a trace
    (images, _), *rest = first_batches(training_data(checkpoint).test, 60, 60)
    assert not rest
    x = checkpoint.preprocessing.normalize(images)
    expected = network(x).detach().numpy()
    found = export_onnx(chain / "model.qat", tmp_path / "model.onnx").figures["against_float"]
    (answers,) = run(session(tmp_path / "model.onnx"), {"input": x.numpy()}).values()
    assert found["name"] == checkpoint.sidecar.details["model"]["name"]
    assert found["images"] == 60
    assert found["other_top1"] == int((answers.argmax(1) != expected.argmax(1)).sum())
    (output,) = found["outputs"]
    assert output["tensor"] == "logits"
    assert output["sqnr_db"] == pytest.approx(sqnr_db(expected, answers), abs=0.5)
    assert 15 < output["sqnr_db"] < 70


def test_a_file_without_quantizers_computes_what_the_float_network_does(chain: Path, tmp_path: Path) -> None:
    found = export_onnx(chain / "model.qat", tmp_path / "model.onnx", precision="float32").figures["against_float"]
    assert found["other_top1"] == 0
    assert found["outputs"][0]["sqnr_db"] > 80


def test_the_recorded_accuracy_is_met(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = export_onnx(chain / "model.qat", tmp_path / "model.onnx")
    found, recorded = written.figures["against_recorded"], load_checkpoint(chain / "model.qat").sidecar.figures["qat"]
    assert (found["recorded_top1"], found["recorded_images"]) == (recorded["test_top1"], 60)
    assert found["top1"] == pytest.approx(recorded["test_top1"], abs=100 / 60)
    said = " ".join(capsys.readouterr().out.split())
    assert f"% of 60 test images right; the checkpoint recorded {recorded['test_top1']:.2f} % of 60" in said


@pytest.mark.parametrize(
    ("top1", "images", "recorded", "explained"),
    [
        (90.0, 1000, 90.0, True),
        (89.5, 1000, 90.0, True),
        (80.0, 1000, 90.0, False),  # on the same images only rounding differs
        (85.0, 100, 90.0, True),  # a tenth of the images: 3 deviations are 8.5 points
        (75.0, 100, 90.0, False),
        (100.0, 4, 90.0, True),
        (0.1, 1000, 100.0, False),
    ],
)
def test_what_chance_explains(top1: float, images: int, recorded: float, explained: bool) -> None:
    assert Recorded(top1, images, recorded, 1000).explained is explained


@pytest.mark.parametrize(
    ("figures", "precision", "recorded"),
    [
        ({"float": 1, "ptq": 2, "qat": 3}, "int8", 3),
        ({"float": 1, "ptq": 2}, "int8", 2),
        ({"float": 1, "ptq": 2}, "float16", 1),
        ({"float": 1, "ptq": 2, "qat": 3}, "float32", None),  # fine-tuning changed the weights
        ({}, "int8", None),
    ],
)
def test_which_figure_is_compared(figures: dict[str, Any], precision: str, recorded: float | None) -> None:
    measured = {stage: {"test_top1": top1, "test_images": 10} for stage, top1 in figures.items()}
    images = Sample(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 0, 1]), "")
    found = against_recorded(measured, precision, images, torch.eye(2)[[0, 1, 1, 1]])
    assert (None if found is None else found.recorded_top1) == recorded
    assert found is None or found.top1 == 75
    unlabelled = Sample(images.images_NCHW, torch.full((4,), -1), "")
    assert against_recorded(measured, precision, unlabelled, torch.zeros(4, 2)) is None


class TwoAnswers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 1)

    def forward(self, image: Tensor, hint: Tensor) -> dict[str, Tensor]:
        x = self.body(image)
        return {"features": x, "map": self.head(x.relu()) + hint}


def test_each_output_of_a_model_in_memory_is_compared_with_its_float_network(tmp_path: Path) -> None:
    model = TwoAnswers().eval()
    prepared = qat.prepare(model, input_shape={"image": (3, 8, 8), "hint": (2, 6, 6)})
    given = {"image": torch.randn(8, 3, 8, 8), "hint": torch.randn(8, 2, 6, 6)}
    qat.calibrate_ranges(prepared, [given])
    prepared.train()
    found = export_onnx(prepared, tmp_path / "model.onnx", images=given).figures["against_float"]
    assert prepared.training
    assert found["other_top1"] is None
    assert [output["tensor"] for output in found["outputs"]] == ["features", "map"]
    answers = run(session(tmp_path / "model.onnx"), {name: one.numpy() for name, one in given.items()})
    expected = {name: one.detach().numpy() for name, one in model(**given).items()}
    for output in found["outputs"]:
        name = output["tensor"]
        assert output["sqnr_db"] == pytest.approx(sqnr_db(expected[name], np.asarray(answers[name])), abs=0.5)
