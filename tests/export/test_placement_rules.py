"""Tiny Q/DQ networks, node by node: exactly the fault that was planted is found, and nothing in its clean twin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_graphs import Graph, save

from export.findings import LintFinding
from export.hard_rules import hard_findings
from export.onnx_network import network_from_onnx
from export.placement_rules import placement_findings, sentence
from export.read import read_onnx

DOUBLED = np.array([1, 1, 2, 2], np.float32)


@pytest.fixture
def findings(tmp_path: Path):
    """What is found of the placement of a model, which breaks no hard rule."""

    def find(model: onnx.ModelProto) -> list[LintFinding]:
        read = read_onnx(save(model, tmp_path / "m.onnx"))
        assert hard_findings(read) == []
        found = placement_findings(network_from_onnx(read))
        assert {finding.severity for finding in found} <= {"warning"}
        return found

    return find


def named(findings: list[LintFinding]) -> list[tuple[str, str]]:
    return [(finding.node, finding.rule) for finding in findings]


def relu(graph: Graph, tensor: str) -> str:
    return graph.node("Relu", [tensor], f"{tensor}.relu")


# --- residual additions


def residual(*, skip: bool, inside: bool) -> onnx.ModelProto:
    """x -> conv1 -> relu -> conv2 -> add x; which inputs of the addition are quantized."""
    graph = Graph()
    x = graph.qdq("x")
    y = graph.conv(graph.qdq(relu(graph, graph.conv(x, "conv1", 16, 16))), "conv2", 16, 16)
    add = graph.node("Add", [graph.qdq(y) if inside else y, x if skip else "x"], "add")
    relu(graph, add)
    return graph.model()


def test_the_skip_branch_of_an_addition_is_quantized(findings):
    assert findings(residual(skip=True, inside=False)) == []


@pytest.mark.parametrize(
    ("skip", "inside", "says"),
    [
        (False, False, "no input is quantized, so the sum does not fuse into conv2: 1 extra reformat of 2.0 kB per"),
        (True, True, "every input is quantized, so the sum does not fuse into conv2: 1 extra reformat of 2.0 kB per"),
        (False, True, "x is read in float, so the sum does not fuse into conv2: 1 extra reformat of 2.0 kB per image"),
    ],
)
def test_an_addition_with_none_both_or_the_wrong_input_quantized(findings, skip, inside, says):
    (finding,) = findings(residual(skip=skip, inside=inside))
    assert (finding.node, finding.rule) == ("add", "residual_add")
    assert says in finding.message
    assert finding.bytes_per_image == 16 * 8 * 8 * 2


def downsampling(*, short: bool, long: bool) -> onnx.ModelProto:
    """conv1 -> relu -> conv2, plus a convolution of the same tensor, as at the start of a ResNet's stage."""
    graph = Graph()
    x = graph.qdq("x")
    y = graph.conv(graph.qdq(relu(graph, graph.conv(x, "conv1", 16, 32))), "conv2", 32, 32)
    shortcut = graph.conv(x, "shortcut", 16, 32, kernel=1)
    graph.node("Add", [graph.qdq(y) if long else y, graph.qdq(shortcut) if short else shortcut], "add")
    return graph.model()


def test_of_two_convolutions_the_shorter_path_is_quantized(findings):
    assert findings(downsampling(short=True, long=False)) == []
    (finding,) = findings(downsampling(short=False, long=True))
    assert (finding.node, finding.rule) == ("add", "residual_add_of_convolutions")
    assert "the longer branch is quantized: conv2, at its end, comes last" in finding.message
    for both in (False, True):
        (finding,) = findings(downsampling(short=both, long=both))
        assert "does not fuse into conv2" in finding.message


def test_an_addition_behind_batch_normalization_names_the_convolution(findings):
    graph = Graph()
    norm = [graph.constant(name, np.ones(16, np.float32)) for name in ("scale", "bias", "mean", "variance")]
    conv = graph.conv(graph.qdq("x"), "conv", 16, 16)
    graph.node("Add", [graph.node("BatchNormalization", [conv, *norm], "norm"), "x"], "add")
    (finding,) = findings(graph.model())
    assert "does not fuse into conv:" in finding.message


# --- convolutions and linear layers


def chain(*, before_relu: bool = False, behind_relu: bool = True) -> onnx.ModelProto:
    graph = Graph()
    y = graph.conv(graph.qdq("x"), "conv1", 16, 16)
    y = relu(graph, graph.qdq(y) if before_relu else y)
    graph.conv(graph.qdq(y) if behind_relu else y, "conv2", 16, 16)
    return graph.model()


def test_a_convolution_is_quantized_behind_its_activation(findings):
    assert findings(chain()) == []
    (finding,) = findings(chain(before_relu=True))
    assert (finding.node, finding.rule) == ("conv1", "weighted_output")
    assert "its output is quantized before conv1/dequantize.relu, which then cannot fuse into it" in finding.message


