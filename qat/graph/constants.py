"""Tensors that depend on no input: parameters, buffers, and what is computed from them, such as a normalized weight."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn


def is_constant(node: fx.Node) -> bool:
    """Whether the result of ``node`` depends on no input of the network."""
    if node.op in ("placeholder", "output"):
        return False
    waiting = [node]
    seen: set[fx.Node] = set()
    while waiting:
        current = waiting.pop()
        if current.op == "placeholder":
            return False
        new = set(current.all_input_nodes) - seen
        seen |= new
        waiting += new
    return node.op == "get_attr" or bool(seen)


def constant_value(node: fx.Node, model: fx.GraphModule) -> Tensor:
    """The value of a constant ``node`` of ``model``, without gradients."""
    interpreter = fx.Interpreter(model)
    interpreter.env = {}
    with torch.no_grad():
        for needed in _ancestors(node):
            interpreter.env[needed] = interpreter.run_node(needed)
    value: Tensor = interpreter.env[node]
    return value


def bake_constants(model: fx.GraphModule, keep: type[nn.Module]) -> None:
    """Replaces what is computed from parameters and buffers by its value; modules of type ``keep`` stay."""
    kept = {node for node in model.graph.find_nodes(op="call_module") if _is_a(model, node, keep)}
    constant = {node for node in model.graph.nodes if is_constant(node)} - kept
    for node in [node for node in model.graph.nodes if node in constant and node.op != "get_attr"]:
        if all(reader in constant for reader in node.users):
            continue
        value = constant_value(node, model)
        if not isinstance(value, Tensor):
            continue
        name = f"{node.name}_value"
        if value.is_floating_point():
            model.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
        else:
            model.register_buffer(name, value.clone())
        with model.graph.inserting_before(node):
            baked = model.graph.get_attr(name)
        baked.meta = dict(node.meta)
        node.replace_all_uses_with(baked)
    model.graph.eliminate_dead_code()
    model.recompile()


def _is_a(model: fx.GraphModule, node: fx.Node, module: type[nn.Module]) -> bool:
    return isinstance(model.get_submodule(str(node.target)), module)


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """``node`` and all that it is computed from, in the order of the graph."""
    needed = {node}
    waiting = [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - needed
        needed |= new
        waiting += new
    return [each for each in node.graph.nodes if each in needed]
