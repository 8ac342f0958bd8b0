"""The tensors in a nested answer of a network, and their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import fx


def leaves(answer: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in ``answer`` that is not a tuple, list, dict or dataclass, with its path, such as ``maps.0``.

    The path is '' if the answer is one thing; a part that is None is left out.
    """
    if answer is None:
        return
    parts: Mapping[Any, Any] | None = None
    if isinstance(answer, Mapping):
        parts = answer
    elif isinstance(answer, (tuple, list)):
        parts = dict(zip(getattr(answer, "_fields", range(len(answer))), answer, strict=True))
    elif is_dataclass(answer) and not isinstance(answer, type):
        parts = {field.name: getattr(answer, field.name) for field in fields(answer)}
    if parts is None:
        yield path, answer
        return
    for key, part in parts.items():
        yield from leaves(part, f"{path}.{key}" if path else str(key))


def flatten_outputs(model: fx.GraphModule) -> tuple[str, ...]:
    """Makes ``model`` answer one tensor, or a tuple of them; returns their paths in the answer that it gave before."""
    output = model.graph.output_node()
    found = [(path, node) for path, node in leaves(_structure(output.args[0])) if isinstance(node, fx.Node)]
    nodes = tuple(node for _, node in found)
    output.args = (nodes[0] if len(nodes) == 1 else nodes,)
    model.graph.eliminate_dead_code()
    model.recompile()
    return tuple(path for path, _ in found)


def _structure(value: Any) -> Any:
    """The nested answer that a graph makes; a dataclass is made by a node of its own."""
    if isinstance(value, fx.Node) and is_dataclass(value.target):
        return {name: _structure(part) for name, part in value.kwargs.items()}
    if isinstance(value, Mapping):
        return {name: _structure(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", range(len(value)))
        return {name: _structure(part) for name, part in zip(names, value, strict=True)}
    return value
