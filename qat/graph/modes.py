"""One graph for training and evaluation, from the graphs of a model in both modes.

Most of the two graphs is equal. Where a tensor differs, behind a dropout written with ``if self.training`` or a softmax
that only evaluation has, a module computes one or the other, depending on its mode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from qat.graph.by_mode import ByMode, OnlyInTraining
from qat.graph.fx_network import arguments

_DROPOUTS: dict[Any, Callable[[float], nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


class ModesDifferError(Exception):
    """Training computes something else than evaluation, and the difference cannot be parted from the network."""


def merge_modes(model: fx.GraphModule, evaluated: fx.Graph) -> None:
    """Gives ``model``, which was traced in training mode, what the graph ``evaluated`` computes in evaluation.

    Raises ModesDifferError naming what differs, where it contains weights that only evaluation reads.
    """
    _Merge(model, evaluated).run()


def keep_evaluation(model: fx.GraphModule) -> None:
    """Leaves in ``model`` only what it computes in evaluation."""
    for node in model.graph.find_nodes(op="call_module"):
        module = model.get_submodule(str(node.target))
        if not isinstance(module, ByMode):
            continue
        inner = module.in_evaluation
        assert isinstance(inner, fx.GraphModule)
        copied = dict(zip(inner.graph.find_nodes(op="placeholder"), node.args, strict=True))
        with model.graph.inserting_before(node):
            result = model.graph.graph_copy(inner.graph, copied)
        for path, called in inner.named_modules():
            if path:
                model.add_submodule(path, called)
        node.replace_all_uses_with(result)
        model.graph.erase_node(node)
    model.graph.eliminate_dead_code()
    model.delete_all_unused_submodules()
    model.recompile()


class _Merge:
    def __init__(self, model: fx.GraphModule, evaluated: fx.Graph) -> None:
        self.model, self.graph = model, model.graph
        trained, other = list(model.graph.nodes), list(evaluated.nodes)
        matcher = SequenceMatcher(None, [_shown(node) for node in other], [_shown(node) for node in trained], False)
        self.same: dict[fx.Node, fx.Node] = {  # node of evaluation -> node of training
            other[block.a + offset]: trained[block.b + offset]
            for block in matcher.get_matching_blocks()
            for offset in range(block.size)
        }
        self.matched = set(self.same.values())
        self.position = {node: index for index, node in enumerate(trained)}
        self.made: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def run(self) -> None:
        for evaluated, trained in list(self.same.items()):
            if evaluated.op == "output":
                self._merge_outputs(evaluated, trained)
                continue
            ours, theirs = trained.all_input_nodes, evaluated.all_input_nodes
            if len(ours) != len(theirs):
                raise ModesDifferError(f"{_describe([trained])} reads other tensors in training than in evaluation")
            for mine, source in zip(ours, theirs, strict=True):
                if self.same.get(source) is not mine:
                    trained.replace_input_with(mine, self._by_mode(source, mine))
        _keep_dropout_modes(self.model, self.same)
        for node in reversed(self.graph.nodes):
            if not node.users and node not in self.matched and node.op != "output" and node not in self.made.values():
                self.graph.erase_node(node)
        self.graph.lint()

    def _merge_outputs(self, evaluated: fx.Node, trained: fx.Node) -> None:
        ours, theirs = trained.all_input_nodes, evaluated.all_input_nodes
        alike = str(_structure(trained.args)) == str(_structure(evaluated.args))
        if alike and len(ours) == len(theirs):
            for mine, source in zip(ours, theirs, strict=True):
                if self.same.get(source) is not mine:
                    trained.replace_input_with(mine, self._by_mode(source, mine))
            return
        answer = self._insert(
            _Part(evaluated.args[0], self._slice(theirs, self.same, False)),
            _Part(trained.args[0], self._slice(ours, {node: node for node in self.matched}, True)),
            "output",
            trained,
        )
        trained.args = (answer,)

    def _by_mode(self, evaluated: fx.Node, trained: fx.Node) -> fx.Node:
        """A tensor that is ``trained`` in training and ``evaluated`` in evaluation."""
        if (evaluated, trained) not in self.made:
            stop = {node: node for node in self.matched}
            self.made[evaluated, trained] = self._insert(
                _Part(evaluated, self._slice([evaluated], self.same, False)),
                _Part(trained, self._slice([trained], stop, True)),
                trained.name,
                None,
            )
        return self.made[evaluated, trained]

    def _slice(self, results: Sequence[fx.Node], stop: dict[fx.Node, fx.Node], training: bool) -> list[fx.Node]:
        """The nodes that compute ``results`` from nodes in ``stop``, and from weights that only training reads."""
        found: set[fx.Node] = set()
        waiting = list(results)
        while waiting:
            node = waiting.pop()
            if node in stop or node in found:
                continue
            if _has_weights(node, self.model):
                if training:
                    continue  # stays in the network, as an input
                raise ModesDifferError(f"{_describe([node])} is computed in evaluation only")
            found.add(node)
            waiting += node.all_input_nodes
        graph = next(iter(results)).graph if results else None
        return [node for node in graph.nodes if node in found] if graph else []

    def _insert(self, evaluation: _Part, training: _Part, name: str, before: fx.Node | None) -> fx.Node:
        back = {trained: evaluated for evaluated, trained in self.same.items()}
        read = [self.same[source] for source in evaluation.reads()]
        inputs = list(dict.fromkeys((*read, *training.reads())))
        module_type = OnlyInTraining if isinstance(evaluation.result, fx.Node) and not evaluation.nodes else ByMode
        module = module_type(
            training.module(self.model, inputs),
            evaluation.module(self.model, [back.get(source, source) for source in inputs]),
            len(dict.fromkeys(read)),
        )
        path = f"{name}_by_mode"
        self.model.add_submodule(path, module.train(self.model.training))
        last = max((*inputs, *training.nodes), key=lambda node: self.position.get(node, -1))
        place = self.graph.inserting_after(last) if before is None else self.graph.inserting_before(before)
        with place:
            made = self.graph.call_module(path, tuple(inputs))
        self.position[made] = self.position.get(last, 0)
        made.meta = dict(last.meta)
        return made


class _Part:
    """A result, which may be nested, and the nodes that compute it."""

    def __init__(self, result: Any, nodes: Sequence[fx.Node]) -> None:
        self.result, self.nodes = result, nodes

    def reads(self) -> list[fx.Node]:
        """The nodes outside that it reads."""
        found: list[fx.Node] = []
        fx.map_arg(self.result, found.append)
        found += [source for node in self.nodes for source in node.all_input_nodes]
        return list(dict.fromkeys(node for node in found if node not in set(self.nodes)))

    def module(self, model: fx.GraphModule, inputs: Sequence[fx.Node]) -> fx.GraphModule:
        """A module that computes the result from ``inputs``."""
        graph = fx.Graph()
        copied = {source: graph.placeholder(source.name) for source in inputs}
        for node in self.nodes:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        graph.output(fx.map_arg(self.result, copied.__getitem__))
        return fx.GraphModule(model, graph)


def _shown(node: fx.Node) -> str:
    """What a node computes, with its constant arguments. The numbers of constants are left out: they keep counting."""
    target = re.sub(r"^_tensor_constant\d+$", "constant", str(node.target))
    if node.op != "call_function" or node.target in _DROPOUTS:
        return target
    return f"{target}{_structure((node.args, node.kwargs))}"


def _structure(arguments: Any) -> Any:
    return fx.node.map_aggregate(arguments, lambda value: None if isinstance(value, fx.Node) else value)


def _describe(nodes: Sequence[fx.Node]) -> str:
    return ", ".join(str(node.target if isinstance(node.target, str) else node.name) for node in nodes)


def _has_weights(node: fx.Node, model: fx.GraphModule) -> bool:
    if node.op == "call_module":
        try:
            module = model.get_submodule(str(node.target))
        except AttributeError:  # of evaluation only
            return True
        return any(True for _ in module.parameters()) or any(True for _ in module.buffers())
    return node.op in ("get_attr", "placeholder")


def _keep_dropout_modes(model: fx.GraphModule, same: dict[fx.Node, fx.Node]) -> None:
    """Turns F.dropout(x, p, training=self.training) into a module, which follows train() and eval()."""
    for evaluated, node in same.items():
        make = _DROPOUTS.get(node.target) if node.op == "call_function" else None
        if make is None or arguments(node).get("training", True) == arguments(evaluated).get("training", True):
            continue  # always on or always off, as the author wrote it
        path = f"{node.name}_module"
        model.add_submodule(path, make(float(arguments(node).get("p", 0.5))).train(model.training))
        with model.graph.inserting_before(node):
            replacement = model.graph.call_module(path, (node.args[0],))
        node.replace_all_uses_with(replacement)
        model.graph.erase_node(node)
        replacement.name = node.name
