"""Measures which layers gain by INT8 on the GPU at hand, for the rules that place Q/DQ nodes.

    python -m deploy.kernels --output h200.json
    python -m deploy.kernels --output h200.json --families grouped transposed --minutes 5

Each layer stands in a small INT8 network, which is built and timed twice: with the layer in INT8 and with it in float.
The time is that of the whole network, conversions included. What has been measured is kept, so a run that was stopped
goes on where it ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from qat.base.console import Command, run_command
from qat.base.exit_codes import DONE
from qat.base.outputs import Writes


@dataclass(frozen=True, kw_only=True)
class KernelOptions(Command):
    """The options of ``python -m deploy.kernels``."""

    output: Annotated[Path, Writes()]
    """The profile, as JSON."""
    families: tuple[str, ...] = ()
    """Families of layers, such as grouped, transposed, depthwise; by default all."""
    batch: int = 32
    """Images in a batch."""
    runs: int = 200
    """Each network has at least this many timed inferences."""
    minutes: float = 30.0
    """No layer is begun after these."""
    again: bool = False
    """Measure again what the file has."""


def main(options: KernelOptions) -> int:
    """Measures and writes the profile. Returns 0."""
    from deploy.kernel_sweep import sweep_kernels

    sweep_kernels(options.families, options.batch, options.runs, options.minutes, options.output, again=options.again)
    return DONE


def cli() -> None:
    """The console script ``deploy-kernels``."""
    run_command(main, KernelOptions, supervised=True)


if __name__ == "__main__":
    cli()
