"""INT8 transposed convolutions in ONNX: one scale, as a vector along the output channels, by all three routes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from untrained import lively, prepared

from export.emit import emit
from export.fewer_quantizers import write_variant
from export.fold import fold
from export.from_float_onnx import quantize_onnx
from export.linter import lint_onnx
from export.session import run, session_with_tensors
from qat.fake_quantize.quantizer import weight_amax
from qat.fake_quantize.weight_ranges import weight_amax_mse

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """[N, 3, 8, 8] -> [N, 16, 16, 16]: a transposed convolution of 16 to 24 channels with normalization, in a chain."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.ConvTranspose2d(16, 24, 2, 2, bias=False)
        self.norm, self.head = nn.BatchNorm2d(24), nn.Conv2d(24, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.norm(self.up(self.stem(x).relu())).relu())
        return answer


def weight_of(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """The codes and the scales of the only transposed convolution, and their axis."""
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    (layer,) = (node for node in graph.node if node.op_type == "ConvTranspose")
    dequantize = made[layer.input[1]]
    (axis,) = (attribute.i for attribute in dequantize.attribute if attribute.name == "axis")
    return constants[dequantize.input[0]], constants[dequantize.input[1]], axis


def check_weight(path: Path, weight: np.ndarray) -> None:
    """The codes of ``weight`` [I, O, ...] by one scale, as the specification says it."""
    codes, scales, axis = weight_of(path)
    scale = np.float32(np.abs(weight).max()) / np.float32(127)
    assert axis == 1
    np.testing.assert_array_equal(scales, np.full(weight.shape[1], scale))
    np.testing.assert_array_equal(codes, np.rint(weight / scale))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transposed") / "model.onnx"
    ir.save(emit(fold(prepared(lively(Net()), (3, 8, 8)))[0], X, {}), path)
    return path


def test_the_export_computes_what_training_saw(exported: Path) -> None:
    ready = prepared(lively(Net()), (3, 8, 8))
    check_weight(exported, ready.get_parameter("up.weight").detach().numpy())
    assert lint_onnx(exported) == []
    nodes = onnx.load(exported).graph.node
    assert [node.op_type for node in nodes if node.op_type in ("ConvTranspose", "BatchNormalization", "Identity")] == [
        "ConvTranspose"
    ]
    head = next(node for node in nodes if node.op_type == "Conv" and "head" in node.name)
    made = {node.output[0]: node for node in nodes}
    codes = made[made[head.input[0]].input[0]].output[0]
    found = run(session_with_tensors(exported, [codes]), X.numpy())
    with torch.no_grad():
        *_, quantizer = ready.get_submodule("activation_quantizers").children()
        before: list[Tensor] = []
        ready.get_submodule("head").register_forward_pre_hook(lambda _, given: before.append(given[0]))
        answer = ready(X)
    np.testing.assert_array_equal(found[codes], (before[0] / (quantizer.amax / 127)).round())
    np.testing.assert_allclose(next(iter(found.values())), answer, rtol=1e-4, atol=1e-5)


def float_file(path: Path) -> Path:
    torch.onnx.export(lively(Net()), (X,), path, dynamo=False, input_names=["input"], opset_version=17)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("calibrator", ["max", "mse"])
def test_a_float_file_gets_one_scale(calibrator: str, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    quantize_onnx(float_file(tmp_path / "float.onnx"), path, inputs=X.numpy(), weight_calibrator=calibrator)
    graph = onnx.load(tmp_path / "float.onnx").graph
    (weight,) = (tensor for tensor in graph.initializer if tuple(tensor.dims) == (16, 24, 2, 2))
    norm = lively(Net()).norm
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()[:, None, None]
    floats = numpy_helper.to_array(weight)
    if any(node.op_type == "BatchNormalization" for node in graph.node):
        floats = floats * factor
    if calibrator == "max":
        check_weight(path, floats)
    codes, scales, axis = weight_of(path)
    amax = (weight_amax if calibrator == "max" else weight_amax_mse)(torch.from_numpy(floats), None)
    assert axis == 1
    np.testing.assert_array_equal(scales, np.full(24, amax / 127))
    np.testing.assert_array_equal(codes, np.clip(np.rint(floats / scales[0]), -127, 127))
    assert lint_onnx(path) == []


def test_a_variant_of_a_file_keeps_codes_and_scale(exported: Path, tmp_path: Path) -> None:
    write_variant(exported, ["stem"], tmp_path / "v.onnx")
    for kept, given in zip(weight_of(tmp_path / "v.onnx"), weight_of(exported), strict=True):
        np.testing.assert_array_equal(kept, given)
    assert [finding.node for finding in lint_onnx(tmp_path / "v.onnx")] == ["stem"]


def test_a_variant_states_one_scale_without_an_axis_along_the_output_channels(exported: Path, tmp_path: Path) -> None:
    """Of a file from another tool."""
    model = ir.load(exported)
    (layer,) = (node for node in model.graph if node.op_type == "ConvTranspose")
    dequantize = layer.inputs[1].producer()
    del dequantize.attributes["axis"]
    for value, array in zip(dequantize.inputs[1:], (np.float32(0.01), np.int8(0)), strict=True):
        value.const_value = ir.tensor(np.array(array), name=value.name)
        value.shape = ir.Shape(())
    ir.save(model, tmp_path / "scalar.onnx")
    write_variant(tmp_path / "scalar.onnx", [], tmp_path / "v.onnx")
    codes, scales, axis = weight_of(tmp_path / "v.onnx")
    np.testing.assert_array_equal(scales, np.full(24, 0.01, np.float32))
    np.testing.assert_array_equal(codes, weight_of(exported)[0])
    assert axis == 1
