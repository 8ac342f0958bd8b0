"""What the ONNX file is made of, and that ONNX Runtime computes from it what PyTorch computes."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

from export import parity
from export.emit import emit, example_input, with_ends
from export.fold import fold, fold_float
from export.hard_rules import hard_findings
from export.session import session, sqnr_db
from export.shapes import simplify_shapes
from qat.base.errors import UserError
from qat.data.preprocessing import Preprocessing
from qat.fake_quantize.prepare import prepare
from qat.fake_quantize.quantizer import ActivationQuantizer

PIXELS = 32


def preprocessing() -> Preprocessing:
    return Preprocessing(height=PIXELS, width=PIXELS, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), resize=PIXELS)


@pytest.fixture(scope="module")
def prepared() -> fx.GraphModule:
    torch.manual_seed(0)
    prepared = prepare(torchvision.models.resnet18(num_classes=10).eval(), input_shape=(3, PIXELS, PIXELS))
    for module in prepared.modules():
        if isinstance(module, ActivationQuantizer):
            module.amax.fill_(4.0)
    return prepared


@pytest.fixture(scope="module")
def folded(prepared) -> fx.GraphModule:
    return fold(prepared)[0]


@pytest.fixture(scope="module")
def model(folded) -> ir.Model:
    return emit(folded, example_input((3, PIXELS, PIXELS), "float32-nchw"), {"input": "float32-nchw"})


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (4, 3, PIXELS, PIXELS), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def nodes(model: ir.Model, *types: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in types]


def test_only_the_nodes_that_are_wanted(model):
    counts = {}
    for node in model.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    # 20 convolutions; 8 additions; 3 projections, the input, the pooled input and the pooled output are quantized too
    activations = 1 + 1 + 8 + 8 + 3 + 1
    assert counts == {
        "Conv": 20,
        "Relu": 17,
        "Add": 8,
        "MaxPool": 1,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
        "QuantizeLinear": activations,
        "DequantizeLinear": activations + 21,
    }
    assert model.opset_imports[""] == 20


def test_weights_are_int8_initializers_behind_one_dequantize_linear(model):
    for node in nodes(model, "Conv", "Gemm"):
        dequantize = node.inputs[1].producer()
        assert dequantize.op_type == "DequantizeLinear"
        codes, scale, zero_point = dequantize.inputs
        assert codes.const_value.dtype == ir.DataType.INT8
        assert scale.const_value.dtype == ir.DataType.FLOAT
        assert scale.shape == zero_point.shape == (codes.shape[0],)
        assert not zero_point.const_value.numpy().any()


def test_q_and_dq_share_scale_and_zero_point(model):
    for quantize in nodes(model, "QuantizeLinear"):
        (dequantize,) = quantize.outputs[0].consumers()
        assert dequantize.inputs[1] is quantize.inputs[1]
        assert dequantize.inputs[2] is quantize.inputs[2]


def test_nodes_bear_the_names_of_their_modules(model):
    names = {node.name for node in model.graph}
    assert {
        "conv1",
        "layer1.0.conv1",
        "layer2.0.downsample.0",
        "layer1.0.add",
        "fc",
        "x/quantize",
        "layer1.0.conv1.weight_quantizer/dequantize",
    } <= names
    assert len(names) == len(list(model.graph))


def test_nothing_of_this_machine_is_in_the_file(model, tmp_path):
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    content = path.read_bytes()
    for trace in (b"site-packages", str(Path.cwd()).encode(), b"stack_trace"):
        assert trace not in content
    assert onnx.load(path).metadata_props[0].key == "input"


def test_lint_is_clean(model):
    assert hard_findings(model) == []


def test_float_input_agrees_with_onnx_runtime_layer_by_layer(folded, model, images, tmp_path):
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    x = preprocessing().normalize(images)
    found, (logits,), _ = parity.measure(folded, path, [(x[:3], x[:3]), (x[3:], x[3:])], layer_images=4, logits=True)
    assert found.images == len(logits) == 4
    torch.testing.assert_close(logits, folded(x))
    assert len(found.layers) == len(nodes(model, "QuantizeLinear")) + 1
    assert found.worst.sqnr_db is None or found.worst.sqnr_db > 100


def test_logits_that_are_all_zero_agree(prepared, images, tmp_path):
    network, path = fold_float(prepared), tmp_path / "model.onnx"
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    ir.save(emit(network, example_input((3, PIXELS, PIXELS), "float32-nchw"), {}), path)
    x = preprocessing().normalize(images)
    found, (logits,), _ = parity.measure(network, path, [(x, x)], layer_images=4, logits=True)
    assert not logits.any()
    assert (found.other_top1, found.smallest_logit_cosine) == (0, 1.0)


def test_any_batch_size_runs(model, tmp_path):
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    whole = session(path)
    for batch in (1, 3):
        x = np.zeros((batch, 3, PIXELS, PIXELS), np.float32)
        assert whole.run(None, {"input": x})[0].shape == (batch, 10)


def test_uint8_input_does_the_preprocessing(folded, images, tmp_path):
    network = with_ends(folded, preprocessing(), "uint8-nhwc")
    model = emit(network, example_input((3, PIXELS, PIXELS), "uint8-nhwc"), {})
    assert hard_findings(model) == []
    assert "layer1.0.add" in {node.name for node in model.graph}
    assert [node.op_type for node in list(model.graph)[:4]] == ["Cast", "Transpose", "Mul", "Add"]
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    assert model.graph.inputs[0].dtype == ir.DataType.UINT8
    given = images.permute(0, 2, 3, 1).contiguous()
    normalized = preprocessing().normalize(images)
    found, *_ = parity.measure(folded, path, [(normalized, given)], layer_images=4)
    worst_inside = min(layer.sqnr_db or 999 for layer in found.layers[1:])
    assert worst_inside > 100
    assert (found.layers[0].sqnr_db or 999) > 100  # the normalized image itself


def test_the_float32_file_has_the_same_nodes_without_q_and_dq(prepared, model, images, tmp_path):
    network = fold_float(prepared)
    plain = emit(network, example_input((3, PIXELS, PIXELS), "float32-nchw"), {})
    quantizing = nodes(model, "QuantizeLinear", "DequantizeLinear")
    expected = [(node.name, node.op_type) for node in model.graph if node not in quantizing]
    assert [(node.name, node.op_type) for node in plain.graph] == expected
    assert {value.dtype for value in plain.graph.initializers.values()} == {ir.DataType.FLOAT}
    assert hard_findings(plain) == []
    path = tmp_path / "model.onnx"
    ir.save(plain, path)
    x = preprocessing().normalize(images)
    found, *_ = parity.measure(network, path, [(x, x)], layer_images=4)
    assert [layer.tensor for layer in found.layers] == ["logits"]
    assert found.to_json()["worst_layer"]["sqnr_db"] > 100
    assert str(found).endswith("dB at logits")


@pytest.mark.parametrize(("kind", "before"), [("float32-nchw", []), ("uint8-nhwc", ["transpose", "mul", "add"])])
def test_the_float16_file_is_float16_between_two_casts(prepared, model, images, tmp_path, kind, before):
    network = fold_float(prepared)
    given = preprocessing().normalize(images)
    pairs = [(given, given if kind == "float32-nchw" else images.permute(0, 2, 3, 1).contiguous())]
    half = emit(with_ends(network, preprocessing(), kind, torch.float16), example_input((3, PIXELS, PIXELS), kind), {})
    inside = [node.name for node in model.graph if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    assert [node.name for node in half.graph] == ["cast", *before, *inside, "cast_1"]
    assert {value.dtype for value in half.graph.initializers.values()} == {ir.DataType.FLOAT16}
    assert half.graph.inputs[0].dtype == (ir.DataType.FLOAT if kind == "float32-nchw" else ir.DataType.UINT8)
    assert half.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert next(network.parameters()).dtype == torch.float32
    path = tmp_path / "model.onnx"
    ir.save(half, path)
    found, (logits,), _ = parity.measure(network, path, pairs, layer_images=4, logits=True)
    assert logits.dtype == torch.float32
    assert 40 < found.worst.sqnr_db < 100
    assert found.smallest_logit_cosine > 0.9999


def test_codes_go_in_only_where_the_input_is_quantized():
    layers = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 1)).eval())
    with pytest.raises(UserError, match="input is not quantized, so it cannot be INT8: leave out --input int8-nchw"):
        with_ends(layers, preprocessing(), "int8-nchw")


def test_parity_sees_a_wrong_scale(folded, model, images, tmp_path):
    """The comparison must be able to fail: one scale in the file is off by 5 %."""
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    proto = onnx.load(path)
    (scale,) = [t for t in proto.graph.initializer if t.name == "layer2.0.conv1.weight_quantizer.scale"]
    scale.raw_data = (onnx.numpy_helper.to_array(scale) * np.float32(1.05)).tobytes()
    onnx.save(proto, path)
    x = preprocessing().normalize(images)
    found, *_ = parity.measure(folded, path, [(x, x)], layer_images=4)
    assert found.worst.tensor == "layer2_0_relu"
    assert found.worst.sqnr_db < 40


def test_sqnr_against_the_definition():
    signal = np.array([3.0, 4.0], np.float32)
    assert sqnr_db(signal, signal) is None
    assert sqnr_db(signal, signal + np.array([0.5, 0], np.float32)) == pytest.approx(20)


def test_a_flatten_module_and_functional_pooling_stay_single_nodes():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.flatten, self.fc = nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.flatten(nn.functional.adaptive_avg_pool2d(self.conv(x).relu(), 1)))

    prepared = prepare(Head().eval(), input_shape=(3, 8, 8))
    for module in prepared.modules():
        if isinstance(module, ActivationQuantizer):
            module.amax.fill_(4.0)
    types = [node.op_type for node in emit(fold(prepared)[0], torch.zeros(2, 3, 8, 8), {}).graph]
    assert types.count("GlobalAveragePool") == types.count("Flatten") == 1
    assert not set(types) & {"ReduceMean", "Reshape", "Shape", "Identity", "Constant"}


def test_shapes_need_no_arithmetic_that_some_versions_of_tensorrt_misread(tmp_path):
    """A Reshape has a constant shape; the batch that a Resize needs is cut out by Slice, not by attributes of Shape."""

    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            x = self.conv(x)
            batch, channels, height, width = x.shape
            x = x.reshape(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, -1, height, width)
            return nn.functional.interpolate(x, size=(7, 9), mode="bilinear")

    x = torch.rand(3, 3, 8, 8)
    folded = fold_float(prepare(Shuffled().eval(), input_shape=x.shape[1:]))
    model = emit(folded, x[:2], {})
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds == {"Conv": 1, "Reshape": 2, "Transpose": 1, "Shape": 1, "Slice": 1, "Concat": 1, "Resize": 1}
    assert not next(node for node in model.graph if node.op_type == "Shape").attributes
    for node in model.graph:
        if node.op_type == "Reshape":
            assert node.inputs[1].const_value.numpy()[0] == -1
            assert node.attributes["allowzero"].value == 0
    ir.save(model, tmp_path / "shuffled.onnx")
    (got,) = session(tmp_path / "shuffled.onnx").run(None, {"input": x.numpy()})
    np.testing.assert_allclose(got, folded(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, :, :0].reshape(0, x.shape[0]).sum(0) + x.flatten(1).sum(1),  # 0 would stand for the batch
        lambda x: x.flatten(1)[:, None] * x.flatten(1)[:, :1, None].reshape(1, -1).reshape(-1, x.shape[0], 1).sum(),
        lambda x: (x.mean((1, 2, 3))[:, None] * x.mean((1, 2, 3))[None]).reshape(x.shape[0], x.shape[0], 1),
        lambda x: nn.functional.pixel_unshuffle(x, 2),
        lambda x: x.view(-1, x.shape[1]),
    ],
    ids=["empty", "batch inside", "two batches", "pixel unshuffle", "batch into rows"],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_odd_shapes_at_any_batch(function, batch, tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.view_shape = nn.Parameter(torch.ones(1))  # a name that a constant may want

        def forward(self, x):
            return function(self.conv(x) * self.view_shape)

    folded = fold_float(prepare(Odd().eval(), input_shape=(3, 8, 8)))
    ir.save(emit(folded, torch.rand(2, 3, 8, 8), {}), tmp_path / "odd.onnx")
    x = torch.rand(batch, 3, 8, 8)
    (got,) = session(tmp_path / "odd.onnx").run(None, {"input": x.numpy()})
    np.testing.assert_allclose(got, folded(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_shapes_that_do_not_depend_on_the_batch_stay_constants():
    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return nn.functional.instance_norm(self.conv(x))

    model = emit(fold_float(prepare(Normalized().eval(), input_shape=(3, 8, 8))), torch.rand(2, 3, 8, 8), {})
    assert [node.op_type for node in model.graph] == ["Conv", "InstanceNormalization"]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("half", [False, True])
def test_gelu_takes_operators_that_every_version_of_tensorrt_knows(approximate, half, tmp_path):
    layers = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.GELU(approximate)).eval())
    network = with_ends(layers, preprocessing(), "float32-nchw", torch.float16) if half else layers
    x = torch.randn(4, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    exported = emit(network, x[:2], {})
    assert {node.op_type for node in exported.graph} <= {"Cast", "Conv", "Erf", "Tanh", "Mul", "Add"}
    ir.save(exported, tmp_path / "m.onnx")
    (found,) = session(tmp_path / "m.onnx").run(None, {"input": x.numpy()})
    expected = layers(x).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3 if half else 1e-6)


def test_the_product_of_a_linear_layer_bears_its_name():
    """On three dimensions it is a transpose, a product and an addition; --keep-float and the audit go by the name."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.token = nn.Conv2d(3, 8, 3), nn.Linear(8, 16)

        def forward(self, x):
            return self.token(self.conv(x).flatten(2).transpose(1, 2))

    model = emit(fold_float(prepare(Tokens().eval(), input_shape=(3, 8, 8))), torch.rand(2, 3, 8, 8), {})
    assert {"conv", "token"} == {node.name for node in model.graph if node.op_type in ("Conv", "MatMul", "Gemm")}


