"""Finds which layers of an INT8 network are faster in float on the GPU at hand, by the time of the whole engine.

    python -m deploy.tune model.qat
    python -m deploy.tune model.onnx --budget 20 --batch 8 --output runs/model.tuned.json
    python -m deploy.tune model.onnx --costs sensitivity.json --max-drop 0.2

Writes the placement, the ONNX file with fewer quantizers, and its engine. Nothing is trained again: what stays
quantized has the same scales. qat.train, qat.calibrate and export.quantize take the placement as --placement.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from export.file_form import reference_path
from qat.base.artifact import sidecar_path
from qat.base.console import Command, run_command
from qat.base.exit_codes import DONE
from qat.base.outputs import READS, Writes


def _default_output(options: Any) -> Path:
    return options.model.with_suffix(".tuned.json")  # type: ignore[no-any-return]


def _beside(output: Path, options: Any) -> tuple[Path, ...]:
    tuned, engine = output.with_suffix(".onnx"), output.with_suffix(".engine")
    exported = (options.model.with_suffix(".onnx"),) if options.model.suffix == ".qat" else ()
    files = (tuned, engine, *exported)
    return (*files, *map(sidecar_path, files), *map(reference_path, exported))


@dataclass(frozen=True, kw_only=True)
class TuneOptions(Command):
    """The options of ``python -m deploy.tune``."""

    model: Annotated[Path, tyro.conf.Positional, READS]
    """The ONNX file with Q/DQ nodes, or a checkpoint of qat.train, which is exported first."""
    output: Annotated[Path | None, Writes(default=_default_output, beside=_beside)] = None
    """The placement, as JSON; by default model.tuned.json. Beside it model.tuned.onnx and model.tuned.engine."""
    budget: float = 10.0
    """Minutes; nothing is tried after them."""
    batch: int = 32
    """The batch size to tune for."""
    runs: int = 200
    """Each engine of a comparison has at least this many timed inferences."""
    costs: Annotated[Path | None, READS] = None
    """What qat.sensitivity --json wrote: placements with more in float are timed too, as far as it went."""
    max_drop: float | None = None
    """Percentage points of accuracy below the float network that are acceptable, by --costs."""
    trust_code: bool = False
    """Run the code that the sidecar of a checkpoint names, though it was not made by you on this machine."""


def main(options: TuneOptions) -> int:
    """Searches and writes. Returns 0."""
    from deploy.tuned_engine import tune_engine

    tune_engine(
        options.model,
        options.output,
        minutes=options.budget,
        batch=options.batch,
        runs=options.runs,
        costs=options.costs,
        max_drop=options.max_drop,
        trust_code=options.trust_code,
    )
    return DONE


def cli() -> None:
    """The console script ``deploy-tune``."""
    run_command(main, TuneOptions, supervised=True)


if __name__ == "__main__":
    cli()
