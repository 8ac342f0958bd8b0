"""Takes an implicit INT8 network over into an explicit one, and says whether to move.

    python -m deploy.migrate float.onnx --calibration-cache calibration.cache
    python -m deploy.migrate float.onnx --calibration-cache calibration.cache --data path/to/images --batches 1 8 64

The scales of the calibration cache become Q/DQ nodes. Then both engines are built and compared, with FP32 and FP16
beside them, in accuracy and speed, all in one run. It needs a version of TensorRT that still has implicit INT8, and a
GPU. Exit code 4 means that the explicit engine is less accurate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from deploy.settings import ENGINES
from export.file_form import files_beside, quantized_path
from qat.base.console import Command, run_command
from qat.base.exit_codes import DISAGREES, DONE
from qat.base.outputs import READS, READS_IMAGES, WRITES_TEXT, Writes

_EXPLICIT = Writes(
    default=lambda options: quantized_path(options.model),
    beside=files_beside,
    when=lambda options: options.explicit is None,
)


@dataclass(frozen=True, kw_only=True)
class MigrateOptions(Command):
    """The options of ``python -m deploy.migrate``."""

    model: Annotated[Path, tyro.conf.Positional, READS, tyro.conf.arg(metavar="FLOAT.onnx")]
    """The float ONNX file."""
    calibration_cache: Annotated[Path, READS]
    """The calibration cache that the implicit engine was built with."""
    explicit: Annotated[Path | None, READS, _EXPLICIT] = None
    """The Q/DQ file, if it has been made elsewhere; by default it is made here, which needs torch."""
    data: Annotated[str | None, READS_IMAGES] = None
    """Images to compare on, as deploy.build takes them to calibrate; by default the reference file beside the model."""
    images: int = 5000
    """How many of them, at most."""
    batches: tuple[int, ...] = (1, 32)
    """Fixed batch sizes at which engines are built and timed."""
    engines: Annotated[Path | None, ENGINES] = None
    """Folder that keeps the engines; by default engines/ beside the model."""
    repeat: int = 1
    """Build every engine this often and keep the fastest."""
    runs: int = 200
    """Each engine has at least this many timed inferences."""
    json: Annotated[Path | None, WRITES_TEXT] = None
    """File for the results, as JSON; - is the standard output."""


def main(options: MigrateOptions) -> int:
    """Quantizes, builds, compares. Returns 0, or 4 when the explicit engine is less accurate."""
    from deploy.migration import migrate_engine

    found = migrate_engine(
        options.model,
        options.calibration_cache,
        explicit=options.explicit,
        data=options.data,
        images=options.images,
        batches=options.batches,
        folder=options.engines,
        repeat=options.repeat,
        runs=options.runs,
        output=options.json,
    )
    return DONE if found.as_accurate else DISAGREES


def cli() -> None:
    """The console script ``deploy-migrate``."""
    run_command(main, MigrateOptions, supervised=True)


if __name__ == "__main__":
    cli()
