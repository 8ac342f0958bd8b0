"""Walking through operations that only move data: what goes in and what comes out are the same values.

Codes, scales and quantizers pass through such operations (``COMMUTING``), so that whoever asks where a tensor comes
from, or who reads it in the end, asks here. What an operation moves is its first input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from qat.graph.network import Network, Op
from qat.graph.operations import COMMUTING, OpKind

Read = tuple[str, str]
"""(reader, tensor): the operation ``reader`` reads ``tensor``."""


def source_of(network: Network, tensor: str) -> str:
    """The tensor that ``tensor`` is a moved copy of; itself where no data movement makes it."""
    while network[tensor].kind in COMMUTING:
        tensor = network[tensor].inputs[0]
    return tensor


def movers_before(network: Network, op: Op) -> set[str]:
    """The operations that move data to ``op``, which itself is not among them."""
    found: set[str] = set()
    waiting = list(op.inputs)
    while waiting:
        made = network[waiting.pop()]
        if made.kind in COMMUTING and made.name not in found:
            found.add(made.name)
            waiting.extend(made.inputs)
    return found


def copies_of(network: Network, tensor: str, ends: Collection[Read] = ()) -> Iterator[str]:
    """``tensor`` and all that data movement makes of it; a mover whose read is among ``ends`` is not followed."""
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        yield current
        waiting += [
            op.name for op in network.readers(current) if op.kind in COMMUTING and (op.name, current) not in ends
        ]


def final_reads(network: Network, tensor: str, ends: Collection[Read] = ()) -> Iterator[Read]:
    """Every read of ``tensor`` and of what is moved out of it.

    An operation that moves data counts as a reader only where its read is among ``ends``; else those behind it do.
    """
    for current in copies_of(network, tensor, ends):
        for op in network.readers(current):
            if (op.name, current) in ends or op.kind not in COMMUTING:
                yield op.name, current


def first_reads(
    network: Network, read: Read, ends: Collection[Read], through: tuple[OpKind, ...] = COMMUTING
) -> Iterator[Read]:
    """Where the values of ``read`` come from: walks back through data movement.

    A way ends at a read that is among ``ends``, or that no operation of the kinds ``through`` moves on. Of a
    concatenation, where that is one of them, all inputs are followed.
    """
    waiting = [read]
    while waiting:
        current = waiting.pop()
        made = network[current[1]]
        if current in ends or made.kind not in through:
            yield current
        else:
            moved = made.inputs if made.kind == "concat" else made.inputs[:1]
            waiting += [(made.name, tensor) for tensor in reversed(moved)]
