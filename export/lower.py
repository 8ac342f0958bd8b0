"""Operations that the exporter would decompose -> operators that stay one ONNX node each (export/ops.py).

PyTorch's exporter turns a flatten into shape arithmetic, a pool into ReduceMean and Reshape, and a clip into casts.
TensorRT has better kernels for the whole operation, and people can find it in the file.
"""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from export import ops
from export.names import unused_name
from qat.graph.attention import attention_of_products
from qat.graph.fx_network import arguments, function_name, kind_of
from qat.graph.rewrites import PLAIN_NORMS

FLATTEN = torch.ops.int8.flatten.default
POOL = torch.ops.int8.global_average_pool.default


class GlobalAveragePool(nn.Module):
    """[N, C, H, W] -> [N, C, 1, 1]."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The mean over H and W."""
        mean: Tensor = ops.global_average_pool(x_NCHW)
        return mean


class Clip(nn.Module):
    """Clips a tensor of any shape to two constants."""

    low: Tensor
    high: Tensor

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(float(low)))
        self.register_buffer("high", torch.tensor(float(high)))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape, clipped."""
        clipped: Tensor = ops.clip(x, self.low, self.high)
        return clipped


class BatchNorm(nn.Module):
    """A batch normalization that could not be folded, with fixed statistics: [N, C, ...] -> the same shape."""

    scale: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.register_buffer("mean", norm.running_mean.clone())
        self.register_buffer("variance", norm.running_var.clone())
        self.register_buffer(
            "scale", torch.ones_like(self.mean) if norm.weight is None else norm.weight.detach().clone()
        )
        self.register_buffer("bias", torch.zeros_like(self.mean) if norm.bias is None else norm.bias.detach().clone())
        self.epsilon = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """``x`` normalized, scaled and shifted."""
        normalized: Tensor = ops.batch_norm(x, self.scale, self.bias, self.mean, self.variance, self.epsilon)
        return normalized


class GroupNorm(nn.Module):
    """A group normalization: [N, C, ...] -> the same shape. TensorRT 8.6 has InstanceNormalization for it."""

    ones: Tensor
    zeros: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, groups: int, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> None:
        super().__init__()
        self.groups, self.epsilon = groups, epsilon
        self.register_buffer("ones", torch.ones(groups))
        self.register_buffer("zeros", torch.zeros(groups))
        for name, value in (("weight", weight), ("bias", bias)):
            self.register_buffer(name, None if value is None else value.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` normalized over each group of channels, scaled and shifted."""
        normalized = ops.instance_norm(x.reshape(x.shape[0], self.groups, -1), self.ones, self.zeros, self.epsilon)
        y: Tensor = normalized.reshape(x.shape)
        channels = (-1, *(1,) * (x.ndim - 2))
        y = y if self.weight is None else y * self.weight.reshape(channels)
        return y if self.bias is None else y + self.bias.reshape(channels)


def lower(folded: fx.GraphModule) -> None:
    """Replaces in ``folded`` the operations that the exporter would decompose."""
    called = [str(node.target) for node in folded.graph.nodes if node.op == "call_module"]
    for path in dict.fromkeys(called):
        module = folded.get_submodule(path)
        if isinstance(module, PLAIN_NORMS) and module.running_mean is not None:
            folded.set_submodule(path, _copy_children(module, BatchNorm(module)))
        elif isinstance(module, nn.GroupNorm):
            norm = GroupNorm(module.num_groups, module.weight, module.bias, module.eps)
            folded.set_submodule(path, norm)
        elif isinstance(module, nn.Hardtanh):  # and ReLU6
            folded.set_submodule(path, Clip(module.min_val, module.max_val))
        elif isinstance(module, nn.modules.conv._ConvNd) and module.bias is None:
            # Without a bias the exporter adds nodes that compute zeros from the shape of the weight.
            module.bias = nn.Parameter(torch.zeros(module.out_channels), requires_grad=False)
    modules = dict(folded.named_modules())
    for node in list(folded.graph.nodes):
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if node.target in (torch.roll, "roll"):
            node.op, node.target = "call_function", roll_of_slices
        elif node.target is F.group_norm:
            _replace_group_norm(folded, node)
        elif node.target is F.scaled_dot_product_attention:
            node.target = attention_of_products
        elif _flattens_all_but_batch(node, modules):
            node.op, node.target, node.args, node.kwargs = "call_function", FLATTEN, (node.args[0],), {}
        elif node.op == "call_module":
            if kind_of(node, modules) == "global_pool" and isinstance(modules[str(node.target)], nn.AdaptiveAvgPool2d):
                folded.set_submodule(str(node.target), GlobalAveragePool())
        elif kind_of(node, modules) == "global_pool" and function_name(node) in ("adaptive_avg_pool2d", "mean"):
            _replace_pool(folded, node)
        elif (bounds := _bounds(node)) is not None:
            path = unused_path(folded, node.name)
            folded.add_submodule(path, Clip(*bounds))
            node.op, node.target, node.args, node.kwargs = "call_module", path, (node.args[0],), {}


