"""Post-training quantization: a float network and images in, the same network with calibrated INT8 ranges out.

All of python -m qat.calibrate, and what python -m qat.train does before and between its two phases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from qat.base.artifact import check_writable
from qat.base.console import progress, say, table, warn
from qat.base.errors import UserError
from qat.base.number_format import BITS
from qat.base.text import decibels
from qat.calibration.activation_ranges import observe, set_ranges
from qat.calibration.adaround import adaround
from qat.calibration.pytorch_quantization import set_imported_ranges
from qat.checkpoint import save_checkpoint
from qat.compute.device import Compute, exact_float32
from qat.compute.processes import local_rank
from qat.data.batches import batch_count
from qat.data.preprocessing import ImagePreset
from qat.data.sources import unlabelled_folder
from qat.data.splits import Data, load_data, load_unlabelled
from qat.evaluate import compare, inputs
from qat.fake_quantize.low_bit import simulate_bits
from qat.fake_quantize.prepare import prepare, weights_and_quantizers
from qat.fake_quantize.weight_ranges import fix_weight_ranges
from qat.graph.network import Network
from qat.graph.tracing import network_of
from qat.models import Pretrained, build_pretrained, preset_of_weights
from qat.placement import say_placement
from qat.rules.place import place
from qat.rules.placement import Placement

if TYPE_CHECKING:
    from qat.options import CalibrateOptions, SharedOptions

_FEW_IMAGES = 16  # fewer show too little of what a network will see


def quantize_pretrained(options: CalibrateOptions) -> None:
    """The run that ``options`` describe. Raises UserError for what the user can mend."""
    if options.weights is None:
        raise UserError("--weights is missing: give those of a trained network, or train one: python -m qat.train")
    if options.classes is not None and options.classes < 1:
        raise UserError(f"--classes {options.classes} is not positive: give the number of classes, or leave it out")
    if local_rank() is not None:
        raise UserError("python -m qat.calibrate is a single process: start it without torchrun")
    if options.adaround < 0:
        raise UserError(f"--adaround {options.adaround} is no number of steps: give 0 or more")
    check_writable(options.output)
    check_percentile(options)
    compute = Compute.from_options(options.device, "float32", compiled=False)
    found = build_pretrained(options.model, options.weights, options.classes)
    say(f"weights: {options.weights}, {found.spec.num_classes} classes")
    data = _load_data(options)
    say_data(data)
    class_names = _class_names(options, found, data)
    _, placement = placed(options, found.model, data, len(class_names))
    compute.place(found.model)
    prepared = quantized(found.model, placement, found.ranges, data, options, compute)
    if options.adaround:
        _round(prepared, data, options, compute)
    figures = _compared(found.model, prepared, data, options, compute)
    save_checkpoint(
        options.output,
        prepared,
        found.spec,
        data.preprocessing,
        class_names,
        figures,
        {**origin(options, data), "adaround": options.adaround},
        options.seed,
    )
    _say_figures(figures)
    say_next(options.output)


# --- what python -m qat.train does too


def check_percentile(options: SharedOptions) -> None:
    """Raises UserError when it is out of range."""
    if not 0 < options.percentile <= 100:
        raise UserError(f"--percentile {options.percentile} is out of range: choose one above 0 and up to 100")


def photographs(options: SharedOptions) -> ImagePreset:
    """How the network takes photographs. Raises UserError where they could not be normalized so."""
    told = preset_of_weights(options.model, options.weights)
    if options.std is not None and not min(options.std) > 0:
        raise UserError(f"--std {' '.join(map(str, options.std))}: deviations must be above 0")
    return replace(told, mean=options.mean or told.mean, std=options.std or told.std)


def say_data(data: Data) -> None:
    """Prints what there is, and how it was split."""
    sizes = ", ".join(f"{name} {size}" for name, size in data.sizes.items())
    classes = f"{len(data.class_names)} classes" if data.labelled else "no labels"
    size = f"{data.preprocessing.height}x{data.preprocessing.width}"
    say(f"data {data.source}: {classes}, {size} pixels; images: {sizes}")
    for note in data.notes:
        say(f"  {note}")


def placed(options: SharedOptions, model: nn.Module, data: Data, classes: int) -> tuple[Network, Placement]:
    """The view of ``model``, and what will be quantized of it, which is printed.

    Raises UserError where it cannot be quantized, not as asked for, or makes no logits [N, ``classes``].
    """
    network = network_of(model, (3, data.preprocessing.height, data.preprocessing.width))
    (output,) = (op for op in network if op.kind == "output")
    if output.shape != (1, classes):
        found = f"a tensor of shape {list(output.shape)}" if output.shape else "something else than one tensor"
        raise UserError(
            f"model {options.model} makes {found} of one image; needed are logits of shape [1, {classes}], one for "
            "each class: give a classification model"
        )
    placement = place(network, options.keep_float)
    say_placement(placement)
    if not any(decision.quantized for decision in placement.decisions):
        warn("nothing of this network is quantized: python -m qat.placement shows why")
    return network, placement


def quantized(
    model: nn.Module,
    placement: Placement,
    ranges: Mapping[str, Tensor],
    data: Data,
    options: SharedOptions,
    compute: Compute,
    bits: int = BITS,
) -> fx.GraphModule:
    """A copy of ``model`` with quantizers; their ranges are from the calibration split, or from ``ranges``."""
    prepared = prepare(model, placement)
    simulate_bits(prepared, bits)
    images = data.calibration
    if len(images) < _FEW_IMAGES:
        warn(f"only {len(images)} images to calibrate on: ranges may not hold for others; add images")
    count = batch_count(images, options.batch_size)
    with _fitting("--batch-size"), progress("calibrating", count) as task, exact_float32():
        given = _calibration_images(data, options, compute)
        observers = observe(prepared, given, task.advance, compute.processes)
        warnings = set_ranges(prepared, observers, options.calibrator, options.percentile)
    for line in warnings:
        warn(line)
    for line in set_imported_ranges(prepared, ranges) if ranges else ():
        say(line)
    if options.weight_calibrator == "mse" and not ranges:
        fix_weight_ranges(prepared)
    return prepared


@contextmanager
def _fitting(option: str) -> Iterator[None]:
    """Where the GPU's memory does not do, UserError names the option that asks for less."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"the GPU has not enough free memory: free some, or give a smaller {option}") from None


