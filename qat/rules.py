"""Where quantizers go, and why: TensorRT's rules for Q/DQ nodes, applied to the neutral view of a network.

A wrong placement builds and is slower than FP16, because TensorRT fuses a convolution with what follows it only where
the Q/DQ nodes allow it. Each rule below is one function, named as it is recorded in every decision that it makes. The
rules see operations, channel counts, shapes and the graph, never the names of models or classes.

Two kinds of rules:
- an exemption says of a convolution or linear layer why it stays in float, or '' when it does not apply;
- a read says which operation reads which tensor quantized.
Where quantized tensors are one tensor but for data movement, ``_settle`` gives them one scale and one quantizer.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from qat.artifact import UserError
from qat.decisions import Decision, Placement, QuantizedRead, QuantizedTensor
from qat.network import Network, Op
from qat.operations import COMMUTING, WEIGHTED

GUIDE = "TensorRT Developer Guide, Working with Quantized Types, Q/DQ Placement Recommendations"
HEURISTICS = "heuristics of NVIDIA's ONNX quantizer"
POOLS = ("average_pool", "global_pool")


@dataclass(frozen=True)
class Rule:
    """A rule's sentence for people, shown wherever a decision is, and the source of its claim."""

    sentence: str
    source: str


RULES: dict[str, Rule] = {}
Exemption = Callable[[Network, Op], str]
_EXEMPTIONS: list[Exemption] = []
Reads = dict[tuple[str, str], str]  # (reader, tensor) -> rule


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


def place(network: Network, keep_float: Iterable[str] = ()) -> Placement:
    """Applies the rules to ``network``.

    Args:
        network: the view of a float network.
        keep_float: patterns of operations and tensors that stay in float, as ``fnmatch`` takes them; each is compared
            with names and labels, and a module's path stands for all that is inside it. A matched convolution, linear
            layer, addition, pool or concatenation computes in float; of any other operation, the tensor that it makes
            is not quantized.

    Raises:
        UserError: a pattern matches nothing.
    """
    patterns = tuple(keep_float)
    kept = _matched(network, patterns)
    decisions: dict[str, Decision] = _weight_decisions(network, kept)
    quantized = {name for name, decision in decisions.items() if decision.quantized}
    reads: Reads = {(name, network[name].inputs[0]): weighted_input.__name__ for name in quantized}
    for op in network:
        if op.kind == "add" and len(op.inputs) > 1:
            decision, tensors = residual_add(network, op, quantized, kept)
            decisions[op.name] = decision
            reads |= {(op.name, tensor): decision.rule for tensor in tensors}
    # Backwards, so that what stands behind an operation is already decided.
    for op in reversed(network):
        if op.kind in POOLS or op.kind == "concat":
            rule = pool_input if op.kind in POOLS else shared_concat_scale
            why_not = _why_float(network, op, reads, kept)
            decisions[op.name] = Decision(op.name, op.label, op.kind, not why_not, rule.__name__, why_not)
            if not why_not:
                reads |= {(op.name, tensor): rule.__name__ for tensor in op.inputs}
        elif op.kind == "matrix_product":
            reason = RULES["product_of_activations"].sentence
            decisions[op.name] = Decision(op.name, op.label, op.kind, False, product_of_activations.__name__, reason)
    in_order = tuple(decisions[op.name] for op in network if op.name in decisions)
    return Placement(_settle(network, reads), in_order, patterns)


# --- exemptions: why a convolution or linear layer stays in float -----------------------------------------------------


@_rule("kept in float on request", "the user")
def kept_float(network: Network, op: Op) -> None:
    """Comes before all others (see ``place``)."""


@_exemption("a weight that is computed anew at each step is no constant that could be stored as INT8", GUIDE)
def computed_weight(network: Network, op: Op) -> str:
    """A weight behind weight normalization or standardization has no fixed codes."""
    return "its weight is computed by other operations" if op.weight is None else ""


@_exemption("a layer inside a squeeze-and-excite gate works on one pixel: INT8 saves nothing there", HEURISTICS)
def squeeze_excite(network: Network, op: Op) -> str:
    """Layers between a tensor's global pool and the multiplication that scales that same tensor stay in float."""
    return "computes a gate from one value a channel" if op.name in _gate_layers(network) else ""


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
    """Output channels a multiple of 8, and a kernel of 3 or more; never a transposed one."""
    weight = op.weight
    if weight is None or weight.groups == 1:
        return ""
    if op.kind == "transposed_convolution":
        return "transposed and grouped: its scales would not follow its output channels"
    if weight.out_channels % 8 == 0 and max(weight.kernel) >= 3:
        return ""
    return f"grouped, {weight.out_channels} output channels, kernel {max(weight.kernel)}: needs a multiple of 8, >= 3"


@_rule("layers that share one weight are quantized together or not at all", "one tensor is stored once")
def shared_weight(network: Network, op: Op) -> None:
    """Comes after the others (see ``_weight_decisions``)."""


# --- reads: who reads which tensor quantized --------------------------------------------------------------------------


