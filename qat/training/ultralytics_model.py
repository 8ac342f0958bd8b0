"""A model of Ultralytics with fake quantization, as that package's own trainer, validator and checkpoints take it.

The layers are those of a prepared network; decoding, loss, class names and settings are the model's own.
docs/examples/ultralytics_qat.py trains it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qat.base.artifact import Sidecar
from qat.checkpoint import save_checkpoint
from qat.data.preprocessing import Preprocessing
from qat.fake_quantize.prepare import prepare
from qat.graph.tracing import TracedModel
from qat.models import ModelSpec, build_model
from qat.pretrained.ultralytics_models import PREFIX, classes_of, preset_of_ultralytics


class QuantizedModel:
    """Mixed into a model of Ultralytics: ``prepared`` computes what the layers did; of these the head alone is left.

    The head decodes, and the loss reads its numbers. ``origin``: the arguments of ``quantize_ultralytics``.
    """

    prepared: TracedModel
    origin: tuple[str, int, tuple[str, ...]]
    training: bool
    end2end: bool
    model: Any
    loss: Any
    state_dict: Any

    def forward(self, x: Any, **options: Any) -> Any:
        """As Ultralytics' models: a batch with labels -> its loss; images -> raw outputs, or (decoded, raw)."""
        if isinstance(x, Mapping):
            return self.loss(x)
        raw = self.prepared(x.float())
        if self.training:
            return raw
        head = self.model[-1]
        used = raw["one2one" if self.end2end else "one2many"] if "one2one" in raw else raw
        decoded = head._inference(used)
        if self.end2end:
            decoded = head.postprocess(decoded.permute(0, 2, 1))
        return ((decoded, used["proto"]) if "proto" in used else decoded), raw

    def half(self) -> QuantizedModel:
        """Itself: Ultralytics' checkpoints are of float16, in which ranges and codes would be others."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModel:
        made: QuantizedModel = object.__new__(type(self))
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """What a checkpoint of Ultralytics pickles: tensors, and how to build the rest."""
        return quantize_ultralytics, (*self.origin, self.state_dict())


def quantize_ultralytics(
    source: str, size: int, keep_float: Iterable[str] = (), tensors: Mapping[str, Tensor] | None = None
) -> Any:
    """The model of the checkpoint ``source`` with fake quantization inside, for Ultralytics' own trainer.

    Args:
        source: a file of Ultralytics, trained in float.
        size: height and width of the images in pixels.
        keep_float: patterns of what stays in float (qat.rules.place.place).
        tensors: the state dict of such a model; without it, calibrate ``prepared`` (qat.calibrate_ranges).

    Raises UserError when the model cannot be built or prepared.
    """
    origin = (source, size, tuple(keep_float))
    _, model, prepared = _network(origin, "for_loss")
    head = model.model[-1]
    for name, _ in list(head.named_children()):
        if name != "dfl":
            setattr(head, name, nn.Identity())
    model.model, model.prepared, model.origin = model.model[-1:], prepared, origin
    model.__class__ = type(type(model).__name__, (QuantizedModel, type(model)), {})
    if tensors is not None:
        model.load_state_dict(tensors)
    return model


def save_ultralytics(path: str | Path, model: QuantizedModel) -> Sidecar:
    """Writes the checkpoint of a trained model, whose export answers decoded boxes as python -m qat.calibrate --decode.

    Raises UserError as qat.save_checkpoint does.
    """
    spec, _, decoded = _network(model.origin, "decoded")
    decoded.load_state_dict(model.prepared.state_dict(), strict=False)  # what decodes has constants of its own
    source, size, _ = model.origin
    preprocessing = Preprocessing.from_preset(preset_of_ultralytics(source), size, size, size)
    return save_checkpoint(path, decoded, spec, preprocessing)


def _network(origin: tuple[str, int, tuple[str, ...]], answers: str) -> tuple[ModelSpec, Any, TracedModel]:
    source, size, keep_float = origin
    spec = ModelSpec(PREFIX + source, classes_of(source), {answers: True})
    model = build_model(spec)
    return spec, model, prepare(model, input_shape=(3, size, size), keep_float=keep_float)
