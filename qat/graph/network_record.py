"""What a sidecar records of a network: enough to draw it, as plain lists, and back as objects. Needs no torch.

A record is less than the network (qat/graph/network.py): the rules cannot work on it. Its names are those of the
placement that stands beside it in the sidecar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from qat.graph.network import Network, Op
from qat.graph.operations import OpKind


@dataclass(frozen=True)
class RecordedOp:
    """One operation, and the tensor of its name that it makes.

    Attributes:
        name: of the operation and its tensor.
        kind: what it is to the rules.
        label: for people: the module's path, or the function's name.
        inputs: the operations whose tensors it reads, without constants and sizes; all of them come before it.
        shape: of its tensor for a batch of one, batch first; None if unknown.
        weight: shape of its constant weight in PyTorch's layout, whatever the file's is: [O, I] of a linear layer,
            [O, I/groups, *kernel] of a convolution, [I, O/groups, *kernel] of a transposed one; None if it has none or
            it is not known.
    """

    name: str
    kind: OpKind
    label: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...] | None
    weight: tuple[int, ...] | None


def network_to_json(network: Network) -> list[dict[str, Any]]:
    """The operations in the network's order, each a dictionary of strings, numbers and lists."""
    return [
        {
            "name": op.name,
            "kind": op.kind,
            "label": op.label,
            "inputs": list(op.inputs),
            "shape": None if op.shape is None else list(op.shape),
            "weight": _weight_shape(op),
        }
        for op in network
    ]


def network_from_json(content: Any) -> tuple[RecordedOp, ...]:
    """The inverse of ``network_to_json``. Raises KeyError, TypeError or ValueError on any other content."""
    ops: dict[str, RecordedOp] = {}
    for entry in content:
        name, kind, label, inputs = (entry[key] for key in ("name", "kind", "label", "inputs"))
        if not isinstance(name, str) or not isinstance(label, str) or not isinstance(inputs, list):
            raise TypeError(f"network entry {name!r} is not as it was written")
        if kind not in get_args(OpKind):
            raise ValueError(f"operation {name} has an unknown kind {kind!r}")
        if name in ops or not set(inputs) <= ops.keys():
            raise ValueError(f"operation {name} comes twice, or before one that it reads")
        ops[name] = RecordedOp(name, kind, label, tuple(inputs), _shape(entry["shape"]), _shape(entry["weight"]))
    return tuple(ops.values())


def _weight_shape(op: Op) -> list[int] | None:
    weight = op.weight
    if weight is None:
        return None
    inputs, outputs = weight.in_channels, weight.out_channels
    if op.kind == "transposed_convolution":
        return [inputs, outputs // weight.groups, *weight.kernel]
    return [outputs, inputs // weight.groups, *weight.kernel]


def _shape(content: Any) -> tuple[int, ...] | None:
    if content is None:
        return None
    if not isinstance(content, list) or not all(type(extent) is int for extent in content):
        raise TypeError(f"{content!r} is not a shape")
    return tuple(content)