@pytest.mark.parametrize(("bounds", "expected"), [({"start": 1}, [4, 5]), ({"end": -1}, [3, 4]), ({}, [3, 4, 5])])
def test_a_part_of_a_shape_is_what_its_bounds_said(bounds, expected):
    nodes = [onnx.helper.make_node("Shape", ["x"], ["s"], **bounds), onnx.helper.make_node("Abs", ["s"], ["part"])]
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, None, None])
    part = onnx.helper.make_tensor_value_info("part", onnx.TensorProto.INT64, [None])
    graph = onnx.helper.make_graph(nodes, "graph", [x], [part])
    opset = onnx.helper.make_opsetid("", 20)
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10))
    simplify_shapes(model.graph)
    assert not model.graph[0].attributes
    (got,) = session(ir.to_proto(model).SerializeToString()).run(None, {"x": np.zeros((3, 4, 5), np.float32)})
    assert got.tolist() == expected


class Normalized(nn.Module):
    """Divides each vector by its length, which PyTorch expands before: [N, 8, 4] -> [N, 8, 4]."""

    def forward(self, x: Tensor) -> Tensor:
        """As PyTorch's function."""
        return F.normalize(x, dim=-1)


def test_nothing_is_expanded_that_broadcasts() -> None:
    x = torch.randn(2, 8, 4)
    model = emit(fold_float(prepare(Normalized().eval(), input_shape=(8, 4))), x, {})
    assert not {"Expand", "Shape", "Concat"} & {node.op_type for node in model.graph}
    (found,) = session(ir.to_proto(model).SerializeToString()).run(None, {"input": x.numpy()})
    assert np.allclose(found, F.normalize(x, dim=-1), atol=1e-6)
