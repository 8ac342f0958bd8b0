"""Residual blocks that begin with an activation and end in a gate and numbers: all between their layers are codes."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx import ModelProto, NodeProto
from scaled_blocks import Gate, ScaledBlocks, scaled_blocks
from torch import Tensor, nn

from export.emit import emit
from export.fold import fold, fold_float
from export.fold_factors import fold_factors
from export.from_checkpoint import export_onnx
from export.from_float_onnx import quantize_onnx
from export.linter import lint_onnx
from export.parity import measure
from export.session import sqnr_db
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import prepare
from qat.graph.tracing import network_of, trace
from qat.rules.place import place

SHAPE = (3, 32, 32)


def decided(model: nn.Module, kind: str, **options: object) -> list[tuple[str, bool]]:
    placement = place(network_of(trace(model.eval(), SHAPE)), **options)
    return [(one.rule, one.quantized) for one in placement.decisions_about(kind)]


def test_a_swish_reads_the_codes_of_its_sum() -> None:
    rules = decided(scaled_blocks(), "swish")
    assert rules == [("swish_of_sum", True), ("activation_of_codes", True), ("activation_of_codes", True)]
    sums = [("residual_add", True), ("residual_add", True), ("sum_of_gate", True), ("sum_of_gate", True)]
    assert decided(scaled_blocks(), "add") == sums


class Sum(nn.Module):
    """Two layers, their sum, an activation and another layer; ``also``: what else reads the sum."""

    def __init__(self, activation: nn.Module, also: nn.Module | None = None) -> None:
        super().__init__()
        self.one, self.two, self.activation = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3), activation
        self.last, self.also = nn.Conv2d(16, 16, 1), also

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x) + self.two(x)
        y = self.last(self.activation(x))
        return y if self.also is None else y + self.also(x)


@pytest.mark.parametrize(
    ("activation", "also", "rules"),
    [
        (nn.SiLU(), None, [("swish_of_sum", True)]),
        (nn.SiLU(), nn.Conv2d(16, 16, 1), [("activation_of_codes", True)]),
        (nn.SiLU(), nn.Softsign(), []),  # reads the sum in float
    ],
)
def test_only_where_no_float_copy_is_written_anyway(
    activation: nn.Module, also: nn.Module | None, rules: list[tuple[str, bool]]
) -> None:
    assert decided(Sum(activation, also), "swish") == rules


class GateAndSum(nn.Module):
    """x + gate of one layer * 0.5, or the sum of two gates' products; ``also``: the product is read by a layer, too."""

    def __init__(self, *, two: bool = False, also: bool = False) -> None:
        super().__init__()
        self.stem, self.one, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1)
        self.gates, self.also = nn.ModuleList(Gate(16) for _ in range(2 if two else 1)), also

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        made = [gate(self.one(x)) * 0.5 for gate in self.gates]
        y = self.last(made[0] + (made[1] if len(made) > 1 else x))
        return self.last(made[0]) + y if self.also else y


@pytest.mark.parametrize(("given", "rule"), [({}, "sum_of_gate"), ({"two": True}, "unfused_add")])
def test_a_sum_takes_in_one_gate(given: dict[str, bool], rule: str) -> None:
    model = GateAndSum(**given)
    assert decided(model, "add") == [(rule, True)]
    placement = place(network_of(trace(model.eval(), SHAPE)))
    read = {tensor for reader, tensor, _ in placement.reads() if reader == "add"}
    assert len(read) == (1 if rule == "sum_of_gate" else 2)


def test_a_product_that_something_else_reads_is_read_as_codes() -> None:
    assert decided(GateAndSum(also=True), "add")[0] == ("unfused_add", True)


def test_a_relu_fuses_with_its_sum() -> None:
    assert decided(Sum(nn.ReLU()), "activation") == []
    assert decided(Sum(nn.ReLU(), nn.Conv2d(16, 16, 1)), "activation") == [("activation_of_codes", True)]


def test_an_activation_of_no_sum_is_left_alone() -> None:
    class TwoReaders(Sum):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.one(x))
            return self.last(x) + self.activation(x)

    assert decided(TwoReaders(nn.SiLU()), "swish") == []


def test_not_where_the_activation_is_kept_in_float_or_its_result_is_read_in_float() -> None:
    model = Sum(nn.SiLU(), nn.Conv2d(16, 16, 1))
    assert decided(model, "swish", keep_float=["activation"]) == []
    assert decided(model, "swish", keep_float=["last"]) == []
    assert decided(Sum(nn.SiLU()), "swish", keep_float=["last"]) == [("swish_of_sum", False)]


