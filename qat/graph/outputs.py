"""The tensors in a nested answer of a network, and their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any


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
