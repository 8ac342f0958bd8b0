"""Traces a float model with torch.fx and brings the graph into the form that the rest of the project expects.

A plain torch.fx graph is fixed to the mode (training or evaluation) in which it was traced, hides the effects of
in-place operations, and contains operations that compute nothing. All of this is corrected here.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from qat.base.errors import UserError
from qat.graph.fx_network import arguments, function_name, kind_of, label, network_from_fx
from qat.graph.network import Network

PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUTS: dict[Any, Callable[[float], nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_VIEWS = (
    *("getitem", "getattr", "narrow", "select", "split", "chunk", "unbind", "tensor_split", "detach", "to", "float"),
    *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"),
    *("expand_as", "permute", "transpose", "t", "swapaxes", "movedim", "contiguous", "type_as"),
)
_OUT_OF_PLACE: dict[Any, Callable[[Any, Any], Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior")


class _Proxy(fx.Proxy):
    """Records ``x += y`` as an in-place operation; torch.fx would record ``x = x + y``, as if nobody else read x."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other, "add")

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other, "sub")

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other, "mul")

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other, "truediv")

    def _in_place(self, function: Callable[[Any, Any], Any], other: Any, name: str) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {}, name)


class Tracer(fx.Tracer):
    """Does not inline modules that behave differently in training and evaluation."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The object that stands for the result of ``node`` while the model is traced."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True for modules that become one node."""
        mode_dependent = (nn.modules.batchnorm._BatchNorm, torchvision.ops.StochasticDepth)
        return isinstance(m, mode_dependent) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """A traced copy of ``model``, in the same mode and usable in both modes.

    Raises UserError naming the line that torch.fx cannot trace.
    """
    model = copy.deepcopy(model)
    training = model.training
    try:
        evaluated = Tracer().trace(model.eval())
        traced = fx.GraphModule(model, Tracer().trace(model.train()), type(model).__name__)
    except (
        fx.proxy.TraceError,
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        NotImplementedError,
    ) as error:
        raise UserError(_why_untraceable(error)) from error
    _check_modes_agree(evaluated, traced.graph)
    _keep_dropout_modes(traced, evaluated)
    _order_arguments(traced)
    _read_what_in_place_operations_leave(traced)
    _part_fused_norms(traced)
    _drop_identities(traced)
    for node in traced.graph.nodes:
        if hasattr(nn.ModuleDict, node.name):  # x.to(...) makes a node "to", but no submodule may have that name
            node.name = f"{node.name}_"
    traced.recompile()
    return traced.train(training)


def network_of(model: nn.Module, input_shape: Sequence[int]) -> Network:
    """The neutral view of ``model``, with the shapes for one input of ``input_shape`` = [C, H, W].

    Raises UserError naming the line that torch.fx cannot trace, or when the model does not take such an input.
    """
    return network_from_fx(trace(model), input_shape)


def _check_modes_agree(evaluated: fx.Graph, trained: fx.Graph) -> None:
    """A trace follows only one branch of ``if self.training``, and would take it in both modes: that is refused."""
    for evaluation, training in itertools.zip_longest(map(_shown, evaluated.nodes), map(_shown, trained.nodes)):
        if evaluation != training:
            raise UserError(
                f"the model computes {evaluation or 'nothing'} in evaluation but {training or 'nothing'} in training, "
                "and torch.fx can keep only one: replace what depends on self.training by torch.nn.Dropout "
                "or torchvision.ops.StochasticDepth, or switch it off"
            )


def _shown(node: fx.Node) -> str:
    """What a node computes, with its constant arguments. The numbers of constants are left out: they keep counting."""
    target = re.sub(r"^_tensor_constant\d+$", "constant", str(node.target))
    if node.op != "call_function" or node.target in _DROPOUTS:
        return target
    constants = [value for value in (*node.args, *node.kwargs.items()) if not isinstance(value, fx.Node)]
    return f"{target}{fx.node.map_arg(constants, lambda source: None)}"


def _order_arguments(traced: fx.GraphModule) -> None:
    """Makes the tensor that an operation works on its first positional argument, however the call was written."""
    for node in traced.graph.nodes:
        if node.op == "call_module" and node.kwargs:
            bound = inspect.signature(traced.get_submodule(node.target).forward).bind(*node.args, **node.kwargs)
            node.args, node.kwargs = bound.args, bound.kwargs
        elif node.op == "call_function" and not node.args and "input" in node.kwargs:
            node.args, node.kwargs = (node.kwargs["input"],), {k: v for k, v in node.kwargs.items() if k != "input"}


