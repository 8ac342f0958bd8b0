"""TensorRT's hard rules for Q/DQ networks, checked on an ONNX model.

TensorRT refuses a network that breaks one, or computes it otherwise than the file says. Each rule is one object:
export/scale_rules.py has those about scales, export/code_rules.py those about codes and zero points,
export/graph_rules.py those about where scales lie and where Q and DQ stand, export/operator_rules.py those about which
operators there are.
"""

from __future__ import annotations

import onnx_ir as ir

from export.code_rules import CODE_RULES
from export.findings import LintFinding
from export.graph_rules import GRAPH_RULES
from export.operator_rules import OPERATOR_RULES
from export.qdq import QdqModel
from export.rule import HardRule
from export.scale_rules import SCALE_RULES
from qat.base.number_format import INT8, NumberFormat

HARD_RULES: dict[str, HardRule] = {
    rule.name: rule for rule in (*SCALE_RULES, *CODE_RULES, *GRAPH_RULES, *OPERATOR_RULES)
}
"""All hard rules by their names, in the order in which a node is checked."""


def hard_findings(model: ir.Model, number_format: NumberFormat = INT8) -> list[LintFinding]:
    """All broken rules in ``model``, in the order of its nodes; [] if TensorRT's rules hold.

    ``number_format`` is the one that codes must have.
    """
    checked = QdqModel.from_ir(model, number_format)
    return [
        finding for node in checked.nodes for rule in HARD_RULES.values() for finding in rule.findings(checked, node)
    ]
