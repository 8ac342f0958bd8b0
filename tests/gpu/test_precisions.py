"""Float networks in the precisions that builder flags allow, and implicit INT8 by ranges from a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import qdq_models

from deploy import Engine, Profile, build_engine
from deploy.settings import BuilderOptions
from qat.base.errors import UserError

PROFILES = (Profile(8, 8, 8),)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qdq_models.residual(tmp_path_factory.mktemp("floats") / "float.onnx", quantize=False)


@pytest.fixture(scope="module")
def ranges(floats: Path, images: np.ndarray) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of every tensor, by ONNX Runtime."""
    model = onnx.load(floats)
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name) for node in model.graph.node for name in node.output if name not in known
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    values = dict(zip(names, session.run(names, {"input": images}), strict=True)) | {"input": images}
    return {name: (float(value.min()), float(value.max())) for name, value in values.items()}


def built(floats: Path, folder: Path, precision: str, ranges: dict | None = None, **options: object):
    file = None
    if ranges is not None:
        file = folder / "ranges.json"
        file.write_text(json.dumps(ranges))
    settings = BuilderOptions(precision=precision, **options)
    return build_engine(
        floats, folder / "m.engine", builder="tensorrt", profiles=PROFILES, ranges=file, settings=settings
    )


def noise_of(expected: np.ndarray, found: np.ndarray) -> float:
    """The squared error as a share of the squares."""
    return float(np.square(expected - found).sum() / np.square(expected).sum())


def answers(path: Path, images: np.ndarray) -> np.ndarray:
    with Engine.load(path) as engine:
        return engine(images[:8])


@pytest.mark.parametrize(("precision", "least_db"), [("fp32", 100), ("tf32", 40), ("fp16", 40)])
def test_a_float_network_in_each_precision(floats, images, tmp_path, precision, least_db):
    expected = onnxruntime.InferenceSession(floats).run(None, {"input": images[:8]})[0]
    engine = built(floats, tmp_path, precision)
    assert engine.sidecar.details["precision"] == precision
    found = answers(engine.path, images)
    assert noise_of(expected, found) < 10 ** (-least_db / 10)
    assert engine.sidecar.figures["convolutions_int8"] == 0


@pytest.mark.parametrize("strict", [False, True])
def test_implicit_int8_by_ranges(floats, ranges, images, tmp_path, capsys, strict):
    expected = onnxruntime.InferenceSession(floats).run(None, {"input": images[:8]})[0]
    engine = built(floats, tmp_path, "int8", ranges, strict=strict)
    found = answers(engine.path, images)
    assert 0 < noise_of(expected, found) < 0.05
    assert engine.sidecar.figures["convolutions_int8"] > 0
    said = capsys.readouterr().out
    assert f"{len(ranges)} tensors" in said


def test_tensors_without_a_range_stay_float_and_are_listed(floats, ranges, tmp_path, capsys):
    engine = built(floats, tmp_path, "int8", {"input": ranges["input"]})
    assert engine.sidecar.figures["convolutions_int8"] == 0
    missing = engine.sidecar.details["without_range"]
    assert "input" not in missing
    assert len(missing) >= len(ranges) - 1
    assert "what reads or writes the others runs in FP16" in " ".join(capsys.readouterr().out.split())


def test_ranges_of_another_network_are_refused(floats, tmp_path):
    with pytest.raises(UserError, match=r"is for another network: .*did you mean input"):
        built(floats, tmp_path, "int8", {"inputs": (-1, 1)})


def test_bf16_is_refused_by_a_version_without_it(floats, tmp_path, toolkit):
    if hasattr(toolkit.module.BuilderFlag, "BF16"):
        built(floats, tmp_path, "bf16")
    else:
        with pytest.raises(UserError, match="it has no BF16 flag"):
            built(floats, tmp_path, "bf16")
