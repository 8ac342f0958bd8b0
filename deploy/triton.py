"""Writes a model repository for NVIDIA's Triton Inference Server from an engine or an ONNX file.

    python -m deploy.triton runs/model.engine --out runs/repository
    python -m deploy.triton runs/model.onnx --out runs/repository --backend python

With --backend python, Triton's Python backend and this package serve any engine, and ONNX files in ONNX Runtime on the
processor. The repository has the file, its config.pbtxt, the names of its classes, and a page (README.md) that says how
to start the server, what to send to it and how to measure it. No GPU and no server are needed to write it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qat.base.console import Command, run_command
from qat.base.outputs import READS, Writes


def _beside(repository: Path, options: Any) -> tuple[Path, ...]:
    from deploy.triton_repository import files_of_model

    return files_of_model(repository, options.name or options.model.stem)


@dataclass(frozen=True, kw_only=True)
class TritonOptions(Command):
    """The options of ``python -m deploy.triton``."""

    model: Annotated[Path, tyro.conf.Positional, READS, tyro.conf.arg(metavar="MODEL.engine|MODEL.onnx")]
    """The engine that python -m deploy.build wrote, or with --backend python an ONNX file."""
    out: Annotated[Path, Writes(folder=True, beside=_beside)]
    """The model repository: a folder, which may have other models."""
    backend: Literal["tensorrt", "python"] = "tensorrt"
    """Who runs it: Triton's TensorRT backend, or its Python backend with this package."""
    name: str | None = None
    """Name of the model on the server; by default the file's name without its suffix."""
    instances: int = 1
    """How many copies of the model run at the same time, on each GPU or on the processor."""
    max_batch: int | None = None
    """The largest batch of an ONNX file, by default 32; an engine has its own."""
    max_queue_delay_us: int = 100
    """How many microseconds a request waits at most for others that share its batch."""
    overwrite: bool = False
    """Replace a model of the same name."""


def main(options: TritonOptions) -> None:
    """Writes the model repository."""
    from deploy.triton_repository import write_repository

    write_repository(
        options.model,
        options.out,
        backend=options.backend,
        name=options.name,
        instances=options.instances,
        max_batch=options.max_batch,
        max_queue_delay_us=options.max_queue_delay_us,
        overwrite=options.overwrite,
    )


def cli() -> None:
    """The console script ``deploy-triton``."""
    run_command(main, TritonOptions, supervised=True)


if __name__ == "__main__":
    cli()
