"""One scale for what is one tensor: where quantizers stand among data movement, and which tensors share one.

A tensor and what data movement makes of it hold the same values, so TensorRT can move a Q from one to the other, but
only where one scale comes from all sides. They form a tree with one scale, and a quantized concatenation joins the
trees of its inputs with its own. In a tree the quantizer stands as late as possible, but before paths part of which all
are read quantized.
"""

from __future__ import annotations

from collections.abc import Iterator

from qat.graph.network import Network, Op
from qat.graph.operations import COMMUTING
from qat.rules.placement import QuantizedRead, QuantizedTensor

Reads = dict[tuple[str, str], str]  # (reader, tensor) -> rule
ONE_QUANTIZER = "one_quantizer"  # the rule of reads that come from here


def settle(network: Network, reads: Reads) -> tuple[QuantizedTensor, ...]:
    """Gives every tensor that is read quantized its quantizer, in the order of the network."""
    settled: Reads = {}
    for root in dict.fromkeys(_root(network, tensor) for _, tensor in reads):
        _place(network, root, reads, settled)
    scales = _scales(network, reads)
    readers: dict[str, list[str]] = {}
    for reader, tensor in sorted(settled, key=lambda read: network.position(read[0])):
        readers.setdefault(tensor, []).append(reader)
    tensors = sorted(readers, key=network.position)
    quantizer = {scales[_root(network, tensor)]: tensor for tensor in tensors}  # named by the last of its tensors
    return tuple(
        QuantizedTensor(
            tensor,
            quantizer[scales[_root(network, tensor)]],
            tuple(QuantizedRead(reader, settled[reader, tensor]) for reader in readers[tensor]),
        )
        for tensor in tensors
    )


def all_quantized(network: Network, tensor: str, reads: Reads) -> bool:
    """Whether nobody reads ``tensor``, or what is moved out of it, in float."""
    return all(read in reads for read in final_reads(network, tensor, reads))


def read_quantized(network: Network, tensor: str, reads: Reads) -> bool:
    """Whether somebody reads ``tensor``, or what is moved out of it, quantized."""
    return any(read in reads for read in final_reads(network, tensor, reads))


def final_reads(network: Network, tensor: str, reads: Reads) -> Iterator[tuple[str, str]]:
    """Every (reader, what it reads) of ``tensor`` and of what is moved out of it.

    An operation that moves data counts as a reader only where it reads quantized; else those behind it do.
    """
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        for op in network.readers(current):
            if (op.name, current) in reads or op.kind not in COMMUTING:
                yield op.name, current
            else:
                waiting.append(op.name)


def _place(network: Network, root: str, reads: Reads, settled: Reads) -> None:
    """Places the quantizers of ``root`` and of all that is moved out of it; writes them to ``settled``."""
    waiting = [root]
    while waiting:
        tensor = waiting.pop()
        direct = [op for op in network.readers(tensor) if (op.name, tensor) in reads]
        moving = [op for op in network.readers(tensor) if _moves_codes(network, op, reads)]
        settled |= {(op.name, tensor): reads[op.name, tensor] for op in direct}
        for op in moving:
            parts = len(direct) + len(moving) > 1 or (op.kind == "split" and _parts(network, op, reads))
            if not network[tensor].floating:  # no tensor, but several
                waiting.append(op.name)
            elif op.kind == "dropout":
                # Behind a dropout, which scales up what it keeps, values in training exceed what calibration found.
                rules = [reads[read] for read in final_reads(network, op.name, reads) if read in reads]
                settled[op.name, tensor] = rules[0] if len(rules) == 1 else ONE_QUANTIZER
            elif parts and all_quantized(network, op.name, reads):
                settled[op.name, tensor] = ONE_QUANTIZER
                if op.kind == "max_pool":  # whose readers, if there are several, would each dequantize for themselves
                    waiting.append(op.name)
            else:
                waiting.append(op.name)


def _parts(network: Network, split: Op, reads: Reads) -> bool:
    """Whether several tensors that ``split`` makes are read quantized."""
    return sum(_moves_codes(network, op, reads) for op in network.readers(split.name)) > 1


def _moves_codes(network: Network, op: Op, reads: Reads) -> bool:
    """Whether ``op`` moves data to somebody who reads it quantized."""
    return op.kind in COMMUTING and read_quantized(network, op.name, reads)


def _root(network: Network, tensor: str) -> str:
    """The tensor that ``tensor`` is a moved copy of."""
    while network[tensor].kind in COMMUTING:
        tensor = network[tensor].inputs[0]
    return tensor


def _scales(network: Network, reads: Reads) -> dict[str, str]:
    """For every root, one that stands for all of the same scale."""
    same = {name: name for name in network.ops}

    def find(name: str) -> str:
        while same[name] != name:
            name = same[name]
        return name

    for reader, tensor in reads:
        if network[reader].kind == "concat":
            same[find(_root(network, tensor))] = find(reader)
    return {name: find(name) for name in same}
