"""An engine's final layers in one form: names, types, memory formats, tactics.

There are two sources: the verbose log of TensorRT-RTX as text, and the JSON of the engine inspector, older and newer.
An engine layer has the name of its ONNX node; a fused layer has the names of all its nodes.

A layer computes in INT8 when it reads INT8 data and INT8 weights. There is one exception: the name of a generated
kernel (``__myl_...``) lists its operations, and if a Cast comes before the product (``CastMulCastCastMulFc``), the
kernel dequantizes first and multiplies in float, although it reads INT8.

The text form and the older JSON were captured from the real builders (tests/deploy/test_precision_audit.py). The newer
JSON follows NVIDIA's documentation; it was not run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qat.base.number_format import INT8

_LAYER_LINE = re.compile(r"^\s*Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>Inputs: .*)$", re.MULTILINE)
_TENSOR = re.compile(r"Dimensions: \[([\d,]*)\].*?Datatype: (\w+)")
_TENSOR_TYPE = re.compile(r"Datatype: (\w+)")
_LIST_NAMES = ("Inputs", "Constants", "Outputs", "TacticName")
_TACTIC = re.compile(r"TacticName: ([^,]*)")
_FORMAT = re.compile(r"Format: (.*?) \}")
_METADATA_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f]|\[ONNX Layer: |\s*$)", re.DOTALL)
# Words in the builders' descriptions of memory formats. Words that contain others come first.
_FORMATS = {
    "Thirty-two wide": "NC/32HW32",
    "Sixteen wide": "NC/16HW16",
    "Four wide": "NC/4HW4",
    "Two wide": "NC/2HW2",
    "channel % 8 == 0": "NHWC8",
    "Channel major": "NHWC",
    "Row major": "NCHW",
}
_NUMBERING = re.compile(r"(_U\d+)?_myl\d+_\d+$")
_TYPE_WORD = re.compile(r"\b(INT8|INT4|FP8|FP16|HALF|BF16|BFLOAT16|FP32|FLOAT|INT32|INT64|UINT8|BOOL)\b", re.IGNORECASE)
_SHORT_TYPES = {"FLOAT": "FP32", "HALF": "FP16", "BFLOAT16": "BF16"}
_NO_NUMBERS = ("BOOL", "INT32", "INT64")
_BYTES = {"INT8": 1, "UINT8": 1, "BOOL": 1, "FP8": 1, "FP16": 2, "BF16": 2, "INT64": 8}  # all others have 4
_PROFILE = re.compile(r" \[profile (\d+)\]$")
_FOREIGN = re.compile(r"\{ForeignNode\[(.*)\]\}")
_POINTWISE = "PWN("
_BETWEEN_NAMES = re.compile(r" \+ | \|\| ")
_ATTENTION = ("_gemm_mha", "_gemv_mha")
POINTWISE_KINDS = ("kgen", "shape_call", "pointwise", "pointwisev2", "reformat", "noop", "constant")
"""Kinds of layers without any product. Their metadata may name a convolution that they do not compute."""
_PRODUCT_WORD = re.compile(r"Fc|Gemm|Mma|Conv|Corr")


@dataclass(frozen=True)
class EngineLayer:
    """A final layer: ``inputs``, ``constants`` and ``outputs`` are types such as ``INT8`` and ``FP32``."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx_nodes: tuple[str, ...]
    """The ONNX nodes that the layer computes. Those in its name come first."""
    format: str = ""
    """Memory format of what the layer writes, in the builder's words."""
    tactic: str = ""
    """Name of the kernel."""
    output_bytes: int = 0
    """How many bytes the layer writes; 0 if the description has no dimensions."""

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> EngineLayer:
        """From the output of ``dataclasses.asdict``; unknown entries are ignored."""
        known: dict[str, Any] = {field.name: entry[field.name] for field in fields(cls) if field.name in entry}
        for key in ("inputs", "constants", "outputs", "onnx_nodes"):
            known[key] = tuple(known[key])
        return cls(**known)

    @property
    def profile(self) -> int:
        """Index of the optimization profile that the layer belongs to. Each profile has its own layers."""
        match = _PROFILE.search(self.name)
        return int(match[1]) if match else 0

    @property
    def foreign_ends(self) -> tuple[str, ...]:
        """First and last node of a part that another compiler handles: ``{ForeignNode[a...b]}``. Else empty."""
        match = _FOREIGN.search(self.name)
        return tuple(match[1].split("...")) if match else ()

    @property
    def own_nodes(self) -> list[str]:
        """The ONNX nodes in the layer's name. A generated name has none."""
        return node_names(self.name)

    @property
    def short_format(self) -> str:
        """The memory format by its abbreviation, such as ``NC/32HW32``; the builder's words if there is none."""
        return next((short for words, short in _FORMATS.items() if words in self.format), self.format)

    @property
    def is_reformat(self) -> bool:
        """Whether the layer only changes the type or the memory format."""
        return self.kind.lower() in ("reformat", "reformatting")

    @property
    def is_quantization(self) -> bool:
        """Whether the layer only quantizes or dequantizes."""
        if self.kind.lower() in ("quantize", "dequantize"):
            return True
        nodes = self.onnx_nodes
        return not self.is_reformat and bool(nodes) and all("quantizelinear" in node.lower() for node in nodes)

    @property
    def names_product(self) -> bool:
        """Whether the layer is a generated kernel whose name lists a convolution or a matrix product."""
        return _PRODUCT_WORD.search(_operations(self.name)) is not None or self.is_attention

    @property
    def is_attention(self) -> bool:
        """Whether the layer is a kernel that computes both products of an attention and the softmax between."""
        return self.name.startswith(_ATTENTION)

    @property
    def dequantizes_first(self) -> bool:
        """Whether the layer is a generated kernel that casts before its product, and so multiplies in float."""
        operations = _operations(self.name)
        product = _PRODUCT_WORD.search(operations)
        return product is not None and "Cast" in operations[: product.start()]

    @property
    def precision(self) -> str:
        """The type of the data that the layer reads, or writes when it reads nothing."""
        return next(iter(self.numbers_read + self.inputs + self.outputs), "none")

    @property
    def numbers_read(self) -> tuple[str, ...]:
        """The types of its inputs, but for masks and indices, which an attention may read first."""
        return tuple(found for found in self.inputs if found not in _NO_NUMBERS)

    @property
    def writes_fp32(self) -> bool:
        """Whether the layer computes in float and writes FP32. What an INT8 product writes is another matter."""
        computes = not (self.is_reformat or self.is_quantization) and self.product_precision != INT8.name
        return computes and "FP32" in self.outputs

    @property
    def product_precision(self) -> str:
        """The type that a convolution or matrix product multiplies in."""
        weights = (*self.numbers_read[1:], *(found for found in self.constants if found not in _NO_NUMBERS))
        # An older inspector hides the types if the batch is dynamic. A kernel multiplies in the type of its weights.
        if self.precision == "unknown" and self.constants:
            return self.constants[0]
        if self.precision == INT8.name and (self.dequantizes_first or (weights and INT8.name not in weights)):
            return next((found for found in weights if found != INT8.name), "FP32")
        return self.precision


