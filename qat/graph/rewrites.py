"""Brings a graph that was traced into the form that the rest of the project expects.

A plain torch.fx graph hides the effects of in-place operations, of torch.no_grad and of devices, and contains
operations that compute nothing. All of this is corrected here.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qat.base.errors import UserError
from qat.graph.attention import scale_before_product, softmax_before_values
from qat.graph.fx_network import function_name, kind_of, label
from qat.graph.set_item import set_item, with_item
from qat.graph.tracer import parts_of_norm

PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
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


def rewrite(traced: fx.GraphModule) -> None:
    """Makes every operation read what it computes with, and removes those that compute nothing.

    Raises UserError when a tensor that was changed in place is read through another view of its memory.
    """
    _order_arguments(traced)
    _write_through_parts(traced)
    _read_what_in_place_operations_leave(traced)
    _plain_norms(traced)
    _stacks_as_concats(traced)
    _products_as_swish(traced)
    _drop_identities(traced)
    scale_before_product(traced)
    softmax_before_values(traced)
    _follow_device(traced)
    for node in traced.graph.nodes:
        if hasattr(nn.ModuleDict, node.name):  # x.to(...) makes a node "to", but no submodule may have that name
            node.name = f"{node.name}_"


def stop_gradients(traced: fx.GraphModule) -> None:
    """Detaches what was computed under torch.no_grad where it is read outside of it."""
    for node in list(traced.graph.nodes):
        readers = [reader for reader in node.users if not reader.meta.get("no_grad")]
        if node.meta.get("no_grad") and node.op != "get_attr" and readers:
            with traced.graph.inserting_after(node):
                detached = traced.graph.call_method("detach", (node,))
            detached.meta = dict(node.meta)
            for reader in readers:
                reader.replace_input_with(node, detached)


def _follow_device(traced: fx.GraphModule) -> None:
    """Tensors go to, and are made on, the device of the input, and not the one where the model was traced."""
    inputs = traced.graph.find_nodes(op="placeholder")
    device: fx.Node | None = None
    for node in list(traced.graph.nodes):
        if not any(isinstance(value, torch.device) for value in (*node.args, *node.kwargs.values())):
            continue
        if device is None:
            with traced.graph.inserting_after(inputs[-1]):
                device = traced.graph.call_function(getattr, (inputs[0], "device"))
        followed = device
        node.args = tuple(followed if isinstance(value, torch.device) else value for value in node.args)
        node.kwargs = {
            key: followed if isinstance(value, torch.device) else value for key, value in node.kwargs.items()
        }


def _order_arguments(traced: fx.GraphModule) -> None:
    """Makes the tensor that an operation works on its first positional argument, however the call was written."""
    for node in traced.graph.nodes:
        if node.op == "call_module" and node.kwargs:
            bound = inspect.signature(traced.get_submodule(node.target).forward).bind(*node.args, **node.kwargs)
            node.args, node.kwargs = bound.args, bound.kwargs
        elif node.op == "call_function" and not node.args and "input" in node.kwargs:
            node.args, node.kwargs = (node.kwargs["input"],), {k: v for k, v in node.kwargs.items() if k != "input"}


def _write_through_parts(traced: fx.GraphModule) -> None:
    """Where an operation changes ``x[index]`` in place, makes later readers of x read a copy with that change."""
    order = {node: position for position, node in enumerate(traced.graph.nodes)}
    for node in list(traced.graph.nodes):
        part = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if part is None or part.target is not operator.getitem or not _is_in_place(node, traced):
            continue
        whole = part.args[0]
        if not isinstance(whole, fx.Node) or not whole.meta.get("tensor"):
            continue
        later = [user for user in whole.users if order[user] > order[node]]
        if not later:
            continue
        with traced.graph.inserting_before(node):
            copy = traced.graph.call_method("clone", (part,))
        with traced.graph.inserting_after(node):
            changed = traced.graph.call_function(with_item, (whole, part.args[1], node))
        for made in (copy, changed):
            made.meta, order[made] = dict(node.meta), order[node]
        for reader in [user for user in part.users if order[user] > order[node]]:
            reader.replace_input_with(part, node)
        node.replace_input_with(part, copy)
        for reader in later:
            reader.replace_input_with(whole, changed)


def _read_what_in_place_operations_leave(traced: fx.GraphModule) -> None:
    """Makes the readers of a tensor that was changed in place read the result of the change, which fx hides.

    Raises UserError when they read it through another view of the same memory.
    """
    order = {node: position for position, node in enumerate(traced.graph.nodes)}
    modules = dict(traced.named_modules())
    owner: dict[fx.Node, fx.Node] = {}  # the node that allocated a node's memory
    sizes: set[fx.Node] = set()  # numbers, and tensors that are made of numbers alone
    for node in traced.graph.nodes:
        given = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        changes = given is not None and _is_in_place(node, traced)
        if node.target in _OUT_OF_PLACE:  # the edges below express the change
            node.target = _OUT_OF_PLACE[node.target]
        if kind_of(node, modules) == "shape" or (node.all_input_nodes and sizes.issuperset(node.all_input_nodes)):
            sizes.add(node)
            continue
        shares = given is not None and (changes or _is_view(node, traced))
        owner[node] = owner.get(given, node) if given is not None and shares else node
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
    if node.target is set_item:
        return True
    return bool(node.kwargs.get("inplace", False)) or called in _IN_PLACE or (own and called.endswith("_"))


def _is_view(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether the output of ``node`` shares, or may share, the memory of its first input."""
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), (nn.Flatten, nn.Unflatten, nn.Identity))
    return node.op in ("call_function", "call_method") and function_name(node) in _VIEWS


