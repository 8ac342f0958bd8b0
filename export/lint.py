"""Check the Q/DQ nodes of any ONNX file against TensorRT's rules: what it refuses, and what it runs slowly.

    python -m export.lint runs/model.onnx
    python -m export.lint other_tool.onnx --json findings.json

An error is something that TensorRT refuses or computes differently; a warning costs speed. Exit codes: 0 no error,
1 errors (with --strict also warnings), 2 a file that cannot be checked.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qat.base.artifact import check_writable, write_json
from qat.base.console import Command, run_command, say
from qat.base.errors import UserError
from qat.base.exit_codes import LINT_ERRORS

if TYPE_CHECKING:
    import onnx_ir as ir

    from export.findings import LintFinding, Severity


@dataclass(frozen=True, kw_only=True)
class LintOptions(Command):
    """The options of ``python -m export.lint``."""

    model: Annotated[Path, tyro.conf.Positional]
    """An ONNX file with QuantizeLinear and DequantizeLinear nodes, from whatever tool."""
    json: Path | None = None
    """Also write all findings here."""
    strict: bool = False
    """Exit with code 1 for warnings too."""
    show: int = 8
    """Findings of each rule that are printed; the file of --json has all."""


def main(options: LintOptions) -> int:
    """Prints what is found. ONNX is imported here, so that --help answers at once."""
    from export.read import is_quantized, read_onnx

    if options.show < 0:
        raise UserError(f"--show {options.show} is no number of findings: give 0 or more")
    if options.json is not None:
        if options.json.resolve() == options.model.resolve():
            raise UserError(f"--json {options.json} is the model itself: give another name")
        check_writable(options.json)
    model = read_onnx(options.model)
    if not is_quantized(model):
        raise UserError(
            f"{options.model} is a float network, with no Q/DQ node to check: quantize it first "
            "(python -m export.quantize, or python -m qat.train)"
        )
    findings = lint(model)
    counts = Counter(finding.severity for finding in findings)
    _print(findings, options.show)
    if options.json is not None:
        write_json(options.json, _report(options.model, findings, counts))
        say(f"wrote {options.json}")
    return LINT_ERRORS if counts["error"] or (options.strict and findings) else 0


def lint(model: ir.Model) -> list[LintFinding]:
    """All findings in ``model``, errors first; [] when TensorRT takes it and the placement is right."""
    from export.hard_rules import hard_findings
    from export.onnx_network import network_from_onnx
    from export.placement_rules import placement_findings
    from export.reuse_concats import repeated_concat

    findings = [
        *hard_findings(model),
        *placement_findings(network_from_onnx(model)),
        *repeated_concat(model.graph),
    ]
    return sorted(findings, key=lambda finding: finding.severity != "error")


def _report(model: Path, findings: list[LintFinding], counts: Counter[Severity]) -> dict[str, Any]:
    return {
        "model": model.name,
        "errors": counts["error"],
        "warnings": counts["warning"],
        "bytes_per_image": sum(finding.bytes_per_image for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _print(findings: list[LintFinding], show: int) -> None:
    from export.placement_rules import sentence
    from qat.base.text import megabytes

    by_rule: dict[str, list[LintFinding]] = {}
    for finding in findings:
        by_rule.setdefault(finding.rule, []).append(finding)
    for rule, found in by_rule.items():
        times = "once" if len(found) == 1 else f"{len(found)} times"
        say(f"{found[0].severity}: {rule}, {times}{f' ({meaning})' if (meaning := sentence(rule)) else ''}")
        for finding in found[:show]:
            say(f"  {finding.node}: {finding.message}")
        if len(found) > show:
            say(f"  ... and {len(found) - show} more")
    counts = Counter(finding.severity for finding in findings)
    extra = sum(finding.bytes_per_image for finding in findings)
    cost = f", about {megabytes(extra, 1)} more memory traffic for each image" if extra else ""
    total = ", ".join(f"{counts[kind]} {kind}{'' if counts[kind] == 1 else 's'}" for kind in ("error", "warning"))
    say(f"{total}{cost}" if findings else "no finding: TensorRT's hard rules hold, and the placement is right")


if __name__ == "__main__":
    run_command(main, LintOptions)
