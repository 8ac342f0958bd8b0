"""Precision and output type of single layers, by patterns over their names (--layer, --output-type).

Weakly typed networks have them. What the builder made of each is read from the engine's final layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from deploy.engine_layers import EngineLayer
from deploy.settings import BuilderOptions
from qat.base.errors import UserError
from qat.base.text import did_you_mean

if TYPE_CHECKING:
    import tensorrt as trt

Kind = Literal["precision", "output type"]
_OPTIONS: dict[Kind, str] = {"precision": "--layer", "output type": "--output-type"}
# A type by our name -> TensorRT's, and the precisions of the whole network that allow it.
_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "INT8"}
_ALLOWED_BY = {
    "fp16": ("fp16", "int8", "explicit"),
    "bf16": ("bf16",),
    "int8": ("int8", "explicit"),
}
_FLOATS = ("FLOAT", "HALF", "BF16")
_NOT_TOLD = ("unknown", "none")  # what EngineLayer has where the engine's description lacks a type
_WITHOUT_COMPUTATION = ("CONSTANT", "SHAPE", "QUANTIZE", "DEQUANTIZE")


@dataclass(frozen=True)
class TypeRule:
    """``pattern`` of layer names and the ``type`` (fp32, fp16, bf16 or int8) that these layers get."""

    kind: Kind
    pattern: str
    type: str

    @classmethod
    def parse(cls, kind: Kind, text: str, options: BuilderOptions) -> TypeRule:
        """``conv1*=fp32``. Raises UserError for any other text, and when the network's precision does not allow it."""
        option = _OPTIONS[kind]
        pattern, _, name = text.rpartition("=")
        if not pattern or name not in _TYPES:
            raise UserError(
                f"{option} {text!r}: must be PATTERN=TYPE with one of {', '.join(_TYPES)}, as 'conv1*=fp32'"
            )
        allowed = _ALLOWED_BY.get(name, ())
        if allowed and (options.precision not in allowed or (options.strict and name == "fp16")):
            if options.precision in allowed:
                raise UserError(f"{option} {text!r}: --strict allows no {name}: leave out --strict")
            raise UserError(f"{option} {text!r}: --precision {options.precision} has no {name}: give {allowed[0]}")
        return cls(kind, pattern, name)


@dataclass(frozen=True)
class LayerType:
    """What was asked for one layer: its ``precision`` or ``output type``, and what it has in the engine.

    ``found`` is empty if the engine's description does not tell: the layer is gone, or part of a larger one.
    """

    layer: str
    kind: Kind
    asked: str
    found: str = ""

    @property
    def obeyed(self) -> bool | None:
        """None if it is not known."""
        return self.found == self.asked if self.found else None

    def __str__(self) -> str:
        found = self.found or "not told by the engine"
        return f"{self.layer}: {self.kind} {self.asked} asked, {found}"


def type_rules(options: BuilderOptions) -> tuple[TypeRule, ...]:
    """The rules of --layer and --output-type. Raises UserError as ``TypeRule.parse`` does."""
    precisions = [TypeRule.parse("precision", text, options) for text in options.layer]
    return (*precisions, *(TypeRule.parse("output type", text, options) for text in options.output_type))


def set_types(rules: Sequence[TypeRule], network: trt.INetworkDefinition, module: Any) -> tuple[LayerType, ...]:
    """Sets precisions and output types in a network; ``module`` is TensorRT's Python module.

    Returns what every layer was asked. Raises UserError when a pattern matches no layer that computes on floats.
    """
    layers = {layer.name: layer for layer in _computing_layers(network)}
    asked: dict[tuple[str, Kind], str] = {}
    for rule in rules:
        # TensorRT's own names have signs of patterns in them: (Unnamed Layer* 3) [Shuffle]
        matching = [name for name in layers if name == rule.pattern or fnmatchcase(name, rule.pattern)]
        if not matching:
            raise UserError(
                f"{_OPTIONS[rule.kind]} {rule.pattern!r} matches none of the {len(layers)} layers"
                f"{did_you_mean(rule.pattern, layers)}: names are those of the ONNX nodes"
            )
        asked |= {(name, rule.kind): rule.type for name in matching}
    for (name, kind), wanted in asked.items():
        data_type = getattr(module.DataType, _TYPES[wanted])
        if kind == "precision":
            layers[name].precision = data_type
        else:
            for index in _float_outputs(layers[name]):
                layers[name].set_output_type(index, data_type)
    return tuple(LayerType(name, kind, wanted) for (name, kind), wanted in asked.items())


def layers_as_built(asked: Iterable[LayerType], layers: Sequence[EngineLayer]) -> tuple[LayerType, ...]:
    """What the engine's final ``layers`` have of what was ``asked``; of several profiles, where it is another type."""
    profiles = sorted({layer.profile for layer in layers}) or [0]
    of_profile = [[layer for layer in layers if layer.profile == profile] for profile in profiles]
    checked = []
    for one in asked:
        found = [_found(one, known) for known in of_profile]
        other = [type_ for type_ in found if type_ not in ("", one.asked)]
        checked.append(LayerType(one.layer, one.kind, one.asked, (other or found)[0]))
    return tuple(checked)


def _found(asked: LayerType, layers: Sequence[EngineLayer]) -> str:
    """The type in the engine, "" if it is not told; of an output only where the layer is the last of the fused."""
    naming = [layer for layer in layers if not layer.is_reformat and asked.layer in layer.own_nodes]
    naming = naming or [layer for layer in layers if not layer.is_reformat and asked.layer in layer.onnx_nodes]
    if not naming:
        return ""
    layer = naming[0]
    last = bool(layer.own_nodes) and layer.own_nodes[-1] == asked.layer
    found = layer.product_precision if asked.kind == "precision" else layer.outputs[0] if last and layer.outputs else ""
    return "" if found in _NOT_TOLD else found.lower()


def _computing_layers(network: trt.INetworkDefinition) -> Iterator[Any]:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name not in _WITHOUT_COMPUTATION and _float_outputs(layer):
            yield layer


def _float_outputs(layer: Any) -> list[int]:
    """Indices of the outputs that can have another type; those of integers, such as TopK's second, cannot."""
    return [index for index in range(layer.num_outputs) if layer.get_output(index).dtype.name in _FLOATS]
