"""A neutral view of a network: operations, the tensors between them, and what is constant. Placement works on it.

Every operation makes one tensor, which bears the operation's name. ``network_from_fx`` reads the view from a traced
torch.fx graph; this file is the only place that knows which modules, functions and methods mean which operation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

OpKind = Literal[
    "input",
    "output",
    "convolution",  # also transposed
    "linear",  # matrix product with a constant matrix
    "batch_norm",
    "activation",  # pointwise, fuses into the convolution before it
    "add",
    "concat",
    "max_pool",
    "average_pool",
    "dropout",  # nothing in the engine, but in training it scales what it keeps
    "data_movement",  # reshape, slice, ...: values pass unchanged, so a scale passes too
    "other",
]


@dataclass(frozen=True)
class ConstantWeight:
    """The constant weight of a convolution or linear layer: channel counts, groups, kernel extents ([] if linear)."""

    in_channels: int
    out_channels: int
    groups: int = 1
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class Op:
    """One operation. ``inputs`` names the operations whose tensors it reads, constants left out."""

    name: str
    kind: OpKind
    inputs: tuple[str, ...]
    label: str  # for people: the module's path, or the function's name
    weight: ConstantWeight | None = None


@dataclass(frozen=True)
class Network:
    """Operations by name, in an order in which every one comes after its inputs."""

    ops: dict[str, Op]
    _readers: dict[str, tuple[str, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        readers: dict[str, list[str]] = {name: [] for name in self.ops}
        for op in self.ops.values():
            for name in dict.fromkeys(op.inputs):
                readers[name].append(op.name)
        object.__setattr__(self, "_readers", {name: tuple(found) for name, found in readers.items()})

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops.values())

    def __getitem__(self, name: str) -> Op:
        return self.ops[name]

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

    def longest_path(self, start: str, end: str) -> int:
        """Number of operations on the longest path from ``start`` to ``end``; -1 when there is none."""
        length = {start: 0}
        for op in self:
            behind = [length[name] for name in op.inputs if name in length]
            if behind and op.name != start:
                length[op.name] = 1 + max(behind)
        return length.get(end, -1)


_MODULES: tuple[tuple[OpKind, tuple[type[nn.Module], ...]], ...] = (
    ("convolution", (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)),
    ("linear", (nn.Linear,)),
    ("batch_norm", (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
    ("activation", (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh)),
    ("max_pool", (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)),
    ("average_pool", (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)),
    ("dropout", (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, torchvision.ops.StochasticDepth)),
    ("data_movement", (nn.Identity, nn.Flatten, nn.ChannelShuffle)),
)

_FUNCTIONS: dict[OpKind, tuple[Callable[..., Any], ...]] = {
    "add": (operator.add, operator.iadd, torch.add),
    "concat": (torch.cat, torch.concat),
    "activation": (F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.hardtanh),
    "max_pool": (F.max_pool1d, F.max_pool2d, F.max_pool3d),
    "average_pool": (F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
    "data_movement": (torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze),
}

_METHODS: dict[OpKind, tuple[str, ...]] = {
    "add": ("add", "add_"),
    "activation": ("relu", "relu_"),
    "data_movement": (
        "flatten",
        "view",
        "reshape",
        "permute",
        "transpose",
        "contiguous",
        "squeeze",
        "unsqueeze",
    ),
}


def network_from_fx(traced: fx.GraphModule) -> Network:
    """The neutral view of a traced module. Ops are named as the nodes of ``traced.graph``."""
    modules = dict(traced.named_modules())
    ops: dict[str, Op] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            continue  # a constant
        inputs = tuple(source.name for source in node.all_input_nodes if source.name in ops)
        ops[node.name] = Op(node.name, _kind(node, modules), inputs, _label(node), _constant_weight(node, modules))
    return Network(ops)


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> OpKind:
    if node.op == "placeholder":
        return "input"
    if node.op == "output":
        return "output"
    if node.op == "call_module":
        module_type = type(modules[str(node.target)])
        # Exact types: a subclass may compute something else (a batch normalization with an activation inside).
        return next((kind for kind, types in _MODULES if module_type in types), "other")
    if node.op == "call_function":
        return next((kind for kind, functions in _FUNCTIONS.items() if node.target in functions), "other")
    return next((kind for kind, methods in _METHODS.items() if node.target in methods), "other")


def _label(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    # A function has no name of its own: it is known by the module that calls it.
    stack = list(node.meta.get("nn_module_stack", {}).values())
    inside = stack[-1][0] if stack else ""
    function = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{inside}.{function}" if inside else str(function)


def _constant_weight(node: fx.Node, modules: dict[str, nn.Module]) -> ConstantWeight | None:
    if _kind(node, modules) not in ("convolution", "linear") or not node.all_input_nodes:
        return None
    module = modules[str(node.target)]
    if "weight" not in module._parameters:  # computed anew at each call, as by spectral normalization
        return None
    match module:
        case nn.modules.conv._ConvNd() as conv:
            return ConstantWeight(conv.in_channels, conv.out_channels, conv.groups, tuple(conv.kernel_size))
        case nn.Linear() as linear:
            return ConstantWeight(linear.in_features, linear.out_features)
    return None
