"""Networks for small images: a ResNet50 whose stem is one 3x3 convolution without pooling, and two transformers."""

from __future__ import annotations

import timm
import torchvision
from torch import nn


def resnet50(num_classes: int) -> nn.Module:
    """Takes [N, 3, 32, 32], gives [N, num_classes]."""
    network: nn.Module = torchvision.models.resnet50(num_classes=num_classes, zero_init_residual=True)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def vit(num_classes: int) -> nn.Module:
    """timm's vit_tiny with 9 blocks and patches of 4: takes [N, 3, 32, 32], gives [N, num_classes]."""
    name = "vit_tiny_patch16_224"
    network: nn.Module = timm.create_model(name, img_size=32, patch_size=4, depth=9, num_classes=num_classes)
    return network


def deit(num_classes: int) -> nn.Module:
    """timm's deit_tiny for images of 128 pixels: takes [N, 3, 128, 128], gives [N, num_classes]."""
    network: nn.Module = timm.create_model("deit_tiny_patch16_224", img_size=128, num_classes=num_classes)
    return network
