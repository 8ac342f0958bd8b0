"""One scale for what is one tensor: where quantizers stand among data movement, and which tensors share one.

A tensor and what data movement makes of it hold the same values, so TensorRT can move a Q from one to the other, but
only where one scale comes from all sides. They form a tree with one scale, and a quantized concatenation joins the
trees of its inputs with its own. In a tree the quantizer stands as late as possible, but before paths part of which all
are read quantized.
"""

from __future__ import annotations

from collections.abc import Mapping

from qat.graph.data_movement import Read, final_reads, source_of
from qat.graph.network import Network, Op
from qat.graph.operations import COMMUTING
from qat.rules.placement import QuantizedRead, QuantizedTensor
from qat.rules.rule import GUIDE, PlacementState, Reads, Rule, Verdict


def share_scales(network: Network, reads: Reads) -> tuple[QuantizedTensor, ...]:
    """Gives every tensor that is read quantized its quantizer, in the order of the network."""
    state = PlacementState(network, reads=dict(reads))
    settled: dict[Read, str] = {}
    for source in dict.fromkeys(source_of(network, tensor) for _, tensor in reads):
        settled |= _quantizers_behind(source, state)
    scales = _scales(network, reads)
    readers: dict[str, list[str]] = {}
    for reader, tensor in sorted(settled, key=lambda read: network.position(read[0])):
        readers.setdefault(tensor, []).append(reader)
    tensors = sorted(readers, key=network.position)
    quantizer = {scales[source_of(network, tensor)]: tensor for tensor in tensors}  # named by the last of its tensors
    return tuple(
        QuantizedTensor(
            tensor,
            quantizer[scales[source_of(network, tensor)]],
            tuple(QuantizedRead(reader, settled[reader, tensor]) for reader in readers[tensor]),
        )
        for tensor in tensors
    )


class OneQuantizer(Rule):
    """Decided when all reads are: an operation that moves data reads codes, instead of each of those behind it.

    Two cases. Where paths part and all of one are read quantized, one quantizer before it serves them. And behind a
    dropout, which scales up what it keeps, values in training exceed what calibration found.
    """

    name = "one_quantizer"
    sentence = "one quantizer before data movement serves all that read the data (qat/rules/scale_groups.py)"
    source = GUIDE

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """In INT8, for an operation that moves data to somebody who reads it quantized; None where it is not needed."""
        (tensor, *_), network = op.inputs, state.network
        if not network[tensor].floating:  # not one tensor, but several
            return None
        if op.kind == "dropout":
            behind = [state.reads[read] for read in final_reads(network, op.name, state.reads) if read in state.reads]
            return Verdict(behind[0] if len(behind) == 1 else self.name, True, (tensor,))
        parts = len(_readers_of_codes(tensor, state)) > 1 or (
            op.kind == "split" and sum(_moves_codes(part, state) for part in network.readers(op.name)) > 1
        )
        return self.quantize(tensor) if parts and state.is_only_read_quantized(op.name) else None


ONE_QUANTIZER = OneQuantizer()


def _quantizers_behind(source: str, state: PlacementState) -> dict[Read, str]:
    """The quantized reads of ``source`` and of all that is moved out of it; quantizers stand as late as they may."""
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
            # A max pool's readers, if there are several, would each dequantize for themselves.
            if verdict is None or (op.kind == "max_pool" and verdict.rule == ONE_QUANTIZER.name):
                waiting.append(op.name)
    return settled


def _readers_of_codes(tensor: str, state: PlacementState) -> list[Op]:
    """Those who read ``tensor`` quantized, and those who move it to somebody who does."""
    return [op for op in state.network.readers(tensor) if (op.name, tensor) in state.reads or _moves_codes(op, state)]


def _moves_codes(op: Op, state: PlacementState) -> bool:
    """Whether ``op`` moves data to somebody who reads it quantized."""
    return op.kind in COMMUTING and state.is_read_quantized(op.name)


def _scales(network: Network, reads: Mapping[Read, str]) -> dict[str, str]:
    """For every tensor that is not a moved copy, one that stands for all of the same scale."""
    same = {name: name for name in network.ops}

    def find(name: str) -> str:
        while same[name] != name:
            name = same[name]
        return name

    for reader, tensor in reads:
        if network[reader].kind == "concat":
            same[find(source_of(network, tensor))] = find(reader)
    return {name: find(name) for name in same}
