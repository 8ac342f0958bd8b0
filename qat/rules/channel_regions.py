"""Which tensors have the same channels, from the convolutions that make them to the convolutions that read them.

Inside of such a region channels can be added or taken away: nothing outside sees them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from qat.graph.network import Network, Op
from qat.graph.operations import POINTWISE, POOLS, OpKind
from qat.rules.fusion import stands_alone

# Every channel of their output depends on the same channel of their inputs alone.
_APART: tuple[OpKind, ...] = (*POINTWISE, "max_pool", *POOLS)


@dataclass(frozen=True)
class ChannelRegion:
    """Operations by name: ``tensors`` have the channels, ``makers`` are convolutions that write them, ``takers`` read.

    Makers are among the tensors.
    """

    tensors: frozenset[str]
    makers: frozenset[str]
    takers: frozenset[str]


def channel_region(network: Network, tensor: str) -> ChannelRegion | None:
    """The region of ``tensor`` [N, C, H, W]; None if something else than convolutions would see a change.

    The region has one grouped convolution at most, and no sum: a residual branch would spread it over a whole stage.
    """
    shape = network[tensor].shape
    uses = Counter(op.weight.tensor for op in network if op.weight is not None)
    tensors, makers, takers, waiting = set[str](), set[str](), set[str](), [tensor]
    while waiting:
        op = network[waiting.pop()]
        if op.name in tensors:
            continue
        if shape is None or op.shape is None or len(op.shape) != 4 or op.shape[1] != shape[1]:
            return None
        tensors.add(op.name)
        if op.kind == "convolution":
            makers.add(op.name)
        elif op.kind in _APART and not stands_alone(network, op):
            waiting += op.inputs
        else:
            return None
        for reader in network.readers(op.name):
            if reader.kind == "convolution":
                takers.add(reader.name)
            else:
                waiting.append(reader.name)
    layers = [network[name] for name in makers | takers]
    if not all(map(_is_plain, layers)) or sum(_groups(op) > 1 for op in layers) > 1:
        return None
    if any(op.weight is not None and uses[op.weight.tensor] > 1 for op in layers):
        return None
    return ChannelRegion(frozenset(tensors), frozenset(makers), frozenset(takers))


def _is_plain(op: Op) -> bool:
    return op.weight is not None and len(op.weight.kernel) == 2


def _groups(op: Op) -> int:
    return op.weight.groups if op.weight is not None else 1
