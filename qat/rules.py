"""Where quantizers go, and why: TensorRT's rules for Q/DQ nodes, applied to the neutral view of a network.

A wrong placement builds and is slower than FP16, because TensorRT fuses a convolution with what follows it only where
the Q/DQ nodes allow it. Each rule below is one function, named as it is recorded in every decision that it makes. The
rules see operations, channel counts, shapes and the graph, never the names of models or classes.

Two kinds of rules:
- an exemption says of a convolution or linear layer why it stays in float, or '' when it does not apply;
- a read says which operation reads which tensor quantized.
Exemptions come first, because a read may depend on what its neighbours compute in.
Where quantized tensors are one tensor but for data movement, qat/sharing.py gives them one scale and one quantizer.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from qat.artifact import UserError
from qat.decisions import Decision, Placement
from qat.network import Network, Op
from qat.operations import WEIGHTED
from qat.sharing import ONE_QUANTIZER, Reads, all_quantized, read_quantized, settle

GUIDE = "TensorRT Developer Guide, Working with Quantized Types, Q/DQ Placement Recommendations"
HEURISTICS = "heuristics of NVIDIA's ONNX quantizer"
MEASURED = "benchmarks/gpu_placement.txt"
BYTES = "bytes that TensorRT-RTX's layers write: benchmarks/placement_table.txt"
POOLS = ("average_pool", "global_pool")
_CHOOSABLE = (*WEIGHTED, *POOLS, "add", "concat", "multiply")


@dataclass(frozen=True)
class Rule:
    """A rule's sentence for people, shown wherever a decision is, and the source of its claim."""

    sentence: str
    source: str


RULES: dict[str, Rule] = {
    ONE_QUANTIZER: Rule("one quantizer before data movement serves all that read the data (qat/sharing.py)", GUIDE),
}
Exemption = Callable[[Network, Op], str]
_EXEMPTIONS: list[Exemption] = []
Throughout = Callable[[Network, Op, set[str]], bool]
_THROUGHOUT: list[Throughout] = []


Function = TypeVar("Function", bound=Callable[..., Any])


def _rule(sentence: str, source: str) -> Callable[[Function], Function]:
    """Records the decorated function as a rule of its name."""

    def record(function: Function) -> Function:
        RULES[function.__name__] = Rule(sentence, source)
        return function

    return record


def _exemption(sentence: str, source: str) -> Callable[[Exemption], Exemption]:
    """Records it as a rule, and asks it about every convolution and linear layer, after those above it."""

    def record(function: Exemption) -> Exemption:
        _EXEMPTIONS.append(function)
        return _rule(sentence, source)(function)

    return record


def _throughout(sentence: str, source: str) -> Callable[[Throughout], Throughout]:
    """Records it as a rule about operations whose inputs are all quantized wherever their output is read quantized."""

    def record(function: Throughout) -> Throughout:
        _THROUGHOUT.append(function)
        return _rule(sentence, source)(function)

    return record


@dataclass(frozen=True)
class _Kept:
    """What stays in float whatever the network is: operations by a user's wish, tensors also without a range."""

    ops: frozenset[str]
    tensors: frozenset[str]
    unknown: frozenset[str]

    def why(self, op: str, tensors: Iterable[str]) -> tuple[str, str]:
        """The rule by which ``op`` cannot read ``tensors`` quantized, and the reason; ('', '') when it can."""
        if op in self.ops:
            return kept_float.__name__, "kept in float"
        for tensor in tensors:
            if tensor in self.tensors:
                return kept_float.__name__, f"its input {tensor} is kept in float"
            if tensor in self.unknown:
                return no_range.__name__, f"no range is known of its input {tensor}"
        return "", ""


def place(network: Network, keep_float: Iterable[str] = (), unknown: Iterable[str] = ()) -> Placement:
    """Applies the rules to ``network``.

    Args:
        network: the view of a float network.
        keep_float: patterns of operations and tensors that stay in float, as ``fnmatch`` takes them; each is compared
            with names and labels, and a module's path stands for all that is inside it. A matched convolution, linear
            layer, addition, pool, product or concatenation computes in float. Any other operation is matched by its
            very name alone, and then the tensor that it makes is not quantized.
        unknown: tensors whose range nobody knows, so that they cannot be quantized.

    Raises:
        UserError: a pattern matches nothing.
    """
    patterns = tuple(keep_float)
    named = _matched(network, patterns)
    ops = frozenset(name for name in named if network[name].kind in _CHOOSABLE)
    never = {op.name for op in network if not op.floating}
    kept = _Kept(ops, frozenset(named - ops), frozenset(unknown) | never)
    unfit: set[str] = set()
    while True:  # what one layer does without, another may have relied on
        decisions, reads = _decide(network, kept, unfit)
        more = {op.name for op in network if grouped_float_output(network, op, decisions, reads)}
        if not more:
            break
        unfit |= more
    in_order = tuple(decisions[op.name] for op in network if op.name in decisions)
    return Placement(settle(network, reads), in_order, patterns)