@pytest.mark.parametrize(
    ("x", "weight", "says"),
    [
        (False, False, "no Q/DQ on its input and weight, so it runs in float"),
        (True, False, "no Q/DQ on its weight, so it runs in float, and the Q/DQ on the other only adds work"),
        (False, True, "no Q/DQ on its input, so it runs in float, and the Q/DQ on the other only adds work"),
    ],
)
def test_a_layer_that_is_quantized_by_half_or_not_at_all(findings, x, weight, says):
    graph = Graph()
    y = relu(graph, graph.conv(graph.qdq("x"), "conv1", 16, 16))
    graph.conv(graph.qdq(y) if x else y, "conv2", 16, 16, quantized=weight)
    (finding,) = findings(graph.model())
    assert (finding.node, finding.rule, finding.message) == ("conv2", "weighted_input", says)


def test_a_weight_that_is_clipped_behind_its_dq_is_not_quantized(findings):
    graph = Graph()
    bounds = [graph.constant("low", np.float32(-1)), graph.constant("high", np.float32(1))]
    clipped = graph.node("Clip", [graph.codes("w", (16, 16, 1, 1)), *bounds], "clipped")
    graph.node("Conv", [graph.qdq("x"), clipped], "conv")
    (finding,) = findings(graph.model())
    assert "no Q/DQ on its weight" in finding.message


def test_too_few_channels_stay_in_float(findings):
    def network(*, quantized: bool) -> onnx.ModelProto:
        graph = Graph()
        graph.conv(graph.qdq("x") if quantized else "x", "conv", 3, 12, quantized=quantized)
        return graph.model(("N", 3, 8, 8))

    assert findings(network(quantized=False)) == []
    (finding,) = findings(network(quantized=True))
    assert (finding.node, finding.rule) == ("conv", "few_channels")
    assert "it is quantized, but has no INT8 kernel, or a slow one: 3 -> 12 channels" in finding.message


def test_a_depthwise_convolution_is_quantized_where_its_output_is(findings):
    def network(*, depthwise: bool, output: bool) -> onnx.ModelProto:
        graph = Graph()
        y = graph.conv(graph.qdq("x") if depthwise else "x", "depthwise", 16, 16, group=16, quantized=depthwise)
        y = relu(graph, y)
        if output:
            graph.conv(graph.qdq(y), "conv", 16, 16)
        else:
            graph.node("Softmax", [y], "softmax")
        return graph.model()

    assert findings(network(depthwise=True, output=True)) == []
    assert findings(network(depthwise=False, output=False)) == []
    (finding,) = findings(network(depthwise=True, output=False))
    assert (finding.node, finding.rule) == ("depthwise", "grouped_float_output")
    assert "its output is read in float" in finding.message
    (finding,) = findings(network(depthwise=False, output=True))
    assert (finding.node, finding.rule) == ("depthwise", "weighted_input")


# --- what runs in INT8 throughout


def concatenation(scales: tuple[float | None, ...], *, behind: float | None, other_reader: bool = False):
    """Two convolutions, concatenated; the scales of the inputs and of the output, where they are quantized."""
    graph = Graph()
    x = graph.qdq("x")
    parts = [relu(graph, graph.conv(x, name, 16, 16)) for name in ("a", "b")]
    parts = [graph.qdq(part, scale) if scale else part for part, scale in zip(parts, scales, strict=True)]
    y = graph.node("Concat", parts, "concat", axis=1)
    outputs = [graph.node("Softmax", [y], "softmax")] if other_reader else []
    outputs.append(graph.conv(graph.qdq(y, behind) if behind else y, "conv", 32, 16))
    return graph.model(outputs=outputs)


@pytest.mark.parametrize(("scales", "behind"), [((0.1, 0.1), None), ((0.1, 0.1), 0.1), ((None, None), 0.1)])
def test_a_concatenation_of_one_scale(findings, scales, behind):
    assert findings(concatenation(scales, behind=behind)) == []


@pytest.mark.parametrize(("scales", "behind"), [((0.1, 0.2), None), ((0.1, 0.1), 0.2), ((None, 0.1), 0.2)])
def test_a_concatenation_of_different_scales(findings, scales, behind):
    (finding,) = findings(concatenation(scales, behind=behind))
    assert (finding.node, finding.rule) == ("concat", "shared_concat_scale")
    assert "its inputs and output have 2 different scales" in finding.message


def test_a_concatenation_in_float(findings):
    assert findings(concatenation((0.1, 0.1), behind=None, other_reader=True)) == []
    (finding,) = findings(concatenation((None, None), behind=0.1, other_reader=True))
    assert (finding.node, finding.rule) == ("concat", "shared_concat_scale")
    assert "a.relu and b.relu are read in float, so it copies FP16" in finding.message


def test_an_average_pool_reads_int8(findings):
    def network(*, quantized: bool) -> onnx.ModelProto:
        graph = Graph()
        y = relu(graph, graph.conv(graph.qdq("x"), "conv", 16, 16))
        y = graph.node("GlobalAveragePool", [graph.qdq(y) if quantized else y], "pool")
        y = graph.node("Flatten", [y], "flat")
        graph.node("Gemm", [graph.qdq(y, 0.02), graph.codes("w", (10, 16))], "fc", transB=1)
        return graph.model()

    assert findings(network(quantized=True)) == []
    (finding,) = findings(network(quantized=False))
    assert (finding.node, finding.rule) == ("pool", "pool_input")
    assert finding.message == "conv.relu is read in float: the pool runs in FP16 between INT8 layers"
    assert finding.bytes_per_image == 16 * 8 * 8


