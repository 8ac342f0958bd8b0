"""Whatever is exported, the lint finds nothing in it: both front ends see the same network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from untrained import prepared

from export import export_onnx, lint_onnx

SIDE, WIDTH = 8, 32


class Tokens(nn.Module):
    """A residual block of linear layers on [N, 64, 32], and what ``between`` does to its branch."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.patches, self.norm, self.between = nn.Conv2d(3, WIDTH, 2, 2), nn.LayerNorm(WIDTH), between
        self.first, self.second, self.head = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        x = x + self.between(self.second(F.gelu(self.first(self.norm(x)))))
        x = x + self.second(F.gelu(self.first(x)))
        return self.head(x.mean((1, 2)))


class Channels(nn.Module):
    """Convolutions on [N, 32, 8, 8] with ``norm`` before them, and a mean over the last two axes."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, WIDTH, 2, 2), norm, nn.Linear(WIDTH, 5)
        self.body = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.body(self.norm(x))
        return self.head(x.mean((-1, -2)))


class Mixes(nn.Module):
    """A convolution with kernel 1 as an equation in capitals."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("N C H W, C D -> N D H W", x, self.weight)


class Functional(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), True), self.bias, self.stride, self.padding)


def rolled(x: Tensor) -> Tensor:
    return torch.roll(x, shifts=(-2, 3), dims=(1, 2))


NETWORKS = {
    "bias": Tokens(lambda x: x),
    "roll": Tokens(rolled),
    "roll once": Tokens(lambda x: x.roll(1, 1)),
    "crop of everything": Tokens(lambda x: x[:, :SIDE]),
    "equation": Channels(Mixes()),
    "stack": Tokens(lambda x: torch.stack((x, x.relu()), 1).amax(1)),
    "timm's activation in a batch norm": Channels(timm.layers.BatchNormAct2d(WIDTH, act_layer=timm.layers.GELU)),
    "group norm": Channels(nn.GroupNorm(4, WIDTH)),
    "group norm as a function": Channels(Functional(1, WIDTH)),
    "batch norm": Channels(nn.BatchNorm2d(WIDTH)),
    "synchronized": nn.SyncBatchNorm.convert_sync_batchnorm(Channels(nn.BatchNorm2d(WIDTH))),
    "computed weight": Channels(Standardized(WIDTH, WIDTH, 3, 1, 1)),
    "normalized weight": Channels(nn.utils.parametrizations.weight_norm(nn.Conv2d(WIDTH, WIDTH, 1))),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_lint_finds_nothing(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ready, x = prepared(NETWORKS[name]), torch.randn(4, 3, 2 * SIDE, 2 * SIDE)
    path = tmp_path / "m.onnx"
    parity = export_onnx(ready, path, images=x).figures["parity"]
    assert parity["worst_layer"]["sqnr_db"] is None or parity["worst_layer"]["sqnr_db"] > 60
    assert [str(finding) for finding in lint_onnx(path)] == []
    types = {node.op_type for node in onnx.load(path).graph.node}
    means = {"ReduceMean"} if isinstance(NETWORKS[name], Tokens) else set()  # over tokens, not over pixels
    assert not types & {"CastLike", "ReduceMean", "Mod"} - means