def _decide(network: Network, kept: _Kept, unfit: set[str]) -> tuple[dict[str, Decision], Reads]:
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
                written = _made_by(network, op, decisions, reads) if op.kind == "add" else op.name
                if not read_quantized(network, written, reads):
                    why, reason = rule.__name__, "nothing behind it reads INT8"
                decisions[op.name] = Decision(op.name, op.label, op.kind, not why, why or rule.__name__, reason)
                reads |= {(op.name, tensor): rule.__name__ for tensor in op.inputs if not why}
    reads |= {(op.name, op.inputs[0]): norm_of_codes.__name__ for op in network if norm_of_codes(network, op, reads)}
    return decisions, reads


# --- exemptions: why a convolution or linear layer stays in float -----------------------------------------------------


@_rule("kept in float on request", "the user")
def kept_float(network: Network, op: Op) -> None:
    """Comes before all others (see ``_Kept``)."""


@_rule("no calibration gave a range of the tensor that it reads", "without a range there is no scale")
def no_range(network: Network, op: Op) -> None:
    """Comes next (see ``_Kept``)."""


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
    shown = f"{weight.in_channels} -> {weight.out_channels} channels: below 16, neither a multiple of 8"
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
    tensor = _made_by(network, op, decisions, reads)
    return not all_quantized(network, tensor, reads)


@_rule("layers that share one weight are quantized together or not at all", "one tensor is stored once")
def shared_weight(network: Network, op: Op) -> None:
    """Comes after the others (see ``_weight_decisions``)."""


# --- reads: who reads which tensor quantized --------------------------------------------------------------------------


@_rule("a convolution or linear layer runs in INT8 when its input and its weight are quantized", GUIDE)
def weighted_input(network: Network, op: Op, kept: _Kept) -> tuple[str, str]:
    """The exemption that applies to a layer and its reason, or this rule and ''."""
    rule, reason = kept.why(op.name, op.inputs[:1])
    if reason:
        return rule, reason
    for exemption in _EXEMPTIONS:
        if reason := exemption(network, op):
            return exemption.__name__, reason
    return weighted_input.__name__, ""


@_rule("one input of a residual addition is quantized, so that it fuses into the other's convolution", GUIDE)
def residual_add(network: Network, add: Op, quantized: set[str], kept: _Kept) -> tuple[Decision, list[str]]:
    """Quantize all inputs of an addition but one: the one whose convolution can take the sum in.

    That convolution's own output must stay float between it and the addition. Returns the decision and the tensors.
    """
    fusing = [tensor for tensor in add.inputs if _fusing_convolution(network, tensor, quantized)]
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
    nearest = max(common, key=network.position) if common else None
    layers = {tensor: network.most_layers(nearest, tensor) if nearest else 0 for tensor in fusing}
    return max(fusing, key=lambda tensor: (layers[tensor], network.position(tensor)))


@_throughout("an average pool runs in INT8 when its input and its output are quantized", GUIDE)
def pool_input(network: Network, op: Op, quantized: set[str]) -> bool:
    """Max pooling commutes with quantization and needs nothing."""
    return op.kind in POOLS


@_throughout("all inputs of a concatenation share the scale of its output, so that it copies codes", GUIDE)
def shared_concat_scale(network: Network, op: Op, quantized: set[str]) -> bool:
    """The one scale for all is given by qat/sharing.py."""
    return op.kind == "concat"


@_throughout("a gate multiplies INT8 codes, so that the convolutions on both sides of it write and read them", MEASURED)
def gate_product(network: Network, op: Op, quantized: set[str]) -> bool:
    """A tensor times a function of its own global pool: squeeze-and-excite. Both factors are quantized."""
    return op.name in _gate_products(network)


