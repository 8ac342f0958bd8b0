"""Post-training quantization: from a float network and images to the same network with calibrated INT8 ranges.

This is all the work of python -m qat.calibrate, and the steps of python -m qat.train before and between its two phases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.base.console import progress, say, warn
from qat.base.errors import UserError
from qat.base.interval import is_near_chance
from qat.base.number_format import BITS
from qat.base.ranges_file import ranges_path, write_distributions
from qat.base.writing import atomic_write, check_writable
from qat.calibration.activation_ranges import observe, set_ranges
from qat.calibration.adaround import adaround
from qat.calibration.distributions import distributions
from qat.calibration.explain import explain, quantizers_named, say_explanations
from qat.calibration.explain_page import draw_explanations
from qat.calibration.histogram import HistogramObserver
from qat.calibration.pytorch_quantization import match_ranges, set_imported_ranges
from qat.calibration.settings import CalibrationSettings
from qat.calibration.smoothquant import say_smoothed, smooth
from qat.checkpoint import save_checkpoint
from qat.compute.device import Compute
from qat.compute.precision import exact_float32
from qat.compute.processes import local_rank
from qat.data.batches import batch_count
from qat.data.folders import unlabelled_folder
from qat.data.preprocessing import ImagePreset
from qat.data.request import ImageRequest
from qat.data.splits import Data, load_data, load_unlabelled, say_data
from qat.evaluate import Accuracy, compare, compare_outputs, inputs, say_figures
from qat.fake_quantize.low_bit import simulate_bits
from qat.fake_quantize.prepare import prepare, weights_and_quantizers
from qat.fake_quantize.weight_ranges import fix_weight_ranges
from qat.graph.tracing import TracedModel, network_of
from qat.models import answers_classes, check_logits, options_for_size, trace_on_images
from qat.pretrained.ultralytics_models import PREFIX
from qat.rules.describe import say_placement
from qat.rules.kernel_profile import KernelProfile
from qat.rules.place import place
from qat.rules.placement import Placement
from qat.weights import Pretrained, brings_weights, build_pretrained, input_preset, with_classes_of_output

_FEW_IMAGES = 16  # fewer do not represent what a network will see


def quantize_pretrained(
    model: str,
    weights: str | None,
    images: ImageRequest,
    output: Path,
    *,
    classes: int | None = None,
    decoded: bool = False,
    calibration: CalibrationSettings,
    keep_float: Iterable[str] = (),
    profile: KernelProfile | None = None,
    adaround_steps: int = 0,
    explained: Sequence[str] = (),
    compute: Compute,
) -> None:
    """Quantizes a trained network, writes its checkpoint, and prints what was measured.

    Args:
        model: the name of a model, as qat.models.ModelSpec takes it.
        weights: torchvision's name of them, or a file; None for a checkpoint of Ultralytics.
        images: images to calibrate on, with labels or without; some are held out to measure on.
        output: the checkpoint; what calibration saw is written beside it (qat/base/ranges_file.py).
        classes: number of classes of the network, if the weights do not show it.
        decoded: of a model of Ultralytics, boxes in pixels instead of what the head computes.
        calibration: how ranges are chosen.
        keep_float: patterns of what stays in float.
        profile: what deploy.kernels measured on a GPU; None for what was measured on an H200.
        adaround_steps: steps in which AdaRound rounds the weights of each layer; 0: round to the nearest code.
        explained: patterns of tensors; how their ranges are chosen is printed, and drawn beside ``output``.
        compute: the device; one process.

    Raises:
        UserError: for every mistake that the user can correct.
    """
    if weights is None and not brings_weights(model):
        raise UserError("--weights is missing: give those of a trained network, or train one: python -m qat.train")
    if classes is not None and classes < 1:
        raise UserError(f"--classes {classes} is not positive: give the number of classes, or leave it out")
    if local_rank() is not None:
        raise UserError("python -m qat.calibrate runs as a single process: start it without torchrun")
    if adaround_steps < 0:
        raise UserError(f"--adaround {adaround_steps} is not a number of steps: it must be at least 0")
    page, ranges_file = output.with_suffix(".explain.html"), ranges_path(output)
    for path in (output, ranges_file, *([page] if explained else [])):
        check_writable(path)
    if decoded and not model.startswith(PREFIX):
        raise UserError(f"--decode is for Ultralytics' models, and {model} is none: leave it out")
    given = {"decoded": True} if decoded else options_for_size(model, images.image_size)
    found = build_pretrained(model, weights, classes, images.channels, given)
    data = _load_images(images, input_preset(model, weights, images))
    found = with_classes_of_output(found, data.preprocessing.input_shape, classes)
    traced = trace_on_images(compute.place(found.model), model, data.preprocessing.input_shape)
    answers = f"{found.spec.num_classes} classes" if answers_classes(traced) else "the network answers no classes"
    say(", ".join([f"weights: {weights or model}", answers, *found.notes]))
    say_data(data)
    class_names: tuple[str, ...] = ()
    if answers_classes(traced):
        class_names = _class_names(weights or model, found, data)
        check_logits(traced, model, len(class_names))
    placement = _place(traced, keep_float, profile)
    names = quantizers_named(network_of(traced), placement, explained)
    observers: dict[str, HistogramObserver] = {}
    prepared = prepare_and_calibrate(
        traced, placement, found.ranges, data, images, calibration, compute, on_observed=observers.update
    )
    seen = distributions(prepared, observers, calibration, len(data.calibration))
    if adaround_steps:
        _round_weights(prepared, data, images, adaround_steps, compute)
    figures = _compare_on_test(found.model, prepared, data, images, compute, classes=bool(class_names))
    written = save_checkpoint(
        output,
        prepared,
        found.spec,
        data.preprocessing,
        class_names,
        figures,
        {
            **record_of_images(images, data, calibration),
            **record_of_ranges(prepared, found.ranges),
            "adaround": adaround_steps,
        },
        images.seed,
    )
    write_distributions(ranges_file, replace(seen, checkpoint=written.sha256))
    say_figures(figures)
    if explained:
        explanations = explain(prepared, observers, names, calibration.percentile)
        say_explanations(explanations)
        with atomic_write(page) as temporary:
            temporary.write_text(
                draw_explanations(explanations, f"How the ranges of {output.name} are chosen"), "utf-8"
            )
        say(f"picture: {page}")
    say_next(output)


# --- steps that python -m qat.train has too


def choose_placement(
    model: nn.Module,
    name: str,
    data: Data,
    classes: int,
    keep_float: Iterable[str],
    profile: KernelProfile | None = None,
    *,
    training: bool | None = None,
) -> tuple[TracedModel, Placement]:
    """The traced ``model``, and what will be quantized in it; the latter is printed too.

    ``training``: whether it must be trainable; see qat.graph.tracing.trace.

    Raises UserError when it cannot be quantized, or not as ``keep_float`` asks, or when its output is not logits
    [N, ``classes``].
    """
    traced = trace_on_images(model, name, data.preprocessing.input_shape, training=training)
    check_logits(traced, name, classes)
    return traced, _place(traced, keep_float, profile)


def _place(traced: TracedModel, keep_float: Iterable[str], profile: KernelProfile | None) -> Placement:
    placement = place(network_of(traced), keep_float, profile=profile)
    say_placement(placement)
    if not any(decision.quantized for decision in placement.decisions):
        warn("nothing in this network is quantized: python -m qat.placement shows why")
    return placement


def prepare_and_calibrate(
    model: TracedModel,
    placement: Placement,
    ranges: Mapping[str, Tensor],
    data: Data,
    images: ImageRequest,
    calibration: CalibrationSettings,
    compute: Compute,
    bits: int = BITS,
    on_observed: Callable[[Mapping[str, HistogramObserver]], None] = lambda observers: None,
) -> fx.GraphModule:
    """A copy of ``model`` with quantizers whose ranges come from the calibration split, or from ``ranges``.

    With ``calibration.smoothquant``, ``model`` itself is smoothed first, so that both hold the same tensors.
    ``on_observed`` gets what qat.calibration.activation_ranges.observe returned.
    """
    if calibration.smoothquant is not None:
        _smooth(model, placement, ranges, data, images, calibration.smoothquant, compute)
    prepared = prepare(model, placement, input_shape=data.preprocessing.input_shape)
    simulate_bits(prepared, bits)
    if len(data.calibration) < _FEW_IMAGES:
        warn(f"only {len(data.calibration)} images to calibrate on: ranges may not fit other images; add images")
    count = batch_count(data.calibration, images.batch_size)
    with _remedy_for_memory("--batch-size"), progress("calibrating", count) as task, exact_float32():
        given = _calibration_images(data, images, compute)
        observers = observe(prepared, given, task.advance, compute.processes)
        on_observed(observers)
        warnings = set_ranges(prepared, observers, calibration.method, calibration.percentile)
    for line in warnings:
        warn(line)
    imported = set_imported_ranges(prepared, ranges)
    for line in imported.lines() if ranges else ():
        say(line)
    if calibration.weight_method == "mse":
        fix_weight_ranges(prepared, imported.weights)
        if imported.weights:
            changed = f"sets {len(imported.other_weights)} ranges" if imported.other_weights else "changes nothing"
            say(f"--weight-calibrator mse {changed}: {len(imported.weights)} weights keep the checkpoint's")
    return prepared


def _smooth(
    model: TracedModel,
    placement: Placement,
    ranges: Mapping[str, Tensor],
    data: Data,
    images: ImageRequest,
    alpha: float,
    compute: Compute,
) -> None:
    """Smooths LayerNorms with SmoothQuant, on the calibration images. Raises UserError when ``ranges`` are given."""
    if ranges:
        raise UserError(
            "the weights come with ranges, which --smoothquant would invalidate: leave it out, or the ranges"
        )
    count = batch_count(data.calibration, images.batch_size)
    with _remedy_for_memory("--batch-size"), progress("smoothing", count) as task:
        given = _calibration_images(data, images, compute)
        found = smooth(model, placement, given, alpha, task.advance, compute.processes)
    say_smoothed(found)


@contextmanager
def _remedy_for_memory(option: str) -> Iterator[None]:
    """Turns a lack of GPU memory into a UserError that names the option to lower."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"the GPU does not have enough free memory: free some, or give a smaller {option}") from None


