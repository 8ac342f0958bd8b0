"""Builds the neutral view (qat/graph/network.py) of a traced torch.fx module. Ops have the names of the graph's nodes.

It also answers questions about single nodes: their kind, label, arguments and constant weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qat.base.errors import UserError, one_line
from qat.graph.network import ConstantWeight, Network, Op, exact_kind
from qat.graph.operations import WEIGHTED, OpKind, kind_of_function, kind_of_module

# Names of the positional arguments of builtins and methods, which inspect.signature does not know.
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ARGUMENTS: dict[str, Sequence[str]] = {
    **dict.fromkeys(("matmul", "mm", "bmm"), ("input", "other")),
    "mean": ("input", "dim", "keepdim"),
    "getattr": ("input", "name"),
    "flatten": ("input", "start_dim", "end_dim"),
    **dict.fromkeys(("clamp", "clip", "clamp_", "clip_"), ("input", "min", "max")),
    "linear": ("input", "weight", "bias"),
    "to": ("input", "dtype"),
    **{f"conv{space}d": _CONVOLUTION for space in (1, 2, 3)},
    **{f"conv_transpose{space}d": _TRANSPOSED for space in (1, 2, 3)},
}
_FROM_TORCH = ("torch", "torchvision", "_operator", "builtins")  # packages whose functions are known by name


def network_from_fx(traced: fx.GraphModule, input_shape: Sequence[int] | None = None) -> Network:
    """The neutral view of a traced module.

    Args:
        traced: what qat.graph.tracing.trace returned.
        input_shape: [C, H, W] of its only input; without it, shapes stay unknown.

    Raises:
        UserError: the module does not take an input of that shape.
    """
    modules = dict(traced.named_modules())
    weight_names = _weight_names(traced)
    found = shapes(traced, input_shape) if input_shape is not None else {}
    needed = _nodes_needed(traced)
    ops: dict[str, Op] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr" or node not in needed:
            continue  # a constant, or unused
        kind = kind_of(node, modules)
        inputs = tuple(source.name for source in _tensors_read(node) if source.name in ops)
        if kind == "shape" or (not inputs and kind not in ("input", "output")):
            continue  # a size, or computed only from sizes and constants
        weight = constant_weight(node, traced)
        if weight is not None:
            weight = replace(weight, tensor=weight_names.get(weight.tensor, weight.tensor))
        first = node.args[0] if node.args else None
        kind = exact_kind(kind, weight, isinstance(first, fx.Node) and first.name not in ops)
        made = found.get(node.name)
        floating = made is not None if found else kind != "split"
        ops[node.name] = Op(node.name, kind, inputs, label(node), weight, made, floating or kind == "output")
    return Network(ops)


def constant_weight(node: fx.Node, traced: fx.GraphModule) -> ConstantWeight | None:
    """The weight of a convolution or matrix product (module or function); None if there is none or it is computed."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if "weight" not in module._parameters:  # computed at each call, for example by spectral normalization
            return None
        tensor = f"{node.target}.weight"
        match module:
            case nn.modules.conv._ConvNd() as conv:
                return ConstantWeight(tensor, conv.in_channels, conv.out_channels, conv.groups, conv.kernel_size)
            case nn.Linear() as linear:
                return ConstantWeight(tensor, linear.in_features, linear.out_features)
        return None
    if node.op in ("placeholder", "output"):
        return None
    kind, source = kind_of(node, {}), weight_source(node)
    if source is None or kind not in (*WEIGHTED, "matrix_product"):
        return None
    if any(isinstance(value, fx.Node) and value.op != "get_attr" for value in list(arguments(node).values())[1:]):
        return None  # a computed bias or stride
    tensor, name = _attribute(traced, str(source.target)), str(source.target)
    if not isinstance(tensor, Tensor) or tensor.ndim < 2 or (tensor.ndim != 2 and kind == "matrix_product"):
        return None
    if kind == "matrix_product":  # x @ w, [I, O]
        return ConstantWeight(name, tensor.shape[0], tensor.shape[1])
    if kind == "linear":
        return ConstantWeight(name, tensor.shape[1], tensor.shape[0])
    groups, kernel = int(arguments(node).get("groups", 1)), tuple(tensor.shape[2:])
    if kind == "transposed_convolution":
        return ConstantWeight(name, tensor.shape[0], tensor.shape[1] * groups, groups, kernel)
    return ConstantWeight(name, tensor.shape[1] * groups, tensor.shape[0], groups, kernel)


def weight_source(node: fx.Node) -> fx.Node | None:
    """The get_attr node from which a functional convolution or matrix product reads its weight; None if another."""
    given = arguments(node)
    found = given.get("weight", given.get("other"))
    return found if isinstance(found, fx.Node) and found.op == "get_attr" else None


def weight_axis(node: fx.Node) -> int:
    """The axis of the output channels in the weight of a function call: 0 for [O, ...], 1 for [I, O, ...]."""
    return 0 if kind_of(node, {}) in ("convolution", "linear") else 1