@_throughout("an addition that no convolution can take in reads and writes INT8 codes", BYTES)
def unfused_add(network: Network, op: Op, quantized: set[str]) -> bool:
    """Of tensors none of which an INT8 convolution has just made, or that differ in shape, or are the same."""
    if op.kind != "add" or len(op.inputs) < 2:
        return False
    odd = _broadcasts(network, op) or len(set(op.inputs)) < 2
    return odd or not any(_fusing_convolution(network, tensor, quantized) for tensor in op.inputs)


@_rule(
    "a normalization that stands alone reads the codes that all others read, so that no float copy is written", BYTES
)
def norm_of_codes(network: Network, op: Op, reads: Reads) -> bool:
    """A batch normalization that folds into no convolution, beside readers of the same tensor that all read codes."""
    if op.kind != "batch_norm" or network[op.inputs[0]].kind in WEIGHTED:
        return False
    others = [reader for reader in network.readers(op.inputs[0]) if reader.kind != "batch_norm"]
    return bool(others) and all((reader.name, op.inputs[0]) in reads for reader in others)


@_throughout("an activation that takes a kernel of its own reads and writes INT8 codes", MEASURED)
def unfused_activation(network: Network, op: Op, quantized: set[str]) -> bool:
    """Between INT8 convolutions that do not take it in, its input is quantized as well as its output."""
    return op.kind == "unfused_activation" and _fusing_convolution(network, op.inputs[0], quantized) is not None


@_rule("a product of two activations stays in float", HEURISTICS)
def product_of_activations(network: Network, op: Op) -> None:
    """No constant factor, so no weight."""


# --- graph questions --------------------------------------------------------------------------------------------------


def _matched(network: Network, patterns: tuple[str, ...]) -> set[str]:
    """The operations that the patterns of ``place`` name."""
    found: set[str] = set()
    for pattern in patterns:
        matched = {op.name for op in network if _is_meant(op, pattern)}
        if not matched:
            labels = sorted({op.label for op in network})
            close = difflib.get_close_matches(pattern, labels, n=3) or labels[:3]
            raise UserError(
                f"--keep-float {pattern} matches none of the {len(network.ops)} operations; there are, for example, "
                f"{', '.join(close)}"
            )
        found |= matched
    return found


def _is_meant(op: Op, pattern: str) -> bool:
    """Whether ``pattern`` names ``op``. What could not be INT8 stands for its tensor, and is meant by its very name."""
    if op.kind not in _CHOOSABLE:
        return pattern in (op.name, op.label)
    forms = (pattern, f"{pattern}.*", pattern.removesuffix(".*"))
    return any(fnmatchcase(name, form) for name in (op.name, op.label) for form in forms)


def _weight_decisions(network: Network, kept: _Kept, unfit: set[str]) -> dict[str, Decision]:
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


def _broadcasts(network: Network, op: Op) -> bool:
    shapes = {network[tensor].shape for tensor in op.inputs}
    return len(shapes) > 1 and None not in shapes


@functools.lru_cache(maxsize=2)
def _gate_products(network: Network) -> set[str]:
    """The multiplications of a tensor by what is computed from its own global pool."""
    found = set()
    for op in network:
        if op.kind == "multiply" and len(set(op.inputs)) == 2:
            for value, gate in (op.inputs, op.inputs[::-1]):
                before = network.ancestors(value)
                between = [network[name] for name in network.ancestors(gate) - before]
                if any(made.kind == "global_pool" and made.inputs[0] in before for made in between):
                    found.add(op.name)
    return found


def _made_by(network: Network, op: Op, decisions: dict[str, Decision], reads: Reads) -> str:
    """The tensor that the engine's layer of a convolution writes: behind what fuses into it."""
    tensor = op.name
    while True:
        readers = network.readers(tensor)
        following = readers[-1] if readers else op
        alone = len(readers) == 1 and (following.name, tensor) not in reads
        takes_sum = following.kind == "add" and following.name in decisions and decisions[following.name].quantized
        fuses = alone and (following.kind in ("batch_norm", "activation") or takes_sum)
        if not fuses and not (len(readers) == 2 and _is_swish(network, tensor, following)):
            return tensor
        tensor = following.name


def _is_swish(network: Network, tensor: str, product: Op) -> bool:
    """Whether ``product`` is ``tensor`` times an activation of it."""
    others = [name for name in product.inputs if name != tensor]
    return (
        product.kind == "multiply"
        and len(others) == 1
        and network[others[0]].inputs == (tensor,)
        and network[others[0]].kind in ("activation", "unfused_activation")
    )
