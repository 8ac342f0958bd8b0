"""Show what is quantized and why, what stays in float and why, and which tensors share a scale.

    python -m qat.placement resnet50 --svg resnet50.svg
    python -m qat.placement timm/darknet53 --json placement.json --keep-float stem 'head.*'
    python -m qat.placement runs/model.qat --svg model.svg

For a checkpoint, this shows the placement it was trained with; for a model, the placement that python -m qat.train
would choose with the same options.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qat.base.artifact import write_json
from qat.base.console import Command, run_command, say
from qat.base.outputs import READS, WRITES_TEXT
from qat.base.writing import atomic_write, check_writable
from qat.rules.kernel_profile import given_profile
from qat.rules.tuned import tuned_names


@dataclass(frozen=True, kw_only=True)
class PlacementOptions(Command):
    """The options of ``python -m qat.placement``."""

    model: Annotated[str, tyro.conf.Positional, READS]
    """A torchvision model, timm/NAME, path/to/file.py:function, or a checkpoint written by python -m qat.train."""
    keep_float: tuple[str, ...] = ()
    """Patterns (* ? []) of modules, operations and tensors that stay in float, by the names that this command shows."""
    placement: Annotated[Path | None, READS] = None
    """A placement that deploy.tune wrote for this network: what it leaves in float stays in float."""
    profile: Annotated[Path | None, READS] = None
    """What deploy.kernels measured on the GPU that the engine is for; by default what was measured on an H200."""
    image_size: int | None = None
    """Height and width of the input in pixels; 224 by default."""
    num_classes: int | None = None
    """Number of classes of the model; 1000 by default."""
    channels: Literal[1, 3] | None = None
    """Channels of the images; 3 by default."""
    allow_changed_model: bool = False
    """Go on when the code of the checkpoint's model has changed since, so that the network answers something else."""
    trust_code: bool = False
    """Run the code and read the images that the sidecar names, though it was not made by you on this machine."""
    json: Annotated[Path | None, WRITES_TEXT] = None
    """File for the placement, the scale groups and the rules, as JSON; - is the standard output."""
    svg: Annotated[Path | None, WRITES_TEXT] = None
    """File for a picture of the graph, as SVG; - is the standard output."""


def main(options: PlacementOptions) -> None:
    """Prints the placement and writes the files asked for. Torch is imported here, so that --help answers at once."""
    from qat.placement_view import view_placement
    from qat.rules.describe import placement_json, print_placement
    from qat.rules.drawing import draw

    for path in (options.json, options.svg):
        if path is not None:
            check_writable(path)
    view = view_placement(
        options.model,
        (*options.keep_float, *(tuned_names(options.placement) if options.placement else ())),
        given_profile(options.profile),
        options.image_size,
        options.num_classes,
        options.channels,
        options.allow_changed_model,
        options.trust_code,
    )
    print_placement(view)
    if options.json is not None:
        write_json(options.json, placement_json(view))
        say(f"JSON: {options.json}")
    if options.svg is not None:
        with atomic_write(options.svg) as temporary:
            temporary.write_text(draw(view), encoding="utf-8")
        say(f"picture: {options.svg}")


def cli() -> None:
    """The console script qat-placement."""
    run_command(main, PlacementOptions)


if __name__ == "__main__":
    cli()