def _calibration_images(data: Data, options: SharedOptions, compute: Compute) -> Iterator[Tensor]:
    """Normalized, in batches, on the device."""
    return (x for x, _ in inputs(data.calibration, options.batch_size, compute, options.workers))


def origin(options: SharedOptions, data: Data) -> dict[str, Any]:
    """What a checkpoint records of its images: enough to load them again, and how ranges were chosen from them."""
    source = {"source": options.data, "image_size": options.image_size, "root": str(options.data_root)}
    return {
        "data": source | {"labelled": data.labelled},
        "splits": data.sizes,
        "calibration_images": options.calibration_images,
        "seed": options.seed,
        "calibrator": options.calibrator,
        "weight_calibrator": options.weight_calibrator,
    }


def say_next(output: Path) -> None:
    """Prints what was written, and what to run on it."""
    say(f"wrote {output}\nnext: python -m export.onnx {output}")


# --- what it does not


def _load_data(options: CalibrateOptions) -> Data:
    chosen = (options.image_size, options.seed, options.calibration_images)
    folder, taken = unlabelled_folder(options.data), photographs(options)
    if folder is not None:
        return load_unlabelled(folder, *chosen, taken)
    return load_data(options.data, *chosen, options.data_root, taken)


def _round(prepared: fx.GraphModule, data: Data, options: CalibrateOptions, compute: Compute) -> None:
    """Rounds the weights by AdaRound, on the calibration images."""
    images = list(_calibration_images(data, options, compute))
    layers = sum(1 for _ in weights_and_quantizers(prepared))
    with _fitting("--calibration-images"), progress("rounding", layers) as task:
        found = adaround(prepared, images, options.adaround, lambda layer: task.advance(note=layer), options.seed)
    shares = sorted(layer.mse / layer.mse_nearest for layer in found if layer.mse_nearest)
    if shares:
        say(f"AdaRound: {len(found)} layers; the median one has {shares[len(shares) // 2]:.2f} times the squared error")


def _class_names(options: CalibrateOptions, found: Pretrained, data: Data) -> tuple[str, ...]:
    """The data's, else torchvision's, else numbers."""
    classes = found.spec.num_classes
    if data.labelled and len(data.class_names) != classes:
        raise UserError(
            f"weights {options.weights} are of {classes} classes, data {data.source} has {len(data.class_names)}: give "
            "weights of these classes (python -m qat.train trains them), or a folder of images without train/ and val/"
        )
    return data.class_names or found.class_names or tuple(map(str, range(classes)))


def _compared(
    model: nn.Module, prepared: nn.Module, data: Data, options: CalibrateOptions, compute: Compute
) -> dict[str, Any]:
    """What was measured on the test split, as the checkpoint records it: accuracies only where there are labels."""
    held_out = len(data.test) > 0
    images = data.test if held_out else data.calibration  # on these too a network must answer with numbers
    with _fitting("--batch-size"):
        agreement, accuracies = compare(model, prepared, images, data, options.batch_size, compute, options.workers)
    if not held_out:
        return {}
    figures = zip(("float", "ptq"), (accuracy.test_figures() for accuracy in accuracies), strict=False)
    return {**dict(figures), "agreement": asdict(agreement)}


def _say_figures(figures: Mapping[str, Any]) -> None:
    if not figures:
        say("nothing was measured: too few images to hold any out")
        return
    agreement = figures["agreement"]
    columns, agrees = (
        ("same class as float", "SQNR of the logits"),
        (f"{agreement['top1']:.2f} %", decibels(agreement["sqnr_db"])),
    )
    if "ptq" not in figures:
        title = f"Agreement on {agreement['images']} images held out, without labels"
        table(title, ("network", *columns), [("INT8, post-training", *agrees)])
        return
    floats, codes = (
        (f"{figures[key]['test_top1']:.2f} %", f"{figures[key]['test_loss']:.4f}") for key in ("float", "ptq")
    )
    table(
        f"Accuracy on the test split ({agreement['images']} images)",
        ("network", "top-1", "loss", *columns),
        [("float", *floats, "", ""), ("INT8, post-training", *codes, *agrees)],
    )
