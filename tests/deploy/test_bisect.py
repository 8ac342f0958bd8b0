"""The search for the first tensor that differs, on what it is told, and on the networks that it reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from qdq_models import classifier, residual

from deploy import builder
from deploy.bisect import Difference, every_difference, first_difference, tensors_to_compare
from deploy.installed import find_toolkit
from deploy.runtime import Engine
from deploy.settings import BuildSettings
from export.session import run, session_with_tensors, sqnr_db

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


def test_what_overflows_has_no_ratio():
    exact = np.ones(2, np.float32)
    for value in (np.inf, np.nan):
        ratio = sqnr_db(exact, np.array([value, 1], np.float32))
        assert ratio is not None
        assert np.isnan(ratio)
    assert sqnr_db(exact, exact) is None


@pytest.mark.parametrize(("added", "ratio"), [(0.0, 20), (np.inf, -np.inf), (np.nan, -np.inf)])
def test_every_tensor_is_compared_in_one_engine(
    added: float, ratio: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is ONNX Runtime's, of which one tensor is changed: no engine of TensorRT-RTX runs here."""
    path, asked = residual(tmp_path / "m.onnx"), list[tuple[str, ...]]()
    inputs = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)

    class Answering:
        def __enter__(self) -> Answering:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __call__(self, x: np.ndarray) -> dict[str, np.ndarray]:
            tensors = run(session_with_tensors(path, asked[-1]), x)
            return tensors | {"relu2": tensors["relu2"] * 1.1 + added}

    def build(
        toolkit: object, model: Path, settings: BuildSettings, timings: object, extra: tuple[str, ...], **_: object
    ):
        assert settings.profiles[0].opt == 4
        asked.append(extra)
        return SimpleNamespace(plan=b"", float_weights=False, timing_cache_content=b"")

    monkeypatch.setattr(builder, "build", build)
    monkeypatch.setattr(Engine, "from_plan", lambda *_: Answering())
    found = every_difference(find_toolkit("tensorrt-rtx"), path, path, inputs, BuildSettings())
    assert asked == [("stem_relu", "relu1", "relu2", "flat")]
    assert [dataclasses.replace(one, sqnr_db=None) for one in found[:3]] == [
        Difference("stem_relu", "/stem_relu/Relu", None),
        Difference("relu1", "/relu1/Relu", None),
        Difference("relu2", "/relu2/Relu", None),
    ]
    assert [found[0].sqnr_db, found[1].sqnr_db, found[2].sqnr_db] == [None, None, pytest.approx(ratio, abs=0.1)]
