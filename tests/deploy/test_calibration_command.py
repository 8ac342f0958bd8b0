"""python -m deploy.build with the options of calibration: one line and exit code 2 for what cannot be, in this process.

TensorRT-RTX has no calibrators, so nothing is calibrated here: that is in tests/gpu.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import qdq_models

from deploy import build
from qat.base import console


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return qdq_models.residual(tmp_path / "float.onnx", quantize=False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "corrupt.png").write_text("not read, because the builder is refused first")
    return folder


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(console, "continue_in_child", lambda command: None)  # this process has threads
    monkeypatch.setattr(sys, "argv", ["deploy-build", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        build.cli()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path, *arguments: object
) -> str:
    """The line on standard error; the model is alone as before."""
    before = sorted(model.parent.iterdir())
    capsys.readouterr()
    assert exit_code(monkeypatch, model, "--builder", "tensorrt-rtx", *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert sorted(model.parent.iterdir()) == before
    return lines[0]


def test_implicit_int8_is_refused_with_the_explicit_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path, images: Path
) -> None:
    for given in (
        ("--data", images),
        ("--calibration-cache", model.parent / "none.cache"),
        ("--data", images, "--calibrator", "minmax", "--calibration-cache", model.parent / "new.cache"),
    ):
        line = refused(monkeypatch, capsys, model, "--precision", "int8", *given)
        assert "python -m export.quantize" in line
        assert "TensorRT-RTX" in line


@pytest.mark.parametrize("option", ["--layer", "--output-type"])
def test_types_of_layers_are_refused_in_a_strongly_typed_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path, option: str
) -> None:
    line = refused(monkeypatch, capsys, model, option, "conv*=fp32")
    assert "leave out --layer and --output-type" in line


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--quantile 1.5", "--quantile 1.5: must be 0 to 1"),
        ("--quantile nan", "--quantile nan: must be 0 to 1"),
        ("--regression-cutoff -0.1", "--regression-cutoff -0.1: must be 0 to 1"),
        ("--images 0", "--images 0: must be at least 1"),
        ("--calibration-batch 0", "--calibration-batch 0: must be at least 1"),
        ("--trust-cache", "--trust-cache is about a --calibration-cache"),
        ("--std 0.2 0 0.2", "--std 0.2 0 0.2: must be above 0"),
        ("--precision int8", "--precision int8 needs ranges"),
        ("--data {images}", "--ranges are for --precision int8, not explicit"),
        ("--precision fp16 --calibration-cache c", "--ranges are for --precision int8, not fp16"),
        ("--strict", "--strict is for --precision int8, not explicit"),
        ("--layer conv1", "--layer 'conv1': must be PATTERN=TYPE"),
        ("--layer conv1=fp8", "--layer 'conv1=fp8': must be PATTERN=TYPE"),
        ("--precision fp32 --layer conv1=int8", "--precision fp32 has no int8"),
    ],
)
def test_options_that_cannot_be_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: Path,
    images: Path,
    given: str,
    says: str,
) -> None:
    assert says in refused(monkeypatch, capsys, model, *given.format(images=images).split())


def test_the_whole_traceback_of_a_contradiction_is_shown_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    assert exit_code(monkeypatch, model, "--images", 0, "--debug") == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.splitlines()[-1] == "qat.base.errors.UserError: --images 0: must be at least 1"


@pytest.mark.parametrize("given", ["--calibrator best", "--images many", "--constraints maybe", "--mean red"])
def test_options_that_are_none_are_refused_by_the_parser(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path, given: str
) -> None:
    assert exit_code(monkeypatch, model, *given.split()) == 2
    assert given.split()[0] in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, images: Path
) -> None:
    given = ("--precision", "int8", "--data", images)
    assert f"no file {tmp_path / 'none.onnx'}" in refused(monkeypatch, capsys, tmp_path / "none.onnx", *given)
