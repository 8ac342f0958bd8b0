"""The lint: checks one ONNX file by all rules, prints the findings and writes them as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.findings import LintFinding
from export.hard_rules import hard_findings
from export.onnx_network import network_from_onnx
from export.placement_rules import placement_findings, sentence
from export.read import blaming_inconsistencies, is_quantized, read_onnx
from export.reuse_concats import repeat_findings
from qat.base.artifact import write_json
from qat.base.console import say
from qat.base.errors import UserError
from qat.base.text import megabytes
from qat.base.writing import check_writable
from qat.rules.kernel_profile import KernelProfile


def lint_onnx(path: Path | str, profile: KernelProfile | None = None) -> list[LintFinding]:
    """Checks the Q/DQ nodes of an ONNX file, from whatever tool, against TensorRT's rules.

        for finding in lint_onnx("model.onnx"):
            print(finding.severity, finding)

    ``profile``: what deploy.kernels measured on a GPU; None for what was measured on an H200.

    Returns what TensorRT refuses or computes differently (errors), then what it runs slowly (warnings); [] when
    everything is right. Of a float network only what TensorRT refuses.

    Raises UserError when the file is missing or is not ONNX, or is a float network with nothing that TensorRT refuses.
    """
    path = Path(path)
    with blaming_inconsistencies(path):
        model = read_onnx(path)
        if is_quantized(model):
            return lint_model(model, profile)
        findings = hard_findings(model)
    if any(finding.severity == "error" for finding in findings):
        return findings
    raise UserError(
        f"{path} is a float network, with no Q/DQ node to check: quantize it first (python -m export.quantize, or "
        "python -m qat.train)"
    )


def lint_model(model: ir.Model, profile: KernelProfile | None = None) -> list[LintFinding]:
    """All findings in ``model`` (from export.read.read_onnx), errors first; [] when everything is right."""
    findings = [
        *hard_findings(model),
        *placement_findings(network_from_onnx(model), profile),
        *repeat_findings(model.graph),
    ]
    return sorted(findings, key=lambda finding: finding.severity != "error")


def report_findings(
    model: Path, json: Path | None = None, show: int = 8, profile: KernelProfile | None = None
) -> list[LintFinding]:
    """Lints ``model``, prints up to ``show`` findings of each rule, and writes all of them to ``json``.

    Returns all findings. Raises UserError as ``lint_onnx`` does, and when ``json`` cannot be written.
    """
    if show < 0:
        raise UserError(f"--show {show} is not a number of findings: give 0 or more")
    if json is not None:
        if json.resolve() == model.resolve():
            raise UserError(f"--json {json} is the model itself: give another name")
        check_writable(json)
    findings = lint_onnx(model, profile)
    _print(findings, show)
    if json is not None:
        write_json(json, _report(model, findings))
        say(f"wrote {json}")
    return findings


def _report(model: Path, findings: list[LintFinding]) -> dict[str, Any]:
    counts = Counter(finding.severity for finding in findings)
    return {
        "model": model.name,
        "errors": counts["error"],
        "warnings": counts["warning"],
        "bytes_per_image": sum(finding.bytes_per_image for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _print(findings: list[LintFinding], show: int) -> None:
    by_rule: dict[str, list[LintFinding]] = {}
    for finding in findings:
        by_rule.setdefault(finding.rule, []).append(finding)
    for rule, found in by_rule.items():
        times = "once" if len(found) == 1 else f"{len(found)} times"
        meaning = sentence(rule)
        say(f"{found[0].severity}: {rule}, {times}{f' ({meaning})' if meaning else ''}")
        for finding in found[:show]:
            say(f"  {finding.node}: {finding.message}")
        if len(found) > show:
            say(f"  ... and {len(found) - show} more")
    counts = Counter(finding.severity for finding in findings)
    extra = sum(finding.bytes_per_image for finding in findings)
    cost = f", about {megabytes(extra, 1)} more memory traffic for each image" if extra else ""
    total = ", ".join(f"{counts[kind]} {kind}{'' if counts[kind] == 1 else 's'}" for kind in ("error", "warning"))
    say(f"{total}{cost}" if findings else "no finding: TensorRT's hard rules hold, and the placement is right")