def layers_from_log(text: str) -> list[EngineLayer]:
    """Final layers from a verbose build log: ``Name: ..., LayerType: ..., Inputs: [...], ... Metadata: ...``."""
    found = []
    for match in _LAYER_LINE.finditer(text):
        body, _, metadata = match["rest"].partition(", Metadata: ")
        starts = {key: body.find(f"{key}: ") for key in _LIST_NAMES}
        present = sorted((start, key) for key, start in starts.items() if start >= 0)
        ends = [start for start, _ in present[1:]] + [len(body)]
        texts = {key: body[start:end] for (start, key), end in zip(present, ends, strict=True)}
        lists = {key: tuple(map(_short_type, _TENSOR_TYPE.findall(part))) for key, part in texts.items()}
        formats = _FORMAT.findall(body)
        tactic = _TACTIC.search(body)
        found.append(
            EngineLayer(
                name=match["name"],
                kind=match["kind"],
                inputs=lists.get("Inputs", ()),
                constants=lists.get("Constants", ()),
                outputs=lists.get("Outputs", ()),
                onnx_nodes=_onnx_nodes(match["name"], metadata),
                format=formats[-1] if formats else "",
                tactic=tactic[1] if tactic else "",
                output_bytes=sum(_bytes(*tensor) for tensor in _TENSOR.findall(texts.get("Outputs", ""))),
            )
        )
    return found


