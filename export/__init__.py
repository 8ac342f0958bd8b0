"""ONNX files with explicit Q/DQ nodes: made from a trained network or a float ONNX file, or checked by the lint.

    from export import export_onnx, lint_onnx, quantize_onnx

Importing this package does not import torch or onnx: a name is loaded when it is used. The commands are
``python -m export.onnx``, ``python -m export.quantize`` and ``python -m export.lint``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.findings import LintFinding
    from export.from_checkpoint import export_onnx
    from export.from_float_onnx import quantize_onnx
    from export.linter import lint_onnx
    from qat.base.errors import UserError

__all__ = ["LintFinding", "UserError", "export_onnx", "lint_onnx", "quantize_onnx"]

_MODULES = {
    "LintFinding": "export.findings",
    "UserError": "qat.base.errors",
    "export_onnx": "export.from_checkpoint",
    "lint_onnx": "export.linter",
    "quantize_onnx": "export.from_float_onnx",
}
"""Public name -> the module that defines it."""

if not TYPE_CHECKING:  # with __getattr__ a type checker would accept any name

    def __getattr__(name: str) -> Any:
        """Loads a public name."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
