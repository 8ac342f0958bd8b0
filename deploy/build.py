"""Builds a TensorRT engine from a Q/DQ ONNX file, and checks that what the file declares INT8 runs in INT8.

    python -m deploy.build runs/model.onnx
    python -m deploy.build runs/model.onnx --profiles 1,1,8 32,128,256 --timing-cache runs/timing.cache

With a GPU and TensorRT the engine is built for that GPU. Without them TensorRT-RTX builds it ahead of time for a list
of compute capabilities. Exit code 3 means that a layer which the ONNX file declares INT8 runs in another precision.

Older versions of TensorRT also build a float file in any precision, and calibrate implicit INT8:

    python -m deploy.build runs/float.onnx --precision int8 --data path/to/images --calibration-cache runs/float.cache
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deploy.settings import BuilderOptions, CalibrationSettings, Profile, beside_artifact
from qat.base.console import Command, run_command
from qat.base.exit_codes import DONE, NOT_INT8
from qat.base.outputs import READS, Writes

_OUTPUT = Writes(default=lambda options: options.model.with_suffix(".engine"), beside=beside_artifact)


@dataclass(frozen=True, kw_only=True)
class BuildOptions(Command, BuilderOptions):
    """The options of ``python -m deploy.build``."""

    model: Annotated[Path, tyro.conf.Positional, READS, tyro.conf.arg(metavar="MODEL.onnx")]
    """The ONNX file."""
    output: Annotated[Path | None, _OUTPUT] = None
    """The engine to write; by default the model's name with the suffix .engine."""
    builder: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    """auto: TensorRT if it and a GPU are usable, else TensorRT-RTX."""
    compute_capabilities: tuple[str, ...] | None = None
    """The GPUs that TensorRT-RTX builds for; by default 8.6 8.9 12.0."""
    profiles: tuple[str, ...] = ("1,8,32",)
    """Batch sizes MIN,OPT,MAX that a dynamic batch takes and is tuned for. Several make several profiles. A single
    number, such as 128, is a fixed batch, which is the fastest."""
    repeat: int = 1
    """Build this often and keep the engine that is fastest at the OPT batch, because the choice of kernels varies from
    build to build. Needs a GPU."""
    ranges: Annotated[Path | None, READS] = None
    """For --precision int8: the ranges of the tensors; a CSV file with the columns tensor,min,max, JSON like
    {"conv1": [-2.5, 2.5]}, a calibration cache of TensorRT, a Q/DQ ONNX file or a checkpoint of qat.train. They come
    before those of a calibrator."""
    calibration: tyro.conf.OmitArgPrefixes[CalibrationSettings] = field(default_factory=CalibrationSettings)
    verify_speed: bool = False
    """Also build the FP16 engine of the same network, measure both in turns, and say and record which is faster. Needs
    a GPU."""
    fall_back: bool = False
    """With --verify-speed: write the FP16 engine where INT8 is not faster beyond the spread."""
    timing_cache: Annotated[Path | None, Writes(beside=beside_artifact)] = None
    """File that keeps measured kernel times. The first build makes it, later builds are shorter."""
    trust_code: bool = False
    """Run the code that a checkpoint of --ranges names, though it was not made by you on this machine."""


def main(options: BuildOptions) -> int:
    """Builds, audits and writes the engine. Returns 0, or 3 when a declared INT8 layer is not INT8."""
    from deploy.engine_file import build_engine, print_engine_file

    engine = build_engine(
        options.model,
        options.output,
        builder=options.builder,
        profiles=[Profile.parse(text) for text in options.profiles],
        compute_capabilities=options.compute_capabilities,
        repeat=options.repeat,
        timing_cache=options.timing_cache,
        ranges=options.ranges,
        verify_speed=options.verify_speed,
        fall_back=options.fall_back,
        calibration=options.calibration,
        settings=options,
        trust_code=options.trust_code,
    )
    print_engine_file(engine)
    return NOT_INT8 if engine.audit.broken else DONE


def cli() -> None:
    """The console script ``deploy-build``."""
    run_command(main, BuildOptions, supervised=True)


if __name__ == "__main__":
    cli()
