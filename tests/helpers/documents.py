"""Commands and Python blocks of README.md and docs/, and a folder in which they run as they stand there.

Blocks that run are fenced: ```bash and ```python. A further word says what is expected of a machine without a GPU and
without a network: ``gpu``, that the block ends in one line about the GPU or its driver; ``download``, in one about the
network.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import tiny
import torch
import torchvision
from commands import ROOT
from PIL import Image
from safetensors.torch import save_file
from torch import nn

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Training is a matter of minutes and hours, and what it does is tested elsewhere: here it takes no step.
_SHORTENED = {"qat.train": {"--float-epochs": "0", "--qat-epochs": "0", "--progressive": "0", "--float-lr": None}}


@dataclass(frozen=True)
class Block:
    """A fenced block: its page and line, its language, what is expected of it ('' or gpu, download), its text."""

    page: str
    line: int
    language: str
    expected: str
    text: str

    def commands(self) -> Iterator[list[str]]:
        """The words of each command; continued lines are joined, comments and the activation of .venv left out."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] not in ("source", "pip"):
                yield words


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page that run."""
    text = page.read_text()
    return [
        Block(page.name, text[: match.start()].count("\n") + 1, match[1], match[2] or "", match[3])
        for match in _FENCE.finditer(text)
        if match[1] in ("bash", "python")
    ]


def shortened(words: list[str]) -> list[str]:
    """The words behind ``python -m``, without training steps."""
    module, *given = words
    for option, value in _SHORTENED.get(module, {}).items():
        if option in given:
            at = given.index(option)
            del given[at : at + 2]
        if value is not None:
            given += [option, value]
    return [module, *given]


def make_folder(folder: Path) -> Path:
    """All files that the documents name, small: images, networks, weights, a float ONNX file, a calibration cache."""
    (folder / "docs").symlink_to(ROOT / "docs")
    random = np.random.default_rng(0)

    def write_image(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)

    for split, count in (("train", 24), ("val", 6)):
        for name in ("rose", "tulip"):
            for index in range(count):
                write_image(folder / "path/to/folder" / split / name / f"{index}.png")
    for index in range(24):
        write_image(folder / "path/to/images" / f"{index}.png")
    (folder / "path/to/net.py").write_text(tiny.NET)
    torch.manual_seed(0)
    save_file(torchvision.models.resnet50().state_dict(), folder / "path/to/resnet50.safetensors")
    _write_float_onnx(folder / "path/to/float.onnx")
    return folder


def _write_float_onnx(path: Path) -> None:
    """A convolution, a ReLU, a pool and a linear layer: [N, 3, 40, 40] -> [N, 2]; and a calibration cache for it."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)).eval()
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 3, 40, 40),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    ir.save(program.model, path)
    names = [
        program.model.graph.inputs[0].name,
        *(value.name for node in program.model.graph for value in node.outputs),
    ]
    lines = [f"{name}: {np.float32(0.02).view(np.uint32):08x}" for name in names]
    path.with_name("calibration.cache").write_text("\n".join(["TRT-8601-EntropyCalibration2", *lines]) + "\n")


OFFLINE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
"""An environment in which a download fails at once."""


def environment() -> dict[str, str]:
    """That of the commands: no network, and caches of their own."""
    return {**OFFLINE, "TORCH_HOME": os.devnull}
