"""Hard rules about codes: their type, and their zero points."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from export.onnx_network import DEQUANTIZE, QUANTIZE, WEIGHTED, constant
from export.qdq import (
    BIAS,
    DATA,
    Q_DQ,
    SCALE,
    ZERO_POINT,
    QdqModel,
    code_type,
    input_of,
    is_checked_at_quantizer,
    is_made_by_integer_operator,
    name_of,
)
from export.rule import GUIDE, ONNX, PARSER, RTX, HardRule


class ExplicitZeroPoint(HardRule):
    """Without a zero point and an output_dtype, codes are UINT8 in ONNX. The parser and TensorRT-RTX read INT8."""

    name = "explicit_zero_point"
    sentence = "QuantizeLinear must have a zero point, whose type says what the codes are"
    source = ONNX
    operators = (QUANTIZE,)

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """A Q whose type of codes is not stated."""
        if input_of(node, ZERO_POINT) is None and not node.attributes.get_int("output_dtype", 0):
            name = model.format.name
            yield f"no zero point, which means UINT8 in ONNX and {name} in TensorRT: add {name} zeros as an initializer"


class ConstantZeroPoint(HardRule):
    """The parser of TensorRT 9 needs an initializer or a Constant, from which it makes a float zero point.

    The parser of 10.11, and TensorRT-RTX, also look through Identity and Cast.
    """

    name = "constant_zero_point"
    sentence = "a zero point must be an initializer or a Constant"
    source = PARSER
    operators = Q_DQ

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """A zero point that another operator makes."""
        given = input_of(node, ZERO_POINT)
        if given is None or constant(given) is not None or is_checked_at_quantizer(node, ZERO_POINT):
            return
        if is_made_by_integer_operator(given):
            return  # see forbidden_op
        maker = given.producer()
        through = f"{maker.op_type} {name_of(maker)}" if maker is not None else "the network's input"
        yield f"its zero point comes through {through}, which TensorRT 9 and older refuse: make it an initializer"


class Symmetric(HardRule):
    """The parser: "TensorRT only supports symmetric quantization"."""

    name = "symmetric"
    sentence = "zero points must be 0"
    source = PARSER
    operators = Q_DQ

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """A zero point that is not 0; about codes of another type see int8_codes."""
        zero_point = model.value(input_of(node, ZERO_POINT))
        if zero_point is None or not zero_point.any() or is_checked_at_quantizer(node, ZERO_POINT):
            return
        if code_type(model, node) in (model.codes, None):
            worst = zero_point.reshape(-1)[np.argmax(zero_point != 0)]
            yield (
                f"its zero point is {worst}, and TensorRT's {model.format.name} is symmetric: quantize again with "
                "zero point 0"
            )


class ZeroPointShape(HardRule):
    """The parser: "The scale and zero point must have the same volume"."""

    name = "zero_point_shape"
    sentence = "there must be as many zero points as scales"
    source = PARSER
    operators = Q_DQ

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """Scales and zero points that differ in number."""
        scale, zero_point = model.value(node.inputs[SCALE]), model.value(input_of(node, ZERO_POINT))
        if scale is None or zero_point is None or scale.size == zero_point.size:
            return
        if not (is_checked_at_quantizer(node, SCALE) and is_checked_at_quantizer(node, ZERO_POINT)):
            yield f"{scale.size} scales, but {zero_point.size} zero points: give one zero point for each scale"


class Int8Codes(HardRule):
    """TensorRT refuses UINT8 codes, or reads them as INT8 with a warning. It refuses codes of 16 bits."""

    name = "int8_codes"
    sentence = "codes must be INT8"
    source = f"{PARSER}; {RTX}"
    operators = Q_DQ

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """Codes of another type; about INT32 see float_bias."""
        codes, name = code_type(model, node), model.format.name
        if codes in (model.codes, None) or (node.op_type == DEQUANTIZE and codes == ir.DataType.INT32):
            return
        zero_point = model.value(input_of(node, ZERO_POINT))
        if codes == ir.DataType.UINT8:
            not_zero = zero_point is not None and zero_point.any()
            shifted = f" with zero point {zero_point.reshape(-1)[0]}" if zero_point is not None and not_zero else ""
            yield (
                f"its codes are UINT8{shifted}, which TensorRT refuses, or takes for {name}, so that those above "
                f"{model.format.high} saturate: quantize again to {name} with zero point 0"
            )
        else:
            yield f"its codes are {codes}, which is not {name}: quantize to {name}, or leave it in float"


class FloatBias(HardRule):
    """TensorRT-RTX refuses an INT32 bias. It accepts an INT8 bias, which then has only 8 bits."""

    name = "float_bias"
    sentence = "a bias must not be quantized"
    source = GUIDE
    operators = (DEQUANTIZE,)

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """A DQ of a bias, or of INT32."""
        readers = [
            reader
            for reader, position in node.outputs[0].uses()
            if position == BIAS and reader.op_type in WEIGHTED and node.inputs[DATA] in model.constants
        ]
        codes = code_type(model, node)
        if readers or codes == ir.DataType.INT32:
            what = f"the bias of {', '.join(map(name_of, readers))}" if readers else "a constant"
            yield f"it dequantizes {what} from {codes or 'codes'}: TensorRT adds biases in float, store it in float32"


CODE_RULES = (
    ExplicitZeroPoint(),
    ConstantZeroPoint(),
    Symmetric(),
    ZeroPointShape(),
    Int8Codes(),
    FloatBias(),
)
