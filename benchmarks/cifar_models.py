"""ResNet50 for images of 32 pixels: its stem is one 3x3 convolution of stride 1, without pooling."""

from __future__ import annotations

import torchvision
from torch import nn


def resnet50(num_classes: int) -> nn.Module:
    """Takes [N, 3, 32, 32], gives [N, num_classes]."""
    network: nn.Module = torchvision.models.resnet50(num_classes=num_classes, zero_init_residual=True)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network
