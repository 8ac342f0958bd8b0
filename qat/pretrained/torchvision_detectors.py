"""The part of torchvision's detectors that is a network: backbone, feature pyramid and heads.

Such a model resizes images before it, and chooses boxes behind it, by code that depends on the images' values and
cannot be traced. That code stays: it is the user's, or torchvision's own, in front of and behind the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from qat.base.errors import UserError
from qat.data.preprocessing import ImagePreset, three_floats
from qat.graph.tracing import TracedModel


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
    """How the detector ``name`` itself normalizes images, and the pixels of their short side; in a letterbox.

    Its own transform pads at the right and below, or stretches; but no more than a letterbox does it cut anything off.
    """
    with torch.device("meta"):
        transform: Any = build_detector(name, weights_backbone=None).transform
    pixels = int(min(transform.fixed_size or transform.min_size))
    return ImagePreset(
        pixels, pixels, three_floats(transform.image_mean), three_floats(transform.image_std), letterbox=True
    )


def build_detector(name: str, **options: Any) -> nn.Module:
    """The detector ``name`` of torchvision, with ``HeadOutputs`` mixed in; ``options`` are its constructor's."""
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    kind = type(model)
    model.__class__ = type(kind.__name__, (HeadOutputs, kind), {})
    return model


class BoxChooser:
    """What torchvision's detector does behind its heads, by its own code: anchors, boxes, suppression.

    The detector itself runs, but its transform, backbone and head are replaced with what gives known answers.

    Attributes:
        limits: the least score, the most overlap and the most boxes of an image that it uses.
    """

    def __init__(self, model: Any, **limits: float | None) -> None:
        self._model = model.eval()
        self._backbone = model.backbone
        for name, value in limits.items():
            if value is not None:
                setattr(model, name, value)
        self.limits = (model.score_thresh, model.nms_thresh, model.detections_per_img)
        self._given: dict[str, _Given] = {"backbone": _Given(None), "head": _Given(None)}
        self._size: tuple[int, int] | None = None

    @torch.no_grad()
    def __call__(self, outputs: Mapping[str, np.ndarray], size: tuple[int, int]) -> tuple[np.ndarray, ...]:
        """The heads' outputs for one image, without the batch, and (height, width) of the network's input.

        Returns boxes [n, 4] in pixels of that input, scores [n] and labels [n], as the detector itself answers.
        """
        model = self._model
        if size != self._size:  # anchors depend on the shapes of the features alone
            model.backbone, model.transform = self._backbone, _Unchanged(size)
            self._size, self._given["backbone"].answer = size, model.backbone(torch.zeros(1, 3, *size))
            model.backbone, model.head = self._given["backbone"], self._given["head"]
        self._given["head"].answer = {name: torch.from_numpy(value)[None] for name, value in outputs.items()}
        (found,) = model([torch.zeros(3, *size)])
        return tuple(found[name].numpy() for name in ("boxes", "scores", "labels"))


def box_chooser(name: str, num_classes: int, options: Mapping[str, Any], **limits: float | None) -> BoxChooser:
    """That of the detector ``name``; ``limits`` by torchvision's names of them, None for its own.

    Raises UserError when it is not a one-stage detector of torchvision.
    """
    return BoxChooser(_one_stage(name, num_classes, options), **limits)


def as_torchvision(prepared: TracedModel, name: str, num_classes: int, **options: Any) -> nn.Module:
    """torchvision's own detector around ``prepared``, to be trained and evaluated as its reference scripts do.

    It takes a list of images [3, h, w] in 0..1 and of targets, and answers losses in training, and boxes in evaluation:
    anchors, matching, losses and suppression are torchvision's. Images are resized to the size of ``prepared``.

    Args:
        prepared: qat.prepare of build_model(ModelSpec(name, num_classes)), which is trained; it is not copied.
        name: a detector of one stage.
        num_classes: with the background, where the detector has one.
        options: of the detector's constructor.

    Raises UserError when it is not a one-stage detector of torchvision.
    """
    model = _one_stage(name, num_classes, options)
    ((_, height, width),) = prepared.meta["inputs"].shapes.values()
    with torch.no_grad():
        features = model.eval().backbone(torch.zeros(1, 3, height, width))
    kind = type(model.head)
    model.head.__class__ = type(kind.__name__, (_Given, kind), {})  # its losses are left
    for part in model.head.modules():
        part._parameters.clear()
    model.backbone = _Prepared(prepared, {level: one.shape[1:] for level, one in features.items()}, model.head)
    model.transform.fixed_size, model.transform.size_divisible = (width, height), 1
    made: nn.Module = model.train(prepared.training)
    return made


class _Prepared(nn.Module):
    """In place of a backbone: the answer of ``prepared`` goes to ``head``; of the features only the shapes are read."""

    def __init__(self, prepared: nn.Module, shapes: Mapping[str, torch.Size], head: _Given) -> None:
        super().__init__()
        self.prepared, self._shapes, self._head = prepared, shapes, (head,)  # no submodule twice

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self._head[0].answer = self.prepared(images)
        return {level: images.new_zeros(1).expand(len(images), *shape) for level, shape in self._shapes.items()}


def _one_stage(name: str, num_classes: int, options: Mapping[str, Any]) -> Any:
    if name not in detector_names():
        raise UserError(f"{name} is not a detector of torchvision: give --decoder path/file.py:function")
    known = {"weights": None, "weights_backbone": None, "num_classes": num_classes}
    model = torchvision.models.get_model(name, **{**options, **known})
    if hasattr(model, "rpn"):
        raise UserError(f"{name} has two stages, of which only the first is a network that is quantized: use your own")
    return model


class _Given(nn.Module):
    """Answers what it was given, whatever it is asked."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *_: Any) -> Any:
        return self.answer


class _Unchanged(nn.Module):
    """In place of a detector's transform: images are ready, and boxes stay as they are."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self._size = size

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[Any, Any]:
        return ImageList(torch.stack(images), [self._size]), targets

    def postprocess(self, result: Any, *_: Any) -> Any:
        return result
