"""deploy.build --verify-speed: which engine is written, and what the sidecar and the report say. Times are made up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from qdq_models import residual

from deploy import cuda, engine_file, float_twin
from deploy.build import BuildOptions, main
from deploy.float_twin import SpeedCheck
from deploy.installed import find_toolkit
from deploy.measure import Latency
from deploy.report import ReportOptions
from deploy.report import main as report
from qat.base.artifact import read_sidecar
from qat.base.errors import UserError


def latency(median: float) -> Latency:
    return Latency(8, 200, median, median - 0.1, median + 0.1, median + 0.1)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds of the two engines on a GPU that is not there."""
    found = {"int8": 1.0, "float16": 2.0}
    toolkit = dataclasses.replace(find_toolkit("tensorrt-rtx"), device=cuda.Device("A GPU", "8.9", "1", "1", 1.0))
    monkeypatch.setattr(engine_file, "find_toolkit", lambda name: toolkit)

    def check_speed(_: Any, int8: Any, floats: Any, batch: int) -> SpeedCheck:
        assert batch == 8
        assert (int8.audit.count("convolution")[0], floats.audit.count("convolution")[0]) == (3, 0)
        return SpeedCheck(*(latency(found[name]) for name in ("int8", "float16")))

    monkeypatch.setattr(float_twin, "check_speed", check_speed)
    return found


def build(model: Path, **options: Any) -> dict[str, Any]:
    """What the sidecar of the engine says."""
    options = {"verify_speed": True, "builder": "tensorrt-rtx", "compute_capabilities": ("8.9",), **options}
    assert main(BuildOptions(model=model, **options)) == 0
    sidecar = read_sidecar(model.with_suffix(".engine"), "engine")
    return {**sidecar.details, "int8": sidecar.figures["convolutions_int8"]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return residual(tmp_path / "m.onnx")


def test_a_win_is_said_and_recorded(times: dict[str, float], model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    details = build(model)
    assert "INT8 1.0000 ms, FP16 2.0000 at batch 8: INT8 is 2.00 times as fast" in capsys.readouterr().out
    assert (details["speed"]["int8_wins"], details["speed"]["written"], details["int8"]) == (True, "int8", 3)


@pytest.mark.parametrize("milliseconds", [2.0, 2.1, 3.0])  # within the spread is no win
def test_where_int8_does_not_win_it_is_written_all_the_same_unless_asked(
    milliseconds: float, times: dict[str, float], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times["int8"] = milliseconds
    details = build(model)
    assert "INT8 is not faster beyond the spread" in " ".join(capsys.readouterr().err.split())
    assert (details["speed"]["int8_wins"], details["speed"]["written"], details["int8"]) == (False, "int8", 3)
    details = build(model, fall_back=True)
    assert (details["speed"]["written"], details["int8"]) == ("float16", 0)
    report(ReportOptions(runs=(model.with_suffix(".engine"),), output=model.with_suffix(".html")))
    page = model.with_suffix(".html").read_text()
    assert "this engine is FP16, because INT8 was not faster" in page
    assert f'<td class="n">{milliseconds:.4f}</td><td class="n">2.0000</td>' in page


def test_a_win_does_not_fall_back(times: dict[str, float], model: Path) -> None:
    assert build(model, fall_back=True)["speed"]["written"] == "int8"


def test_nothing_is_said_where_nothing_was_measured(times: dict[str, float], model: Path) -> None:
    assert build(model, verify_speed=False)["speed"] is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"verify_speed": False, "fall_back": True}, "--fall-back needs to know which engine is faster"),
        ({"precision": "fp32"}, "--verify-speed is for Q/DQ files, not --precision fp32"),
        ({"strip_weights": True}, "leave out --strip-weights or --verify-speed"),
    ],
)
def test_options_that_do_not_go_together(
    options: dict[str, Any], says: str, times: dict[str, float], model: Path
) -> None:
    with pytest.raises(UserError, match=says):
        build(model, **options)


def test_without_a_gpu_it_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match="--verify-speed times engines, which needs a GPU"):
        build(model)
