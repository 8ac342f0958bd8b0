"""Writes a model repository for NVIDIA's Triton Inference Server from an engine of python -m deploy.build.

    python -m deploy.triton runs/model.engine --out runs/repository

The repository has the engine, its config.pbtxt, the names of its classes, and a page (README.md) that says how to start
the server, what to send to it and how to measure it. No GPU and no server are needed to write it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qat.base.console import Command, run_command


@dataclass(frozen=True, kw_only=True)
class TritonOptions(Command):
    """The options of ``python -m deploy.triton``."""

    engine: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL.engine")]
    """The engine that python -m deploy.build wrote with TensorRT."""
    out: Path
    """The model repository: a folder, which may have other models."""
    name: str | None = None
    """Name of the model on the server; by default the engine's name without its suffix."""
    instances: int = 1
    """How many copies of the model run at the same time on each GPU."""
    max_queue_delay_us: int = 100
    """How many microseconds a request waits at most for others that share its batch."""
    overwrite: bool = False
    """Replace a model of the same name."""


def main(options: TritonOptions) -> None:
    """Writes the model repository."""
    from deploy.triton_repository import write_repository

    write_repository(
        options.engine,
        options.out,
        name=options.name,
        instances=options.instances,
        max_queue_delay_us=options.max_queue_delay_us,
        overwrite=options.overwrite,
    )


def cli() -> None:
    """The console script ``deploy-triton``."""
    run_command(main, TritonOptions, supervised=True)


if __name__ == "__main__":
    cli()