@_rule("a convolution or linear layer runs in INT8 when its input and its weight are quantized", GUIDE)
def weighted_input(network: Network, op: Op, kept: set[str]) -> tuple[str, str]:
    """The exemption that applies to a layer and its reason, or this rule and ''."""
    if op.name in kept:
        return kept_float.__name__, "kept in float"
    if kept_tensors := _kept_tensors(network, op.inputs[:1], kept):
        return kept_float.__name__, f"its input {kept_tensors[0]} is kept in float"
    for exemption in _EXEMPTIONS:
        if reason := exemption(network, op):
            return exemption.__name__, reason
    return weighted_input.__name__, ""


@_rule("one input of a residual addition is quantized, so that it fuses into the other's convolution", GUIDE)
def residual_add(network: Network, add: Op, quantized: set[str], kept: set[str]) -> tuple[Decision, list[str]]:
    """Quantize all inputs of an addition but one: the one whose convolution can take the sum in.

    That convolution's own output must stay float between it and the addition. Returns the decision and the tensors.
    """

    def decide(rule: Callable[..., object], tensors: list[str], reason: str = "") -> tuple[Decision, list[str]]:
        return Decision(add.name, add.label, add.kind, bool(tensors), rule.__name__, reason), tensors

    fusing = [tensor for tensor in add.inputs if _fusing_convolution(network, tensor, quantized)]
    if not fusing or len(set(add.inputs)) < 2:
        return decide(float_add, [], RULES["float_add"].sentence)
    if _broadcasts(network, add):
        return decide(float_add, [], "its inputs differ in shape, so no convolution can take it in")
    inside = fusing[0] if len(fusing) == 1 else residual_add_of_convolutions(network, add, fusing)
    others = [tensor for tensor in dict.fromkeys(add.inputs) if tensor != inside]
    if add.name in kept or _kept_tensors(network, others, kept):
        return decide(kept_float, [], "kept in float")
    return decide(residual_add if len(fusing) == 1 else residual_add_of_convolutions, others)


@_rule("of two convolutions that are added, the one on the shorter path is quantized", GUIDE)
def residual_add_of_convolutions(network: Network, add: Op, fusing: list[str]) -> str:
    """The input that stays float: on the longest path from the common ancestor, so that it is computed last."""
    common = set.intersection(*(network.ancestors(tensor) for tensor in fusing))
    nearest = max(common, key=network.position) if common else None
    length = {tensor: network.longest_path(nearest, tensor) if nearest else 0 for tensor in fusing}
    return max(fusing, key=lambda tensor: (length[tensor], network.position(tensor)))


@_rule("no INT8 convolution ends in this addition, so none can take it in", GUIDE)
def float_add(network: Network, add: Op) -> None:
    """Named in decisions of ``residual_add``."""


@_rule("an average pool runs in INT8 when its input and its output are quantized", GUIDE)
def pool_input(network: Network, op: Op) -> None:
    """Quantize the input of an average pool whose output is read quantized. Max pooling commutes and needs nothing."""


@_rule("all inputs of a concatenation share the scale of its output, so that it copies codes", GUIDE)
def shared_concat_scale(network: Network, op: Op) -> None:
    """Quantize all inputs of a concatenation whose output is read quantized, with one scale for all (``_settle``)."""


@_rule("one quantizer before data movement serves all that read the data", GUIDE)
def one_quantizer(network: Network, tensor: str) -> None:
    """Where several readers share a tensor, it is quantized before the paths part (``_settle``)."""


@_rule("a product of two activations stays in float", HEURISTICS)
def product_of_activations(network: Network, op: Op) -> None:
    """No constant factor, so no weight."""


# --- one scale for what is one tensor ---------------------------------------------------------------------------------


def _settle(network: Network, reads: Reads) -> tuple[QuantizedTensor, ...]:
    """Gives every tensor its quantizer.

    A tensor and what data movement makes of it are one tree with one scale, and a quantized concatenation joins the
    trees of its inputs with its own. In a tree the quantizer stands as late as possible, but before paths part of
    which all are read quantized: TensorRT moves a Q back over data movement only where one scale comes from all sides.
    """
    settled: Reads = {}
    placing = _Tree(network, reads, settled)
    roots = {network.ops[tensor].name: _root(network, tensor) for _, tensor in reads}
    for root in dict.fromkeys(roots.values()):
        placing.place(root)
    scales = {name: name for name in network.ops}  # root -> another of the same scale

    def scale(name: str) -> str:
        while scales[name] != name:
            name = scales[name]
        return name

    for reader, tensor in reads:
        if network[reader].kind == "concat":
            scales[scale(_root(network, tensor))] = scale(reader)
    hosts: dict[str, list[str]] = {}  # tensor -> its readers
    for reader, tensor in sorted(settled, key=lambda read: network.position(read[0])):
        hosts.setdefault(tensor, []).append(reader)
    quantizer: dict[str, str] = {}
    for tensor in sorted(hosts, key=network.position):  # the last tensor of a scale gives its quantizer the name
        quantizer[scale(_root(network, tensor))] = tensor
    return tuple(
        QuantizedTensor(
            tensor,
            quantizer[scale(_root(network, tensor))],
            tuple(QuantizedRead(reader, settled[reader, tensor]) for reader in hosts[tensor]),
        )
        for tensor in sorted(hosts, key=network.position)
    )


