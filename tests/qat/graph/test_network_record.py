"""A network as a sidecar records it: the same operations come back, and what is no record is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from commands import ROOT
from own_network import Net
from torch import Tensor, nn

from qat.graph.network_record import RecordedOp, network_from_json, network_to_json
from qat.graph.tracing import network_of, trace


class Layouts(nn.Module):
    """A grouped convolution, a transposed one, and a product with a constant matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(4, 6, (1, 3), groups=2), nn.ConvTranspose2d(6, 8, 2, groups=2)
        self.matrix = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.up(self.conv(x)).mean((2, 3)) @ self.matrix
        return found


def test_it_comes_back() -> None:
    network = network_of(trace(Net(), (3, 16, 16)))
    content = network_to_json(network)
    assert json.loads(json.dumps(content)) == content
    found = network_from_json(content)
    for op, given in zip(found, network, strict=True):
        assert (op.name, op.kind, op.label) == (given.name, given.kind, given.label)
        assert (op.inputs, op.shape) == (given.inputs, given.shape)
    assert found[1] == RecordedOp("conv1", "convolution", "conv1", ("x",), (1, 8, 8, 8), (8, 3, 3, 3))
    assert {op.name: op.weight for op in found if op.weight} == {
        "conv1": (8, 3, 3, 3),
        "conv2": (8, 8, 3, 3),
        "fc": (3, 8),
    }


def test_shapes_of_weights_are_in_the_layout_of_pytorch() -> None:
    found = network_from_json(network_to_json(network_of(trace(Layouts(), (4, 8, 8)))))
    assert [op.weight for op in found if op.weight] == [(6, 2, 1, 3), (6, 4, 2, 2), (5, 8)]


ENTRY = {"name": "x", "kind": "input", "label": "x", "inputs": [], "shape": [1, 3], "weight": None}


@pytest.mark.parametrize(
    "content",
    [
        None,
        "x",
        3,
        [3],
        [{}],
        [ENTRY, ENTRY],
        [ENTRY | {"kind": "unheard"}],
        [ENTRY | {"name": None}],
        [ENTRY | {"inputs": ["y"]}],
        [ENTRY | {"inputs": "x"}],
        [ENTRY | {"inputs": [[]]}],
        [ENTRY | {"shape": [1.5]}],
        [ENTRY | {"weight": 3}],
    ],
)
def test_what_is_no_record(content: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        network_from_json(content)


def test_reading_needs_no_torch() -> None:
    code = "import sys, qat.graph.network_record, qat.base.ranges_file; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
