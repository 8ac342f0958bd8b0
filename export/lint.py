"""Check the Q/DQ nodes of any ONNX file against TensorRT's rules: what it refuses, and what it runs slowly.

    python -m export.lint runs/model.onnx
    python -m export.lint other_tool.onnx --json findings.json

An error is something that TensorRT refuses or computes differently; a warning costs speed. In a float network only
operators that TensorRT refuses are sought. Exit codes: 0 no error, 1 errors (with --strict also warnings), 2 a file
that cannot be checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qat.base.console import Command, run_command
from qat.base.exit_codes import DONE, LINT_ERRORS
from qat.base.outputs import READS, WRITES_TEXT
from qat.rules.kernel_profile import given_profile


@dataclass(frozen=True, kw_only=True)
class LintOptions(Command):
    """The options of ``python -m export.lint``."""

    model: Annotated[Path, tyro.conf.Positional, READS]
    """An ONNX file with QuantizeLinear and DequantizeLinear nodes, from whatever tool."""
    profile: Annotated[Path | None, READS] = None
    """What deploy.kernels measured on the GPU that the engine is for; by default what was measured on an H200."""
    json: Annotated[Path | None, WRITES_TEXT] = None
    """Also write all findings here, as JSON; - is the standard output."""
    strict: bool = False
    """Exit with code 1 for warnings too."""
    show: int = 8
    """Findings of each rule that are printed; the file of --json has all."""


def main(options: LintOptions) -> int:
    """Prints what is found. ONNX is imported here, so that --help answers at once."""
    from export.linter import report_findings

    findings = report_findings(options.model, options.json, options.show, given_profile(options.profile))
    broken = [finding for finding in findings if options.strict or finding.severity == "error"]
    return LINT_ERRORS if broken else DONE


def cli() -> None:
    """The console script export-lint."""
    run_command(main, LintOptions, supervised=True)


if __name__ == "__main__":
    cli()
