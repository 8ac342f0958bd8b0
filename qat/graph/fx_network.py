"""Builds the neutral view (qat/graph/network.py) of a traced torch.fx module. Ops have the names of the graph's nodes.

It also answers questions about single nodes: their kind, label, arguments and constant weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qat.graph.by_mode import ByMode, OnlyInTraining
from qat.graph.constants import is_constant
from qat.graph.inputs import Inputs
from qat.graph.network import ConstantWeight, Network, Op, exact_kind
from qat.graph.operations import WEIGHTED, OpKind, kind_of_function, kind_of_module
from qat.graph.torch_patches import without_autocast

# Names of the positional arguments of builtins and methods, which inspect.signature does not know.
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ARGUMENTS: dict[str, Sequence[str]] = {
    **dict.fromkeys(("matmul", "mm", "bmm"), ("input", "other")),
    "mean": ("input", "dim", "keepdim"),
    "softmax": ("input", "dim", "dtype"),
    "getattr": ("input", "name"),
    "flatten": ("input", "start_dim", "end_dim"),
    **dict.fromkeys(("clamp", "clip", "clamp_", "clip_"), ("input", "min", "max")),
    "linear": ("input", "weight", "bias"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "to": ("input", "dtype"),
    **{f"conv{space}d": _CONVOLUTION for space in (1, 2, 3)},
    **{f"conv_transpose{space}d": _TRANSPOSED for space in (1, 2, 3)},
}
_FROM_TORCH = ("torch", "torchvision", "_operator", "builtins")  # packages whose functions are known by name


def network_from_fx(traced: fx.GraphModule) -> Network:
    """The neutral view of what qat.graph.tracing.trace returned, as it is in evaluation."""
    modules = dict(traced.named_modules())
    weight_names = _weight_names(traced)
    found = shapes(traced)
    needed = _nodes_needed(traced, modules)
    ops: dict[str, Op] = {}
    for node in traced.graph.nodes:
        if node not in needed or is_constant(node):
            continue
        kind = kind_of(node, modules)
        inputs = tuple(source.name for source in _tensors_read(node, modules) if source.name in ops)
        if kind == "shape" or (not inputs and kind not in ("input", "output")):
            continue  # a size, or computed only from sizes and constants
        weight = constant_weight(node, traced, found)
        if weight is not None:
            weight = replace(weight, tensor=weight_names.get(weight.tensor, weight.tensor))
        first = node.args[0] if node.args else None
        kind = exact_kind(kind, weight, len(inputs), isinstance(first, fx.Node) and first.name not in ops)
        made = found.get(node.name)
        floating = made is not None or kind == "output"
        ops[node.name] = Op(node.name, kind, inputs, label(node), weight, made, floating)
    return Network(ops)


def constant_weight(
    node: fx.Node, traced: fx.GraphModule, found: Mapping[str, tuple[int, ...]]
) -> ConstantWeight | None:
    """The weight of a convolution or matrix product (module or function); None if there is none or inputs change it.

    ``found``: the shapes of the network's tensors. A weight that is computed from parameters is constant, too.
    """
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if "weight" not in module._parameters:  # computed by a hook, at each call
            return None
        tensor = f"{node.target}.weight"
        match module:
            case nn.modules.conv._ConvNd() as conv:
                channels = (conv.in_channels, conv.out_channels, conv.groups)
                return ConstantWeight(tensor, *channels, conv.kernel_size, conv.stride)
            case nn.Linear() as linear:
                return ConstantWeight(tensor, linear.in_features, linear.out_features)
        return None
    if node.op in ("placeholder", "output"):
        return None
    kind, source = kind_of(node, {}), weight_source(node)
    if source is None or kind not in (*WEIGHTED, "matrix_product"):
        return None
    if any(isinstance(value, fx.Node) and not is_constant(value) for value in list(arguments(node).values())[1:]):
        return None  # a bias or stride that inputs change
    name = str(source.target) if source.op == "get_attr" else source.name
    shape = found.get(source.name, ())
    if len(shape) < 2 or (len(shape) != 2 and kind == "matrix_product"):
        return None
    if kind == "matrix_product":  # x @ w, [I, O]
        return ConstantWeight(name, shape[0], shape[1])
    if kind == "linear":
        return ConstantWeight(name, shape[1], shape[0])
    groups, kernel = int(arguments(node).get("groups", 1)), shape[2:]
    given = arguments(node).get("stride", 1)
    stride: tuple[int, ...] = tuple(given) if isinstance(given, (tuple, list)) else (given,) * len(kernel)
    inputs, outputs = shape[1] * groups, shape[0]
    if kind == "transposed_convolution":
        inputs, outputs = shape[0], inputs
    return ConstantWeight(name, inputs, outputs, groups, kernel, stride)


def weight_source(node: fx.Node) -> fx.Node | None:
    """The constant from which a functional convolution or matrix product reads its weight; None if it is none."""
    given = arguments(node)
    found = given.get("weight", given.get("other"))
    return found if isinstance(found, fx.Node) and is_constant(found) else None


def weight_axis(node: fx.Node) -> int | None:
    """The axis of the scales of a function call's weight: 0 for [O, ...], 1 for [I, O]; None for one scale."""
    kind = kind_of(node, {})
    return None if kind == "transposed_convolution" else int(kind not in ("convolution", "linear"))


def layer_of(node: fx.Node, traced: fx.GraphModule) -> nn.Module:
    """A module that computes the same as the function call ``node``, whose weight is constant; tensors are shared.

    There may be one module, a quantizer, between the weight and ``node``.
    """
    given = arguments(node)

    def tensor(source: Any) -> Any:
        constant = source.all_input_nodes[0] if source.op == "call_module" else source
        return attrgetter(str(constant.target))(traced)

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
    layer.weight, layer.bias = _parameter(weight), _parameter(bias)
    module: nn.Module = layer
    return module


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    """``tensor``, which may be a buffer, as a parameter."""
    return tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


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
        if isinstance(module, OnlyInTraining):
            return "dropout"
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


def _tensors_read(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """The nodes that ``node`` reads in evaluation, as often as it reads them."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    args = node.args[: module.inputs_of_evaluation] if isinstance(module, ByMode) else node.args
    found: list[fx.Node] = []
    fx.map_arg((args, node.kwargs), found.append)
    return found


def _nodes_needed(traced: fx.GraphModule, modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """The nodes that the output depends on in evaluation, and the inputs."""
    needed = {node for node in traced.graph.nodes if node.op in ("placeholder", "output")}
    for node in reversed(traced.graph.nodes):
        if node in needed:
            needed.update(_tensors_read(node, modules))
    return needed


class _ShapeRecorder(fx.Interpreter):
    """Runs a module on tensors without data and records the shape of each float32 tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.shapes[n.name] = tuple(result.shape)
        return result


@without_autocast()
def shapes(traced: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """The shape of every float32 tensor for a batch of one, by the name of its node, in evaluation."""
    training, recorder = traced.training, _ShapeRecorder(traced.eval())
    device = next((parameter.device for parameter in traced.parameters()), None)
    inputs: Inputs = traced.meta["inputs"]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        recorder.run(*(mode.from_tensor(torch.zeros(1, *shape, device=device)) for shape in inputs.shapes.values()))
    traced.train(training)
    return recorder.shapes
