"""The search for the first tensor that differs, on what it is told, and on the networks that it reads."""

from __future__ import annotations

import pytest
from qdq_models import classifier, residual

from deploy.bisect import first_difference, tensors_to_compare
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings

NAMES = [f"t{index}" for index in range(56)]


@pytest.mark.parametrize("first", [0, 1, 27, 28, 54, 55])
def test_the_first_of_56_is_found_in_few_questions(first):
    asked = []

    def sqnr(name: str) -> float | None:
        asked.append(name)
        index = int(name[1:])
        return None if index == 0 and first else (5.0 + index / 100 if index >= first else 60.0)

    assert first_difference(NAMES, sqnr, 20.0) == (f"t{first}", 5.0 + first / 100)
    assert len(asked) <= 7
    assert len(set(asked)) == len(asked)


def test_no_difference_is_asked_for_once():
    asked = []
    assert first_difference(NAMES, lambda name: asked.append(name), 20.0) is None
    assert asked == ["t55"]
    assert first_difference(NAMES, lambda name: 20.0, 20.0) is None
    assert first_difference([], lambda name: 0.0, 20.0) is None


def test_tensors_are_listed_in_the_networks_order_with_their_makers(tmp_path):
    toolkit = find_toolkit("tensorrt-rtx")
    found, outputs = tensors_to_compare(toolkit, residual(tmp_path / "m.onnx"), BuildSettings())
    assert outputs == ["logits"]
    assert found.pop("logits").startswith("/logits/Gemm")  # the parser numbers the addition of the bias
    assert found == {
        "stem_relu": "/stem_relu/Relu",
        "relu1": "/relu1/Relu",
        "relu2": "/relu2/Relu",
        "flat": "/flat/Flatten",
    }
    assert list(found) == ["stem_relu", "relu1", "relu2", "flat"]
    with_float_weights = residual(tmp_path / "f.onnx", float_weights=True)
    assert list(tensors_to_compare(toolkit, with_float_weights, BuildSettings())[0])[:-1] == list(found)
    found, outputs = tensors_to_compare(toolkit, classifier(tmp_path / "c.onnx"), BuildSettings())
    assert (list(found), outputs) == (["relu", "flat", "fc"], ["fc"])
