"""The network in the picture of README.md: a residual block with a projection, between two convolutions.

python -m qat.placement docs/examples/residual_block.py:network --image-size 32 --num-classes 10 --svg block.svg
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """relu(conv2(relu(conv1(x))) + shortcut(x)): [N, C, H, W] -> [N, 2 C, H/2, W/2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * channels))
        self.conv2 = nn.Sequential(nn.Conv2d(2 * channels, 2 * channels, 3, 1, 1), nn.BatchNorm2d(2 * channels))
        self.shortcut = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1, 2, bias=False), nn.BatchNorm2d(2 * channels))

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


class Network(nn.Module):
    """[N, 3, H, W] -> [N, classes]."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 16, 3, 1, 1), Block(16)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The classes' logits."""
        answer: Tensor = self.fc(self.pool(self.block(torch.relu(self.stem(x)))).flatten(1))
        return answer


def network(num_classes: int) -> nn.Module:
    """What --model docs/examples/residual_block.py:network builds."""
    return Network(num_classes)
