"""In which precision every convolution and matrix product of an engine runs, and what the ONNX file declares.

A layer of the parsed network is declared INT8 when all its data inputs, activation and weights, come from
DequantizeLinear, directly or through operations that only move values, such as a transpose, a max pool or a
concatenation. The engine's final layers (deploy/engine_layers.py) tell what it runs in. The two are matched by name,
because an engine layer has the names of its ONNX nodes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from deploy.engine_layers import POINTWISE_KINDS, EngineLayer
from deploy.kernel_trace import Kernel
from deploy.parsed_network import ParsedNetwork, kind_of
from qat.base.number_format import INT8

if TYPE_CHECKING:
    import tensorrt as trt

Operation = Literal["convolution", "matrix product"]
CONVOLUTION_TYPES = ("CONVOLUTION", "DECONVOLUTION")
MATRIX_TYPES = ("MATRIX_MULTIPLY", "FULLY_CONNECTED")
# Layers that move values without changing them, so that a DequantizeLinear before them counts.
_MOVING_TYPES = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY", "SLICE", "GATHER", "RESIZE", "CONCATENATION", "MAX")


@dataclass(frozen=True)
class PrecisionFinding:
    """A convolution or matrix product: what it is declared, what it runs in and, if not INT8, the likely cause."""

    node: str
    operation: Operation
    declared_int8: bool
    precision: str
    """``INT8``, ``FP32`` ... or ``unknown`` if no engine layer has its name."""
    cause: str = ""
    has_kernel: bool = True
    """False if this builder is known to have no INT8 kernel for such a layer."""
    in_part: bool = False
    """Whether another compiler handles it, with others, as one layer, which does not say what single layers run in."""

    @property
    def broken(self) -> bool:
        """Whether it is declared INT8 but not INT8 in the engine, although the builder could."""
        return self.declared_int8 and self.has_kernel and self.precision != INT8.name


@dataclass(frozen=True)
class PrecisionAudit:
    """All findings in the order of the network, and the engine's final layers.

    ``kernels`` are all that one inference runs, where they were needed to look into parts.
    """

    findings: tuple[PrecisionFinding, ...]
    layers: tuple[EngineLayer, ...]
    kernels: tuple[Kernel, ...] = ()

    def count(self, operation: Operation) -> tuple[int, int]:
        """How many layers of this operation are INT8, and how many there are."""
        chosen = [finding for finding in self.findings if finding.operation == operation]
        return sum(finding.precision == INT8.name for finding in chosen), len(chosen)

    @property
    def broken(self) -> tuple[PrecisionFinding, ...]:
        """Findings that are declared INT8 but are not INT8 in the engine, although the builder could."""
        return tuple(finding for finding in self.findings if finding.broken)


@dataclass(frozen=True)
class DeclaredLayer:
    """A convolution or matrix product of the parsed network, and its inputs without Q/DQ nodes."""

    node: str
    operation: Operation
    kind: str
    float_inputs: tuple[str, ...]
    weight_axis: int | None
    """Axis of the per-channel weight scale; None if there is one scale for all weights."""
    groups: int
    channels: int
    weight_scales: int = 1
    """Number of the weight's scales."""
    weight_path: tuple[str, ...] = ()
    """Names of the layers between the constant and the layer, the constant last."""

    @property
    def int8(self) -> bool:
        """Whether every data input comes from DequantizeLinear. A second format would be told by the type it reads."""
        return not self.float_inputs


def audit_precision(
    declared: Sequence[DeclaredLayer], layers: Sequence[EngineLayer], without_kernels: Collection[str] = ()
) -> PrecisionAudit:
    """Compares what the network declares with the engine's final layers.

    ``without_kernels`` are types of layers for which the builder has no INT8 kernels. An engine with several
    optimization profiles has layers for each of them. A finding is about the worst profile.
    """
    profiles = sorted({layer.profile for layer in layers}) or [0]
    of_profile = [[layer for layer in layers if layer.profile == profile] for profile in profiles]
    findings = []
    for layer in declared:
        found = [_audit_layer(layer, known) for known in of_profile]
        worst = next((index for index, finding in enumerate(found) if finding.precision != INT8.name), 0)
        finding = replace(found[worst], has_kernel=layer.kind not in without_kernels)
        if len(profiles) > 1 and finding.cause:
            finding = replace(finding, cause=f"in profile {profiles[worst]}: {finding.cause}")
        findings.append(finding)
    return PrecisionAudit(tuple(findings), tuple(layers))


def _audit_layer(declared: DeclaredLayer, layers: Sequence[EngineLayer]) -> PrecisionFinding:
    found = _matching_layer(declared, layers)
    precision = found.product_precision if found else "unknown"
    cause = "" if precision == INT8.name else _cause(declared, found)
    in_part = bool(found.foreign_ends) if found else any(layer.foreign_ends for layer in layers)
    return PrecisionFinding(declared.node, declared.operation, declared.int8, precision, cause, in_part=in_part)


def declared_layers(network: trt.INetworkDefinition, module: Any) -> list[DeclaredLayer]:
    """The convolutions and matrix products of an INetworkDefinition; ``module`` is TensorRT's Python module."""
    parsed_network = ParsedNetwork(network)
    wanted = (*CONVOLUTION_TYPES, *MATRIX_TYPES)
    return [
        _declare(layer, parsed_network.makers, module) for layer in parsed_network.layers if layer.type.name in wanted
    ]


