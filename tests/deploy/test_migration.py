"""From implicit to explicit INT8: the table of engines and its verdict. The engines themselves: tests/gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdq_models import residual

from deploy.engine_table import EngineTable, Questions, Row
from deploy.measure import Latency
from deploy.migrate import MigrateOptions, main
from deploy.migration import EXPLICIT, FLOAT, FP16, IMPLICIT, judge
from qat.base.artifact import TensorSpec
from qat.base.errors import UserError

COUNT = 200
SPEC = (TensorSpec("input", (-1, 3, 32, 32), "float32"),)
BUILD = {"seconds": 3.25, "bytes": 12_000_000, "reformats": 1, "convolutions": 20, "convolutions_int8": 20}


def answers(wrong: int) -> np.ndarray:
    """One-hot [COUNT, 10] of class 0, the first ``wrong`` of class 1."""
    found = np.zeros((COUNT, 10), np.float32)
    found[:, 0] = 1
    found[:wrong] = np.eye(10, dtype=np.float32)[1]
    return found


def latency(milliseconds: float) -> Latency:
    return Latency.from_milliseconds(32, [milliseconds * factor for factor in (0.99, 1.0, 1.01)])


def table(wrong: dict[str, int], times: dict[str, float], labelled: bool = True) -> EngineTable:
    rows = {
        name: Row(name, answers(wrong.get(name, 0)), {32: latency(times.get(name, 1.0))}, {32: built()})
        for name in (FLOAT, FP16, IMPLICIT, EXPLICIT)
    }
    labels = np.zeros(COUNT, np.int64) if labelled else None
    return EngineTable(Questions("some images", np.zeros((COUNT, 1)), labels), rows)


@pytest.mark.parametrize(("mine", "theirs", "cosine"), [(0, 0, 1.0), (1, 1, 1.0), (1, 0, 0.0), (1, -1, -1.0)])
def test_the_cosine_of_answers_that_may_be_zero(mine: int, theirs: int, cosine: float) -> None:
    rows = [Row("a", np.full((2, 3), value, np.float32), {}, {}) for value in (mine, theirs)]
    assert rows[0].cosine(rows[1]) == pytest.approx(cosine)


def built(**changes: Any) -> dict[str, Any]:
    return BUILD | {"built_in_this_run": True} | changes


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    ("wrong", "times", "as_accurate", "says"),
    [
        ({IMPLICIT: 20, EXPLICIT: 21}, {IMPLICIT: 1.0, EXPLICIT: 0.5}, True, "move to the explicit network"),
        ({IMPLICIT: 20, EXPLICIT: 5}, {IMPLICIT: 1.0, EXPLICIT: 1.0}, True, "move to the explicit network"),
        ({IMPLICIT: 20, EXPLICIT: 60}, {IMPLICIT: 1.0, EXPLICIT: 0.5}, False, "do not move yet: train with"),
        ({IMPLICIT: 20, EXPLICIT: 20}, {IMPLICIT: 1.0, EXPLICIT: 1.5}, True, "move for TensorRT's newer versions"),
    ],
)
def test_the_verdict(wrong, times, as_accurate, says, labelled) -> None:
    found, verdict = judge(table(wrong, times, labelled))
    assert found is as_accurate
    assert verdict.startswith(says)
    share = 100 * (COUNT - wrong[EXPLICIT]) / COUNT
    assert f"it {'is right' if labelled else 'agrees with FP32'} on {share:.2f} % of 200 images" in verdict
    assert f"{times[IMPLICIT] / times[EXPLICIT]:.2f} times as fast at batch 32" in verdict


def test_the_table_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    found = table({FP16: 10, EXPLICIT: 50}, {FP16: 0.4})
    found.rows[FP16].builds[32] = built(built_in_this_run=False)
    found.show()
    said = capsys.readouterr().out
    for text in ("75.00 % (68.6 to 80.5)", "95.00 %", "0.400", "12.00 MB", "20 of 20", "reused", "3.2"):
        assert text in said
    rows = {row["name"]: row for row in found.to_json()["rows"]}
    assert (rows[EXPLICIT]["right"], rows[EXPLICIT]["same_class_as_float"]) == (150, 150)
    assert rows[FP16]["top1_interval_percent"] == [91.04, 97.26]
    assert rows[EXPLICIT]["cosine"] == pytest.approx(0.75)
    assert rows[FLOAT]["cosine"] == pytest.approx(1)


def test_without_labels_no_accuracy_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    found = table({}, {}, labelled=False)
    found.show()
    assert "no labels" in capsys.readouterr().out
    assert {row["right"] for row in found.to_json()["rows"]} == {None}


def test_what_engines_are_asked(tmp_path: Path) -> None:
    model = residual(tmp_path / "m.onnx", quantize=False)
    np.save(tmp_path / "x.npy", np.ones((7, 3, 32, 32), np.float32))
    found = Questions.of_model(model, str(tmp_path / "x.npy"), 5, SPEC)
    assert found.inputs.shape == (5, 3, 32, 32)
    assert found.labels is None
    with pytest.raises(UserError, match="has no sidecar, so nothing tells its test images: give --data"):
        Questions.of_model(model, None, 5, SPEC)
    with pytest.raises(UserError, match="has 2 inputs"):
        Questions.of_model(model, None, 5, SPEC * 2)


def test_bad_options_are_one_line(tmp_path: Path) -> None:
    model, cache = residual(tmp_path / "m.onnx", quantize=False), tmp_path / "c.cache"
    with pytest.raises(UserError, match=r"no file .*c\.cache: check the path"):
        main(MigrateOptions(model=model, calibration_cache=cache))
    cache.write_text("TRT-8600-EntropyCalibration2\ninput: 3d18b082\n")
    with pytest.raises(UserError, match="--batches, --images and --runs must be at least 1"):
        main(MigrateOptions(model=model, calibration_cache=cache, batches=(0,)))
    with pytest.raises(UserError, match="no TensorRT builder is usable"):
        main(MigrateOptions(model=model, calibration_cache=cache))
