"""Lists what an engine consists of: every layer with its precision, memory format, kernel, ONNX nodes and time.

    python -m deploy.audit runs/model.engine
    python -m deploy.audit runs/model.engine --json runs/audit.json

Times come from TensorRT's profiler, which runs layer by layer: their sum is more than the engine takes as a whole. If
the engine cannot be run here (no GPU, another GPU), the layers are those that the build recorded, without times.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qat.base.artifact import write_result
from qat.base.console import Command, run_command, say, warn
from qat.base.outputs import READS, WRITES_TEXT
from qat.base.writing import check_writable


@dataclass(frozen=True, kw_only=True)
class AuditOptions(Command):
    """The options of ``python -m deploy.audit``."""

    engine: Annotated[Path, tyro.conf.Positional, READS]
    """The engine that python -m deploy.build wrote."""
    json: Annotated[Path | None, WRITES_TEXT] = None
    """File for the whole audit, as JSON; - is the standard output."""
    batch: int | None = None
    """Batch size at which times are measured; by default the one that the engine is tuned for."""
    runs: int = 50
    """Number of inferences that the times are averaged over."""
    peaks: bool = False
    """Also measure what the GPU can do at most: the report then shows how far each layer is from it."""
    trust: bool = False
    """Load the engine even if it is not the file that its sidecar was written for."""


def main(options: AuditOptions) -> None:
    """Prints the audit, and writes it as JSON."""
    from deploy.engine_audit import audit_engine, print_engine_audit

    if options.json:
        check_writable(options.json)
    audit = audit_engine(
        options.engine, batch=options.batch, runs=options.runs, trust=options.trust, peaks=options.peaks
    )
    if audit.why_not_measured:
        warn(f"the engine cannot be run here, so its times are not measured: {audit.why_not_measured}")
    print_engine_audit(audit)
    if options.json:
        write_result(options.json, audit.to_json())
        say(f"wrote {options.json}")


def cli() -> None:
    """The console script ``deploy-audit``."""
    run_command(main, AuditOptions, supervised=True)


if __name__ == "__main__":
    cli()
