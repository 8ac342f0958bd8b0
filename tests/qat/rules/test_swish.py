"""Swish behind first layers: it reads codes where a profile says that no kernel of its layer takes it in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.emit import emit
from export.fold import fold, fold_float
from export.from_float_onnx import quantize_onnx
from export.linter import lint_onnx
from export.onnx_network import network_from_onnx
from export.session import session
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import placement_of, prepare
from qat.graph.tracing import network_of, trace
from qat.rules.kernel_profile import KernelProfile
from qat.rules.place import place
from qat.rules.placement import Decision

SHAPE = (3, 32, 32)


class Network(nn.Module):
    """A first layer with a swish, written in several ways, and another layer."""

    def __init__(self, channels: int, swish: Callable[[Tensor], Tensor], stride: int = 2) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.second, self.swish, self.sigmoid = nn.Conv2d(channels, 64, 3), swish, nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 32, 32] -> [N, 64, h, w]."""
        x = self.norm(self.first(x))
        return self.second(x * self.sigmoid(x) if self.swish is None else self.swish(x))


SWISHES = [nn.SiLU(), F.silu, lambda x: x * torch.sigmoid(x), lambda x: x.sigmoid().mul_(x), None]


def decisions(model: nn.Module) -> tuple[Decision, ...]:
    return placement_of(prepare(model, input_shape=SHAPE)).decisions_about("swish")


@pytest.mark.parametrize("swish", SWISHES)
def test_it_reads_codes_however_it_is_spelt(swish: Callable[[Tensor], Tensor]) -> None:
    for channels in (48, 64, 96):
        assert [(one.rule, one.quantized) for one in decisions(Network(channels, swish))] == [("swish_of_codes", True)]


@pytest.mark.parametrize(("channels", "stride"), [(16, 2), (32, 2), (64, 1)])
def test_one_kernel_is_left_one_where_it_is_faster_or_nothing_is_known(channels: int, stride: int) -> None:
    assert decisions(Network(channels, F.silu, stride)) == ()


def test_the_profile_decides() -> None:
    network, shipped = network_of(trace(Network(64, F.silu), SHAPE)), KernelProfile.shipped()

    def rules(profile: KernelProfile) -> set[str]:
        return {decision.rule for decision in place(network, profile=profile).decisions}

    fused = [one for one in shipped.kinds if one.kind.activation != "swish of codes"]
    slower = [
        replace(one, int8_ms=9.0) if one.kind.activation == "swish of codes" and one.int8_ms else one
        for one in shipped.kinds
    ]
    assert "swish_of_codes" in rules(shipped)
    assert "swish_of_codes" not in rules(replace(shipped, kinds=tuple(fused)))
    assert "swish_of_codes" not in rules(replace(shipped, kinds=tuple(slower)))


def test_a_gate_by_another_tensor_is_no_swish() -> None:
    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate = nn.Conv2d(3, 64, 3, 2, 1), nn.Conv2d(64, 64, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            one = y.sigmoid()
            return y * self.gate(y).sigmoid() + y * one + one

    kinds = [op.kind for op in network_of(trace(Gates(), SHAPE))]
    assert "swish" not in kinds


@pytest.mark.parametrize("swish", SWISHES)
def test_the_file_has_codes_in_front_of_it_and_answers_as_pytorch(
    swish: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x, path = Network(64, swish).eval(), torch.randn(4, *SHAPE), tmp_path / "m.onnx"
    prepared = prepare(model, input_shape=SHAPE)
    with torch.no_grad():
        calibrate_ranges(prepared, [x], "max")
        expected = prepared(x)
    assert 10 * (model(x).square().sum() / (model(x) - expected).square().sum()).log10() > 28
    ir.save(emit(fold(prepared)[0], x[:2], {}), path)
    assert lint_onnx(path) == []
    (found,) = session(path).run(None, {"input": x.numpy()})
    assert np.abs(found - expected.detach().numpy()).max() < 1e-5
    assert [op.kind for op in network_from_onnx(ir.load(path)).network].count("swish") == 1


def test_a_float_file_gets_them_too_and_a_file_without_them_is_reported(tmp_path: Path) -> None:
    path, output = tmp_path / "f.onnx", tmp_path / "q.onnx"
    x = torch.randn(8, *SHAPE)
    prepared = prepare(Network(64, F.silu).eval(), input_shape=SHAPE)
    ir.save(emit(fold_float(prepared), x[:2], {}), path)
    quantize_onnx(path, output, inputs=x.numpy())
    model = onnx.load(output)
    codes = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    (sigmoid,) = (node for node in model.graph.node if node.op_type == "Sigmoid")
    (product,) = (node for node in model.graph.node if sigmoid.output[0] in node.input)
    assert sigmoid.input[0] in codes
    assert set(product.input) == {sigmoid.input[0], sigmoid.output[0]}
    assert lint_onnx(output) == []
    (pair,) = (node for node in model.graph.node if node.output[0] == sigmoid.input[0])
    (quantize,) = (node for node in model.graph.node if node.output[0] == pair.input[0])
    for node in (sigmoid, product):
        node.input[:] = [quantize.input[0] if name == pair.output[0] else name for name in node.input]
    onnx.save(model, output)
    (finding,) = lint_onnx(output)
    assert (finding.rule, "another layout" in finding.message) == ("swish_of_codes", True)