def layer_of(node: fx.Node, traced: fx.GraphModule) -> nn.Module:
    """A module that computes the same as the function call ``node``, whose weight is constant; tensors are shared.

    There may be one module, a quantizer, between the weight and ``node``.
    """
    given = arguments(node)

    def tensor(source: Any) -> Any:
        constant = source.all_input_nodes[0] if source.op == "call_module" else source
        return _attribute(traced, str(constant.target))

    weight = tensor(given.get("weight", given.get("other")))
    bias = None if given.get("bias") is None else tensor(given["bias"])
    kind, function = kind_of(node, {}), function_name(node)
    layer: Any
    if kind in ("linear", "matrix_product"):
        matrix = weight if kind == "linear" else nn.Parameter(weight.detach().T.contiguous(), requires_grad=False)
        layer, weight = nn.Linear(matrix.shape[1], matrix.shape[0], bias is not None, device="meta"), matrix
    else:
        keys = ("stride", "padding", "output_padding", "groups", "dilation")
        options = {key: value for key, value in given.items() if key in keys}
        inputs, outputs = weight.shape[1] * options.get("groups", 1), weight.shape[0]
        if kind == "transposed_convolution":
            inputs, outputs = weight.shape[0], inputs
        name = "".join(part.capitalize() for part in function.split("_"))  # conv_transpose2d -> ConvTranspose2d
        layer = getattr(nn, name)(inputs, outputs, weight.shape[2:], bias=bias is not None, **options, device="meta")
    layer.weight, layer.bias = weight, bias
    module: nn.Module = layer
    return module


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a function or method by name; those whose name is not known are left out."""
    function = function_name(node)
    names: Sequence[str] = _ARGUMENTS.get(function, ())
    if not names and callable(node.target):
        try:
            names = tuple(inspect.signature(node.target).parameters)
        except ValueError:  # a builtin without a signature
            names = ()
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def function_name(node: fx.Node) -> str:
    """The name of the function or method that ``node`` calls; '' for a function that is not PyTorch's."""
    if isinstance(node.target, str):
        return node.target
    package = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return getattr(node.target, "__name__", "") if package in _FROM_TORCH else ""


def label(node: fx.Node) -> str:
    """The readable name of ``node``: its module's path, or the calling module's path and the function's name."""
    if node.op == "call_module":
        return str(node.target)
    stack = list(node.meta.get("nn_module_stack", {}).values())
    inside = stack[-1][0] if stack else ""
    function = node.name if node.op in ("placeholder", "output") else function_name(node) or node.name
    return f"{inside}.{function}" if inside else function


def kind_of(node: fx.Node, modules: dict[str, nn.Module]) -> OpKind:
    """The kind of the operation ``node``; ``modules`` are all modules by their path."""
    if node.op == "placeholder":
        return "input"
    if node.op == "output":
        return "output"
    if node.op == "call_module":
        module = modules[str(node.target)]
        # Only exact types of torch: a subclass may compute something else, such as a normalization with an activation.
        own_type = nn.utils.parametrize.type_before_parametrizations(module)
        known = own_type.__module__.partition(".")[0] in ("torch", "torchvision")
        return kind_of_module(own_type.__name__, vars(module)) if known else "other"
    return kind_of_function(function_name(node), arguments(node))


def is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether ``node`` is a ReLU: it clips at zero and does nothing else. ``modules`` are all modules by their path."""
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    return node.op in ("call_function", "call_method") and function_name(node) in ("relu", "relu_")


def _weight_names(traced: fx.GraphModule) -> dict[str, str]:
    """Maps every name of a parameter to its first name: one parameter may be the weight of several modules."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name) for name, tensor in traced.named_parameters(remove_duplicate=False)
    }


def _tensors_read(node: fx.Node) -> list[fx.Node]:
    """The nodes that ``node`` reads, as often as it reads them."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _nodes_needed(traced: fx.GraphModule) -> set[fx.Node]:
    """The nodes that the output depends on, and the inputs."""
    needed = {node for node in traced.graph.nodes if node.op in ("placeholder", "output")}
    for node in reversed(traced.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return needed


def _attribute(traced: fx.GraphModule, path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(traced.get_submodule(module), name)


class _ShapeRecorder(fx.Interpreter):
    """Runs a module on tensors without data and records the shape of each floating-point tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.shapes[n.name] = tuple(result.shape)
        return result


def shapes(traced: fx.GraphModule, input_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The shape of every floating-point tensor for a batch of one, by the name of its node.

    ``input_shape`` is [C, H, W]. Raises UserError when the network does not take such an input.
    """
    training, recorder = traced.training, _ShapeRecorder(traced.eval())
    device = next((parameter.device for parameter in traced.parameters()), None)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            recorder.run(mode.from_tensor(torch.zeros(1, *input_shape, device=device)))
    except Exception as error:  # a model may raise anything
        shown = "x".join(map(str, input_shape))
        raise UserError(
            f"the model does not take one image of {shown} ({type(error).__name__}: {one_line(error)}): "
            "give another --image-size (input_shape), or a model with one input"
        ) from error
    finally:
        traced.train(training)
    return recorder.shapes
