"""Whose time an engine's layers are charged to, on a part of a U-Net as TensorRT 8.6 names and times its layers."""

import pytest
import qdq_models

from deploy.builder import build
from deploy.engine_layers import EngineLayer
from deploy.installed import find_toolkit
from deploy.layer_costs import CostNode, LayerCosts, SlowerInInt8
from deploy.settings import BuildSettings


def conversions(tensor: str, name: str, suffix: str = "") -> dict[str, CostNode]:
    q, dq = f"{name}/quantize{suffix}", f"{name}/dequantize{suffix}"
    return {q: CostNode("conversion", (tensor,), (q,)), dq: CostNode("conversion", (q,), (dq,))}


NODES = {
    **conversions("x", "x"),
    "down": CostNode("product", ("x/dequantize", "down.weight"), ("down",)),
    "relu": CostNode("other", ("down",), ("relu",)),
    **conversions("relu", "cat"),
    "pool": CostNode("other", ("cat/dequantize",), ("pool",)),
    "up": CostNode("product", ("pool", "up.weight"), ("up",)),
    **conversions("up", "cat", "_1"),
    "cat": CostNode("other", ("cat/dequantize", "cat/dequantize_1"), ("cat",)),
    **conversions("cat", "cat", "_2"),
    "join": CostNode("product", ("cat/dequantize_2", "join.weight"), ("join",)),
    "activation": CostNode("other", ("join",), ("activation",)),
    **conversions("activation", "activation"),
    "head": CostNode("product", ("activation/dequantize", "head.weight"), ("head",)),
}


def costs() -> LayerCosts:
    return LayerCosts(NODES)


def layer(name: str, precision: str = "INT8") -> EngineLayer:
    own = EngineLayer(name, "", (precision,), (), (), ()).own_nodes
    return EngineLayer(name, "", (precision,), (), (), tuple(own))


INT8 = [
    (layer("x/quantize", "FP32"), 0.018),
    (layer("down.weight + down + relu"), 0.112),
    (layer("pool"), 0.039),
    (layer("Reformatting CopyNode for Input Tensor 0 to up", "FP16"), 0.026),
    (layer("up", "FP16"), 0.093),
    (layer("cat/quantize_1", "FP16"), 0.131),
    (layer("join.weight + join"), 0.112),
    (layer("PWN(PWN(activation), activation_7)"), 0.022),
    (layer("head.weight + head"), 0.079),
]
FP16 = [
    (layer("Reformatting CopyNode for Input Tensor 0 to down + relu", "FP32"), 0.031),
    (layer("down + relu", "FP16"), 0.096),
    (layer("pool", "FP16"), 0.034),
    (layer("up", "FP16"), 0.095),
    (layer("join + PWN(activation)", "FP16"), 0.144),
    (layer("head", "FP16"), 0.042),
    (layer("Reformatting CopyNode for Output Tensor 0 to head", "FP16"), 0.011),
    (layer("Reformatting CopyNode for Input Tensor 1 to head + PWN(PWN(other), another)", "FP16"), 0.010),
]


def test_every_layer_is_charged_to_somebody():
    """A Q to who reads what it writes, through a concatenation too; a reformat to its target; a pool to its input."""
    assert costs().charge(INT8) == pytest.approx(
        {
            "down": 0.018 + 0.112 + 0.039,
            "up": 0.026 + 0.093,
            "join": 0.131 + 0.112 + 0.022,
            "head": 0.079,
        }
    )
    assert costs().charge(FP16) == pytest.approx(
        {
            "down": 0.031 + 0.096 + 0.034,
            "up": 0.095,
            "join": 0.144,
            "head": 0.042 + 0.021,
        }
    )


def test_what_nobody_made_is_kept_apart():
    assert costs().charge([(layer("another"), 0.5), (layer("head"), 1.0)]) == {"": 0.5, "head": 1.0}


def test_layers_that_are_slower_in_int8_worst_first():
    """``up`` runs in FP16 in both engines, so no Q/DQ can be taken away from it."""
    slower = costs().slower_in_int8(INT8, FP16)
    assert [one.node for one in slower] == ["join", "head", "down"]
    assert slower[0] == SlowerInInt8("join", pytest.approx(0.265), pytest.approx(0.144))
    assert slower[0].loss == pytest.approx(0.121)


def test_small_differences_are_noise():
    int8 = [(layer("head.weight + head"), 1.0)]
    assert not costs().slower_in_int8(int8, [(layer("head", "FP16"), 0.995)])
    assert costs().slower_in_int8(int8, [(layer("head", "FP16"), 0.985)])


def test_a_layer_of_several_nodes_that_are_no_products():
    """Its time goes to what makes its first node's input; of Q nodes alone, to what reads behind the last."""
    assert costs().charge([(layer("pool + cat/quantize_1"), 1.0)]) == {"down": 1.0}
    assert costs().charge([(layer("x/quantize + activation/quantize"), 1.0)]) == {"head": 1.0}


def test_a_reformat_into_a_float_layer_does_not_make_it_int8():
    int8 = [(layer("Reformatting CopyNode for Input Tensor 0 to head || up"), 0.5), (layer("head || up", "FP16"), 0.5)]
    assert not costs().slower_in_int8(int8, [(layer("head", "FP16"), 0.1), (layer("up", "FP16"), 0.1)])


def test_nodes_of_one_kernel_count_together():
    """Half of what both took is more than one of them takes alone; together they are not slower."""
    int8 = [(layer("join"), 0.25), (layer("head"), 0.05)]
    assert not costs().slower_in_int8(int8, [(layer("join || head", "FP16"), 0.40)])
    assert [one.node for one in costs().slower_in_int8(int8, [(layer("join || head", "FP16"), 0.20)])] == ["join"]


def test_nodes_that_the_other_engine_does_not_name_are_not_compared():
    assert not costs().slower_in_int8([(layer("head"), 1.0)], [(layer("{ForeignNode[join...head]}", "FP16"), 0.5)])


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("PWN(features.1.mul)", ["features.1.mul"]),
        ("conv.weight + conv + PWN(act.2, act.2_58)", ["conv.weight", "conv", "act.2", "act.2_58"]),
        ("PWN(PWN(a), b + c)", ["a", "b", "c"]),
    ],
)
def test_names_of_kernels_of_several_pointwise_operations(name: str, nodes: list[str]):
    assert EngineLayer(name, "", (), (), (), ()).own_nodes == nodes


def test_nodes_of_a_real_network_bear_the_names_of_a_real_engine(tmp_path):
    toolkit = find_toolkit("tensorrt-rtx")
    model = qdq_models.residual(tmp_path / "model.onnx")
    layers = build(toolkit, model, BuildSettings()).audit.layers
    charged = LayerCosts.from_model(toolkit, model).charge([(layer, 1.0) for layer in layers])
    products = {"/stem/Conv": 1, "/conv1/Conv": 1, "/conv2/Conv": 1, "/logits/Gemm": 1}
    assert charged == products | {"": len(layers) - len(products)}  # generated kernels bear no names of nodes
