"""The command that lists an engine's layers, on a machine that cannot run the engine; with times: tests/gpu."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qdq_models import classifier, convolution, transposed_convolution

from deploy import EngineAudit, audit, build_engine
from deploy.audit import AuditOptions
from deploy.engine_layers import EngineLayer
from deploy.precision_audit import PrecisionFinding
from qat.base.errors import UserError


def engine(make, folder: Path) -> Path:
    model = make(folder / "m.onnx")
    return build_engine(model, builder="tensorrt-rtx", compute_capabilities=("8.9",)).path


def layer(name: str, kind: str, inputs: tuple[str, ...], nodes: tuple[str, ...], **more: str) -> EngineLayer:
    return EngineLayer(name, kind, inputs, (), inputs, nodes, **more)


def test_layers_and_findings_of_a_real_engine(tmp_path, capsys):
    path = engine(classifier, tmp_path)
    capsys.readouterr()
    audit.main(AuditOptions(engine=path, json=tmp_path / "audit.json"))
    output = capsys.readouterr()
    assert "times are not measured" in output.err
    assert "2 of 2 layers that the ONNX file declares INT8 are INT8" in output.out
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["batch"] is None
    assert {layer["milliseconds"] for layer in found["layers"]} == {None}
    (convolution,) = [layer for layer in found["layers"] if layer["kind"] == "correlation"]
    assert (convolution["precision"], convolution["onnx_nodes"][0]) == ("INT8", "/conv/Conv")
    assert sum(entry["layers"] for entry in found["totals"].values()) == len(found["layers"])
    assert [finding["precision"] for finding in found["findings"]] == ["INT8", "INT8"]


def test_a_declared_layer_that_is_float_is_named_with_its_cause(tmp_path, capsys):
    path = engine(lambda path: convolution(path, axis=1), tmp_path)
    capsys.readouterr()
    audit.main(AuditOptions(engine=path))
    output = capsys.readouterr().out
    assert "declared INT8, is FP32: convolution /conv/Conv: its weight scales are on axis 1" in output
    assert "0 of 1 layers that the ONNX file declares INT8 are INT8" in output


def test_a_layer_for_which_the_builder_has_no_kernel_is_named_too(tmp_path, capsys):
    path = engine(transposed_convolution, tmp_path)
    capsys.readouterr()
    audit.main(AuditOptions(engine=path))
    output = capsys.readouterr().out
    assert "declared INT8, is FP32: convolution /up/ConvTranspose: this builder computes transposed conv" in output
    assert "0 of 1 layers that the ONNX file declares INT8 are INT8" in output


def test_totals_by_precision():
    layers = (
        layer("Reformatting CopyNode for Input Tensor 0 to conv", "Reformat", ("FP32",), ()),
        layer("conv + relu", "CaskConvolution", ("INT8",), ("conv", "relu")),
        layer("x_QuantizeLinear", "Scale", ("FP32",), ("x_QuantizeLinear",)),
        layer("softmax", "SoftMax", ("FP16",), ("softmax",)),
        layer("conv2", "CaskConvolution", ("INT8",), ("conv2",)),
    )
    found = EngineAudit(layers, (), (0.5, 2.0, 0.25, 1.0, 3.0), batch=8, runs=10)
    assert found.totals() == {
        "reformat": {"layers": 1, "milliseconds": 0.5},
        "INT8": {"layers": 2, "milliseconds": 5.0},
        "Q/DQ alone": {"layers": 1, "milliseconds": 0.25},
        "FP16": {"layers": 1, "milliseconds": 1.0},
    }
    assert found.to_json()["layers"][4]["milliseconds"] == 3.0


@pytest.mark.parametrize(
    ("words", "short"),
    [
        ("Thirty-two wide channel vectorized row major Int8 format", "NC/32HW32"),
        ("Row major linear FP32", "NCHW"),
        ("(NHWC) Channel major format", "NHWC"),
        ("Channel major FP16 format where channel % 8 == 0", "NHWC8"),
        ("N/A due to dynamic shapes", "N/A due to dynamic shapes"),
    ],
)
def test_formats_have_short_names(words, short):
    assert layer("x", "k", ("INT8",), (), format=words).short_format == short


def test_a_layer_survives_its_json(tmp_path):
    one = layer("conv + relu", "CaskConvolution", ("INT8",), ("conv", "relu"), format="f", tactic="t")
    entry = json.loads(
        json.dumps(EngineAudit((one,), (PrecisionFinding("conv", "convolution", True, "INT8"),)).to_json())
    )
    assert EngineLayer.from_json(entry["layers"][0]) == one


@pytest.mark.parametrize(
    ("name", "profile", "nodes", "ends"),
    [
        ("conv + relu [profile 1]", 1, ["conv", "relu"], ()),
        ("conv + relu", 0, ["conv", "relu"], ()),
        ("{ForeignNode[cast]}", 0, ["{ForeignNode[cast]}"], ("cast",)),
        ("{ForeignNode[fc.weight...logits]}", 0, ["{ForeignNode[fc.weight...logits]}"], ("fc.weight", "logits")),
        ("layer1.0.conv1_U229_myl0_12", 0, ["layer1.0.conv1"], ()),
    ],
)
def test_what_a_layers_name_says(name, profile, nodes, ends):
    found = layer(name, "k", ("INT8",), ())
    assert (found.profile, found.own_nodes, found.foreign_ends) == (profile, nodes, ends)


def test_what_is_not_an_engine(tmp_path):
    with pytest.raises(UserError, match="no file"):
        audit.main(AuditOptions(engine=tmp_path / "no.engine"))
    path = engine(classifier, tmp_path)
    with pytest.raises(UserError, match="--runs 0"):
        audit.main(AuditOptions(engine=path, runs=0))
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="is truncated or is another one"):
        audit.main(AuditOptions(engine=path))
    audit.main(AuditOptions(engine=path, trust=True))  # what was recorded, since it cannot be run here
