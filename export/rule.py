"""What a hard rule is: a name, a sentence, a source, and a check of one node."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from export.findings import LintFinding, Severity
from export.qdq import QdqModel, name_of

GUIDE = 'TensorRT Developer Guide, "Working with Quantized Types" and "Explicit Quantization"'
PARSER = "NVIDIA's ONNX parser (onnx-tensorrt, QuantDequantLinearHelper) as of TensorRT 9 and 10.11"
RTX = "what TensorRT-RTX 1.7 does with the fault: tests/export/test_lint.py builds it"
ONNX = "the definition of the ONNX operators"


class HardRule(ABC):
    """One of TensorRT's rules for Q/DQ networks; each is one object (export/hard_rules.py lists them)."""

    name: ClassVar[str]
    """What findings call it."""
    sentence: ClassVar[str]
    """What must hold, for people. Findings do not repeat it: their messages say more."""
    source: ClassVar[str]
    """Who says so."""
    operators: ClassVar[tuple[str, ...]] = ()
    """The operators whose nodes are checked; () for all."""
    severity: ClassVar[Severity] = "error"

    @abstractmethod
    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """What is wrong with ``node``, in plain words, each with what to do; nothing if the rule holds."""

    def findings(self, model: QdqModel, node: ir.Node) -> Iterator[LintFinding]:
        """A finding for each thing that is wrong with ``node``."""
        if not self.operators or node.op_type in self.operators:
            for message in self.check(model, node):
                yield LintFinding(name_of(node), self.name, message, self.severity)
