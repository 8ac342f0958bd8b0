"""Calibration time of ResNet50 against its bare forward passes, on the CPU.

    python benchmarks/calibration.py

One line per image size: seconds of the float model's forward passes, of observing them, and of each method's
whole calibration (observing, then choosing every range). Best of five rounds, forward and calibration taking
turns, because the machine is shared. Weights and images are random. Target: entropy at most 2 times forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar, get_args

import torch
import torchvision
from stamp import stamp
from torch import Tensor, nn

from qat.calibration import observe, set_ranges
from qat.prepare import prepare
from qat.thresholds import Method

ROUNDS = 5
METHODS: tuple[Method, ...] = get_args(Method)
CASES = ((128, 32, 32), (32, 32, 224))  # images, batch, pixels

Result = TypeVar("Result")


def main() -> None:
    """Measures and prints the table."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # as training does
    model = torchvision.models.resnet50().eval()
    prepared = prepare(model)
    print(stamp("python benchmarks/calibration.py"))
    print(f"ResNet50 (torchvision), float32, best of {ROUNDS} rounds")
    print(f"\n{'images':>6} {'pixels':>6} {'forward s':>10} {'observe s':>10}", end="")
    print("".join(f"{method + ' s':>13} {'ratio':>6}" for method in METHODS))
    for images, batch, pixels in CASES:
        batches = list(torch.randn(images, 3, pixels, pixels).split(batch))
        forward, observing, choosing = measure(model, prepared, batches)
        print(f"{images:6} {pixels:6} {forward:10.3f} {observing:10.3f}", end="")
        totals = [observing + one for one in choosing]
        print("".join(f"{total:13.3f} {total / forward:6.2f}" for total in totals), flush=True)


def measure(model: nn.Module, prepared: nn.Module, batches: list[Tensor]) -> tuple[float, float, list[float]]:
    """Best seconds of the forward passes, of observing them, and of choosing by each of METHODS."""
    forwards, observings, choosings = [], [], []
    with torch.no_grad():
        model(batches[0])  # warm-up
    for _ in range(ROUNDS):
        with torch.no_grad():
            forwards.append(seconds(lambda: [model(batch) for batch in batches])[0])
        taken, observers = seconds(lambda: observe(prepared, batches))
        observings.append(taken)
        choosings.append([seconds(partial(set_ranges, prepared, observers, method))[0] for method in METHODS])
    return min(forwards), min(observings), [min(of_method) for of_method in zip(*choosings, strict=True)]


def seconds(work: Callable[[], Result]) -> tuple[float, Result]:
    """Wall-clock seconds that ``work`` takes, and what it returns."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
