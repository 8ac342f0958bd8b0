"""Why the parser or the builder refuses a network, in one line: which node, why, and what to do.

TensorRT's own errors are paragraphs of source locations. The cause is usually a violation of one of its few Q/DQ rules,
which are recognised by TensorRT's words. The verbose log is read too, because only it names a node's scale. An error
that is not recognised is shortened, not hidden.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.build_log import BuildLog, raise_if_out_of_memory
from deploy.trt import failed_node
from qat.base.onnx_file import flaw

_HALF = ("HALF", "FLOAT16", "BFLOAT16", "BF16")
_Q_DQ = ("QuantizeLinear", "DequantizeLinear")
# The parser logs this and no error when it reads UINT8 codes as INT8, so that 128..255 saturate at 127.
_UINT8_TAKEN_AS_INT8 = "UINT8 zero_point"
_PARSING = re.compile(r"^Parsing node: (?P<node>.*) \[(?P<op>\w+)\]$")
_FAILED_AT = re.compile(r'While parsing node number (?P<index>\d+) \[(?P<op>\w+) -> "(?P<output>.*?)"')
_INITIALIZER = re.compile(r"Failed to import initializer: (?!In node)(?P<name>.+?)\s*$")
_NO_FILE = re.compile(r"Failed to open file: (?P<path>.+)")
_SOURCE = re.compile(r"^\w+\.cpp:\d+: ")
# With precisions by layer that the builder must obey; each names the layer.
_NO_KERNEL = re.compile(
    r"No supported formats for (?P<layer>.+)|Internal Error \((?P<foreign>.+?) requires foreign node"
)
_NO_RANGE = re.compile(r"No non-int8 implementation of layer (?P<layer>.+?) is supported")
# Without a GPU each error is followed by one about the driver, which is never the cause.
_NOISE = re.compile(r"cudaError|CUDA driver version|^--- (Begin|End) node|^Invalid Node - |^\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class ParserFailure:
    """A node that the ONNX parser refuses: its name and operator, and the parser's own words."""

    node: str
    op: str
    reason: str


def parser_failures(parser: Any, log: BuildLog) -> list[ParserFailure]:
    """The parser's errors. A node without a name, or that the parser's API does not name, is named by its output."""
    failures = []
    named = [match.groupdict() for text in log.errors() if (match := _FAILED_AT.search(text))]
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        hint = named[index] if index < len(named) else {"op": "", "output": ""}
        node, op = failed_node(error) or ("", hint["op"])
        failures.append(ParserFailure(node or hint["output"], op, error.desc()))
    return failures


def explain(model: Path, failures: list[ParserFailure], log: BuildLog) -> str:
    """One line about the first failure in the file ``model``, and how many others there are."""
    if not failures:
        return f"TensorRT refused it and gave no reason: {_condense(' '.join(log.errors()[-2:]))}"
    first, *others = failures
    if not first.node and not first.op:
        return _explain_file(model, first, log)
    more = f" ({len(others)} more nodes are refused)" if others else ""
    return f"{first.op} node {first.node!r}: {_cause(first, log)}{more}"


def uint8_nodes(log: BuildLog) -> list[str]:
    """Names of Q/DQ nodes with UINT8 zero points, which the parser reads as INT8 with only a warning."""
    found, node = [], ""
    for _, text in log.messages:
        if match := _PARSING.match(text):
            node = match["node"]
        elif _UINT8_TAKEN_AS_INT8 in text:
            found.append(node)
    return found


def build_failure(log: BuildLog) -> str:
    """The last errors of a failed build, in one line. Raises UserError if the GPU's memory was full."""
    raise_if_out_of_memory(log)
    said = "\n".join(log.errors())
    if match := _NO_RANGE.search(said):
        return f"layer {match['layer']!r} is to be INT8, and a tensor of it has no range: give it one"
    if match := _NO_KERNEL.search(said):
        return f"layer {match['layer'] or match['foreign']!r} has no kernel of the type that it is to have"
    lines = [condensed for text in log.errors() if (condensed := _condense(text))]
    return "; ".join(lines[-2:]) or "it gave no reason"


def _cause(failure: ParserFailure, log: BuildLog) -> str:
    reason = failure.reason
    if "Scale coefficients must all be positive" in reason:
        scale, kind = _scale_of(failure, log)
        if kind in _HALF:
            return (
                f"its scale {scale} is in half precision, which this version does not take: export without --float-type"
            )
        return (
            f"its scale {scale} has a value that is zero, negative or not a number. "
            "The cause is a dead channel (all weights or activations are zero): "
            "floor the scale to a small positive number and export again"
        )
    if failure.op in _Q_DQ and ("shiftIsAllZeros" in reason or "zero zero point" in reason):
        return "its zero point is not 0, but TensorRT's INT8 is symmetric: quantize again with INT8 and zero point 0"
    if failure.op == "DequantizeLinear" and "type Int32" in reason:
        return "it dequantizes INT32, a quantized bias, which TensorRT refuses: leave the bias in float"
    if "UNSUPPORTED" in reason or reason.strip() == "false" or "Plugin not found" in reason:
        return "TensorRT has no such operator: replace it in the model, or remove it"
    return f"TensorRT refuses it: {_condense(reason)}"


def _explain_file(model: Path, failure: ParserFailure, log: BuildLog) -> str:
    """Why the parser refuses the file before it comes to a node: the weights outside of it, or the file itself."""
    errors = [_SOURCE.sub("", text) for text in log.errors() if "In function import" not in text]
    said = "; ".join(condensed for text in errors if (condensed := _condense(text))) or _condense(failure.reason)
    if "import initializer" not in failure.reason:
        wrong = flaw(model)
        return f"it {wrong}: make or copy it again" if wrong else f"TensorRT's parser says: {said}"
    named = _INITIALIZER.search(failure.reason)
    initializer = f"initializer {named['name']!r}" if named else "an initializer"
    missing = _NO_FILE.search(said)
    if missing and not Path(missing["path"]).is_file():
        return (
            f"the external data of {initializer} is missing: no file {missing['path']}, where the parser looks for it"
        )
    if "external" in said or "file" in said:
        return f"the external data of {initializer} is refused ({said}): copy both files again, or export again"
    return f"{initializer} is refused: {said}"


def _scale_of(failure: ParserFailure, log: BuildLog) -> tuple[str, str]:
    """Name and shape of the failed node's scale, and its type, from where the log lists the node's inputs."""
    start = f"{failure.node} [{failure.op}] inputs: "
    for text in reversed(log.texts("VERBOSE")):
        if text.startswith(start):
            inputs = re.findall(r"\[(.+?) -> \(([\d, -]*)\)\[(\w+)\]\]", text[len(start) :])
            if len(inputs) > 1:
                name, shape, kind = inputs[1]
                return f"{name!r} (shape [{shape}])", kind
    return "(its second input)", ""


def _condense(text: str) -> str:
    """``text`` without driver noise, source locations and line breaks."""
    kept = [line for line in text.splitlines() if not _NOISE.search(line)]
    short = " ".join(" ".join(kept).split())
    short = re.sub(r"Assertion failed: .*?: ", "", short)
    return re.sub(r"\(?In \w+ at \S+\)?", "", short).strip(" .")
