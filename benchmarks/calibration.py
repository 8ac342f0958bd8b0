"""Calibration time of ResNet50 against its bare forward passes, on the GPU where there is one, otherwise on the CPU.

    python -m benchmarks.calibration

One line per batch and image size: seconds of the float model's forward passes, of observing them, of each method's
whole calibration (observing, then choosing every range), and how many times the forward passes all four from one
observation take. Median of seven rounds, forward and calibration taking turns, because the machine is shared. Weights
and images are random. Targets: entropy at most 2 times forward; on a GPU all four at most 1.5 times. qat.train and
qat.calibrate calibrate in exact float32, without TF32.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TypeVar, get_args

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.gpu_training_step import now
from benchmarks.stamp import stamp
from qat.base.choices import Calibrator
from qat.calibration.activation_ranges import observe, set_ranges
from qat.compute.precision import exact_float32
from qat.fake_quantize.prepare import prepare

ROUNDS = 7
METHODS: tuple[Calibrator, ...] = get_args(Calibrator)
GPU = torch.cuda.is_available()
# Images, batch, pixels, exact float32
CASES = (
    [(512, batch, 224, exact) for exact in (False, True) for batch in (64, 128, 256)]
    if GPU
    else [(128, 32, 32, True), (32, 32, 224, True)]
)

Result = TypeVar("Result")


def main() -> None:
    """Measures and prints the table."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # as training does
    device = "cuda" if GPU else "cpu"
    model = torchvision.models.resnet50().eval().to(device)
    prepared = prepare(model, input_shape=(3, 224, 224)).to(device)
    print(stamp("python -m benchmarks.calibration"))
    where = f", {torch.cuda.get_device_name()}" if GPU else ""
    print(f"ResNet50 (torchvision), median of {ROUNDS} rounds{where}")
    print(f"\n{'images':>6} {'batch':>6} {'pixels':>6} {'type':>8} {'forward s':>10} {'observe s':>10}", end="")
    print("".join(f"{method + ' s':>13} {'ratio':>6}" for method in METHODS) + f"{'all':>7}")
    for images, batch, pixels, exact in CASES:
        batches = list(torch.randn(images, 3, pixels, pixels, device=device).split(batch))
        with exact_float32() if exact else nullcontext():
            forward, observing, choosing = measure(model, prepared, batches)
        kind = "float32" if exact or not GPU else "TF32"
        print(f"{images:6} {batch:6} {pixels:6} {kind:>8} {forward:10.4f} {observing:10.4f}", end="")
        totals = [observing + one for one in choosing]
        print("".join(f"{total:13.4f} {total / forward:6.2f}" for total in totals), end="")
        print(f"{(observing + sum(choosing)) / forward:7.2f}", flush=True)


def measure(model: nn.Module, prepared: nn.Module, batches: list[Tensor]) -> tuple[float, float, list[float]]:
    """Seconds of the forward passes, of observing them, and of choosing by each of METHODS."""
    forwards, observings, choosings = [], [], []
    for index in range(ROUNDS + 1):
        with torch.no_grad():
            forward = seconds(lambda: [model(batch) for batch in batches])[0]
        observing, observers = seconds(lambda: observe(prepared, batches))
        choosing = [seconds(partial(set_ranges, prepared, observers, method))[0] for method in METHODS]
        if index:  # the first warms up
            forwards.append(forward)
            observings.append(observing)
            choosings.append(choosing)
    chosen = [statistics.median(of_method) for of_method in zip(*choosings, strict=True)]
    return statistics.median(forwards), statistics.median(observings), chosen


def seconds(work: Callable[[], Result]) -> tuple[float, Result]:
    """Wall-clock seconds that ``work`` takes, and what it returns."""
    start = now()
    result = work()
    return now() - start, result


if __name__ == "__main__":
    main()
