"""Where quantizers go, and why: TensorRT's rules for Q/DQ nodes, applied to the neutral view of a network.

A wrong placement builds and is slower than FP16, because TensorRT fuses a convolution with what follows it only where
the Q/DQ nodes allow it. Each rule below is one function, named as it is recorded in every decision that it makes. The
rules see operations, channel counts, shapes and the graph, never the names of models or classes.

Two kinds of rules:
- an exemption says of a convolution or linear layer why it stays in float, or '' when it does not apply;
- a read says which operation reads which tensor quantized.
Exemptions come first, because a read may depend on what its neighbours compute in.
Where quantized tensors are one tensor but for data movement, qat/rules/scale_groups.py gives them one scale and one
quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from qat.graph.network import Network, Op
from qat.graph.operations import POOLS, WEIGHTED
from qat.rules.fusion import broadcasts, fusing_convolution, gate_products, stands_alone, written_by
from qat.rules.keep_float import INTEGERS, KEPT_FLOAT, NO_RANGE, KeepFloat
from qat.rules.placement import Decision, Placement
from qat.rules.scale_groups import ONE_QUANTIZER, Reads, all_quantized, read_quantized, settle

GUIDE = "TensorRT Developer Guide, Working with Quantized Types, Q/DQ Placement Recommendations"
HEURISTICS = "heuristics of NVIDIA's ONNX quantizer"
MEASURED = "benchmarks/gpu_placement.txt"
BYTES = "bytes that TensorRT-RTX's layers write: benchmarks/placement_table.txt"


@dataclass(frozen=True)
class Rule:
    """A rule's sentence for people, shown wherever a decision is, and the source of its claim.

    ``cost``: what follows where an operation's inputs are not all quantized, though the rule wants them so.
    """

    sentence: str
    source: str
    cost: str = ""


RULES: dict[str, Rule] = {
    KEPT_FLOAT: Rule("kept in float on request", "the user"),
    NO_RANGE: Rule("no calibration gave a range of the tensor that it reads", "without a range there is no scale"),
    INTEGERS: Rule("integers are not quantized", "they have no scale"),
    ONE_QUANTIZER: Rule(
        "one quantizer before data movement serves all that read the data (qat/rules/scale_groups.py)", GUIDE
    ),
}
Exemption = Callable[[Network, Op], str]
_EXEMPTIONS: list[Exemption] = []
Throughout = Callable[[Network, Op, set[str]], bool]
_THROUGHOUT: list[Throughout] = []


Function = TypeVar("Function", bound=Callable[..., Any])


def _rule(sentence: str, source: str, cost: str = "") -> Callable[[Function], Function]:
    """Records the decorated function as a rule of its name."""

    def record(function: Function) -> Function:
        RULES[function.__name__] = Rule(sentence, source, cost)
        return function

    return record


def _exemption(sentence: str, source: str) -> Callable[[Exemption], Exemption]:
    """Records it as a rule, and asks it about every convolution and linear layer, after those above it."""

    def record(function: Exemption) -> Exemption:
        _EXEMPTIONS.append(function)
        return _rule(sentence, source)(function)

    return record


def _throughout(sentence: str, source: str, cost: str = "") -> Callable[[Throughout], Throughout]:
    """Records it as a rule about operations whose inputs are all quantized wherever their output is read quantized."""

    def record(function: Throughout) -> Throughout:
        _THROUGHOUT.append(function)
        return _rule(sentence, source, cost)(function)

    return record


def place(network: Network, keep_float: Iterable[str] = (), unknown: Iterable[str] = ()) -> Placement:
    """Applies the rules to ``network``.

    Args:
        network: the view of a float network.
        keep_float: patterns of operations and tensors that stay in float, as ``fnmatch`` takes them; each is compared
            with names and labels, and a module's path stands for all that is inside it. A matched convolution, linear
            layer, addition, pool, product, concatenation or normalization that stands alone computes in float. Any
            other operation is matched by its very name alone, and then the tensor that it makes is not quantized.
        unknown: tensors whose range nobody knows, so that they cannot be quantized.

    Raises:
        UserError: a pattern matches nothing.
    """
    patterns = tuple(keep_float)
    kept = KeepFloat.from_patterns(network, patterns, unknown)
    unfit: set[str] = set()
    while True:  # what one layer does without, another may have relied on
        decisions, reads = _decide(network, kept, unfit)
        more = {op.name for op in network if grouped_float_output(network, op, decisions, reads)}
        if not more:
            break
        unfit |= more
    in_order = tuple(decisions[op.name] for op in network if op.name in decisions)
    return Placement(settle(network, reads), in_order, patterns)


def _decide(network: Network, kept: KeepFloat, unfit: set[str]) -> tuple[dict[str, Decision], Reads]:
    """The decisions by operation, and the reads that follow from them; ``unfit`` layers stay in float."""
    decisions = _weight_decisions(network, kept, unfit)
    quantized = {name for name, decision in decisions.items() if decision.quantized}
    reads: Reads = {(name, network[name].inputs[0]): weighted_input.__name__ for name in quantized}
    for op in network:
        if op.kind == "add" and len(op.inputs) > 1 and not unfused_add(network, op, quantized):
            decisions[op.name], tensors = residual_add(network, op, quantized, kept)
            reads |= {(op.name, tensor): decisions[op.name].rule for tensor in tensors}
        elif op.kind == "matrix_product":
            reason = RULES["product_of_activations"].sentence
            decisions[op.name] = Decision(op.name, op.label, op.kind, False, product_of_activations.__name__, reason)
    # Backwards, so that what stands behind an operation is already decided.
    for op in reversed(network):
        for rule in _THROUGHOUT:
            if rule(network, op, quantized):
                why, reason = kept.why(op.name, op.inputs)
                fuses = op.kind in ("add", "batch_norm")
                written = _written_by(network, op, decisions, reads) if fuses else op.name
                if not read_quantized(network, written, reads):
                    why, reason = rule.__name__, "nothing behind it reads INT8"
                decisions[op.name] = Decision(op.name, op.label, op.kind, not why, why or rule.__name__, reason)
                reads |= {(op.name, tensor): rule.__name__ for tensor in op.inputs if not why}
    for op in network:
        read = (op.name, op.inputs[0]) if op.inputs else None
        if read and read not in reads and norm_of_codes(network, op, reads) and not kept.why(op.name, op.inputs)[0]:
            reads[read] = norm_of_codes.__name__
            decisions[op.name] = Decision(op.name, op.label, op.kind, True, norm_of_codes.__name__, "")
    return decisions, reads


def _weight_decisions(network: Network, kept: KeepFloat, unfit: set[str]) -> dict[str, Decision]:
    decisions = {}
    for op in network:
        if op.kind in WEIGHTED:
            rule, reason = weighted_input(network, op, kept)
            if op.name in unfit and not reason:
                rule, reason = grouped_float_output.__name__, "what it makes is read in float"
            decisions[op.name] = Decision(op.name, op.label, op.kind, not reason, rule, reason)
    owners: dict[str, list[str]] = {}
    for name in decisions:
        if (weight := network[name].weight) is not None:
            owners.setdefault(weight.tensor, []).append(name)
    for names in owners.values():
        floats = [name for name in names if not decisions[name].quantized]
        for name in names if floats else ():
            if decisions[name].quantized:
                op, reason = network[name], f"shares its weight with {floats[0]}, which stays in float"
                decisions[name] = Decision(name, op.label, op.kind, False, shared_weight.__name__, reason)
    return decisions


def _written_by(network: Network, op: Op, decisions: dict[str, Decision], reads: Reads) -> str:
    """The tensor that the kernel of a convolution, or of what it takes in, writes."""

    def takes_in(following: Op, tensor: str) -> bool:
        takes_sum = following.kind == "add" and following.name in decisions and decisions[following.name].quantized
        return (following.name, tensor) not in reads and (following.kind in ("batch_norm", "activation") or takes_sum)

    return written_by(network, op, takes_in)


# --- exemptions: why a convolution or linear layer stays in float -----------------------------------------------------


@_exemption("a weight that is computed anew at each step is no constant that could be stored as INT8", GUIDE)
def computed_weight(network: Network, op: Op) -> str:
    """A weight behind weight normalization or standardization has no fixed codes."""
    return "its weight is computed by other operations" if op.weight is None else ""


@_exemption("a transposed convolution has no INT8 kernel", "what TensorRT-RTX 1.7 builds: tests/test_zoo.py")
def transposed_convolution(network: Network, op: Op) -> str:
    """Quantized, it would dequantize its input and compute in float all the same."""
    return "transposed" if op.kind == "transposed_convolution" else ""


@_exemption("a convolution with few channels, none a multiple of 8, has no fast INT8 kernel", HEURISTICS)
def few_channels(network: Network, op: Op) -> str:
    """Below 16 channels in or out, one of the two must be a multiple of 8."""
    weight = op.weight
    if weight is None or op.kind == "linear" or weight.groups > 1:
        return ""
    few = min(weight.in_channels, weight.out_channels) < 16
    aligned = weight.in_channels % 8 == 0 or weight.out_channels % 8 == 0
    shown = f"{weight.in_channels} -> {weight.out_channels} channels: one is below 16, and neither a multiple of 8"
    return shown if few and not aligned else ""


@_exemption("a grouped convolution has INT8 kernels for multiples of 8 channels and extents of 3 or more", HEURISTICS)
def grouped_channels(network: Network, op: Op) -> str:
    """Output channels a multiple of 8, and a kernel of 3 or more."""
    weight = op.weight
    if weight is None or weight.groups == 1:
        return ""
    if weight.out_channels % 8 == 0 and max(weight.kernel) >= 3:
        return ""
    return f"grouped, {weight.out_channels} output channels, kernel {max(weight.kernel)}: needs a multiple of 8, >= 3"


@_rule("a grouped convolution has INT8 kernels only where what it makes is quantized too", MEASURED)
def grouped_float_output(network: Network, op: Op, decisions: dict[str, Decision], reads: Reads) -> bool:
    """Whether a quantized grouped convolution makes a tensor that somebody reads in float."""
    if op.weight is None or op.weight.groups == 1 or not decisions[op.name].quantized:
        return False
    tensor = _written_by(network, op, decisions, reads)
    return not all_quantized(network, tensor, reads)


@_rule("layers that share one weight are quantized together or not at all", "one tensor is stored once")
def shared_weight(network: Network, op: Op) -> None:
    """Comes after the others (see ``_weight_decisions``)."""


# --- reads: who reads which tensor quantized --------------------------------------------------------------------------


@_rule("a convolution or linear layer runs in INT8 when its input and its weight are quantized", GUIDE)
def weighted_input(network: Network, op: Op, kept: KeepFloat) -> tuple[str, str]:
    """The exemption that applies to a layer and its reason, or this rule and ''."""
    rule, reason = kept.why(op.name, op.inputs[:1])
    if reason:
        return rule, reason
    for exemption in _EXEMPTIONS:
        if reason := exemption(network, op):
            return exemption.__name__, reason
    return weighted_input.__name__, ""


@_rule("one input of a residual addition is quantized, so that it fuses into the other's convolution", GUIDE)
def residual_add(network: Network, add: Op, quantized: set[str], kept: KeepFloat) -> tuple[Decision, list[str]]:
    """Quantize all inputs of an addition but one: the one whose convolution can take the sum in.

    That convolution's own output must stay float between it and the addition. Returns the decision and the tensors.
    """
    fusing = [tensor for tensor in add.inputs if fusing_convolution(network, tensor, quantized)]
    inside = fusing[0] if len(fusing) == 1 else residual_add_of_convolutions(network, add, fusing)
    others = [tensor for tensor in dict.fromkeys(add.inputs) if tensor != inside]
    why, reason = kept.why(add.name, others)
    rule = residual_add if len(fusing) == 1 else residual_add_of_convolutions
    decision = Decision(add.name, add.label, add.kind, not why, why or rule.__name__, reason)
    return decision, [] if why else others


@_rule("of two convolutions that are added, the one on the shorter path is quantized", GUIDE)
def residual_add_of_convolutions(network: Network, add: Op, fusing: list[str]) -> str:
    """The input that stays float: on the longest path from the common ancestor, so that it is computed last."""
    common = set.intersection(*(network.ancestors(tensor) for tensor in fusing))
    common -= {name for name in common if network[name].kind == "dropout"}  # which is not exported
    nearest = max(common, key=network.position) if common else None
    layers = {tensor: network.most_layers(nearest, tensor) if nearest else 0 for tensor in fusing}
    return max(fusing, key=lambda tensor: (layers[tensor], network.position(tensor)))


@_throughout(
    "an average pool runs in INT8 when its input and its output are quantized",
    GUIDE,
    cost="the pool runs in FP16 between INT8 layers",
)
def pool_input(network: Network, op: Op, quantized: set[str]) -> bool:
    """Max pooling commutes with quantization and needs nothing."""
    return op.kind in POOLS


@_throughout("all inputs of a concatenation share the scale of its output, so that it copies codes", GUIDE)
def shared_concat_scale(network: Network, op: Op, quantized: set[str]) -> bool:
    """The one scale for all is given by qat/rules/scale_groups.py."""
    return op.kind == "concat"


@_throughout(
    "a gate multiplies INT8 codes, so that the convolutions on both sides of it write and read them",
    MEASURED,
    cost="the gate multiplies in FP16, so the convolutions around it write and read FP16",
)
def gate_product(network: Network, op: Op, quantized: set[str]) -> bool:
    """A tensor times a function of its own global pool: squeeze-and-excite. Both factors are quantized."""
    return op.name in gate_products(network)


@_throughout(
    "an addition that no convolution can take in reads and writes INT8 codes",
    BYTES,
    cost="the addition, which fuses into no convolution, reads FP16",
)
def unfused_add(network: Network, op: Op, quantized: set[str]) -> bool:
    """Of tensors none of which an INT8 convolution has just made, or that differ in shape, or are the same."""
    if op.kind != "add" or len(op.inputs) < 2:
        return False
    odd = broadcasts(network, op) or len(set(op.inputs)) < 2
    return odd or not any(fusing_convolution(network, tensor, quantized) for tensor in op.inputs)


@_throughout(
    "a normalization that stands alone reads INT8 codes where it writes them",
    MEASURED,
    cost="the normalization and whatever makes its input run in FP16 or FP32",
)
def unfused_norm(network: Network, op: Op, quantized: set[str]) -> bool:
    """A batch normalization that folds into no convolution: its kernel, with the activation, is bound by memory."""
    return stands_alone(network, op)


@_rule(
    "a normalization that stands alone reads the codes that all others read, so that no float copy is written", BYTES
)
def norm_of_codes(network: Network, op: Op, reads: Reads) -> bool:
    """A batch normalization that folds into no convolution, beside readers of the same tensor that all read codes."""
    if not stands_alone(network, op):
        return False
    others = [reader for reader in network.readers(op.inputs[0]) if reader.kind != "batch_norm"]
    return bool(others) and all((reader.name, op.inputs[0]) in reads for reader in others)


@_throughout(
    "an activation that takes a kernel of its own reads and writes INT8 codes",
    MEASURED,
    cost="the activation's kernel reads FP16",
)
def unfused_activation(network: Network, op: Op, quantized: set[str]) -> bool:
    """Between INT8 convolutions that do not take it in, its input is quantized as well as its output."""
    return op.kind == "unfused_activation" and fusing_convolution(network, op.inputs[0], quantized) is not None


@_rule("a product of two activations stays in float", HEURISTICS)
def product_of_activations(network: Network, op: Op) -> None:
    """No constant factor, so no weight."""
