"""The smallest thing that the whole pipeline takes: a network of three layers, and 180 images of 3 classes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CLASSES = ("red", "green", "blue")
STEPS = 9  # in an epoch of the 81 images that are left to train on
FLOAT_STEPS = 2 * STEPS

# The BatchNorm is still there after quantizers were inserted: it counts the training steps of both phases, and can
# stop the process in the middle of one. Tracing compares models on two images, which are no step; of several processes
# each may get two images in a step, and there the two passes of tracing count, too.
NET = """
import os
import torch
from torch import nn

passes = 0

def stop(module, inputs, output):
    global passes
    trains = module.training and (len(output) > 2 or "RANK" in os.environ)
    passes += trains
    if trains and passes == int(os.environ["STOP_IN_PASS"]):
        os.kill(os.getpid(), int(os.environ["STOP_BY"]))

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.dropout, self.fc = nn.Dropout(0.1), nn.Linear(8, num_classes)
        if "STOP_IN_PASS" in os.environ:  # otherwise what is compiled would be compiled anew in each pass
            self.bn1.register_forward_hook(stop)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = (self.bn2(self.conv2(x)) + x).relu()
        return self.fc(self.dropout(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)))

class Branching(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)

def net(num_classes):
    return Net(num_classes)

def branching(num_classes):
    return Branching(num_classes)
"""


def write_images(path: Path) -> Path:
    """An .npz of 120 training and 60 test images, 16 px, tinted by their class under strong noise."""
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {"class_names": np.array(CLASSES)}
    for split, count in (("train", 120), ("test", 60)):
        labels = np.arange(count) % 3
        images = random.integers(0, 200, (count, 16, 16, 3))
        images[np.arange(count), :, :, labels] += 50
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    np.savez(path, **arrays)
    return path


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """The options of a run of seconds that reads from and writes to ``folder``; makes its files where needed."""
    net, images = folder / "net.py", folder / "images.npz"
    if not net.exists():
        net.write_text(NET)
        write_images(images)
    return {
        "model": f"{net}:net",
        "data": str(images),
        "output": folder / "model.qat",
        "float_epochs": 2,
        "float_lr": 2e-2,
        "qat_epochs": 2,
        "qat_lr": 1e-3,
        "batch_size": 9,
        "device": "cpu",
    } | changes


def flags(chosen: dict[str, Any]) -> list[str]:
    """Options as a command line takes them."""
    words = []
    for name, value in chosen.items():
        words += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
    return words


class Stopped(BaseException):
    """As a kill would end a run, but in this process."""


def stop_in_steps(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
    """Stops training in each step for whose number ``when`` holds; steps are counted from 1, over all runs."""
    from qat.training.trainer import Fit

    real, done = Fit._step, itertools.count(1)

    def step(*given: Any) -> Any:
        if when(next(done)):
            raise Stopped
        return real(*given)

    monkeypatch.setattr(Fit, "_step", step)
