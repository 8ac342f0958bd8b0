"""What every convolution and matrix product of an engine really runs in, against what the ONNX declares.

Declared: a layer of the parsed network is declared INT8 when all its data inputs, activation and weights,
come from DequantizeLinear, possibly through a transpose or a reshape. Real: the builder's list of final
layers, either the text in TensorRT-RTX's verbose log or the engine inspector's JSON. ONNX nodes and
engine layers are matched by name: an engine layer is called after its ONNX node, and a fused one names
all its nodes.

A layer computes in INT8 when it reads INT8 data and INT8 weights. One exception: a generated kernel
(``__myl_...``) spells its operations in its name, and when a Cast stands before the product
(``CastMulCastCastMulFc``) it dequantizes first and multiplies in float, although INT8 goes in.

The text form and the JSON of TensorRT 8.6 were captured from the real builders (tests/deploy/test_audit.py). The JSON
of newer versions follows NVIDIA's documentation and was not run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

CONVOLUTION_TYPES = ("CONVOLUTION", "DECONVOLUTION")
MATRIX_TYPES = ("MATRIX_MULTIPLY", "FULLY_CONNECTED")
# Layers that move values without changing them: a DequantizeLinear is looked for behind them.
_MOVING_TYPES = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY")

_LAYER_LINE = re.compile(r"^\s*Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>Inputs: .*)$", re.MULTILINE)
_TENSOR_TYPE = re.compile(r"Datatype: (\w+)")
_LIST_NAMES = ("Inputs", "Constants", "Outputs", "TacticName")
_METADATA_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f]|\[ONNX Layer: |\s*$)", re.DOTALL)
_NUMBERING = re.compile(r"_myl\d+_\d+$")
_TYPE_WORD = re.compile(r"\b(INT8|INT4|FP8|FP16|HALF|BF16|BFLOAT16|FP32|FLOAT|INT32|INT64|UINT8|BOOL)\b", re.IGNORECASE)
_SHORT_TYPES = {"FLOAT": "FP32", "HALF": "FP16", "BFLOAT16": "BF16"}
_PRODUCT_WORD = re.compile(r"Fc|Gemm|Mma|Conv|Corr")

# Layers of pointwise work only: their metadata may name a convolution that they do not compute.
_POINTWISE_KINDS = ("kgen", "shape_call", "pointwise", "pointwisev2", "reformat", "noop", "constant")


@dataclass(frozen=True)
class EngineLayer:
    """A final layer: ``inputs``, ``constants`` and ``outputs`` are types such as ``INT8`` and ``FP32``."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx_nodes: tuple[str, ...]

    @property
    def precision(self) -> str:
        """The type of the data that the layer reads, or writes when it reads nothing."""
        return next(iter(self.inputs + self.outputs), "none")

    @property
    def product_precision(self) -> str:
        """The type that a convolution or matrix product multiplies in."""
        weights = (*self.inputs[1:], *self.constants)
        # TensorRT 8.6 hides the types of data whose batch is dynamic; a kernel multiplies in the type of its weights.
        if self.precision == "unknown" and self.constants:
            return self.constants[0]
        if self.precision == "INT8" and (_dequantizes_first(self.name) or (weights and "INT8" not in weights)):
            return next((found for found in weights if found != "INT8"), "FP32")
        return self.precision


@dataclass(frozen=True)
class Finding:
    """One convolution or matrix product: what it is declared, what it is and, where not INT8, the likely cause."""

    node: str
    operation: Literal["convolution", "matrix product"]
    declared_int8: bool
    precision: str
    """``INT8``, ``FP32`` ... or ``unknown`` when no engine layer bears its name."""
    cause: str = ""

    @property
    def broken(self) -> bool:
        """Declared INT8, but not INT8 in the engine."""
        return self.declared_int8 and self.precision != "INT8"


@dataclass(frozen=True)
class Audit:
    """All findings in network order, and the engine's layers that they were made from."""

    findings: tuple[Finding, ...]
    layers: tuple[EngineLayer, ...]

    def count(self, operation: str) -> tuple[int, int]:
        """(in INT8, all) of the operation ``convolution`` or ``matrix product``."""
        chosen = [finding for finding in self.findings if finding.operation == operation]
        return sum(finding.precision == "INT8" for finding in chosen), len(chosen)

    @property
    def broken(self) -> tuple[Finding, ...]:
        """Findings that are declared INT8 but are not INT8 in the engine."""
        return tuple(finding for finding in self.findings if finding.broken)


