"""A network of pre-activation residual blocks that end in a gate and in numbers, as NFNets have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gate(nn.Module):
    """Squeeze-and-excitation: x * sigmoid(layers(mean of x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, 16, 1), nn.Conv2d(16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        return x * self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()


class Block(nn.Module):
    """alpha * 2 * gate(branch(a)) + shortcut, of a = beta * silu(x); the shortcut is x, or a layer of a pool of a."""

    def __init__(self, channels: int, beta: float, *, first: bool, stride: int = 1) -> None:
        super().__init__()
        self.alpha, self.beta = 0.2, beta
        self.one, self.two = nn.Conv2d(channels, 16, 1), nn.Conv2d(16, 32, 3, stride, 1)
        self.gate = Gate(32)
        self.pool = nn.AvgPool2d(2) if stride > 1 else nn.Identity()
        self.down = nn.Conv2d(channels, 32, 1) if first else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, 32, H / stride, W / stride]."""
        a = F.silu(x) * self.beta
        shortcut = x if self.down is None else self.down(self.pool(a))
        y: Tensor = 2.0 * self.gate(self.two(F.silu(self.one(a))))
        return y * self.alpha + shortcut


class ScaledBlocks(nn.Module):
    """[N, 3, 32, 32] -> [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.blocks = nn.Sequential(
            Block(16, 1.0 / 1.25, first=True),
            Block(32, 0.7, first=True, stride=2),
            Block(32, 0.9, first=False),
            Block(32, 0.8, first=False),
        )
        self.last, self.head = nn.Conv2d(32, 64, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.last(self.blocks(self.stem(x))))
        answer: Tensor = self.head(x.mean((2, 3)))
        return answer


def scaled_blocks() -> ScaledBlocks:
    """The network, with weights that do not let the signal fade."""
    torch.manual_seed(0)
    model = ScaledBlocks()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model.eval()
