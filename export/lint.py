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

from qat.artifact import UserError, write_json
from qat.console import Command, run_command, say, table

if TYPE_CHECKING:
    import onnx_ir as ir

    from export.findings import Finding

EXIT_FOUND = 1


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

    model = read_onnx(options.model)
    if not is_quantized(model):
        raise UserError(
            f"{options.model} is a float network, with no Q/DQ node to check: quantize it first "
            "(python -m export.quantize, or python -m qat.train)"
        )
    findings = lint(model)
    _print(findings, options.show)
    errors = sum(finding.severity == "error" for finding in findings)
    if options.json:
        summary = {"errors": errors, "warnings": len(findings) - errors}
        content: dict[str, Any] = {"model": options.model.name, **summary, "findings": list(map(asdict, findings))}
        write_json(options.json, content)
        say(f"wrote {options.json}")
    return EXIT_FOUND if errors or (options.strict and findings) else 0


def lint(model: ir.Model) -> list[Finding]:
    """All findings in ``model``, errors first; [] when TensorRT takes it and the placement is right."""
    from export.hard_rules import hard_findings
    from export.onnx_network import network_from_onnx
    from export.placement_rules import placement_findings

    return [*hard_findings(model), *placement_findings(network_from_onnx(model))]


def _print(findings: list[Finding], show: int) -> None:
    from export.findings import megabytes
    from export.placement_rules import sentence

    for rule in dict.fromkeys(finding.rule for finding in findings):
        of_rule = [finding for finding in findings if finding.rule == rule]
        meaning = f": {sentence(rule)}" if sentence(rule) else ""
        say(f"{of_rule[0].severity} {rule}, {len(of_rule)} times{meaning}")
        for finding in of_rule[:show]:
            say(f"  {finding.node}: {finding.message}")
        if len(of_rule) > show:
            say(f"  ... and {len(of_rule) - show} more")
    counts = Counter(finding.severity for finding in findings)
    extra = sum(finding.bytes_per_image for finding in findings)
    cost = f", about {megabytes(extra)} more memory traffic for each image" if extra else ""
    if findings:
        say(f"{counts['error']} errors, {counts['warning']} warnings{cost}")
    else:
        table("Lint", ("rules", "findings"), [("TensorRT's hard rules", 0), ("placement", 0)])


if __name__ == "__main__":
    run_command(main, LintOptions)
