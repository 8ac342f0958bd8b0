"""Concatenations that repeat an earlier one: what is rewritten, and that the answer stays the same to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx_graphs import Graph, save
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
from torch import Tensor, nn

from export.emit import emit
from export.fold import fold, fold_float
from export.reuse_concats import repeat_findings, reuse_concats
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import prepare


def concats(*inputs: str, axes: tuple[int, ...] = (1, 1), quantized: tuple[float, ...] = ()) -> onnx.ModelProto:
    """x -> branches a to d; concatenations of what ``inputs`` name by letters; each goes through a Relu.

    ``quantized``: the scales of the branches and of each concatenation, then the letters are behind Q/DQ.
    """
    graph = Graph()
    scales = {scale: graph.constant(f"scale_{scale}", np.float32(scale)) for scale in quantized}
    zero = graph.constant("zero", np.int8(0))

    def read(tensor: str, scale: float) -> str:
        codes = graph.node("QuantizeLinear", [tensor, scales[scale], zero], f"{tensor}/quantize")
        return graph.node("DequantizeLinear", [codes, scales[scale], zero], f"{tensor}/dequantize")

    branches = {letter: graph.conv("x", letter, 16, 16, 1, quantized=False) for letter in "abcd"}
    if quantized:
        branches = {letter: read(tensor, quantized[0]) for letter, tensor in branches.items()}
    outputs = []
    for index, letters in enumerate(inputs):
        whole = graph.node("Concat", [branches[one] for one in letters], f"concat{index}", axis=axes[index % len(axes)])
        whole = read(whole, quantized[index + 1]) if quantized else whole
        outputs.append(graph.node("Relu", [whole], f"relu{index}"))
    return graph.model(outputs=outputs)


def rewritten(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, list[str]]]:
    """The rewritten model, whose answer is the same; the inputs of its concatenations."""
    found = ir.from_proto(model)
    reuse_concats(found.graph)
    after = ir.to_proto(found)
    for one, other in zip(answers(model, (2, 16, 8, 8)), answers(after, (2, 16, 8, 8)), strict=True):
        np.testing.assert_array_equal(one, other)
    return after, {node.name: list(node.input) for node in after.graph.node if node.op_type == "Concat"}


def answers(model: onnx.ModelProto, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Without fusions, which round differently."""
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
    session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return list(session.run(None, {session.get_inputs()[0].name: x}))


@pytest.mark.parametrize(
    ("letters", "inputs"),
    [
        (("ab", "abc", "abcd"), [["a", "b"], ["concat0", "c"], ["concat1", "d"]]),
        (("ab", "cab"), [["a", "b"], ["c", "concat0"]]),
        (("ab", "cabd"), [["a", "b"], ["c", "concat0", "d"]]),
        (("ab", "abc", "abcab"), [["a", "b"], ["concat0", "c"], ["concat1", "concat0"]]),
        (("ab", "ba"), [["a", "b"], ["b", "a"]]),
        (("ab", "bac"), [["a", "b"], ["b", "a", "c"]]),
        (("abc", "ab"), [["a", "b", "c"], ["a", "b"]]),
        (("ab", "ab"), [["a", "b"], ["a", "b"]]),
    ],
)
def test_an_earlier_concatenation_takes_the_place_of_its_inputs(letters, inputs):
    assert list(rewritten(concats(*letters))[1].values()) == inputs


def test_concatenations_along_another_axis_are_others():
    assert rewritten(concats("ab", "abc", axes=(2, 1)))[1]["concat1"] == ["a", "b", "c"]


def test_behind_one_scale_codes_are_copied():
    scales = {"quantized": (0.05, 0.05, 0.05, 0.05)}
    _, found = rewritten(concats("ab", "abc", "abcd", **scales))
    assert found["concat1"] == ["concat0/dequantize", "c/dequantize"]
    assert found["concat2"] == ["concat1/dequantize", "d/dequantize"]


def test_behind_another_scale_the_concatenation_itself_is_taken():
    _, found = rewritten(concats("ab", "abc", quantized=(0.05, 0.1, 0.05)))
    assert found["concat1"] == ["concat0", "c/dequantize"]


class DenseBlock(nn.Module):
    """As in DenseNets: each layer reads all tensors before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 * count) for count in (2, 3, 4))
        self.convs = nn.ModuleList(nn.Conv2d(16 * count, 16, 1) for count in (1, 2, 3, 4))
        self.head = nn.Linear(80, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.first(x)]
        for index, conv in enumerate(self.convs):
            given = torch.cat(features, 1)
            features.append(conv(F.relu(self.norms[index - 1](given)) if index else given))
        return self.head(F.adaptive_avg_pool2d(torch.cat(features, 1), 1).flatten(1))


@pytest.mark.parametrize("quantized", [True, False])
def test_an_exported_dense_block_grows_in_one_tensor(quantized):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    prepared = prepare(DenseBlock().eval(), input_shape=x.shape[1:])
    with torch.no_grad():
        calibrate_ranges(prepared, [x], "max")
    network = fold(prepared)[0] if quantized else fold_float(prepared)
    model = ir.to_proto(emit(network, x[:2], {}))
    assert [len(node.input) for node in model.graph.node if node.op_type == "Concat"] == [2, 2, 2, 2]
    (found,) = answers(model, tuple(x.shape))
    with torch.no_grad():
        expected = network(torch.from_numpy(np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3)


def test_the_lint_says_what_is_copied_again(tmp_path: Path):
    graph = ir.load(save(onnx.shape_inference.infer_shapes(concats("ab", "cab")), tmp_path / "m.onnx")).graph
    (finding,) = repeat_findings(graph)
    assert (finding.node, finding.rule, finding.severity) == ("concat1", "repeated_concat", "warning")
    assert finding.bytes_per_image == 2 * 2 * 16 * 8 * 8
    assert "2 of its inputs make up concat0 already" in finding.message
    quantized = onnx.shape_inference.infer_shapes(concats("ab", "cab", quantized=(0.05, 0.05, 0.05)))
    (finding,) = repeat_findings(ir.from_proto(quantized).graph)
    assert finding.bytes_per_image == 2 * 16 * 8 * 8
    assert not list(repeat_findings(ir.from_proto(concats("ab", "cd")).graph))
