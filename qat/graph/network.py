"""The neutral view of a network that the rules work on: operations, the tensors between them, constant weights.

Every operation makes one tensor, which has the operation's name. The view is built from a torch.fx graph
(qat/graph/fx_network.py) or from an ONNX graph (export/onnx_network.py), so the rules are the same for both.
qat/graph/operations.py assigns names of operations to kinds. Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from qat.graph.operations import COMMUTING, WEIGHTED, OpKind


@dataclass(frozen=True)
class ConstantWeight:
    """The constant weight of a convolution or linear layer: channel counts, groups, kernel extents and strides.

    ``kernel`` and ``stride`` are () if it is linear. ``tensor`` is its name; operations with the same ``tensor`` share
    the weight.
    """

    tensor: str
    in_channels: int
    out_channels: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()

    @property
    def is_depthwise(self) -> bool:
        """Whether each input channel has a group of its own, of several."""
        return 1 < self.groups == self.in_channels

    @property
    def group_widths(self) -> tuple[int, int]:
        """Input and output channels of a group."""
        return self.in_channels // self.groups, self.out_channels // self.groups


@dataclass(frozen=True)
class Op:
    """One operation. ``inputs`` names the operations whose tensors it reads, without constants and sizes.

    ``shape`` is the shape of its output, batch first; None if unknown. ``floating`` says whether its output is one
    tensor of floating-point numbers: nothing else can be quantized.
    """

    name: str
    kind: OpKind
    inputs: tuple[str, ...]
    label: str  # for people: the module's path, or the function's name
    weight: ConstantWeight | None = None
    shape: tuple[int, ...] | None = None
    floating: bool = True

    @property
    def elements(self) -> int:
        """Number of values in the output for one image; 0 if the shape is unknown."""
        return math.prod(self.shape[1:]) if self.shape else 0


def exact_kind(kind: OpKind, weight: ConstantWeight | None, inputs: int, constant_data: bool) -> OpKind:
    """Refines ``kind``, which the table gave an operation by its name, by what its inputs are.

    A product with a constant matrix is a linear layer. The sum or product of one tensor, of ``inputs`` that are not
    constant, and a constant is a pointwise function of that tensor, as an activation is. Data movement whose data are
    constant, while a tensor says where to, is a table lookup, which is "other".
    """
    if kind == "matrix_product" and weight is not None:
        return "linear"
    if kind in ("add", "multiply") and inputs == 1:
        return "activation"
    return "other" if kind in COMMUTING and constant_data else kind


@dataclass(frozen=True, eq=False)
class Network:
    """Operations by name, ordered so that each comes after its inputs."""

    ops: dict[str, Op]
    _readers: dict[str, tuple[str, ...]] = field(init=False, repr=False)
    _position: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        readers: dict[str, list[str]] = {name: [] for name in self.ops}
        for op in self.ops.values():
            for name in dict.fromkeys(op.inputs):
                readers[name].append(op.name)
        object.__setattr__(self, "_readers", {name: tuple(found) for name, found in readers.items()})
        object.__setattr__(self, "_position", {name: position for position, name in enumerate(self.ops)})

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops.values())

    def __reversed__(self) -> Iterator[Op]:
        return reversed(self.ops.values())

    def __getitem__(self, name: str) -> Op:
        return self.ops[name]

    def position(self, name: str) -> int:
        """The position of ``name`` in the order of the operations."""
        return self._position[name]

    def readers(self, name: str) -> tuple[Op, ...]:
        """The operations that read the tensor ``name``, each once."""
        return tuple(self.ops[reader] for reader in self._readers[name])

    def ancestors(self, name: str) -> set[str]:
        """``name`` and all operations that its tensor depends on."""
        found: set[str] = set()
        waiting = [name]
        while waiting:
            current = waiting.pop()
            if current not in found:
                found.add(current)
                waiting.extend(self.ops[current].inputs)
        return found

    def most_layers(self, start: str, end: str) -> int:
        """The largest number of weighted layers on a path from after ``start`` to ``end``; -1 if there is no path.

        Other operations do not count, because their number depends on how the network was written.
        """
        count = {start: 0}
        for op in list(self)[self.position(start) + 1 : self.position(end) + 1]:
            behind = [count[name] for name in op.inputs if name in count]
            if behind:
                count[op.name] = max(behind) + (op.kind in WEIGHTED)
        return count.get(end, -1)