@dataclass
class _Tree:
    """Finds where in a tree of data movement the quantizers stand; writes them to ``settled``."""

    network: Network
    reads: Reads
    settled: Reads

    def place(self, tensor: str) -> None:
        """Places the quantizers of ``tensor`` and of all that is moved out of it."""
        direct = [op for op in self.network.readers(tensor) if (op.name, tensor) in self.reads]
        moving = [op for op in self.network.readers(tensor) if self._moves(op) and self._rules_behind(op.name)]
        for op in direct:
            self.settled[op.name, tensor] = self.reads[op.name, tensor]
        parts = len(direct) + len(moving) > 1
        for op in moving:
            behind = self._rules_behind(op.name)
            parts_inside = op.kind == "split" and sum(bool(self._rules_behind(o.name)) for o in self._out(op)) > 1
            # Behind a dropout, which scales up what it keeps, values in training exceed what calibration found.
            early = op.kind == "dropout" or ((parts or parts_inside) and self._all_quantized(op.name))
            if early and self.network[tensor].kind != "split":
                rule = behind[0] if op.kind == "dropout" and len(behind) == 1 else one_quantizer.__name__
                self.settled[op.name, tensor] = rule
            else:
                self.place(op.name)

    def _out(self, op: Op) -> tuple[Op, ...]:
        return self.network.readers(op.name)

    def _moves(self, op: Op) -> bool:
        return op.kind in COMMUTING

    def _rules_behind(self, tensor: str) -> list[str]:
        """The rules of all quantized reads of ``tensor`` and of what is moved out of it."""
        found = [
            self.reads[op.name, tensor] for op in self._out(self.network[tensor]) if (op.name, tensor) in self.reads
        ]
        for op in self._out(self.network[tensor]):
            if self._moves(op):
                found += self._rules_behind(op.name)
        return found

    def _all_quantized(self, tensor: str) -> bool:
        """Whether nobody reads ``tensor``, or what is moved out of it, in float."""
        return all(
            (op.name, tensor) in self.reads or (self._moves(op) and self._all_quantized(op.name))
            for op in self._out(self.network[tensor])
        )


def _root(network: Network, tensor: str) -> str:
    """The tensor that ``tensor`` is a moved copy of."""
    while network[tensor].kind in COMMUTING:
        tensor = network[tensor].inputs[0]
    return tensor


# --- graph questions --------------------------------------------------------------------------------------------------


def _matched(network: Network, patterns: tuple[str, ...]) -> set[str]:
    """The operations that the patterns of ``place`` name."""
    found: set[str] = set()
    for pattern in patterns:
        matched = {
            op.name
            for op in network
            if any(fnmatchcase(name, form) for name in (op.name, op.label) for form in (pattern, f"{pattern}.*"))
        }
        if not matched:
            labels = sorted({op.label for op in network})
            close = difflib.get_close_matches(pattern, labels, n=3) or labels[:3]
            raise UserError(
                f"--keep-float {pattern} matches none of the {len(network.ops)} operations; there are, for example, "
                f"{', '.join(close)}"
            )
        found |= matched
    return found


def _kept_tensors(network: Network, tensors: Iterable[str], kept: set[str]) -> list[str]:
    """Those of ``tensors`` that a user keeps in float; of an operation that could be INT8, it alone is meant."""
    choosable = (*WEIGHTED, *POOLS, "add", "concat")
    return [tensor for tensor in tensors if tensor in kept and network[tensor].kind not in choosable]


def _weight_decisions(network: Network, kept: set[str]) -> dict[str, Decision]:
    decisions = {}
    for op in network:
        if op.kind in WEIGHTED:
            rule, reason = weighted_input(network, op, kept)
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
    return len(shapes) > 1 and () not in shapes


def _why_float(network: Network, op: Op, reads: Reads, kept: set[str]) -> str:
    """Why a pool or concatenation stays in float, '' if it does not."""
    if op.name in kept or _kept_tensors(network, op.inputs, kept):
        return "kept in float"
    return "" if _read_quantized(network, op.name, reads) else "nothing behind it reads INT8"


def _read_quantized(network: Network, tensor: str, reads: Reads) -> bool:
    """Whether ``tensor`` is read quantized, through data movement or at once."""
    return any(
        (op.name, tensor) in reads or (op.kind in COMMUTING and _read_quantized(network, op.name, reads))
        for op in network.readers(tensor)
    )


@functools.lru_cache(maxsize=2)
def _gate_layers(network: Network) -> set[str]:
    """Convolutions and linear layers between a tensor's global pool and the product that scales the same tensor."""
    found: set[str] = set()
    for op in network:
        if op.kind == "multiply" and len(set(op.inputs)) == 2:
            for value, gate in (op.inputs, op.inputs[::-1]):
                before = network.ancestors(value)
                between = network.ancestors(gate) - before
                pooled = (network[name] for name in between if network[name].kind == "global_pool")
                if any(pool.inputs[0] in before for pool in pooled):
                    found |= {name for name in between if network[name].kind in WEIGHTED}
    return found