def _matching_layer(declared: DeclaredLayer, layers: Sequence[EngineLayer]) -> EngineLayer | None:
    """The engine layer that computes a node: the one that has its name, else one whose metadata names it."""
    node = declared.node
    naming = [layer for layer in layers if node in layer.onnx_nodes]
    products = [layer for layer in naming if layer.kind.lower() not in POINTWISE_KINDS]
    of_its_name = [layer for layer in products if node in layer.own_nodes]
    kernels = [layer for layer in naming if layer.names_product]
    # The name of a part that another compiler handles has its first and its last node.
    parts = [layer for layer in layers if set(layer.foreign_ends) & {node, *declared.weight_path}]
    return next(iter(of_its_name + products + kernels + parts), None)


def _declare(layer: Any, makers: dict[str, Any], module: Any) -> DeclaredLayer:
    convolution = layer.type.name in CONVOLUTION_TYPES
    given = [layer.get_input(index) for index in range(min(layer.num_inputs, 2))]
    inputs = [tensor for tensor in given if tensor is not None]  # a constant weight may be none, or one without tensor
    sources = [_source(tensor, makers, module) for tensor in inputs]
    missing = [
        f"{what}{tensor.name!r}"
        for what, tensor, source in zip(("input ", "weights "), inputs, sources, strict=False)
        if source is None
    ]
    if len(inputs) < 2:
        missing.append("weights")
    weights = sources[1] if len(sources) == 2 else None
    groups, channels = _groups_and_channels(layer, module) if convolution else (1, int(layer.get_output(0).shape[-1]))
    return DeclaredLayer(
        node=layer.name,
        operation="convolution" if convolution else "matrix product",
        kind=layer.type.name,
        float_inputs=tuple(missing),
        weight_axis=_scale_axis(weights, module),
        groups=groups,
        channels=channels,
        weight_scales=math.prod(weights.get_input(1).shape) if weights is not None and weights.num_inputs > 1 else 1,
        weight_path=_path(inputs[1], makers) if len(inputs) == 2 else (),
    )


def _path(tensor: Any, makers: dict[str, Any]) -> tuple[str, ...]:
    """Names of the layers from ``tensor`` back to a constant, along the first input of each layer."""
    names: list[str] = []
    while tensor is not None and (maker := makers.get(tensor.name)) is not None:
        names.append(maker.name)
        tensor = maker.get_input(0) if maker.num_inputs else None
    return tuple(names)


def _source(tensor: Any, makers: dict[str, Any], module: Any) -> Any | None:
    """The DequantizeLinear layer that ``tensor`` comes from, or None."""
    while tensor is not None and (maker := makers.get(tensor.name)) is not None:
        if maker.type.name == "DEQUANTIZE":
            return maker
        if kind_of(maker, module) not in _MOVING_TYPES:
            return None
        tensor = maker.get_input(0)
    return None


def _scale_axis(dequantize: Any | None, module: Any) -> int | None:
    if dequantize is None or dequantize.num_inputs < 2 or tuple(dequantize.get_input(1).shape) in ((), (1,)):
        return None
    dequantize.__class__ = module.IDequantizeLayer  # the API's way to reach the attributes of a layer's type
    return int(dequantize.axis)


def _groups_and_channels(layer: Any, module: Any) -> tuple[int, int]:
    layer.__class__ = module.IConvolutionLayer if layer.type.name == "CONVOLUTION" else module.IDeconvolutionLayer
    return int(layer.num_groups), int(layer.num_output_maps)


def _cause(layer: DeclaredLayer, found: EngineLayer | None) -> str:
    if layer.float_inputs:
        return f"not declared {INT8.name}: no Q/DQ on {' and '.join(layer.float_inputs)}"
    if found is None:
        return "no engine layer has its name: see the list of layers in the sidecar"
    if found.product_precision == "unknown":
        return "the builder does not report the type of its data"
    if found.foreign_ends:
        return (
            f"it is in {found.name}, a part that another compiler handles as a whole and that reads {found.precision}"
        )
    if layer.kind == "DECONVOLUTION":
        return "this builder computes transposed convolutions in float, and dequantizes before them"
    if layer.operation == "convolution" and layer.weight_axis not in (None, 0):
        return f"its weight scales are on axis {layer.weight_axis}; a convolution needs one per output channel (axis 0)"
    if found.dequantizes_first:
        if layer.weight_scales not in (1, layer.channels):
            what = f"{layer.weight_scales} weight scales for {layer.channels} output channels"
            return f"the kernel dequantizes and multiplies in float: {what}; they must be on the output axis"
        return (
            f"the builder chose to dequantize its weight and to multiply in float ({found.name}); nothing in the file "
            "asks for that. TensorRT-RTX does so to layers that are cut into parts behind them, such as q, k and v"
        )
    if layer.groups > 1 and layer.channels % 8:
        return f"grouped convolution with {layer.channels} output channels, which is not a multiple of 8"
    if INT8.name not in found.numbers_read[:1]:
        return f"it reads {found.precision}: a layer between it and its DequantizeLinear is not {INT8.name}"
    return f"the builder chose a {found.precision} kernel"
