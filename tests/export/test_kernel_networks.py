"""The small networks around one layer: both forms compute the same, and only the layer in question differs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from deploy.kernel_sweep import kinds_of_layers
from export.kernel_networks import write_kernel_network
from export.linter import lint_onnx
from qat.rules.kernel_profile import LayerKind, WeightScales

BATCH = 2
KINDS = [kind for kinds in kinds_of_layers().values() for kind in kinds]


def network(path: Path, kind: LayerKind, quantized: bool) -> tuple[onnx.ModelProto, np.ndarray]:
    """The network, and its answer to random inputs."""
    write_kernel_network(path, kind, BATCH, quantized=quantized)
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    x = np.random.default_rng(0).standard_normal(given.shape).astype(np.float32)
    return onnx.load(path), session.run(None, {given.name: x})[0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_both_forms_compute_the_same(kind: LayerKind, tmp_path: Path) -> None:
    (int8, codes), (floats, exact) = (network(tmp_path / "m.onnx", kind, quantized) for quantized in (True, False))
    assert codes.shape == exact.shape
    cosine = np.sum(codes * exact) / np.sqrt(np.sum(codes**2) * np.sum(exact**2))
    assert cosine > 0.95
    count = [Counter(node.op_type for node in model.graph.node) for model in (int8, floats)]
    assert count[0]["QuantizeLinear"] > count[1]["QuantizeLinear"] or kind.out_channels < 16
    for operator in ("Conv", "ConvTranspose", "Gemm", "AveragePool", "GlobalAveragePool", "Relu", "Mul"):
        assert count[0][operator] == count[1][operator]
    assert sum(node.name == "layer" for node in int8.graph.node) == 1


@pytest.mark.parametrize("kind", KINDS[::6], ids=str)
def test_the_quantized_form_breaks_no_rule_of_tensorrt(kind: LayerKind, tmp_path: Path) -> None:
    if kind.operation == "transposed_convolution":  # the file's own form; deploy moves the scales for old versions
        kind = replace(kind, weight_scales="output")
    write_kernel_network(tmp_path / "m.onnx", kind, BATCH, quantized=True)
    errors = [finding for finding in lint_onnx(tmp_path / "m.onnx") if finding.severity == "error"]
    assert errors == []


@pytest.mark.parametrize(("scales", "axis", "count"), [("output", 1, 32), ("input", 0, 64), ("tensor", None, None)])
def test_a_transposed_convolution_has_the_scales_that_were_asked_for(
    scales: WeightScales, axis: int | None, count: int | None, tmp_path: Path
) -> None:
    kind = next(k for k in kinds_of_layers()["transposed"] if (k.in_channels, k.kernel) == (64, (2, 2)))
    model, _ = network(tmp_path / "m.onnx", replace(kind, weight_scales=scales), True)
    (dequantize,) = (node for node in model.graph.node if node.name == "layer_w_dq")
    assert {one.name: one.i for one in dequantize.attribute} == ({} if axis is None else {"axis": axis})
    (scale,) = (one for one in model.graph.initializer if one.name == "layer_w_scale")
    assert list(scale.dims) == ([] if count is None else [count])
