"""What runs in INT8 inside the parts of a network that another compiler handles, as their kernels tell.

An older TensorRT gives a transformer as a whole to such a compiler, and lists it as one layer. Which kernel computes
which layer of the file is not told. But if all kernels that multiply are INT8, so are all layers; and if some are not,
and no more than there are layers in the part that the file declares float, they are taken for those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deploy.executor import BoundContext
from deploy.kernel_trace import Kernel, recorded_kernels
from deploy.precision_audit import PrecisionAudit, PrecisionFinding
from deploy.runtime import Engine
from deploy.settings import BuildSettings
from deploy.trt import Toolkit
from qat.base.errors import UserError
from qat.base.number_format import INT8


def look_into_parts(audit: PrecisionAudit, plan: Any, toolkit: Toolkit, settings: BuildSettings) -> PrecisionAudit:
    """``audit`` with what the kernels of an engine say about its parts; ``plan`` is run once if it has any.

    Without a GPU the findings stay as they are, without CUPTI too, with the reason.
    """
    if toolkit.device is None or not any(finding.in_part for finding in audit.findings):
        return audit
    try:
        return settle(audit, _kernels(plan, toolkit, settings))
    except UserError as error:
        findings = [replace(one, cause=f"{one.cause}; {error}") if one.cause else one for one in audit.findings]
        return replace(audit, findings=tuple(findings))


def settle(audit: PrecisionAudit, kernels: Sequence[Kernel]) -> PrecisionAudit:
    """``audit`` with the precision of the layers in parts, by all ``kernels`` of one inference in their order."""
    inside = [finding for finding in audit.findings if finding.in_part]
    products = _products_of_parts(audit, kernels)
    floats = [kernel for kernel, precision in products if precision != INT8.name]
    spare = sum(not finding.declared_int8 for finding in inside)
    proved = len(floats) < len(products) and len(floats) <= spare
    findings = [_settled(one, products, floats, proved=proved) if one.in_part else one for one in audit.findings]
    return replace(audit, findings=tuple(findings), kernels=tuple(kernels))


def describe(audit: PrecisionAudit) -> str:
    """What the kernels of the parts multiply, such as ``...: 61 kernels multiply (61 INT8)``."""
    counts = Counter(precision for _, precision in _products_of_parts(audit, audit.kernels))
    attentions = sum(kernel.is_attention for kernel in audit.kernels)
    named = ", ".join(f"{count} {precision}" for precision, count in counts.most_common())
    computed = f", {attentions} of them whole attentions" if attentions else ""
    return f"parts that another compiler handles: {counts.total()} kernels multiply ({named}){computed}"


def _settled(
    finding: PrecisionFinding, products: Sequence[tuple[Kernel, str]], floats: Sequence[Kernel], *, proved: bool
) -> PrecisionFinding:
    if not finding.declared_int8:
        return finding
    if proved:
        return replace(finding, precision=INT8.name, cause="")
    named = f", such as {floats[0].name}" if floats else ""
    cause = (
        f"{len(floats)} of the {len(products)} kernels of its part that multiply are not {INT8.name}{named}; which "
        "layer each computes is not told"
    )
    return replace(finding, precision="unknown", cause=cause)


def _products_of_parts(audit: PrecisionAudit, kernels: Sequence[Kernel]) -> list[tuple[Kernel, str]]:
    """The kernels of parts that multiply, and what they multiply. Those of the engine's other layers are left out."""
    others = [layer.tactic for layer in audit.layers if layer.tactic and not layer.foreign_ends]
    found: list[tuple[Kernel, str]] = []
    reads_codes = False  # whether what was computed last are codes
    for kernel in kernels:
        tactic = next((tactic for tactic in others if kernel.name.startswith(tactic)), None)
        if tactic is not None:
            others.remove(tactic)
        elif kernel.multiplies:
            codes = INT8.name if reads_codes else "float"
            found.append((kernel, codes if kernel.is_attention and kernel.type == "unknown" else kernel.type))
        if not kernel.only_moves:
            reads_codes = kernel.writes_codes
    return found


def _kernels(plan: Any, toolkit: Toolkit, settings: BuildSettings) -> list[Kernel]:
    """The kernels of one inference. Raises UserError when CUPTI does not tell them."""
    with Engine.from_plan(plan, toolkit, settings) as engine, engine.all_executors() as executors:
        context = BoundContext(executors[0], engine.profiles[0].opt)
        try:
            with recorded_kernels() as kernels:
                context.run()
        finally:
            context.close()
    return kernels
