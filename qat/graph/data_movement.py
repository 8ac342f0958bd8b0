"""Walks through operations that only move data, whose input and output hold the same values.

Codes, scales and quantizers pass through such operations (``COMMUTING``). So all questions about where a tensor comes
from, or who finally reads it, are answered here. The data that an operation moves are its first input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from qat.graph.network import Network, Op
from qat.graph.operations import COMMUTING, OpKind

Read = tuple[str, str]
"""(reader, tensor): the operation ``reader`` reads ``tensor``."""


def source_of(network: Network, tensor: str) -> str:
    """The tensor of which ``tensor`` is a moved copy; ``tensor`` itself if it is not the output of data movement."""
    while network[tensor].kind in COMMUTING:
        tensor = network[tensor].inputs[0]
    return tensor


def movers_before(network: Network, op: Op) -> set[str]:
    """The operations that move data to ``op``, without ``op`` itself."""
    found: set[str] = set()
    waiting = list(op.inputs)
    while waiting:
        made = network[waiting.pop()]
        if made.kind in COMMUTING and made.name not in found:
            found.add(made.name)
            waiting.extend(made.inputs)
    return found


def copies_of(network: Network, tensor: str, ends: Collection[Read] = ()) -> Iterator[str]:
    """``tensor`` and all its moved copies; an operation whose read is in ``ends`` is not followed."""
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        yield current
        waiting += [
            op.name for op in network.readers(current) if op.kind in COMMUTING and (op.name, current) not in ends
        ]


def final_reads(network: Network, tensor: str, ends: Collection[Read] = ()) -> Iterator[Read]:
    """Every read of ``tensor`` and of its moved copies.

    An operation that moves data counts as a reader only if its read is in ``ends``; otherwise the readers of its output
    count instead.
    """
    for current in copies_of(network, tensor, ends):
        for op in network.readers(current):
            if (op.name, current) in ends or op.kind not in COMMUTING:
                yield op.name, current


def first_reads(
    network: Network, read: Read, ends: Collection[Read], through: tuple[OpKind, ...] = COMMUTING
) -> Iterator[Read]:
    """Where the values of ``read`` come from, walking back through data movement.

    A path ends at a read that is in ``ends``, or whose tensor was not made by an operation of a kind in ``through``.
    If ``through`` contains concatenation, all its inputs are followed.
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
