"""The part of torchvision's detectors that is a network: backbone, feature pyramid and heads.

Such a model resizes images before it, and chooses boxes behind it, by code that depends on the images' values and
cannot be traced. That code stays: it is the user's, or torchvision's own, in front of and behind the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from qat.data.preprocessing import ImagePreset, three_floats


class HeadOutputs(nn.Module):
    """Mixed into a detector: it takes images as a tensor, and answers what its heads compute, by name.

    ``cls_logits`` [N, anchors, classes], ``bbox_regression`` [N, anchors, 4] and, of FCOS, ``bbox_ctrness``
    [N, anchors, 1]. Of a detector of two stages, what the second one reads: ``features`` of each level, and
    ``objectness`` and ``deltas`` of the region proposals.
    """

    backbone: Any
    head: Any
    rpn: Any

    def forward(self, images: Tensor) -> Mapping[str, Any]:
        """Normalized images [N, 3, H, W] -> the outputs by name."""
        features = self.backbone(images)
        by_level = {"0": features} if isinstance(features, Tensor) else features
        levels = list(by_level.values())
        if hasattr(self, "rpn"):
            objectness, deltas = self.rpn.head(levels)
            return {"features": by_level, "objectness": objectness, "deltas": deltas}
        found: Mapping[str, Any] = self.head(levels)
        return found


def detector_names() -> list[str]:
    """Names of torchvision's detectors."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models.detection)
    return names


def preset_of_detector(name: str) -> ImagePreset:
    """How the detector ``name`` itself normalizes images, and the pixels of their short side."""
    with torch.device("meta"):
        transform: Any = build_detector(name, weights_backbone=None).transform
    pixels = int(min(transform.fixed_size or transform.min_size))
    return ImagePreset(pixels, pixels, three_floats(transform.image_mean), three_floats(transform.image_std))


def build_detector(name: str, **options: Any) -> nn.Module:
    """The detector ``name`` of torchvision, with ``HeadOutputs`` mixed in; ``options`` are its constructor's."""
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    kind = type(model)
    model.__class__ = type(kind.__name__, (HeadOutputs, kind), {})
    return model