def roll_of_slices(x: Tensor, shifts: int | tuple[int, ...], dims: int | tuple[int, ...]) -> Tensor:
    """torch.roll along ``dims`` of known extent: the exporter's own computes them in the graph."""
    pairs: Any = ((shifts, dims),) if isinstance(shifts, int) else zip(shifts, dims, strict=True)  # type: ignore[arg-type]
    for shift, dim in pairs:
        extent = x.shape[dim]
        first = shift % extent
        if first:
            x = torch.cat([x.narrow(dim, extent - first, first), x.narrow(dim, 0, extent - first)], dim)
    return x


def _replace_group_norm(folded: fx.GraphModule, node: fx.Node) -> None:
    """Replaces a functional group normalization whose weight and bias are constant by a module."""
    given = arguments(node)
    sources = [given.get("weight"), given.get("bias")]
    if any(isinstance(source, fx.Node) and source.op != "get_attr" for source in sources):
        return
    weight, bias = (None if source is None else attrgetter(str(source.target))(folded) for source in sources)
    path = unused_path(folded, node.name)
    folded.add_submodule(path, GroupNorm(given["num_groups"], weight, bias, given.get("eps", 1e-5)))
    node.op, node.target, node.args, node.kwargs = "call_module", path, (node.args[0],), {}


def _copy_children(source: nn.Module, target: nn.Module) -> nn.Module:
    """``target``, with the children of ``source``: other nodes may call them."""
    for name, child in source.named_children():
        target.add_module(name, child)
    return target


def unused_path(module: nn.Module, path: str) -> str:
    """``path``, or ``path`` with a number behind it: a path where ``module`` has no submodule yet."""
    return unused_name(path, dict(module.named_modules()))


def _replace_pool(folded: fx.GraphModule, node: fx.Node) -> None:
    """Replaces a functional mean over H and W: [N, C, H, W] -> [N, C, 1, 1], or [N, C] without ``keepdim``."""
    keeps = function_name(node) != "mean" or bool(arguments(node).get("keepdim", False))
    node.op, node.target, node.args, node.kwargs = "call_function", POOL, (node.args[0],), {}
    if not keeps:
        readers = tuple(node.users)
        with folded.graph.inserting_after(node):
            flat = folded.graph.call_function(FLATTEN, (node,))
        for reader in readers:
            reader.replace_input_with(node, flat)


def _bounds(node: fx.Node) -> tuple[float, float] | None:
    """The bounds that a function clips to, if both are known."""
    name, given = function_name(node).removesuffix("_"), arguments(node)
    low: Any
    high: Any
    match name:
        case "relu6":
            return 0.0, 6.0
        case "hardtanh":
            low, high = given.get("min_val", -1.0), given.get("max_val", 1.0)
        case "clamp" | "clip":
            low, high = given.get("min"), given.get("max")
            if isinstance(low, int) and isinstance(high, int):
                return None  # it may clip integers, which are not quantized
        case _:
            return None
    bounds = [value for value in (low, high) if isinstance(value, (int, float)) and math.isfinite(value)]
    return (bounds[0], bounds[1]) if len(bounds) == 2 else None


def _flattens_all_but_batch(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    given = arguments(node)
    return function_name(node) == "flatten" and (given.get("start_dim", 0), given.get("end_dim", -1)) == (1, -1)
