"""Decides which quantized tensors share a scale, and where quantizers stand among data movement.

A tensor and its moved copies hold the same values. TensorRT can move a Q from one to the other, but only if all have
the same scale. So a tensor and its moved copies form a tree with one scale, and a quantized concatenation joins the
trees of its inputs with the tree of its output. Only the factors of an attention, which are parts of one tensor and go
to one kernel, have scales of their own. Within a tree, quantizers stand as late as possible, with one
exception: where paths part and all that follows is read quantized, one quantizer stands before the branch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from qat.graph.data_movement import Read, final_reads, source_of
from qat.graph.network import Network, Op
from qat.graph.operations import COMMUTING
from qat.rules.attention_rules import ATTENTION_PRODUCT
from qat.rules.placement import QuantizedRead, QuantizedTensor
from qat.rules.rule import GUIDE, PlacementState, Reads, Rule, Verdict


def share_scales(network: Network, reads: Reads) -> tuple[QuantizedTensor, ...]:
    """The quantizers for all quantized reads: the tensors that get one, in the order of the network."""
    state = PlacementState(network, reads=dict(reads))
    settled: dict[Read, str] = {}
    for source in dict.fromkeys(source_of(network, tensor) for _, tensor in reads):
        settled |= _quantizers_behind(source, state)
    scales = _scales(network, reads)
    owners = {tensor: _owner(network, tensor, rule) for (_, tensor), rule in settled.items()}
    readers: dict[str, list[str]] = {}
    for reader, tensor in sorted(settled, key=lambda read: network.position(read[0])):
        readers.setdefault(tensor, []).append(reader)
    tensors = sorted(readers, key=network.position)
    quantizer = {scales[owners[tensor]]: tensor for tensor in tensors}  # named after its last tensor
    return tuple(
        QuantizedTensor(
            tensor,
            quantizer[scales[owners[tensor]]],
            tuple(QuantizedRead(reader, settled[reader, tensor]) for reader in readers[tensor]),
        )
        for tensor in tensors
    )


class OneQuantizer(Rule):
    """An operation that moves data reads codes, instead of each of the readers after it. Decided after all reads.

    There are two cases. If paths part and everything after the operation is read quantized, one quantizer before it
    serves all readers. And a quantizer stands before a dropout, not after it: in training dropout scales up the values
    it keeps, beyond the range that calibration found.
    """

    name = "one_quantizer"
    sentence = "one quantizer before data movement serves all readers of the data (qat/rules/scale_groups.py)"
    source = GUIDE

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """INT8 for an operation that moves data to quantized reads; None if it does not need a quantizer of its own."""
        (tensor, *_), network = op.inputs, state.network
        if not network[tensor].floating:  # several tensors, not one
            return None
        if op.kind == "dropout":
            behind = [state.reads[read] for read in final_reads(network, op.name, state.reads) if read in state.reads]
            return Verdict(behind[0] if len(behind) == 1 else self.name, True, (tensor,))
        if any(state.reads.get(read) == ATTENTION_PRODUCT for read in final_reads(network, op.name, state.reads)):
            return None
        parts = len(_readers_of_codes(tensor, state)) > 1 or (
            op.kind == "split" and sum(_moves_codes(part, state) for part in network.readers(op.name)) > 1
        )
        return self.quantize(tensor) if parts and state.is_only_read_quantized(op.name) else None


ONE_QUANTIZER = OneQuantizer()


def _owner(network: Network, tensor: str, rule: str) -> str:
    """The tensor whose scale ``tensor`` has: what it is a copy of, or, as a factor of an attention, a part of."""
    op = network[tensor]
    while op.kind in COMMUTING:
        before = network[op.inputs[0]]
        if rule == ATTENTION_PRODUCT and (
            before.kind == "split" or math.prod(op.shape or ()) < math.prod(before.shape or ())
        ):
            break
        op = before
    return op.name


def _quantizers_behind(source: str, state: PlacementState) -> dict[Read, str]:
    """The quantized reads of ``source`` and its moved copies, each with its rule; quantizers are placed late."""
    settled: dict[Read, str] = {}
    waiting = [source]
    while waiting:
        tensor = waiting.pop()
        for op in _readers_of_codes(tensor, state):
            if (op.name, tensor) in state.reads:
                settled[op.name, tensor] = state.reads[op.name, tensor]
                if not _moves_codes(op, state):
                    continue
            verdict = ONE_QUANTIZER.decide(op, state)
            if verdict is not None:
                settled[op.name, tensor] = verdict.rule
            # If a max pool had several readers, each would dequantize for itself.
            if verdict is None or (op.kind == "max_pool" and verdict.rule == ONE_QUANTIZER.name):
                waiting.append(op.name)
    return settled


def _readers_of_codes(tensor: str, state: PlacementState) -> list[Op]:
    """The operations that read ``tensor`` quantized, or move it to one that reads it quantized."""
    return [op for op in state.network.readers(tensor) if (op.name, tensor) in state.reads or _moves_codes(op, state)]


def _moves_codes(op: Op, state: PlacementState) -> bool:
    """Whether ``op`` moves data to an operation that reads it quantized."""
    return op.kind in COMMUTING and state.is_read_quantized(op.name)


def _scales(network: Network, reads: Mapping[Read, str]) -> dict[str, str]:
    """Maps every tensor that is not a moved copy to the one that represents all tensors with the same scale."""
    same = {name: name for name in network.ops}

    def find(name: str) -> str:
        while same[name] != name:
            name = same[name]
        return name

    for reader, tensor in reads:
        if network[reader].kind == "concat":
            same[find(source_of(network, tensor))] = find(reader)
    return {name: find(name) for name in same}