@dataclass(frozen=True)
class DeclaredLayer:
    """A convolution or matrix product of the parsed network, and which of its inputs lack Q/DQ nodes."""

    node: str
    operation: Literal["convolution", "matrix product"]
    kind: str
    float_inputs: tuple[str, ...]
    weight_axis: int | None
    """Axis of the per-channel weight scale; None when there is one scale for all."""
    groups: int
    channels: int

    @property
    def int8(self) -> bool:
        """Whether every data input comes from DequantizeLinear."""
        return not self.float_inputs


def audit(declared: Sequence[DeclaredLayer], layers: Sequence[EngineLayer]) -> Audit:
    """Holds what the network declares against the engine's final layers."""
    findings = []
    for layer in declared:
        found = _layer_of(layer.node, layers)
        precision = found.product_precision if found else "unknown"
        cause = "" if precision == "INT8" else _cause(layer, found)
        findings.append(Finding(layer.node, layer.operation, layer.int8, precision, cause))
    return Audit(tuple(findings), tuple(layers))


def declared_layers(network: Any, module: Any) -> list[DeclaredLayer]:
    """The convolutions and matrix products of a parsed INetworkDefinition; ``module`` is TensorRT's own."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    wanted = (*CONVOLUTION_TYPES, *MATRIX_TYPES)
    return [_declare(layer, makers, module) for layer in layers if layer.type.name in wanted]


def layers_from_log(text: str) -> list[EngineLayer]:
    """Final layers from a verbose build log: ``Name: ..., LayerType: ..., Inputs: [...], ... Metadata: ...``."""
    found = []
    for match in _LAYER_LINE.finditer(text):
        body, _, metadata = match["rest"].partition(", Metadata: ")
        starts = {key: body.find(f"{key}: ") for key in _LIST_NAMES}
        present = sorted((start, key) for key, start in starts.items() if start >= 0)
        ends = [start for start, _ in present[1:]] + [len(body)]
        lists = {
            key: tuple(_short_type(word) for word in _TENSOR_TYPE.findall(body[start:end]))
            for (start, key), end in zip(present, ends, strict=True)
        }
        found.append(
            EngineLayer(
                name=match["name"],
                kind=match["kind"],
                inputs=lists.get("Inputs", ()),
                constants=lists.get("Constants", ()),
                outputs=lists.get("Outputs", ()),
                onnx_nodes=_onnx_nodes(match["name"], metadata),
            )
        )
    return found


def layers_from_inspector(text: str) -> list[EngineLayer]:
    """Final layers from the engine inspector's JSON, in any of its forms.

    Older inspectors put control characters into strings, and format and type into one sentence
    ("Thirty-two wide channel vectorized row major Int8 format"); newer ones state ``Datatype`` apart.
    Layers that were built without detail are bare strings: they have names and no types.
    """
    found = []
    for entry in json.loads(text, strict=False).get("Layers", []):
        layer = {"Name": entry} if isinstance(entry, str) else entry
        constants = _inspector_types(layer.get("Constants"))
        # "Weights", or "ConvWeights" where a pooling is fused with the convolution
        weights = [value for key, value in layer.items() if key.endswith("Weights") and isinstance(value, dict)]
        constants = (*(_short_type(str(entry.get("Type", ""))) for entry in weights), *constants)
        name = str(layer.get("Name", ""))
        found.append(
            EngineLayer(
                name=name,
                kind=str(layer.get("LayerType", "unknown")),
                inputs=_inspector_types(layer.get("Inputs")),
                constants=constants,
                outputs=_inspector_types(layer.get("Outputs")),
                onnx_nodes=_onnx_nodes(name, str(layer.get("Metadata", ""))),
            )
        )
    return found


def _inspector_types(tensors: Any) -> tuple[str, ...]:
    listed = [tensor for tensor in tensors or [] if isinstance(tensor, dict)]
    return tuple(_short_type(str(tensor.get("Datatype") or tensor.get("Format/Datatype", ""))) for tensor in listed)


def _short_type(words: str) -> str:
    match = _TYPE_WORD.search(words)
    return _SHORT_TYPES.get(match[0].upper(), match[0].upper()) if match else "unknown"


def _onnx_nodes(name: str, metadata: str) -> tuple[str, ...]:
    """The ONNX nodes of an engine layer, the one that it is called after first."""
    return tuple(dict.fromkeys([*_own_names(name), *_METADATA_NODE.findall(metadata)]))


def _layer_of(node: str, layers: Sequence[EngineLayer]) -> EngineLayer | None:
    """The engine layer that computes ``node``: the one called after it, else one whose metadata names it."""
    naming = [layer for layer in layers if node in layer.onnx_nodes]
    products = [layer for layer in naming if layer.kind.lower() not in _POINTWISE_KINDS]
    called = [layer for layer in products if node in _own_names(layer.name)]
    kernels = [layer for layer in naming if _PRODUCT_WORD.search(_operations(layer.name))]
    return next(iter(called + products + kernels), None)


def _own_names(name: str) -> list[str]:
    """The nodes that a layer is called after; a generated name has none."""
    return [] if _is_generated(name) else re.split(r" \+ | \|\| ", _NUMBERING.sub("", name))


def _is_generated(name: str) -> bool:
    return name.startswith("__my")


def _operations(name: str) -> str:
    """``__myl_CastMulFc_myl0_2`` -> ``CastMulFc``; nothing for layers that were not generated."""
    return _NUMBERING.sub("", name).removeprefix("__myl_") if _is_generated(name) else ""


def _dequantizes_first(name: str) -> bool:
    operations = _operations(name)
    product = _PRODUCT_WORD.search(operations)
    return product is not None and "Cast" in operations[: product.start()]


def _declare(layer: Any, makers: dict[str, Any], module: Any) -> DeclaredLayer:
    convolution = layer.type.name in CONVOLUTION_TYPES
    sources = [_source(layer.get_input(index), makers) for index in range(min(layer.num_inputs, 2))]
    missing = [
        ("input " if index == 0 else "weights ") + f"{layer.get_input(index).name!r}"
        for index, source in enumerate(sources)
        if source is None
    ]
    if len(sources) < 2:  # weights that are a plain constant are no input of the layer
        missing.append("weights")
    weights = sources[1] if len(sources) == 2 else None
    groups, channels = _groups_and_channels(layer, module) if convolution else (1, 0)
    return DeclaredLayer(
        node=layer.name,
        operation="convolution" if convolution else "matrix product",
        kind=layer.type.name,
        float_inputs=tuple(missing),
        weight_axis=_scale_axis(weights, module),
        groups=groups,
        channels=channels,
    )


def _source(tensor: Any, makers: dict[str, Any]) -> Any | None:
    """The DequantizeLinear layer that ``tensor`` comes from, or None when it comes from something else."""
    while tensor is not None and (maker := makers.get(tensor.name)) is not None:
        if maker.type.name == "DEQUANTIZE":
            return maker
        if maker.type.name not in _MOVING_TYPES:
            return None
        tensor = maker.get_input(0)
    return None


def _scale_axis(dequantize: Any | None, module: Any) -> int | None:
    if dequantize is None or dequantize.num_inputs < 2 or tuple(dequantize.get_input(1).shape) in ((), (1,)):
        return None
    dequantize.__class__ = module.IDequantizeLayer  # the API's way to reach what is special to a layer's type
    return int(dequantize.axis)


def _groups_and_channels(layer: Any, module: Any) -> tuple[int, int]:
    layer.__class__ = module.IConvolutionLayer if layer.type.name == "CONVOLUTION" else module.IDeconvolutionLayer
    return int(layer.num_groups), int(layer.num_output_maps)


def _cause(layer: DeclaredLayer, found: EngineLayer | None) -> str:
    if layer.float_inputs:
        return f"not declared INT8: no Q/DQ on {' and '.join(layer.float_inputs)}"
    if found is None:
        return "no engine layer bears its name: look in the layer list of the sidecar"
    if found.product_precision == "unknown":
        return "the builder does not tell the type of its data"
    if layer.kind == "DECONVOLUTION":
        return "transposed convolution: the builder chose a float kernel; leave it unquantized"
    if layer.operation == "convolution" and layer.weight_axis not in (None, 0):
        return f"weight scales lie on axis {layer.weight_axis}; a convolution needs one per output channel (axis 0)"
    if _dequantizes_first(found.name):
        return "the kernel dequantizes and multiplies in float: weight scales must lie on the output axis"
    if layer.groups > 1 and layer.channels % 8:
        return f"grouped convolution with {layer.channels} output channels, which is no multiple of 8"
    if "INT8" not in found.inputs[:1]:
        return f"its data arrives as {found.precision}: a layer between it and its DequantizeLinear is not INT8"
    return f"the builder chose a {found.precision} kernel"
