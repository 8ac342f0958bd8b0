"""The training of one network by several processes that torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny
from commands import ONE_THREAD, ROOT

# Nothing in it depends on the other images of a batch, so that shares of a batch make the gradient of the whole.
NET = """
import json
import os
from torch import nn

passes = 0

def fail(module, inputs, output):
    global passes
    passes += module.training
    if os.environ.get("RANK") == os.environ["FAILS"] and passes == 5:
        os._exit(7)

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, num_classes)
        if "FAILS" in os.environ:  # otherwise what is compiled would be compiled anew in each pass
            self.fc.register_forward_hook(fail)

    def forward(self, x):
        x = self.conv2(self.conv1(x).relu()).relu()
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))

def net(num_classes):
    return Net(num_classes)
"""


def train(
    folder: Path, processes: int, environment: dict[str, str] | None = None, seconds: int = 90, **changes: Any
) -> Any:
    """python -m qat.train in so many processes; an error where it takes longer than ``seconds``."""
    options = tiny.options(folder, **({"batch_size": 8, "float_lr": 2e-3} | changes))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(start if processes > 1 else []), "-m", "qat.train", *tiny.flags(options)]
    return subprocess.run(
        command, cwd=ROOT, env=_environment() | (environment or {}), capture_output=True, text=True, timeout=seconds
    )


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(paths)}
