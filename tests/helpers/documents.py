"""Commands and Python blocks of README.md and docs/, and a folder in which they run as they stand there.

Blocks that run are fenced: ```bash and ```python. A further word says that a block ends in one line of error on the
machine of the tests, and in which: ``gpu``, about the GPU or its driver; ``download``, about the network; ``stopped``,
that there is no stopped run; ``tensorrt``, that TensorRT-RTX built the engine and not TensorRT; ``ultralytics``, that
this package is missing.

The tables of rules and of exit codes are those of the program. After one of them has changed,

    PYTHONPATH=. python tests/helpers/documents.py

writes the tables anew.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tiny
import torch
import torchvision
from annotated import write_yolo
from commands import ROOT
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from export.hard_rules import HARD_RULES
from qat.base import exit_codes
from qat.rules.kernel_profile import KernelProfile
from qat.rules.place import RULES

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Training is a matter of minutes and hours, and what it does is tested elsewhere: here it takes no step.
_ADDED = {"qat.train": {"--float-epochs": "0", "--qat-epochs": "0", "--progressive": "0"}}
_REPLACED = {"qat.calibrate": {"--adaround": "2"}}


@dataclass(frozen=True)
class Block:
    """A fenced block: its page and line, its language, the error that is expected of it ('' for none), its text."""

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
    """The words behind ``python -m``, without training steps and with few steps of AdaRound."""
    module, *given = words
    for option, value in _REPLACED.get(module, {}).items():
        if option in given:
            given[given.index(option) + 1] = value
    for option, value in _ADDED.get(module, {}).items():
        if option in given:
            at = given.index(option)
            del given[at : at + 2]
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
    _write_detector(folder / "path/to")
    tiny.write_images(folder / "path/to/images.npz")
    torch.manual_seed(0)
    save_file(torchvision.models.resnet50().state_dict(), folder / "path/to/resnet50.safetensors")
    save_file(_tiny_network().state_dict(), folder / "path/to/net.safetensors")
    torch.save(_pytorch_quantization_state(), folder / "path/to/pytorch_quantization.pth")
    _write_float_onnx(folder / "path/to/float.onnx")
    np.save(folder / "path/to/inputs.npy", random.standard_normal((12, 3, 40, 40)).astype(np.float32))
    return folder


DETECTOR = """
from torch import nn

class Detector(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.scores, self.distances = nn.Conv2d(16, num_classes, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.body(x)
        return {"scores": self.scores(x), "distances": self.distances(x).exp()}

def build(num_classes=3):
    return Detector(num_classes)
"""


def _write_detector(folder: Path) -> None:
    """detector.py with its weights, and set.yaml with images and boxes."""
    (folder / "detector.py").write_text(DETECTOR)
    names: dict[str, Any] = {}
    exec(DETECTOR, names)
    save_file(names["build"]().state_dict(), folder / "detector.safetensors")
    write_yolo(folder / "boxes", [[(index % 3, 4, 4, 40, 30)] for index in range(10)])
    (folder / "set.yaml").write_text("path: boxes\ntrain: images\nval: images\nnames: [square, bar, dot]\n")


def _tiny_network() -> nn.Module:
    names: dict[str, Any] = {}
    exec(tiny.NET, names)
    network: nn.Module = names["net"](3)
    return network


def _pytorch_quantization_state() -> dict[str, torch.Tensor]:
    """The state dict of a ResNet18 as pytorch-quantization saves it: the float network's, and an amax per quantizer."""
    model = torchvision.models.resnet18(num_classes=2)
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            state[f"{name}._input_quantizer._amax"] = torch.tensor(4.0)
            state[f"{name}._weight_quantizer._amax"] = module.weight.detach().flatten(1).abs().amax(1).clone()
    return state


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


def table_below(text: str, heading: str) -> str:
    """The first table of ``text`` below the line ``heading``."""
    below = f"\n{text}".partition(f"\n{heading}\n")[2]
    return below[below.index("\n| ") + 1 :].partition("\n\n")[0].rstrip("\n")


def tables() -> dict[tuple[str, str], str]:
    """(page, heading) -> the table below it, as the program has it; what to do about an exit code is the page's own."""
    rules = ["| rule | what it says | source |", "| --- | --- | --- |"]
    rules += [f"| `{name}` | {rule.sentence} | {rule.source} |" for name, rule in RULES.items()]
    hard = ["| rule | what it says |", "| --- | --- |"]
    hard += [f"| `{name}` | {rule.sentence} |" for name, rule in HARD_RULES.items()]
    title, line, *codes = table_below((ROOT / "docs/exit-codes.md").read_text(), "# Exit codes").splitlines()
    advice = {code.split(" | ")[0]: code.split(" | ")[2] for code in codes}
    said = [row for row in (exit_codes.__doc__ or "").splitlines() if re.match(r"\| \d+ \|", row)]
    profile = KernelProfile.shipped()
    grouped = [one for one in profile.kinds if one.kind.groups > 1 and one.kind.group_width > 1]
    widths = ["| channels a group | in float, ms | in INT8, ms | times as fast in INT8 |", "| --- | --- | --- | --- |"]
    for one in sorted(grouped, key=lambda one: (one.kind.group_width, one.kind.stride, one.kind.groups)):
        layer = f"{one.kind.group_width}, {one.kind.groups} groups" + ", stride 2" * (one.kind.stride == 2)
        layer += f", {'x'.join(map(str, one.kind.kernel))}" * (one.kind.kernel != (3, 3))
        widths.append(f"| {layer} | {one.float_ms:.3f} | {one.int8_ms:.3f} | {one.gain:.2f} |")
    losing = ["| layer | times as fast in INT8 |", "| --- | --- |"]
    swishes = ["| layer | together, ms | codes between them, ms |", "| --- | --- | --- |"]
    swishes += [
        f"| {layer.in_channels} -> {layer.out_channels}, {layer.pixels} px, stride {layer.stride} | "
        f"{fused.int8_ms:.3f} | {one.int8_ms:.3f} |"
        for one in profile.kinds
        if one.kind.activation == "swish of codes"
        for fused in profile.kinds
        if (layer := fused.kind) == replace(one.kind, activation="swish")
    ]
    losing += [
        f"| {one.kind} | {'refused' if one.gain is None else f'{one.gain:.2f}'}{' (within the spread)' * within} |"
        for one in profile.kinds
        if one not in grouped and not one.gains
        for within in [one.gain is not None and not one.significant]
    ]
    return {
        ("docs/placement.md", "### Grouped convolutions"): "\n".join(widths),
        ("docs/placement.md", "### Layers that do not gain"): "\n".join(losing),
        ("docs/placement.md", "### Layers and their swish"): "\n".join(swishes),
        ("docs/placement.md", "## The rules"): "\n".join(rules),
        ("docs/placement.md", "### What TensorRT refuses"): "\n".join(hard),
        ("docs/exit-codes.md", "# Exit codes"): "\n".join(
            [title, line, *(f"{row} {advice.get(row.split(' | ')[0], '|')}" for row in said)]
        ),
    }


OFFLINE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
"""An environment in which a download fails at once."""


def environment() -> dict[str, str]:
    """That of the commands: no network, and caches of their own."""
    return {**OFFLINE, "TORCH_HOME": os.devnull}


if __name__ == "__main__":
    for (name, heading), table in tables().items():
        page = ROOT / name
        content = page.read_text()
        page.write_text(content.replace(table_below(content, heading), table))