def _calibration_images(data: Data, images: ImageRequest, compute: Compute) -> Iterator[Tensor]:
    """The calibration images, normalized, in batches, on the device."""
    return (x for x, _ in inputs(data.calibration, images.batch_size, compute, images.workers))


def record_of_images(images: ImageRequest, data: Data, calibration: CalibrationSettings) -> dict[str, Any]:
    """What a checkpoint records about its images: enough to load them again, and how ranges were chosen from them."""
    source = {"source": images.source, "image_size": images.image_size, "root": str(images.root)}
    return {
        "data": source | {"labelled": data.labelled},
        "splits": data.sizes,
        "calibration_images": images.calibration_images,
        "seed": images.seed,
        "calibrator": calibration.method,
        "weight_calibrator": calibration.weight_method,
        "smoothquant": calibration.smoothquant,
    }


def record_of_ranges(prepared: fx.GraphModule, ranges: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a checkpoint records about ``ranges`` that came with the weights: which are in ``prepared``, by name."""
    return {"ranges": match_ranges(prepared, ranges).record()} if ranges else {}


def say_next(output: Path) -> None:
    """Prints what was written, and the next command to run."""
    say(f"wrote {output}\nnext: python -m export.onnx {output}")


# --- steps that only python -m qat.calibrate has


def _load_images(images: ImageRequest, preset: ImagePreset) -> Data:
    chosen = (images.image_size, images.seed, images.calibration_images)
    folder = unlabelled_folder(images.source)
    if folder is not None:
        return load_unlabelled(folder, *chosen, preset)
    return load_data(images.source, *chosen, images.root, preset)


def _round_weights(prepared: fx.GraphModule, data: Data, images: ImageRequest, steps: int, compute: Compute) -> None:
    """Rounds the weights with AdaRound, on the calibration images."""
    given = list(_calibration_images(data, images, compute))
    layers = sum(1 for _ in weights_and_quantizers(prepared))
    with _remedy_for_memory("--calibration-images"), progress("rounding", layers) as task:
        found = adaround(prepared, given, steps, lambda layer: task.advance(note=layer), images.seed)
    shares = sorted(layer.mse / layer.mse_nearest for layer in found if layer.mse_nearest)
    if shares:
        share = f"{shares[len(shares) // 2]:.2f} times the squared error of rounding to nearest"
        say(f"AdaRound: {len(found)} layers; the median layer has {share}")


def _class_names(weights: str, found: Pretrained, data: Data) -> tuple[str, ...]:
    """The class names of the data, else those of torchvision's weights, else numbers."""
    classes = found.spec.num_classes
    if not data.all_classes and len(data.class_names) < classes:  # its highest label is not the last class
        return found.class_names or tuple(map(str, range(classes)))
    if data.labelled and len(data.class_names) != classes:
        raise UserError(
            f"weights {weights} have {classes} classes, but data {data.source} has {len(data.class_names)}: "
            "give weights for these classes (python -m qat.train trains them), or a folder of images without train/ "
            "and val/"
        )
    return data.class_names or found.class_names or tuple(map(str, range(classes)))


def _compare_on_test(
    model: nn.Module, prepared: nn.Module, data: Data, images: ImageRequest, compute: Compute, *, classes: bool
) -> dict[str, Any]:
    """What was measured on the test split, as the checkpoint records it; accuracies only if there are labels."""
    held_out = len(data.test) > 0
    measured_on = data.test if held_out else data.calibration  # these at least show an output that is not finite
    how, accuracies = (measured_on, images.batch_size, compute, images.workers), tuple[Accuracy, ...]()
    with _remedy_for_memory("--batch-size"):
        if classes:
            agreement, accuracies = compare(model, prepared, data, *how)
        else:
            agreement = compare_outputs(model, prepared, *how)
    if not held_out:
        return {}
    if accuracies and is_near_chance(accuracies[0].top1, len(data.class_names)):
        warn(f"the float network itself is hardly better than chance, {accuracies[0]}: are these the trained weights?")
    figures = zip(("float", "ptq"), (accuracy.test_figures() for accuracy in accuracies), strict=False)
    return {**dict(figures), "agreement": asdict(agreement)}
