"""A statement that a graph cannot hold, as a function: ``x[index] = value``."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def set_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of ``x`` whose part ``index`` is ``value``; in a graph, later readers of ``x`` read the copy."""
    changed = x.clone()
    changed[index] = value
    return changed
