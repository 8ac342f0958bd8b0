"""The scale of a transposed convolution's weight, as each version of TensorRT takes it, in a really parsed network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from qdq_models import Graph

from deploy.build_log import BuildLog
from deploy.builder import parse_onnx
from deploy.installed import find_toolkit
from deploy.parsed_network import ParsedNetwork
from deploy.precision_audit import declared_layers
from deploy.settings import BuildSettings
from deploy.transposed_scales import state_transposed_scales
from deploy.trt import Toolkit
from qat.base.errors import UserError


@pytest.fixture(scope="module")
def toolkit() -> Toolkit:
    return find_toolkit("tensorrt-rtx")


def saved(path: Path, axis: int | None = 1, scales: Any = None, in_float: bool = False) -> Path:
    """input -> Q/DQ -> ConvTranspose of 16 to 24 channels."""
    graph = Graph()
    if axis is None:
        codes = graph.constant("w_q", np.ones((16, 24, 2, 2), np.int8))
        scale = [graph.constant("w_scale", np.float32(0.02)), graph.constant("w_zero", np.int8(0))]
        weight = graph.node("DequantizeLinear", [codes, *scale], "w_dq")
    else:
        weight = graph.weights("w", (16, 24, 2, 2), axis, scales, in_float)
    inputs = [graph.quantized("input", "x"), weight]
    graph.node("ConvTranspose", inputs, "up", kernel_shape=[2, 2], strides=[2, 2])
    return graph.save(path, (2, 16, 8, 8), (2, 24, 16, 16))


class Parsed:
    """A network and all that it needs while it is looked at."""

    def __init__(self, toolkit: Toolkit, path: Path) -> None:
        self.toolkit, self.path, self.log = toolkit, path, BuildLog()
        self.builder = toolkit.module.Builder(toolkit.logger(self.log))
        settings = BuildSettings(capabilities=("8.9",))
        self.config = toolkit.create_config(self.builder, settings)
        self.network = parse_onnx(toolkit, self.builder, path, self.log, settings)

    def state(self, axis: int) -> None:
        state_transposed_scales(self.network, self.toolkit, self.path, axis)

    @property
    def form(self) -> tuple[int | None, int]:
        (layer,) = declared_layers(self.network, self.toolkit.module)
        return layer.weight_axis, layer.weight_scales

    def layers(self) -> list[str]:
        return [layer.name for layer in ParsedNetwork(self.network).layers]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("form", [{}, {"axis": 0}, {"in_float": True}], ids=["outputs", "inputs", "float weights"])
def test_one_scale_is_moved_to_the_axis_and_the_network_builds(
    form: dict[str, Any], axis: int, toolkit: Toolkit, tmp_path: Path
) -> None:
    parsed = Parsed(toolkit, saved(tmp_path / "m.onnx", **form))
    parsed.state(axis)
    assert parsed.form == (axis, (16, 24)[axis])
    assert parsed.builder.build_serialized_network(parsed.network, parsed.config) is not None


def test_a_network_that_is_right_is_left_alone(toolkit: Toolkit, tmp_path: Path) -> None:
    parsed = Parsed(toolkit, saved(tmp_path / "m.onnx", scales=np.linspace(0.01, 0.02, 24)))
    before = parsed.layers()
    parsed.state(1)
    assert parsed.layers() == before


@pytest.mark.parametrize("form", [{"scales": np.linspace(0.01, 0.02, 24)}, {"axis": None}], ids=["several", "no axis"])
def test_other_forms_are_refused_in_one_line(form: dict[str, Any], toolkit: Toolkit, tmp_path: Path) -> None:
    parsed = Parsed(toolkit, saved(tmp_path / "m.onnx", **form))
    parsed.state(1)
    with pytest.raises(UserError, match=r"weight of /up/ConvTranspose, .*along axis 0: give the weight one scale") as e:
        parsed.state(0)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("version", "axis"), [("8.6.0", 0), ("10.0.1", 0), ("10.2.0", 1), ("10.13.3.9", 1), ("11.0", 1)]
)
def test_the_axis_of_each_version(version: str, axis: int, toolkit: Toolkit) -> None:
    older = replace(toolkit, name="tensorrt", module=SimpleNamespace(__version__=version))
    assert older.transposed_scale_axis == axis
    assert toolkit.transposed_scale_axis is None