def makers(model: ModelProto) -> dict[str, NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def check_all_codes(path: Path) -> None:
    """No number is left; each product, sum and swish between layers reads codes, or what its kernel makes."""
    model = onnx.load(path)
    made, constants = makers(model), {one.name for one in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Mul", "Add"):
            assert constants.isdisjoint(node.input), node.name
            kinds = sorted(made[name].op_type for name in node.input)
            swish = kinds in (["Conv", "Sigmoid"], ["DequantizeLinear", "Sigmoid"])
            sum_ = node.op_type == "Add" and kinds in (["Conv", "DequantizeLinear"], ["DequantizeLinear", "Mul"])
            assert swish or sum_ or kinds == ["DequantizeLinear"] * 2, (node.name, kinds)
    assert lint_onnx(path) == []


def test_the_file_has_no_numbers_left_and_answers_as_pytorch(tmp_path: Path) -> None:
    model, x, path = scaled_blocks(), torch.randn(8, *SHAPE), tmp_path / "m.onnx"
    prepared = prepare(model, input_shape=SHAPE)
    with torch.no_grad():
        calibrate_ranges(prepared, [x], "max")
    folded, _ = fold(prepared)
    exported = emit(folded, x[:2], {})
    assert fold_factors(exported) == 12
    ir.save(exported, path)
    check_all_codes(path)
    parity, answers, found = measure(folded, path, [(x, x)], 8)
    assert parity.least_db is None or parity.least_db > 80
    assert sqnr_db(answers[0].numpy(), found[0].numpy()) > 30
    with torch.no_grad():
        assert sqnr_db(model(x).numpy(), found[0].numpy()) > 20


def test_the_number_of_a_convolution_that_is_added_stays_as_it_was_placed(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(F.relu(self.body(F.relu(x) * 1.7) * 0.2 + x) * 1.1)

    x, path = torch.randn(4, *SHAPE), tmp_path / "m.onnx"
    prepared = prepare(Plain().eval(), input_shape=SHAPE)
    with torch.no_grad():
        calibrate_ranges(prepared, [x], "max")
    exported = emit(fold(prepared)[0], x[:2], {})
    assert fold_factors(exported) == 2
    ir.save(exported, path)
    assert lint_onnx(path) == []


def test_parity_sees_a_wrong_scale_where_a_factor_moved(tmp_path: Path) -> None:
    x = torch.randn(8, *SHAPE)
    prepared = prepare(scaled_blocks(), input_shape=SHAPE)
    with torch.no_grad():
        calibrate_ranges(prepared, [x], "max")
    folded, _ = fold(prepared)
    exported = emit(folded, x[:2], {})
    fold_factors(exported)
    proto = ir.to_proto(exported)
    (moved,) = [one for one in proto.graph.initializer if one.name.startswith("blocks.0.one.weight_quantizer.scale")]
    moved.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(moved) * 1.05, moved.name))
    parity, *_ = measure(folded, proto.SerializeToString(), [(x, x)], 8)
    assert parity.least_db is not None
    assert parity.least_db < 30


@pytest.mark.parametrize("float_type", ["float32", "float16"])
def test_a_float_file_becomes_the_same(float_type: str, tmp_path: Path) -> None:
    path, output = tmp_path / "f.onnx", tmp_path / "q.onnx"
    x = torch.randn(8, *SHAPE)
    ir.save(emit(fold_float(prepare(scaled_blocks(), input_shape=SHAPE)), x[:2], {}), path)
    quantize_onnx(path, output, inputs=x.numpy(), float_type=float_type)
    if float_type == "float32":
        check_all_codes(output)
    assert lint_onnx(output) == []


def test_a_trained_network(tmp_path: Path) -> None:
    prepared = prepare(ScaledBlocks().eval(), input_shape=SHAPE)
    x = torch.randn(8, *SHAPE)
    with torch.no_grad():
        calibrate_ranges(prepared, [x], "max")
    export_onnx(prepared, tmp_path / "m.onnx")
    check_all_codes(tmp_path / "m.onnx")


def test_plain_sums_are_as_they_were() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.silu(self.stem(x))
            return self.head(self.body(x) + x)

    assert decided(Plain(), "swish") == []
