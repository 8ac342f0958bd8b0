"""Writes one page about a run: whether to ship it, and what every layer computes in, costs, and why.

    python -m deploy.report runs
    python -m deploy.report runs/model.engine --evaluation runs/evaluation.json --benchmark runs/benchmark.json
    python -m deploy.report runs/new runs/last

Reads the sidecars of the engine, of its ONNX file and of its checkpoint, and the results of other commands that lie
beside them. Refuses files that do not belong together; a stage that is missing is named with its command.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qat.base.console import Command, run_command
from qat.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Command):
    """The options of ``python -m deploy.report``."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """A folder, or an engine, ONNX file or checkpoint; a second one is what it is compared with."""
    output: Path | None = None
    """The page to write; by default report.html in the folder of the first run."""
    evaluation: Path | None = None
    """What python -m deploy.evaluate --json wrote about this engine."""
    benchmark: Path | None = None
    """What python -m deploy.benchmark wrote about this engine's ONNX file."""
    json: Path | None = None
    """File for the verdict, the figures and all layers, as JSON; - is the standard output."""
    markdown: Path | None = None
    """File for the verdict and the figures, as a table of GitHub's Markdown; - is the standard output."""


def main(options: ReportOptions) -> None:
    """Writes the page and prints the table of results."""
    from deploy.report_page.render import write_report

    if not options.runs:
        raise UserError("name a run: a folder, an engine, an ONNX file or a checkpoint")
    first = options.runs[0]
    output = options.output or (first if first.is_dir() else first.parent) / "report.html"
    write_report(
        options.runs, output, options.evaluation, options.benchmark, json=options.json, markdown=options.markdown
    )


def cli() -> None:
    """The console script ``deploy-report``."""
    run_command(main, ReportOptions, supervised=True)


if __name__ == "__main__":
    cli()
