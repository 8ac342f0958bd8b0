"""Measure what the quantization of each operation costs, and suggest which operations to keep in float.

    python -m qat.sensitivity runs/model.qat
    python -m qat.sensitivity runs/model.qat --images 512 --target-drop 0.2 --json sensitivity.json

Takes a checkpoint of python -m qat.train, or of python -m qat.calibrate with labelled images, and measures on its
validation split, never on the test split. Pass the operations it suggests to --keep-float of either command; the
accuracy that they give back is printed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qat.base.console import Command, run_command
from qat.base.errors import UserError
from qat.base.outputs import READS, WRITES_TEXT
from qat.base.writing import check_writable


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(Command):
    """The options of ``python -m qat.sensitivity``."""

    checkpoint: Annotated[Path, tyro.conf.Positional, READS]
    """A checkpoint written by python -m qat.train or qat.calibrate."""
    images: int = 256
    """Largest number of images of the validation split to measure on."""
    target_drop: float = 0.5
    """How many percentage points of accuracy below the float network the quantized one may be."""
    device: str = "auto"
    """cpu, cuda, or cuda:1 and so on; auto takes a GPU if there is one."""
    json: Annotated[Path | None, WRITES_TEXT] = None
    """File for all figures, as JSON; - is the standard output."""
    allow_changed_model: bool = False
    """Go on when the code of the checkpoint's model has changed since, so that the network answers something else."""
    trust_code: bool = False
    """Run the code and read the images that the sidecar names, though it was not made by you on this machine."""
    show: int = 20
    """Number of operations to print, the costliest first; the file of --json has all."""


def main(options: SensitivityOptions) -> None:
    """Measures and prints the costs. Torch is imported here, so that --help answers at once."""
    from qat.compute.device import Compute
    from qat.costs import measure_sensitivity

    if options.images < 1:
        raise UserError(f"--images {options.images} is too few: it must be at least 1")
    if not options.target_drop >= 0:
        raise UserError(f"--target-drop {options.target_drop} is out of range: it must be at least 0 percentage points")
    if options.show < 0:
        raise UserError(f"--show {options.show} is not a number of operations: it must be at least 0")
    if options.json is not None:
        check_writable(options.json)
    measure_sensitivity(
        options.checkpoint,
        images=options.images,
        target_drop=options.target_drop,
        show=options.show,
        output=options.json,
        allow_changed_model=options.allow_changed_model,
        trust_code=options.trust_code,
        compute=Compute.from_options(options.device, "float32", compiled=False),
    )


def cli() -> None:
    """The console script qat-sensitivity."""
    run_command(main, SensitivityOptions)


if __name__ == "__main__":
    cli()
