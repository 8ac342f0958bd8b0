"""The placement of a model, as it would be trained, or of a checkpoint, as it was trained."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from qat.base.artifact import sidecar_path
from qat.base.errors import UserError
from qat.checkpoint import load_checkpoint
from qat.fake_quantize.prepare import placement_of
from qat.graph.tracing import network_of
from qat.models import build_model, options_for_size, spec_for, trace_on_images
from qat.rules.describe import PlacementView, texts_of
from qat.rules.kernel_profile import KernelProfile
from qat.rules.place import place

_IMAGE_SIZE, _CLASSES = 224, 1000


def view_placement(
    model: str,
    keep_float: Iterable[str] = (),
    profile: KernelProfile | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    channels: Literal[1, 3] | None = None,
    allow_changed_model: bool = False,
    trust_code: bool = False,
) -> PlacementView:
    """What is quantized in ``model``, and why.

    Args:
        model: the name of a model, as qat.train takes it, or the path of a checkpoint, which keeps the placement it was
            trained with.
        keep_float: patterns of what stays in float. This and the next four arguments cannot be given for a checkpoint.
        profile: what deploy.kernels measured on a GPU; None for what was measured on an H200.
        image_size: height and width of the input in pixels; None: 224.
        num_classes: number of classes of the model; None: 1000.
        channels: of the images; None: 3.
        allow_changed_model: go on when the code of a checkpoint's model has changed since it was saved.
        trust_code: run the code that a stranger's checkpoint names (docs/trust.md).

    Raises:
        UserError: there is no such model or file, it cannot be traced, or a pattern matches nothing.
    """
    path = Path(model)
    if path.suffix == ".qat" or path.is_file() or sidecar_path(path).is_file():
        given = {
            "--keep-float": keep_float,
            "--profile": profile,
            "--image-size": image_size,
            "--num-classes": num_classes,
            "--channels": channels,
        }
        for option, value in given.items():
            if value not in (None, ()):
                raise UserError(f"{option} was fixed when {path} was trained: leave it out, or give the model's name")
        return _of_checkpoint(path, allow_changed_model, trust_code)
    size = _IMAGE_SIZE if image_size is None else image_size
    shape = (3 if channels is None else channels, size, size)
    classes = _CLASSES if num_classes is None else num_classes
    spec = spec_for(model, classes, shape[0], options_for_size(model, size))
    network = network_of(trace_on_images(build_model(spec), model, shape))
    placement = place(network, keep_float, profile=profile)
    return PlacementView(model, shape, network, placement, texts_of(placement))


def _of_checkpoint(path: Path, allow_changed_model: bool, trust_code: bool) -> PlacementView:
    checkpoint = load_checkpoint(path, allow_changed_model=allow_changed_model, trust_code=trust_code)
    details, shape = checkpoint.sidecar.details, next(iter(checkpoint.inputs.shapes.values()))
    network = network_of(checkpoint.model)
    placement = placement_of(checkpoint.model)
    rules = texts_of(placement, details["rules"])
    return PlacementView(f"{path} ({details['model']['name']})", shape, network, placement, rules)
