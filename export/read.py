"""Reads an ONNX file for the lint and the quantizer: checked, with shapes inferred; a user's mistake is one line."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError

from qat.artifact import UserError
from qat.pixels import one_line

OPSETS = range(7, 26)
"""The versions of the default operator set that are understood."""


def read_onnx(path: Path) -> ir.Model:
    """The model of ``path`` with all shapes that can be inferred.

    Raises UserError when the file is missing or no ONNX, when data that it keeps outside are missing, or when its
    operator set is none of ``OPSETS``.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: check the path")
    try:
        proto = onnx.load(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} keeps weights in {error.filename}, which is missing: put it beside the model") from error
    except Exception as error:  # protobuf's DecodeError has no stable place
        raise UserError(f"{path} is no ONNX model, or is truncated ({one_line(error)}): get it again") from error
    if not proto.graph.node:
        raise UserError(f"{path} holds no network (an empty graph): is it an ONNX model?")
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset not in OPSETS:
        raise UserError(
            f"{path} has operator set {opset}; understood are {OPSETS.start} to {OPSETS.stop - 1}: convert it with "
            "onnx.version_converter, or export it again"
        )
    try:
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    except (InferenceError, ValidationError, ValueError) as error:
        raise UserError(f"{path} is inconsistent ({one_line(error)}): export it again") from error


def is_quantized(model: ir.Model) -> bool:
    """Whether any node of ``model`` quantizes."""
    return any("Quantize" in node.op_type or "QLinear" in node.op_type for node in model.graph)
