"""Reads a float ONNX file in the form that is placed: constants computed, shapes known, attentions of one form."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
import onnxscript.rewriter
from onnxscript.rewriter.rules import common as rewrites

from export.equations import lower_equations
from export.fold_constants import fold_constants
from export.hard_rules import hard_findings
from export.read import is_quantized, quiet, read_onnx
from export.reuse_concats import reuse_concats
from export.scaled_products import products_of_einsums, scale_before_product, softmax_before_values
from export.session import if_onnx_runtime_can
from export.shapes import drop_expands, find_shapes, simplify_shapes
from export.split_products import split_products
from qat.base.console import warn
from qat.base.errors import UserError

OPSET = 17
"""Models of an older operator set are converted to this one: Q/DQ of single channels exist from 13 on."""
_FIRST_PER_CHANNEL = 13
_MOST_FOLDED = 1 << 26  # elements of a constant that is computed now, and not in the engine


@quiet()
def read_float_network(path: Path, *, same_tensors: bool = False) -> ir.Model:
    """The float network, with constants computed and batch normalization folded into convolutions.

    ``same_tensors``: attentions keep all of their tensors, which a calibration cache names.
    """
    model = read_onnx(path)
    if is_quantized(model):
        raise UserError(f"{path} is quantized already: give the float network (python -m export.lint checks this one)")
    passes.InlinePass()(model)  # also functions of a name that TensorRT would take for an operator
    lower_equations(model.graph)
    for finding in hard_findings(model):
        if finding.severity == "error":
            raise UserError(f"TensorRT cannot run {path}: {finding}")
        warn(str(finding))
    for value in list(model.graph.inputs):
        if value.name in model.graph.initializers:  # old files list their weights as inputs
            model.graph.inputs.remove(value)
    if any(value.dtype == ir.DataType.FLOAT16 for node in model.graph for value in node.outputs):
        raise UserError(f"{path} computes in float16, whose scales TensorRT reads otherwise: export it as float32")
    if len(model.graph.inputs) != 1:
        names = ", ".join(value.name or "" for value in model.graph.inputs)
        raise UserError(f"{path} has {len(model.graph.inputs)} inputs ({names}): export a network with one input")
    if model.opset_imports[""] < _FIRST_PER_CHANNEL:
        try:
            model = ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), OPSET))
        except Exception as error:
            raise UserError(f"{path} cannot be converted to operator set {OPSET} ({error}): export it again") from error
    onnxscript.optimizer.optimize_ir(model, input_size_limit=_MOST_FOLDED, output_size_limit=_MOST_FOLDED)
    norms = [rewrites.fuse_batchnorm_into_conv_rule, rewrites.fuse_batchnorm_into_conv_transpose_rule]
    model = onnxscript.rewriter.rewrite(model, norms)
    reuse_concats(model.graph)
    with if_onnx_runtime_can():
        fold_constants(model)
    with if_onnx_runtime_can():
        find_shapes(model)
    simplify_shapes(model.graph)
    drop_expands(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    if same_tensors:
        return model
    products_of_einsums(model.graph)
    scale_before_product(model.graph)
    softmax_before_values(model.graph)
    passes.RemoveUnusedNodesPass()(model)  # what was transposed, and is no more
    with if_onnx_runtime_can():
        split_products(model)
    return model
