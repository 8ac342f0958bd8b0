"""A statement that a graph cannot hold, as a function: ``x[index] = value``."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def with_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of ``x`` whose part ``index`` is ``value``."""
    changed = x.clone()
    changed[index] = value
    return changed


def set_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """As ``with_item``, where the model's code assigned: later readers of ``x`` are to read the result."""
    return with_item(x, index, value)
