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
from typing import Annotated, Any

import tyro

from qat.base.console import Command, run_command
from qat.base.errors import UserError
from qat.base.outputs import READS, WRITES_TEXT, Writes


def _default_output(options: Any) -> Path | None:
    if not options.runs:
        return None
    first: Path = options.runs[0]
    return (first if first.is_dir() else first.parent) / "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Command):
    """The options of ``python -m deploy.report``."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, READS]
    """A folder, or an engine, ONNX file or checkpoint; a second one is what it is compared with."""
    output: Annotated[Path | None, Writes(default=_default_output)] = None
    """The page to write; by default report.html in the folder of the first run."""
    evaluation: Annotated[Path | None, READS] = None
    """What python -m deploy.evaluate --json wrote about this engine."""
    benchmark: Annotated[Path | None, READS] = None
    """What python -m deploy.benchmark wrote about this engine's ONNX file."""
    json: Annotated[Path | None, WRITES_TEXT] = None
    """File for the verdict, the figures and all layers, as JSON; - is the standard output."""
    markdown: Annotated[Path | None, WRITES_TEXT] = None
    """File for the verdict and the figures, as a table of GitHub's Markdown; - is the standard output."""


def main(options: ReportOptions) -> None:
    """Writes the page and prints the table of results."""
    from deploy.report_page.render import write_report

    output = options.output or _default_output(options)
    if output is None or not options.runs:
        raise UserError("name a run: a folder, an engine, an ONNX file or a checkpoint")
    write_report(
        options.runs, output, options.evaluation, options.benchmark, json=options.json, markdown=options.markdown
    )


def cli() -> None:
    """The console script ``deploy-report``."""
    run_command(main, ReportOptions, supervised=True)


if __name__ == "__main__":
    cli()
