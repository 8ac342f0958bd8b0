"""Where quantizers go, and why: TensorRT's rules for Q/DQ nodes, applied to a network's graph.

A wrong placement builds and is slower than FP16, because TensorRT fuses a convolution with what follows it only where
the Q/DQ nodes allow it. Each rule below is one function, named as it is recorded in every decision that it makes, with
the source of its claim. The rules see operations, channel counts and the graph, never the names of models or classes.

Source, where none other is given: NVIDIA TensorRT Developer Guide, chapter "Working with Quantized Types",
section "Explicit Quantization / Q/DQ Placement Recommendations".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qat.network import Network, Op

WEIGHTED = ("convolution", "linear")
# Operations that commute with quantization: TensorRT moves a Q across them to where it saves memory traffic.
COMMUTING = ("max_pool", "data_movement", "dropout")

# What each rule means, in a sentence for people; recorded with every checkpoint and shown in the report.
RULES = {
    "weighted_input": "a convolution or linear layer runs in INT8 when its input and its weight are quantized",
    "residual_add": "one input of a residual addition is quantized, so that it fuses into the other's convolution",
    "residual_add_of_convolutions": "of two convolutions that are added, the one on the shorter path is quantized",
    "pool_input": "an average pool runs in INT8 when its input and its output are quantized",
    "shared_concat_scale": "all inputs of a concatenation share the scale of its output, so that it copies codes",
    "few_channels": "a convolution with few channels, none a multiple of 8, has no fast INT8 kernel",
    "grouped_channels": "a grouped convolution has INT8 kernels for multiples of 8 channels and extents of 3 or more",
    "float_add": "no INT8 convolution ends in this addition, so none can take it in",
}


@dataclass(frozen=True)
class QuantizedRead:
    """The operation ``reader`` reads a tensor through its quantizer, because of ``rule``."""

    reader: str
    rule: str


@dataclass(frozen=True)
class QuantizedTensor:
    """An activation that has a quantizer. ``reads`` use it; other readers take the float tensor.

    Tensors with the same ``quantizer`` share one scale.
    """

    tensor: str
    quantizer: str
    reads: tuple[QuantizedRead, ...]


@dataclass(frozen=True)
class WeightDecision:
    """Whether the constant weight of ``op`` is quantized (per output channel), by which rule and for what reason."""

    op: str
    label: str
    quantized: bool
    rule: str
    reason: str = ""


@dataclass(frozen=True)
class AddDecision:
    """What was decided for an addition: the input that is quantized (None: neither), by which rule."""

    op: str
    label: str
    quantized_input: str | None
    rule: str
    reason: str = ""


@dataclass(frozen=True)
class Placement:
    """All decisions for one network, in the order of its operations."""

    tensors: tuple[QuantizedTensor, ...]
    weights: tuple[WeightDecision, ...]
    adds: tuple[AddDecision, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain dictionaries and lists, for a sidecar."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Placement:
        """The inverse of ``to_json``. Raises KeyError or TypeError on anything else."""
        tensors = tuple(
            QuantizedTensor(t["tensor"], t["quantizer"], tuple(QuantizedRead(**read) for read in t["reads"]))
            for t in content["tensors"]
        )
        weights = tuple(WeightDecision(**decision) for decision in content["weights"])
        adds = tuple(AddDecision(**decision) for decision in content["adds"])
        return cls(tensors, weights, adds)


def place(network: Network) -> Placement:
    """Applies the rules to ``network``."""
    weights = tuple(weight_rule(op) for op in network if op.weight is not None)
    quantized = {decision.op for decision in weights if decision.quantized}
    adds = tuple(residual_add(network, op, quantized) for op in network if op.kind == "add" and len(op.inputs) == 2)

    reads: dict[str, list[QuantizedRead]] = {}  # tensor -> its quantized reads
    for op in quantized:
        tensor, reader = _before_dropout(network, op)
        reads.setdefault(tensor, []).append(QuantizedRead(reader, "weighted_input"))
    for add in adds:
        if add.quantized_input is not None:
            reads.setdefault(add.quantized_input, []).append(QuantizedRead(add.op, add.rule))
    for op, tensor in pool_input(network, reads):
        reads.setdefault(tensor, []).append(QuantizedRead(op, "pool_input"))
    quantizer = {tensor: tensor for tensor in reads}
    for concat, output in shared_concat_scale(network, reads):
        for tensor in network[concat].inputs:
            reads.setdefault(tensor, []).append(QuantizedRead(concat, "shared_concat_scale"))
            _merge(quantizer, tensor, output)

    order = {name: position for position, name in enumerate(network.ops)}
    tensors = tuple(
        QuantizedTensor(name, quantizer[name], tuple(sorted(reads[name], key=lambda read: order[read.reader])))
        for name in network.ops
        if name in reads
    )
    return Placement(tensors, weights, adds)


# --- the rules --------------------------------------------------------------------------------------------------------


def weight_rule(op: Op) -> WeightDecision:
    """Quantize the input and the weight of every convolution and linear layer that has INT8 kernels.

    Channel limits: the heuristics of NVIDIA's ONNX quantizer (convolutions with few channels, grouped convolutions).
    """
    weight = op.weight
    assert weight is not None
    few = min(weight.in_channels, weight.out_channels) < 16
    aligned = weight.in_channels % 8 == 0 or weight.out_channels % 8 == 0
    if op.kind == "linear":
        return WeightDecision(op.name, op.label, True, "weighted_input")
    if weight.groups > 1 and (weight.out_channels % 8 or max(weight.kernel) < 3):
        reason = (
            f"grouped, {weight.out_channels} output channels, kernel {max(weight.kernel)}: needs a multiple of 8, >= 3"
        )
        return WeightDecision(op.name, op.label, False, "grouped_channels", reason)
    if weight.groups == 1 and few and not aligned:
        reason = f"{weight.in_channels} -> {weight.out_channels} channels: below 16, neither a multiple of 8"
        return WeightDecision(op.name, op.label, False, "few_channels", reason)
    return WeightDecision(op.name, op.label, True, "weighted_input")


def residual_add(network: Network, add: Op, quantized: set[str]) -> AddDecision:
    """Quantize exactly one input of a residual addition, so that it fuses into the convolution of the other.

    The convolution's own output must stay float between it and the addition. Where both inputs come from convolutions
    (a block with a projection), the longer path from their common ancestor is the one that stays float: it is computed
    last, so its convolution is the one that can take the sum in.
    """
    left, right = add.inputs
    sources = {tensor: _fusing_convolution(network, tensor, quantized) for tensor in (left, right)}
    if sources[left] is None and sources[right] is None:
        return AddDecision(add.name, add.label, None, "float_add", RULES["float_add"])
    if sources[left] is None or sources[right] is None:
        skip = left if sources[left] is None else right
        return AddDecision(add.name, add.label, skip, "residual_add")
    common = network.ancestors(left) & network.ancestors(right)
    nearest = next((op.name for op in reversed(list(network)) if op.name in common), None)
    lengths = {tensor: network.longest_path(nearest, tensor) if nearest else 0 for tensor in (left, right)}
    order = {name: position for position, name in enumerate(network.ops)}
    shorter = min((left, right), key=lambda tensor: (lengths[tensor], order[tensor]))
    return AddDecision(add.name, add.label, shorter, "residual_add_of_convolutions")


def pool_input(network: Network, reads: dict[str, list[QuantizedRead]]) -> Iterator[tuple[str, str]]:
    """Quantize the input of an average pool whose output is quantized: it then runs in INT8.

    Yields (pool, its input). Max pooling commutes with quantization and needs nothing.
    """
    for op in network:
        if op.kind == "average_pool" and _quantized_behind(network, op.name, reads) is not None:
            yield op.name, op.inputs[0]


def shared_concat_scale(network: Network, reads: dict[str, list[QuantizedRead]]) -> Iterator[tuple[str, str]]:
    """Quantize all inputs of a concatenation with the scale of its output: it then only copies INT8 codes.

    Yields (concatenation, the quantized tensor behind it that owns the scale), the last ones first, so that in nested
    concatenations the scale of the outer one reaches the inner ones.
    """
    for op in reversed(list(network)):
        if op.kind == "concat" and (behind := _quantized_behind(network, op.name, reads)) is not None:
            yield op.name, behind


# --- graph questions --------------------------------------------------------------------------------------------------


def _fusing_convolution(network: Network, tensor: str, quantized: set[str]) -> str | None:
    """The INT8 convolution whose result ``tensor`` is, in the engine, through batch normalization at most."""
    op = network[tensor]
    while len(network.readers(op.name)) == 1:
        if op.kind in WEIGHTED:
            return op.name if op.name in quantized else None
        if op.kind not in ("batch_norm", "dropout"):
            return None
        op = network[op.inputs[0]]
    return None


def _before_dropout(network: Network, op: str) -> tuple[str, str]:
    """The tensor that ``op`` reads, before any dropout, and who reads it: the dropout, or ``op``.

    Behind a dropout, which scales up what it keeps, values in training exceed the range that calibration found.
    """
    tensor, reader = network[op].inputs[0], op
    while network[tensor].kind == "dropout":
        tensor, reader = network[tensor].inputs[0], tensor
    return tensor, reader


def _quantized_behind(network: Network, tensor: str, reads: dict[str, list[QuantizedRead]]) -> str | None:
    """The quantized tensor that ``tensor`` becomes through operations that commute with quantization."""
    if tensor in reads:
        return tensor
    for reader in network.readers(tensor):
        if reader.kind in COMMUTING and (found := _quantized_behind(network, reader.name, reads)) is not None:
            return found
    return None


def _merge(quantizer: dict[str, str], tensor: str, owner: str) -> None:
    """Makes ``tensor``, and all that share its quantizer, share the one of ``owner``."""
    old, new = quantizer.get(tensor, tensor), quantizer[owner]
    quantizer[tensor] = new
    for name, current in quantizer.items():
        if current == old:
            quantizer[name] = new
