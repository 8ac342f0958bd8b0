"""What the quantization of each operation costs: which to keep in float, and how much accuracy that gives back.

    python -m qat.sensitivity runs/model.qat
    python -m qat.sensitivity runs/model.qat --images 512 --target-drop 0.2 --json sensitivity.json

Takes a checkpoint of python -m qat.train, or one that python -m qat.calibrate made of labelled images, and measures on
its validation split, never on the test split. The operations that it suggests are what --keep-float of both takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qat.base.artifact import check_writable
from qat.base.console import Command, run_command
from qat.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(Command):
    """The options of ``python -m qat.sensitivity``."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """The checkpoint that python -m qat.train or qat.calibrate wrote."""
    images: int = 256
    """Images of the validation split to measure on, at most."""
    target_drop: float = 0.5
    """Points of accuracy that the quantized network may lie below the float one."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a GPU where there is one."""
    json: Path | None = None
    """Also write all figures here."""
    show: int = 20
    """Operations that are printed, the costliest first; the file of --json has all."""


def main(options: SensitivityOptions) -> None:
    """Measures and prints. Torch is imported here, so that --help answers at once."""
    from qat.compute.device import Compute
    from qat.costs import measure_sensitivity

    if options.images < 1:
        raise UserError(f"--images {options.images}: must be at least 1")
    if not options.target_drop >= 0:
        raise UserError(f"--target-drop {options.target_drop}: must be at least 0, in points of accuracy")
    if options.show < 0:
        raise UserError(f"--show {options.show}: must be at least 0, the number of operations")
    if options.json is not None:
        check_writable(options.json)
    measure_sensitivity(
        options.checkpoint,
        images=options.images,
        target_drop=options.target_drop,
        show=options.show,
        output=options.json,
        compute=Compute.from_options(options.device, "float32", compiled=False),
    )


def cli() -> None:
    """The console script qat-sensitivity."""
    run_command(main, SensitivityOptions)


if __name__ == "__main__":
    cli()
