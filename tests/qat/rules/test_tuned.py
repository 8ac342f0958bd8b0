"""A tuned placement as a file, and as what stays in float: in every command that places, and for another network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qat.base.errors import UserError
from qat.fake_quantize.prepare import placement_of, prepare
from qat.graph.tracing import network_of, trace
from qat.options import CalibrateOptions, TrainOptions
from qat.placement import PlacementOptions
from qat.placement import main as show_placement
from qat.rules.place import place
from qat.rules.tuned import FrontierPoint, Trial, TunedPlacement, tuned_names, warn_if_tuned_elsewhere

TUNED = TunedPlacement(
    keep_float=("layer1.0.conv1", "layer2.0.downsample.0"),
    layers=("conv1", "layer1.0.conv1"),
    gpu="A GPU",
    tensorrt="8.6.0",
    batch=32,
    int8_ms=1.0,
    float_ms=2.0,
    tuned_ms=0.9,
    trials=(Trial("a region", 0.95, True), Trial("another", None, False)),
    frontier=(FrontierPoint(1.5, ("layer1.0.conv1",), 0.9),),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    TUNED.write(tmp_path / "t.json")
    return tmp_path / "t.json"


@pytest.mark.parametrize(
    ("gpu", "tensorrt", "warned"), [("A GPU", "8.6.0", False), ("Another", "8.6.0", True), ("A GPU", "11.1", True)]
)
def test_a_file_that_was_tuned_elsewhere_is_warned_of(
    gpu: str, tensorrt: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    details = {"tuned": {"gpu": "A GPU", "tensorrt": "8.6.0"}}
    warn_if_tuned_elsewhere(details, gpu, tensorrt)
    warn_if_tuned_elsewhere({}, gpu, tensorrt)
    said = " ".join(capsys.readouterr().err.split())
    assert ("tuned for A GPU with TensorRT 8.6.0, and this is" in said) is warned


def test_it_is_read_as_it_was_written(path: Path) -> None:
    assert TunedPlacement.read(path) == TUNED


def test_the_placement_command_leaves_its_layers_in_float(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = path.with_name("shown.json")
    show_placement(PlacementOptions(model="resnet18", image_size=64, placement=path, json=output))
    said = " ".join(capsys.readouterr().out.split())
    assert "2 operations stay in float, tuned on A GPU with TensorRT 8.6.0 for batch 32" in said
    decisions = json.loads(output.read_text())["placement"]["decisions"]
    kept = {one["label"] for one in decisions if one["rule"] == "kept_float"}
    assert kept == {"layer1.0.conv1", "layer2.0.downsample.0"}


@pytest.mark.parametrize("options", [TrainOptions, CalibrateOptions])
def test_training_and_calibration_take_it_beside_keep_float(options: Any, path: Path) -> None:
    assert options(placement=path, keep_float=("fc",)).kept_float() == ("fc", *TUNED.keep_float)
    assert options().kept_float() == ()


def test_a_name_with_signs_of_patterns_matches_itself_alone(tmp_path: Path) -> None:
    network = network_of(trace(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)).eval(), (3, 16, 16)))
    labels = [op.label for op in network if op.kind == "convolution"]
    path = tmp_path / "t.json"
    TunedPlacement(**{**vars(TUNED), "keep_float": (labels[0],)}).write(path)
    placement = place(network, tuned_names(path))
    assert [one.quantized for one in placement.weights] == [False, True]
    TunedPlacement(**{**vars(TUNED), "keep_float": ("*",)}).write(path)
    with pytest.raises(UserError, match="was tuned for another network"):
        place(network, tuned_names(path))


def test_one_of_another_network_is_told_in_one_line(path: Path) -> None:
    with pytest.raises(UserError, match=r"t\.json was tuned for another network: it leaves layer1\.0\.conv1") as caught:
        prepare(nn.Sequential(nn.Conv2d(3, 16, 3)).eval(), keep_float=tuned_names(path), input_shape=(3, 16, 16))
    assert "\n" not in str(caught.value)
    assert "deploy.tune" in str(caught.value)


def test_a_prepared_model_records_it(path: Path) -> None:
    import torchvision

    with torch.no_grad():
        model = prepare(
            torchvision.models.resnet18(weights=None).eval(), keep_float=tuned_names(path), input_shape=(3, 32, 32)
        )
    assert placement_of(model).keep_float == TUNED.keep_float


@pytest.mark.parametrize(
    "change",
    [
        {"trials": [{}]},
        {"trials": 3},
        {"keep_float": None},
        {"batch": 0},
        {"int8_ms": 0},
        {"gpu": None},
        {"trials": [{"x": 1}]},
    ],
)
def test_what_is_no_placement_is_refused(change: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"is no tuned placement .*python -m deploy\.tune makes one"):
        tuned_names(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '"x"', "[" * 100_000])
def test_any_other_text_is_refused(text: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(UserError, match="is no tuned placement"):
        tuned_names(path)
    with pytest.raises(UserError, match="cannot read the tuned placement"):
        tuned_names(path.with_name("missing.json"))
