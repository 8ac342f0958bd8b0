"""Hard rules about which operators there are.

NVIDIA's parser looks an operator up by its name and does not look at its domain: first among the operators that it
knows, then among the functions of the file, then among the plugins that are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import onnx
import onnx_ir as ir

from export.equations import has_capitals
from export.qdq import QdqModel, is_integer_operator
from export.rule import GUIDE, RTX, HardRule

IMPORTER = "NVIDIA's ONNX parser (onnx-tensorrt, ModelImporter and ImporterContext) as of TensorRT 10"
MICROSOFT = "com.microsoft"
# Operators of ONNX Runtime's own domain that the parser of TensorRT-RTX 1.7 takes as ONNX Runtime means them.
_TAKEN_OF_MICROSOFT = (
    *("QuantizeLinear", "DequantizeLinear", "Gelu"),
    *("MultiHeadAttention", "GroupQueryAttention", "MatMulNBits", "QMoE"),
    *("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
)
# Operators of ONNX that the parser of TensorRT-RTX 1.7 does not have; those on integers have a rule of their own.
_LACKING = frozenset(
    (
        *("AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"),
        *("CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "CumProd", "DFT", "DeformConv", "Det"),
        *("ImageDecoder", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss"),
        *("Optional", "OptionalGetElement", "OptionalHasElement", "RegexFullMatch", "SequenceAt", "SequenceConstruct"),
        *("SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap"),
        *("SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit", "SwiGLU"),
        *("TfIdfVectorizer", "Unique"),
    )
)


@cache
def onnx_operators() -> frozenset[str]:
    """The names of all operators that ONNX itself has or had."""
    return frozenset(one.name for one in onnx.defs.get_all_schemas_with_history() if not one.domain)


class ForbiddenOp(HardRule):
    """TensorRT's own TRT_ operators are for FP8 and INT4."""

    name = "forbidden_op"
    sentence = "TensorRT does not have operators on integers"
    source = f"{GUIDE}; {RTX}"

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """An operator on integers, or one of TensorRT's own for another format."""
        if is_integer_operator(node):
            yield (
                f"TensorRT does not have {node.op_type}: put QuantizeLinear and DequantizeLinear around the float "
                "operator"
            )
        elif node.op_type.startswith("TRT_") and "uantize" in node.op_type:
            yield f"{node.op_type} is not {model.format.name}: quantize by QuantizeLinear and DequantizeLinear"


class UnknownOperator(HardRule):
    """An operator of another domain than ONNX's is refused, or taken for ONNX's if that has one of the same name."""

    name = "unknown_operator"
    sentence = "every operator must be one of ONNX that TensorRT has, a function of the file, or a plugin"
    source = IMPORTER

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """An operator that ONNX does not have, or of another domain with a name that ONNX has."""
        if not node.domain and node.op_type in _LACKING:
            yield f"TensorRT does not have {node.op_type}: write it as other operators of ONNX"
        if _is_taken(node) or is_integer_operator(node) or _is_plugin(node):
            return
        whole = f"{node.domain or 'ai.onnx'}.{node.op_type}"
        if node.op_type in onnx_operators():
            yield (
                f"TensorRT does not look at domains and computes ONNX's {node.op_type} instead of {whole}: write it "
                "as ONNX's, or give it another name"
            )
        elif node.domain == MICROSOFT:
            yield (
                f"{whole} is ONNX Runtime's own operator, which TensorRT refuses: give the network as it was before "
                "ONNX Runtime optimized it, or write it as operators of ONNX"
            )
        else:
            yield (
                f"{whole} is not an operator of ONNX, so TensorRT refuses it unless a plugin of that name is loaded: "
                "write it as operators of ONNX"
            )


class EinsumLetters(HardRule):
    """TensorRT's parser reads Einsum equations of small letters only."""

    name = "einsum_letters"
    sentence = "the equation of an Einsum must be in small letters"
    source = IMPORTER

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """An equation with a capital letter."""
        if has_capitals(node):
            yield "TensorRT refuses its equation, which has capital letters: write it in small ones"


class Plugin(HardRule):
    """NVIDIA's plugins have names with _TRT at the end; other tools mark theirs by the domain trt.plugins."""

    name = "plugin"
    sentence = "a plugin must be loaded where the engine is built and where it runs"
    source = IMPORTER
    severity = "warning"

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """A plugin: whether it is there is not known."""
        if _is_plugin(node):
            yield (
                f"TensorRT needs the plugin {node.op_type} to build and to run it: load it there; deploy.build does "
                "not load plugins"
            )


def _is_taken(node: ir.Node) -> bool:
    """Whether TensorRT's parser takes the operator as the file means it."""
    if node.op_type.startswith("TRT_"):
        return True
    if node.domain == MICROSOFT:
        return node.op_type in _TAKEN_OF_MICROSOFT
    return not node.domain and (node.op_type in onnx_operators() or node.op_type in _TAKEN_OF_MICROSOFT)


def _is_plugin(node: ir.Node) -> bool:
    """Whether the operator is marked as a plugin of TensorRT."""
    return node.op_type not in onnx_operators() and (node.op_type.endswith("_TRT") or node.domain == "trt.plugins")


OPERATOR_RULES = (ForbiddenOp(), UnknownOperator(), EinsumLetters(), Plugin())
