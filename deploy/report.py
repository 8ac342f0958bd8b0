"""Writes one page that shows what was trained, exported and built: accuracies, precisions, and every Q/DQ's reason.

    python -m deploy.report runs/model.engine
    python -m deploy.report runs/model.engine --evaluation runs/evaluation.json --benchmark runs/benchmark.json

Reads the sidecars of the engine, of its ONNX file and of its checkpoint, and the results of deploy.evaluate and
deploy.benchmark. Refuses files that do not belong together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qat.base.console import Command, run_command


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Command):
    """The options of ``python -m deploy.report``."""

    engine: Annotated[Path, tyro.conf.Positional]
    """The engine that python -m deploy.build wrote."""
    output: Path | None = None
    """The page to write; by default report.html beside the engine."""
    evaluation: Path | None = None
    """What python -m deploy.evaluate --json wrote about this engine."""
    benchmark: Path | None = None
    """What python -m deploy.benchmark wrote about this engine's ONNX file."""


def main(options: ReportOptions) -> None:
    """Writes the page and prints the table of results."""
    from deploy.report_page import write_report

    output = options.output or options.engine.with_name("report.html")
    write_report(options.engine, output, options.evaluation, options.benchmark)


def cli() -> None:
    """The console script ``deploy-report``."""
    run_command(main, ReportOptions)


if __name__ == "__main__":
    cli()
