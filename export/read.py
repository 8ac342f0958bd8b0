"""Reads an ONNX file for the lint and for quantization: the whole model, with shapes inferred."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from export.onnx_network import constant
from export.operator_rules import onnx_operators
from qat.base.errors import UserError, one_line
from qat.base.onnx_file import flaw
from qat.base.onnx_structure import check_structure
from qat.base.supervised import native

OPSETS = range(7, min(25, onnx.defs.onnx_opset_version()) + 1)
"""The versions of the default operator set that can be read."""


def read_onnx(path: Path) -> ir.Model:
    """The model of ``path``, its functions inlined, with all shapes that can be inferred.

    A function with the name of an operator of ONNX is not inlined: TensorRT computes that operator instead
    (export/operator_rules.py).

    Raises UserError when the file is missing or is not ONNX, when external data are missing, when its operator set is
    not in ``OPSETS``, or when a node reads a tensor that no node makes.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: check the path")
    check_structure(path)
    with quiet(), native(f"reading {path}"):
        model = _load(path)
        _check_opset(path, model)
        _load_data(path, model)
        passes.InlinePass(lambda function: function.name not in onnx_operators())(model)
        _check_tensors(path, model)
        # Not strict: a shape that cannot be inferred stays unknown.
        passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    return model


def is_quantized(model: ir.Model) -> bool:
    """Whether any node of ``model`` quantizes, dequantizes, or computes on integers."""
    return any(
        "Quantize" in node.op_type or "QLinear" in node.op_type or node.op_type.endswith("Integer")
        for node in model.graph.all_nodes()
    )


@contextlib.contextmanager
def blaming_inconsistencies(path: Path) -> Iterator[None]:
    """Where the block fails on the model of ``path``, raises UserError if onnx.checker finds that inconsistent.

    Else what failed is a mistake of this program, and is raised as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except Exception as found:  # of several types
            raise UserError(f"{path} is inconsistent ({one_line(found)}): export it again") from error
        raise


def _load(path: Path) -> ir.Model:
    try:
        model = ir.load(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except Exception as error:  # protobuf's DecodeError has no stable place
        wrong = flaw(path) or f"cannot be read as ONNX ({one_line(_first_cause(error))})"
        raise UserError(f"{path} {wrong}: get it again") from error
    if not len(model.graph):
        raise UserError(f"{path} {flaw(path) or 'holds a network without nodes'}: get it again")
    return model


def _first_cause(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _check_opset(path: Path, model: ir.Model) -> None:
    opset = model.opset_imports.setdefault("", model.opset_imports.get("ai.onnx", 0))
    if opset not in OPSETS:
        raise UserError(
            f"{path} has operator set {opset}, which must be {OPSETS.start} to {OPSETS.stop - 1}: convert it with "
            "onnx.version_converter, or export it again"
        )


def _load_data(path: Path, model: ir.Model) -> None:
    try:
        ir.external_data.load_to_model(model)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} keeps weights in another file that cannot be read ({one_line(error)}): get it again"
        ) from error


def _check_tensors(path: Path, model: ir.Model) -> None:
    """Checks that initializers are whole and every tensor is made by something. Sorts nodes that are out of order."""
    for name, initializer in model.graph.initializers.items():
        try:
            constant(initializer)
        except ValueError as error:
            raise UserError(f"{path} is inconsistent: initializer {name} ({one_line(error)}): get it again") from error
    for node in model.graph.all_nodes():
        _check_node(path, node, model.opset_imports[""])
        for value in node.inputs:
            if value is not None and not (value.producer() or value.is_graph_input() or value.is_initializer()):
                raise UserError(
                    f"{path} is inconsistent: {node.op_type} {node.name} reads {value.name}, which nothing makes: "
                    "export it again"
                )
    try:
        model.graph.sort()
    except ValueError as error:
        raise UserError(f"{path} is inconsistent ({one_line(error)}): export it again") from error


def _check_node(path: Path, node: ir.Node, opset: int) -> None:
    """Checks that a node of an operator of ONNX has the inputs, outputs and types of attributes that it must have."""
    try:
        operator = onnx.defs.get_schema(node.op_type, opset)  # of Q/DQ nodes in whatever domain too
    except onnx.defs.SchemaError:
        return
    if node.domain not in ("", "ai.onnx") and "QuantizeLinear" not in node.op_type:
        return
    for name, attribute in node.attributes.items():
        known = operator.attributes.get(name)
        wanted = str(known.type).removeprefix("AttrType.") if known else attribute.type.name
        if attribute.type.name != wanted:
            raise UserError(
                f"{path} is inconsistent: {node.op_type} {node.name} has {name} of type {attribute.type.name}, and it "
                f"must be {wanted}: export it again"
            )
    required = [one.name for one in operator.inputs if one.option == onnx.defs.OpSchema.FormalParameterOption.Single]
    given = [value is not None for value in node.inputs]
    if not all(given[: len(required)]) or not operator.min_input <= len(given):
        raise UserError(
            f"{path} is inconsistent: {node.op_type} {node.name} lacks an input, of {', '.join(required)}: export it "
            "again"
        )
    if node.domain in ("", "ai.onnx") and (
        len(given) > operator.max_input or not operator.min_output <= len(node.outputs) <= operator.max_output
    ):
        raise UserError(
            f"{path} is inconsistent: {node.op_type} {node.name} has {len(given)} inputs and {len(node.outputs)} "
            "outputs, which this operator cannot have: export it again"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what onnx_ir logs about a file: what a user has to know becomes a UserError."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