def _plain_norms(traced: fx.GraphModule) -> None:
    """Makes timm's batch normalizations, whose dropout and activation were traced as operations of their own, plain.

    Their parts keep their places in the hierarchy, so the keys of the state dict do not change.
    """
    for node in traced.graph.find_nodes(op="call_module"):
        module = traced.get_submodule(node.target)
        if type(module) in PLAIN_NORMS or not (parts := parts_of_norm(module)):
            continue
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        plain_type = next(plain for plain in PLAIN_NORMS if isinstance(module, plain))
        plain = plain_type(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
        plain._parameters, plain._buffers = module._parameters, module._buffers
        for name, part in parts.items():
            plain.add_module(name, part)
        traced.set_submodule(node.target, plain.train(module.training))


def _stacks_as_concats(traced: fx.GraphModule) -> None:
    """Makes torch.stack what ONNX files have for it: a concatenation along an axis that each tensor gets."""
    for node in traced.graph.find_nodes(op="call_function", target=torch.stack):
        given = dict(zip(("tensors", "dim"), node.args, strict=False)) | dict(node.kwargs)
        axis = given.get("dim", 0)
        with traced.graph.inserting_before(node):
            parts = [traced.graph.call_method("unsqueeze", (one, axis)) for one in given["tensors"]]
            joined = traced.graph.call_function(torch.cat, (parts, axis))
        for made in (*parts, joined):
            made.meta = dict(node.meta)
        node.replace_all_uses_with(joined)
        traced.graph.erase_node(node)


def _products_as_swish(traced: fx.GraphModule) -> None:
    """Makes x * sigmoid(x) one operation, as the rules know it."""
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if kind_of(node, modules) != "multiply" or len(node.all_input_nodes) != 2:
            continue
        for value, gate in (node.all_input_nodes, node.all_input_nodes[::-1]):
            if _is_sigmoid(gate, modules) and gate.all_input_nodes == [value] and len(gate.users) == 1:
                with traced.graph.inserting_before(node):
                    swish = traced.graph.call_function(F.silu, (value,))
                swish.meta = dict(node.meta)
                node.replace_all_uses_with(swish)
                traced.graph.erase_node(node)
                traced.graph.erase_node(gate)
                break


def _is_sigmoid(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.Sigmoid
    return node.op in ("call_function", "call_method") and function_name(node) == "sigmoid"


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