def _read_what_in_place_operations_leave(traced: fx.GraphModule) -> None:
    """Makes the readers of a tensor that was changed in place read the result of the change, which fx hides.

    Raises UserError when they read it through another view of the same memory.
    """
    order = {node: position for position, node in enumerate(traced.graph.nodes)}
    modules = dict(traced.named_modules())
    owner: dict[fx.Node, fx.Node] = {}  # the node that allocated a node's memory
    sizes: set[fx.Node] = set()  # numbers, which share no memory
    for node in traced.graph.nodes:
        given = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        changes = given is not None and _is_in_place(node, traced)
        if node.target in _OUT_OF_PLACE:  # the edges below express the change
            node.target = _OUT_OF_PLACE[node.target]
        if kind_of(node, modules) == "shape" or (node.all_input_nodes and sizes.issuperset(node.all_input_nodes)):
            sizes.add(node)
            continue
        owner[node] = owner[given] if given is not None and (changes or _is_view(node, traced)) else node
        if not changes or given is None:
            continue
        for user in [user for user in given.users if order[user] > order[node]]:
            user.replace_input_with(given, node)
        for view in [view for view, memory in owner.items() if memory is owner[node] and view is not node]:
            for user in view.users:
                if order[user] > order[node] and kind_of(user, modules) != "shape":
                    raise UserError(
                        f"{label(node)} changes {given.name} in place, and {label(user)} then reads the same memory "
                        f"through {view.name}, which a torch.fx graph cannot express: write it without in-place "
                        "operations"
                    )


def _is_in_place(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` changes its first input."""
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    called = function_name(node) if node.op in ("call_function", "call_method") else ""
    own = getattr(node.target, "__module__", "") != "_operator"  # operator.and_ and or_ are not in place
    return bool(node.kwargs.get("inplace", False)) or called in _IN_PLACE or (own and called.endswith("_"))


def _is_view(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether the output of ``node`` shares, or may share, the memory of its first input."""
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), (nn.Flatten, nn.Unflatten, nn.Identity))
    return node.op in ("call_function", "call_method") and function_name(node) in _VIEWS


def _keep_dropout_modes(traced: fx.GraphModule, evaluated: fx.Graph) -> None:
    """Turns F.dropout(x, p, training=self.training) into a module, which follows train() and eval()."""
    for node, same in zip(list(traced.graph.nodes), list(evaluated.nodes), strict=True):
        make = _DROPOUTS.get(node.target) if node.op == "call_function" else None
        if make is None or arguments(node).get("training", True) == arguments(same).get("training", True):
            continue  # always on or always off, as the author wrote it
        path = f"{node.name}_module"
        traced.add_submodule(path, make(float(arguments(node).get("p", 0.5))).train(traced.training))
        with traced.graph.inserting_before(node):
            replacement = traced.graph.call_module(path, (node.args[0],))
        node.replace_all_uses_with(replacement)
        traced.graph.erase_node(node)
        replacement.name = node.name


def _part_fused_norms(traced: fx.GraphModule) -> None:
    """Splits timm's batch normalization with dropout and activation inside into one module for each operation.

    The modules keep their places in the hierarchy, so the keys of the state dict do not change.
    """
    for node in list(traced.graph.nodes):
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        parts = [name for name in ("drop", "act") if isinstance(getattr(module, name, None), nn.Module)]
        if type(module) in PLAIN_NORMS or not isinstance(module, nn.modules.batchnorm._BatchNorm) or len(parts) < 2:
            continue
        plain_type = next(plain for plain in PLAIN_NORMS if isinstance(module, plain))
        plain = plain_type(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
        plain._parameters, plain._buffers = module._parameters, module._buffers
        for name in parts:
            plain.add_module(name, module.get_submodule(name))
        traced.set_submodule(node.target, plain.train(module.training))
        last, readers = node, tuple(node.users)
        for name in parts:
            with traced.graph.inserting_after(last):
                last = traced.graph.call_module(f"{node.target}.{name}", (last,))
                last.meta = dict(node.meta)
        for reader in readers:
            reader.replace_input_with(node, last)


def _drop_identities(traced: fx.GraphModule) -> None:
    """Removes operations that compute nothing, which would hide their input from the rules: Identity, cat([x])."""
    for node in list(traced.graph.nodes):
        given = node.args[0] if node.args else None
        if node.op == "call_module" and type(traced.get_submodule(node.target)) is nn.Identity:
            same = given
        elif node.target in (torch.cat, torch.concat) and isinstance(given, (list, tuple)) and len(given) == 1:
            same = given[0]
        elif node.target is operator.add and isinstance(given, int) and given == 0:  # sum() starts so
            same = node.args[1]
        else:
            continue
        node.replace_all_uses_with(same)
        traced.graph.erase_node(node)


def _why_untraceable(error: Exception) -> str:
    torch_folder = str(Path(torch.__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if not frame.filename.startswith(torch_folder)]
    where = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "inside torch"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"torch.fx cannot trace this model; it was stopped by {where} ({reason}): "
        "make that line independent of tensor values, or quantize a submodule without it"
    )
