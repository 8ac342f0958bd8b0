"""The networks that placement is held to: torchvision's, timm's and a U-Net, with weights that let signals through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import Encoder

TORCHVISION = (
    *("alexnet", "vgg16_bn", "googlenet", "inception_v3", "resnet18", "resnet50", "resnet101", "resnext50_32x4d"),
    *("wide_resnet50_2", "densenet121", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_large", "mnasnet1_0"),
    *("shufflenet_v2_x1_0", "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "convnext_tiny"),
    *("fcn_resnet50", "deeplabv3_resnet50"),
)
TIMM = (
    *("resnet50d", "efficientnet_lite0", "repvgg_a0", "cspresnet50", "dla34", "darknet53", "hrnet_w18_small"),
    "mobilenetv4_conv_small",
)
# Attention and layer normalization; of most two blocks, because each is like the others.
TRANSFORMERS = (
    *("vit_b_16", "swin_t", "swin_v2_t", "timm/vit_small_patch16_224", "timm/deit3_small_patch16_224"),
    *("timm/vit_small_patch14_dinov2", "timm/swin_tiny_patch4_window7_224", "timm/cait_xxs24_224", "timm/levit_128s"),
    *("timm/convnextv2_atto", "timm/edgenext_xx_small", "timm/mobilenetv4_hybrid_medium", "timm/fastvit_t8"),
    "maxvit_t",
)
NAMES = (*TORCHVISION, "unet", *(f"timm/{name}" for name in TIMM), *TRANSFORMERS)
# The smallest inputs, in pixels, that exercise every layer; of the others it is 64.
_SMALLEST = {
    "alexnet": 224,
    "vgg16_bn": 224,
    "inception_v3": 96,
    "densenet121": 64,
    "timm/vit_small_patch14_dinov2": 56,
    "timm/levit_128s": 224,
    "maxvit_t": 224,
}
# What makes them small.
_OPTIONS: dict[str, dict[str, Any]] = {
    "vit_b_16": {"image_size": 64},
    "timm/vit_small_patch16_224": {"img_size": 64, "depth": 2},
    "timm/deit3_small_patch16_224": {"img_size": 64, "depth": 2},
    "timm/vit_small_patch14_dinov2": {"img_size": 56, "depth": 2},
    "timm/swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "depths": (2, 2)},
    "timm/cait_xxs24_224": {"img_size": 64, "depth": 2},
}


class UNet(nn.Module):
    """Four levels, transposed convolutions, and a concatenation at each level: [N, 3, H, W] -> [N, 2, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(_twice(i, o) for i, o in ((3, 16), (16, 32), (32, 64), (64, 128)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, i // 2, 2, 2) for i in (128, 64, 32))
        self.join = nn.ModuleList(_twice(i, i // 2) for i in (128, 64, 32))
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for index, block in enumerate(self.down):
            x = block(self.pool(x) if index else x)
            levels.append(x)
        for up, join, skip in zip(self.up, self.join, levels[-2::-1], strict=True):
            x = join(torch.cat([skip, up(x)], 1))
        return self.head(x)


class Segmentation(nn.Module):
    """A segmentation network of torchvision that answers with its one tensor: [N, classes, H, W]."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = torchvision.models.get_model(name, weights=None, weights_backbone=None, aux_loss=False)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.network(x)["out"]
        return answer


def build(name: str, *, full: bool = False) -> nn.Module:
    """The network, with random weights and the batch statistics of random images, in evaluation mode.

    ``full``: a transformer as deep as it is, for 224 px. Other networks are always whole.
    """
    full = full and name in TRANSFORMERS
    torch.manual_seed(0)
    model = _network(name, small=not full)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the plain mean over what is seen
        if norm.affine:  # as training leaves them: no branch is hidden by zeros, and no two tensors are one
            nn.init.uniform_(norm.weight, 0.8, 1.2)
            nn.init.uniform_(norm.bias, -0.1, 0.1)
    model.train()
    with torch.no_grad():
        model(full_images(name, 8) if full else images(name, 8))
    return model.eval()


def folders(root: Path, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The networks ``names``, all of them where none is named, each with a folder under ``root``, which is made."""
    for name in names or NAMES:
        folder = root / name.replace("/", "_")
        folder.mkdir(parents=True, exist_ok=True)
        yield name, folder


def images(name: str, count: int, seed: int = 0) -> Tensor:
    """Random images of the size for ``name``: float32 [count, 3, S, S]."""
    return _random(count, image_size(name), seed)


def full_images(name: str, count: int) -> Tensor:
    """The same of the size that the network was made for: 224 px, or 299."""
    return _random(count, 299 if name == "inception_v3" else 224, seed=1)


def image_size(name: str) -> int:
    """Height and width in pixels."""
    return _SMALLEST.get(name, 64 if name in NAMES else 224)


def _random(count: int, size: int, seed: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _network(name: str, *, small: bool) -> nn.Module:
    options = _OPTIONS.get(name, {}) if small else {"img_size": 224} if "dinov2" in name else {}
    if name == "unet":
        return UNet()
    if name.startswith("timm/"):
        import timm

        found: nn.Module = timm.create_model(name.removeprefix("timm/"), **options)
        return found
    if name in ("fcn_resnet50", "deeplabv3_resnet50"):
        return Segmentation(name)
    bare = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **bare, **options)
    for encoder in [part for part in model.modules() if isinstance(part, Encoder) and small]:
        encoder.layers = encoder.layers[:2]
    return model


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    def once(i: int) -> list[nn.Module]:
        return [nn.Conv2d(i, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(*once(inputs), *once(outputs))
