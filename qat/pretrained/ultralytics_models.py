"""Models of Ultralytics, such as the YOLOs, built by the user's own installation of that package.

It is under the AGPL and is called, never copied: pip install ultralytics. A model is named by its YAML file, which the
package knows or the user wrote, ``ultralytics/yolo11n.yaml``, or by a checkpoint of it, ``ultralytics/best.pt``. The
latter is unpickled by that package, which runs what is in it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qat.base.errors import UserError, one_line
from qat.data.preprocessing import ImagePreset

PREFIX = "ultralytics/"
CHECKPOINTS = (".pt",)


class NamedOutputs(nn.Module):
    """Mixed into a model: its answer has names, and nothing in it that only training needs.

    In evaluation such a model answers (decoded, raw): boxes in pixels and scores, and what the head computes, by name.
    Taken is the latter, ``boxes``, ``scores`` and, depending on the task, ``mask_coefficient``, ``proto``, ``kpts`` and
    ``angle``, of the head that answers without NMS where there are two. With ``decoded`` it is ``detections``
    [N, 4 + classes + ..., cells], and ``proto``. With ``for_loss`` it is what Ultralytics' losses read, in evaluation
    too: of both heads, ``one2many`` and ``one2one``, where there are two, and with ``feats``, maps [N, C, h, w].
    """

    decoded = for_loss = False
    stride: Any
    names: Any
    task: Any

    def forward(self, x: Any) -> Any:
        """[N, 3, H, W] -> the outputs by name, or logits [N, classes]; a dict, as its trainer gives -> the loss."""
        if not self.training:
            self._forget_shape()
        answer = super().forward(x)
        if isinstance(x, Mapping):
            return answer
        decoded, raw = (None, answer) if self.training else answer
        if not isinstance(raw, Mapping) or self.for_loss:
            return raw
        if self.decoded and decoded is not None:
            several = isinstance(decoded, (tuple, list))
            return {"detections": decoded[0], "proto": decoded[1]} if several else {"detections": decoded}
        return {name: part for name, part in raw.get("one2one", raw).items() if name != "feats"}

    def _forget_shape(self) -> None:
        """A head keeps the cells' places for the shape it saw last, batch included: a branch that cannot be traced."""
        for module in self.modules():
            if hasattr(module, "anchors") and hasattr(module, "shape"):
                module.shape = None  # type: ignore[assignment]

    def file_metadata(self, input_shape: tuple[int, ...]) -> dict[str, str]:
        """What an ONNX file must say so that Ultralytics predicts with it; {} of one that is not decoded.

        ``input_shape``: [3, H, W].
        """
        if not self.decoded:
            return {}
        stride, names, task = int(max(self.stride)), dict(self.names), str(self.task)
        height, width = input_shape[1:]
        found = {"task": task, "stride": stride, "names": names, "imgsz": [height, width], "batch": 1, "channels": 3}
        return {name: str(value) for name, value in found.items()}


def build_ultralytics(source: str, num_classes: int, decoded: bool = False, for_loss: bool = False) -> nn.Module:
    """The model of the YAML file or checkpoint ``source``, in float32 and training mode, on the CPU.

    ``num_classes``: of a checkpoint they are its own. ``decoded``, ``for_loss``: see NamedOutputs.

    Raises UserError when ultralytics is not installed, and whatever it raises when it cannot build the model.
    """
    model, task = _load(source)
    if not _is_checkpoint(source):
        model = type(model)(dict(model.yaml), nc=num_classes, verbose=False)
    model.task = task
    _separate_activations(model)
    kind = type(model)
    model.__class__ = type(kind.__name__, (NamedOutputs, kind), {"decoded": decoded, "for_loss": for_loss})
    found: nn.Module = model.float().train().requires_grad_(True)
    return found


def classes_of(source: str) -> int:
    """How many classes the model ``source`` has by itself. Raises UserError as ``build_ultralytics`` does."""
    return int(_load(source)[0].yaml["nc"])


def preset_of_ultralytics(source: str) -> ImagePreset:
    """How Ultralytics feeds its models: pixels in 0..1; cropped for a classifier, else in a letterbox."""
    if _load(source)[1] == "classify":
        return ImagePreset(224, 224, (0.0,) * 3, (1.0,) * 3)
    return ImagePreset(640, 640, (0.0,) * 3, (1.0,) * 3, letterbox=True)


def _separate_activations(model: nn.Module) -> None:
    """All layers share one activation; each gets its own, so that tensors are called after the layer they are in."""
    for module in model.modules():
        if isinstance(getattr(module, "act", None), nn.Module):
            module.act = copy.copy(module.act)


def _is_checkpoint(source: str) -> bool:
    return Path(source).suffix in CHECKPOINTS


def _load(source: str) -> tuple[Any, str]:
    """The package's own model, and what it is for: detect, segment, ..."""
    try:
        from ultralytics import YOLO
    except ImportError as error:
        raise UserError(
            f"model {PREFIX}{source} needs ultralytics, which is not installed: pip install ultralytics"
        ) from error
    try:
        found = YOLO(source, verbose=False)
        return found.model, str(found.task)
    except Exception as error:  # it raises what it likes
        raise UserError(
            f"ultralytics cannot make a model of {source} ({type(error).__name__}: {one_line(error)}): give a YAML "
            "file such as yolo11n.yaml, or a checkpoint"
        ) from error