def test_a_gate_multiplies_codes(findings):
    def network(*, quantized: bool) -> onnx.ModelProto:
        graph = Graph()
        y = relu(graph, graph.conv(graph.qdq("x"), "conv", 16, 16))
        codes = graph.qdq(y)
        squeezed = graph.qdq(graph.node("GlobalAveragePool", [codes], "pool"), 0.02)
        gate = relu(graph, graph.conv(squeezed, "down", 16, 16, kernel=1))
        gate = graph.node("Sigmoid", [graph.conv(graph.qdq(gate), "up", 16, 16, kernel=1)], "gate")
        factors = [codes, graph.qdq(gate, 0.01)] if quantized else [y, gate]
        graph.conv(graph.qdq(graph.node("Mul", factors, "product")), "last", 16, 16)
        return graph.model()

    assert findings(network(quantized=True)) == []
    (finding,) = findings(network(quantized=False))
    assert (finding.node, finding.rule) == ("product", "gate_product")
    assert "conv.relu and gate are read in float: the gate multiplies in FP16" in finding.message


def test_a_hard_swish_reads_codes(findings):
    def network(*, quantized: bool) -> onnx.ModelProto:
        graph = Graph()
        y = graph.conv(graph.qdq("x"), "conv1", 16, 16)
        y = graph.node("HardSwish", [graph.qdq(y) if quantized else y], "swish")
        graph.conv(graph.qdq(y), "conv2", 16, 16)
        return graph.model()

    assert findings(network(quantized=True)) == []
    (finding,) = findings(network(quantized=False))
    assert (finding.node, finding.rule) == ("swish", "unfused_activation")
    assert "conv1 is read in float: the activation's kernel reads FP16" in finding.message


# --- scales and data movement


def test_one_tensor_has_one_scale(findings):
    def network(second: float) -> onnx.ModelProto:
        graph = Graph()
        y = relu(graph, graph.conv(graph.qdq("x"), "conv", 16, 16))
        outputs = [
            graph.conv(graph.qdq(y, 0.1, "one"), "a", 16, 16),
            graph.conv(graph.qdq(y, second, "two"), "b", 16, 16),
        ]
        return graph.model(outputs=outputs)

    assert findings(network(0.1)) == []
    (finding,) = findings(network(0.2))
    assert (finding.node, finding.rule) == ("conv.relu", "several_scales")
    assert "quantized by 2 different scales, so its codes are computed 2 times" in finding.message


def test_one_scale_also_behind_data_movement(findings):
    def network(second: float) -> onnx.ModelProto:
        graph = Graph()
        y = relu(graph, graph.conv(graph.qdq("x"), "conv", 16, 16))
        pooled = graph.node("MaxPool", [y], "pool", kernel_shape=[2, 2])
        outputs = [graph.conv(graph.qdq(y, 0.1), "a", 16, 16), graph.conv(graph.qdq(pooled, second), "b", 16, 16)]
        return graph.model(outputs=outputs)

    assert findings(network(0.1)) == []
    assert named(findings(network(0.2))) == [("conv.relu", "several_scales")]


@pytest.mark.parametrize("op", ["MaxPool", "Transpose", "Resize"])
@pytest.mark.parametrize("place", ["before", "behind", "both"])
def test_either_side_of_data_movement_is_right(findings, op, place):
    graph = Graph()
    y = relu(graph, graph.conv(graph.qdq("x"), "conv1", 16, 16))
    y = graph.qdq(y, 0.1) if place != "behind" else y
    sizes = ["", "", graph.constant("sizes", DOUBLED)] if op == "Resize" else []
    attributes = {"MaxPool": {"kernel_shape": [2, 2]}, "Transpose": {"perm": [0, 1, 3, 2]}, "Resize": {}}[op]
    y = graph.node(op, [y, *sizes], "moved", **attributes)
    graph.conv(graph.qdq(y, 0.1) if place != "before" else y, "conv2", 16, 16)
    assert findings(graph.model()) == []


def test_a_q_before_interpolation_does_not_serve_what_is_behind_it(findings):
    graph = Graph()
    y = graph.qdq(relu(graph, graph.conv(graph.qdq("x"), "conv1", 16, 16)))
    y = graph.node("Resize", [y, "", graph.constant("sizes", DOUBLED)], "resized", mode="linear")
    graph.conv(y, "conv2", 16, 16)
    assert named(findings(graph.model())) == [("conv2", "weighted_input")]


def test_every_rule_that_is_found_has_a_sentence_but_those_that_say_all():
    assert sentence("residual_add").startswith("one input of a residual addition")
    assert sentence("several_scales") == sentence("positive_scale") == ""