def layers_from_inspector(text: str) -> list[EngineLayer]:
    """Final layers from the engine inspector's JSON, in any of its forms.

    Older inspectors put control characters into strings, and format and type into one sentence
    ("Thirty-two wide channel vectorized row major Int8 format"). Newer ones have ``Datatype`` as a separate entry.
    Layers that were built without details are plain strings: they have names and no types.
    """
    found = []
    for entry in json.loads(text, strict=False).get("Layers", []):
        layer = {"Name": entry} if isinstance(entry, str) else entry
        constants = _inspector_types(layer.get("Constants"))
        # "Weights", or "ConvWeights" if a pooling is fused with the convolution
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
                format=_inspector_format(layer.get("Outputs")),
                tactic=str(layer.get("TacticName", "")),
            )
        )
    return found


def _inspector_types(tensors: Any) -> tuple[str, ...]:
    listed = [tensor for tensor in tensors or [] if isinstance(tensor, dict)]
    return tuple(_short_type(str(tensor.get("Datatype") or tensor.get("Format/Datatype", ""))) for tensor in listed)


def _inspector_format(tensors: Any) -> str:
    listed = [tensor for tensor in tensors or [] if isinstance(tensor, dict)]
    found = str(listed[0].get("Format") or listed[0].get("Format/Datatype", "")) if listed else ""
    return "" if found.startswith("N/A") else found  # of an engine for several batch sizes


def _bytes(dimensions: str, word: str) -> int:
    """Bytes of a tensor, from its dimensions and type such as ``2,64,112,112`` and ``Int8``."""
    return math.prod(int(extent) for extent in dimensions.split(",") if extent) * _BYTES.get(_short_type(word), 4)


def _short_type(words: str) -> str:
    match = _TYPE_WORD.search(words)
    return _SHORT_TYPES.get(match[0].upper(), match[0].upper()) if match else "unknown"


def _onnx_nodes(name: str, metadata: str) -> tuple[str, ...]:
    """The ONNX nodes of an engine layer. Those in its name come first."""
    return tuple(dict.fromkeys([*node_names(name), *_METADATA_NODE.findall(metadata)]))


def node_names(name: str) -> list[str]:
    """The ONNX nodes in the name of a layer. A generated name has none."""
    if _is_generated(name):
        return []
    plain = _NUMBERING.sub("", _PROFILE.sub("", name))
    if _POINTWISE not in plain:
        return _BETWEEN_NAMES.split(plain)
    # Kernels of several pointwise operations, which may be nested: PWN(PWN(a, b), c)
    names = _BETWEEN_NAMES.split(plain.replace(_POINTWISE, "").replace(", ", " + "))
    return [found.rstrip(")") for found in names]


def _is_generated(name: str) -> bool:
    return name.startswith("__my")


def _operations(name: str) -> str:
    """``__myl_CastMulFc_myl0_2`` -> ``CastMulFc``; empty for a layer that was not generated."""
    return _NUMBERING.sub("", name).removeprefix("__myl_") if _is_generated(name) else ""
