"""Loads the weights of a float model, from a file or from torchvision, and tells which preprocessing they expect.

Weights must fit the model key by key. The one exception is a classifier with another number of classes, which then
keeps its random weights. No code of a file is run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from qat.base.errors import UserError, one_line
from qat.calibration.pytorch_quantization import split_ranges
from qat.data.preprocessing import ImagePreset, Interpolation, three_floats
from qat.data.request import ImageRequest
from qat.models import ModelSpec, build_model, name_of, spec_for, torchvision_names
from qat.pretrained.state_dict import StateDict, find_state_dict, misfitting_names
from qat.pretrained.torchvision_detectors import detector_names, preset_of_detector
from qat.pretrained.ultralytics_models import CHECKPOINTS, PREFIX, classes_of, preset_of_ultralytics
from qat.pretrained.weights_file import SUFFIXES, read_weights_file

# Heads of googlenet, inception_v3 and segmentation models in torchvision's weight files.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.", "aux_classifier.")
_MOST_COMMON = 1000  # classes: ImageNet's


def load_weights(model: nn.Module, weights: str) -> tuple[str, dict[str, Tensor]]:
    """Loads ``weights`` into ``model``, which ``build_model`` built.

    Returns a line that says what was loaded and what was not, and the activation ranges if ``weights`` is a checkpoint
    of pytorch-quantization.

    Args:
        model: the model, which is changed.
        weights: a .safetensors file, a .pth or .pt file that holds a state dict (qat/pretrained/weights_file.py says
            what else it may hold), or torchvision's name of weights for the model, such as 'IMAGENET1K_V2' or
            'DEFAULT'.

    Raises:
        UserError: no such weights, a damaged file, a failed download, or keys that do not fit the model.
    """
    found = _find(model, weights)
    notes = list(found.notes)
    if head := _load(model, weights, found.tensors):
        then, now = (len(tensors[f"{head}.weight"]) for tensors in (found.tensors, model.state_dict()))
        notes.append(f"except {head}: it has {then} classes there and {now} here, so it starts at random")
    return ", ".join([f"weights: {weights}", *notes]), found.ranges


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A float model all of whose weights were loaded.

    ``ranges``: activation ranges from a checkpoint of pytorch-quantization. ``class_names``: () if the weights do not
    come with any. ``notes``: what was taken of the weights file, and what was not.
    """

    spec: ModelSpec
    model: nn.Module
    ranges: Mapping[str, Tensor]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def build_pretrained(
    name: str, weights: str | None, classes: int | None = None, channels: int = 3, options: Mapping[str, Any] = {}
) -> Pretrained:
    """The model ``name`` with as many classes as the classifier in ``weights`` has rows; see ``load_weights``.

    ``classes``: their number, for a model whose classifier cannot be told from its other layers. ``weights``: None for
    a checkpoint of Ultralytics, which has them. ``options``: of the model's constructor. ``channels``: 1 or 3.

    Raises:
        UserError: as ``build_model`` and ``load_weights`` do, and when the weights have another number of classes.
    """
    spec = spec_for(name, classes or _usual_classes(name), channels, options)
    model = build_model(spec)
    if weights is None:
        return Pretrained(spec, model, {}, ())
    found = _find(model, weights)
    remedy = "" if classes else f", or their --classes if they are not {spec.num_classes}"
    own = model.state_dict()
    rows = _classes_of_heads(own, found.tensors, spec.num_classes)
    if head := _other_classifier(own, found.tensors):
        rows = rows or len(found.tensors[f"{head}.weight"])  # a detector's has a row for each class and anchor
        if classes == len(own[f"{head}.weight"]):
            raise UserError(f"weights {weights} have {rows} classes ({head}), not {classes}: leave out --classes")
    if head or (rows and not classes):
        spec, remedy = spec_for(name, rows, channels, options), "" if head else remedy
        model = build_model(spec)
    if head := _load(model, weights, found.tensors, remedy):
        then, now = (len(tensors[f"{head}.weight"]) for tensors in (found.tensors, model.state_dict()))
        raise UserError(
            f"weights {weights} have {then} classes, but {name} has {now} ({head}) when it is built for "
            f"{spec.num_classes}: give weights of this model, or let its function honour num_classes"
        )
    class_names = () if _is_file(weights) else _categories(name, weights)
    return Pretrained(spec, model, found.ranges, class_names, found.notes)


def brings_weights(name: str) -> bool:
    """Whether the model ``name`` is a checkpoint with weights of its own."""
    return name.startswith(PREFIX) and name.endswith(CHECKPOINTS)


def _usual_classes(name: str) -> int:
    return classes_of(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else _MOST_COMMON


def with_classes_of_output(found: Pretrained, input_shape: tuple[int, ...], classes: int | None = None) -> Pretrained:
    """``found`` with the number of classes that its model answers, which a user's function may have chosen itself.

    Args:
        found: a model and its weights.
        input_shape: [C, H, W] of one image.
        classes: the number that the user gave.

    Raises:
        UserError: the user gave another number.
    """
    answered = _classes_of_output(found.model, input_shape) if ".py:" in found.spec.name else None
    if answered is None or answered == found.spec.num_classes:
        return found
    if classes:
        raise UserError(f"model {found.spec.name} answers {answered} classes, not {classes}: leave out --classes")
    return dataclasses.replace(found, spec=dataclasses.replace(found.spec, num_classes=answered))


def _classes_of_output(model: nn.Module, input_shape: tuple[int, ...]) -> int | None:
    """The number of logits for one image; None if the model answers something else, or fails, as tracing will tell."""
    training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, *input_shape))
    except Exception:
        return None
    finally:
        model.train(training)
    return int(logits.shape[1]) if isinstance(logits, Tensor) and logits.ndim == 2 else None


@dataclasses.dataclass(frozen=True)
class _Found:
    """Tensors for a model, the ranges that came with them, and what was taken and what was not."""

    tensors: dict[str, Tensor]
    ranges: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def _find(model: nn.Module, weights: str) -> _Found:
    """What ``weights`` hold for ``model``, from a file or from torchvision."""
    if not _is_file(weights):
        return _Found(_without_auxiliary(model, _torchvision_weights(name_of(model), weights)), {})
    path = Path(weights).expanduser()
    content = read_weights_file(path)
    found = find_state_dict(content, model.state_dict().keys(), _AUXILIARY if _lacks_auxiliary(model) else ())
    if found is None:
        raise UserError(f"{path} does not hold a state dict (found: {_shown(content)}): save model.state_dict()")
    taken, others = found
    return _Found(*split_ranges(taken.tensors), _notes(taken, others))


def _shown(content: Any) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    return ", ".join(f"{key} ({type(value).__name__})" for key, value in list(content.items())[:5]) or "nothing"


def _notes(taken: StateDict, others: tuple[str, ...]) -> tuple[str, ...]:
    """What was taken of a file and what was not, one phrase each."""
    notes = []
    if taken.entry:
        kind = "a moving average of the weights" if taken.is_average else ""
        left = f"{' and '.join(map(repr, others))} not taken" if others else ""
        explained = "; ".join(filter(None, (kind, left)))
        notes.append(f"entry {taken.entry!r}" + (f" ({explained})" if explained else ""))
    if taken.prefix:
        notes.append(f"prefix {taken.prefix!r} removed")
    if taken.ignored:
        more = ", ..." if len(taken.ignored) > 2 else ""
        notes.append(f"{len(taken.ignored)} entries ignored ({', '.join(taken.ignored[:2])}{more})")
    return tuple(notes)


def _lacks_auxiliary(model: nn.Module) -> bool:
    return getattr(model, "aux_logits", None) is False or getattr(model, "aux_classifier", ...) is None


def _without_auxiliary(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    left_out = _AUXILIARY if _lacks_auxiliary(model) else ()
    return {key: tensor for key, tensor in found.items() if not key.startswith(left_out)}


def _load(model: nn.Module, weights: str, found: Mapping[str, Tensor], remedy: str = "") -> str:
    """Loads the tensors ``found``; returns the path of a classifier with other classes, which is not loaded, or ''."""
    own = model.state_dict()
    head = _other_classifier(own, found)
    fitting = {key: tensor for key, tensor in found.items() if not _belongs(key, head)}
    if misfits := _misfits(own, fitting, head):
        if not all("with another shape" in misfit for misfit in misfits):
            remedy = ""  # another number of classes would not help
        raise UserError(
            f"weights {weights} do not fit the model: {'; '.join(misfits)}; give weights of this model{remedy}"
        )
    try:
        model.load_state_dict(own | fitting)
    except RuntimeError as error:  # for example quantized or sparse tensors
        raise UserError(f"weights {weights} cannot be loaded ({one_line(error)}): save float tensors") from error
    return head


def _is_file(weights: str) -> bool:
    path = Path(weights).expanduser()
    return path.exists() or path.suffix in SUFFIXES


def input_preset(model: str, weights: str | None, images: ImageRequest) -> ImagePreset:
    """Size and normalization of the network's input.

    Raises UserError when a deviation is not positive, or when there is not one number for each channel.
    """
    told = preset_of_weights(model, weights).in_channels(images.channels)
    for name, values in (("--mean", images.mean), ("--std", images.std)):
        if values is not None and len(values) != images.channels:
            shown = " ".join(map(str, values))
            raise UserError(
                f"{name} {shown}: {len(values)} for images of {images.channels} channels; give one for each channel, "
                "and --channels 1 for grey images"
            )
    if images.std is not None and not min(images.std) > 0:
        raise UserError(f"--std {' '.join(map(str, images.std))}: deviations must be above 0")
    return dataclasses.replace(told, mean=images.mean or told.mean, std=images.std or told.std)


def preset_of_weights(name: str, weights: str | None) -> ImagePreset:
    """The preprocessing of photographs with which ``weights`` of model ``name`` were trained.

    It is ImageNet's usual one if neither torchvision nor timm knows it.
    """
    if name.startswith(PREFIX):
        return preset_of_ultralytics(name.removeprefix(PREFIX))
    if name in detector_names():
        return preset_of_detector(name)
    if weights is not None and name.startswith("timm/") and importlib.util.find_spec("timm"):
        import timm

        told = timm.get_pretrained_cfg(name.removeprefix("timm/"))
        if told is not None and told.crop_pct:
            size = told.input_size[-1]
            mean, std = three_floats(told.mean), three_floats(told.std)
            return ImagePreset(size, math.floor(size / told.crop_pct), mean, std, _interpolation(told.interpolation))
    if weights is not None and not _is_file(weights) and name in torchvision_names():
        known = torchvision.models.get_model_weights(name)
        entry: Any = known.__members__.get(weights.removeprefix(f"{known.__name__}."))
        preset: Any = entry.transforms() if entry else None
        if hasattr(preset, "crop_size"):  # for classification
            mean, std = three_floats(preset.mean), three_floats(preset.std)
            interpolation = _interpolation(preset.interpolation.value)
            return ImagePreset(preset.crop_size[0], preset.resize_size[0], mean, std, interpolation)
    return ImagePreset()


def _interpolation(name: str) -> Interpolation:
    return "bicubic" if name == "bicubic" else "bilinear"  # there are no others, apart from timm's "random"


def _categories(name: str, weights: str) -> tuple[str, ...]:
    """The class names of torchvision's weights, which must exist."""
    known = torchvision.models.get_model_weights(name)
    return tuple(known[weights.removeprefix(f"{known.__name__}.")].meta["categories"])


def _torchvision_weights(name: str, weights: str) -> dict[str, Tensor]:
    if name not in torchvision_names():
        raise UserError(
            f"there is no weights file {weights}: check the path; only torchvision's models have weights by name"
        )
    known = torchvision.models.get_model_weights(name)
    entry = weights.removeprefix(f"{known.__name__}.")
    if entry not in known.__members__:
        raise UserError(
            f"{name} has no weights {weights!r}, and there is no such file: give a file, "
            f"or one of {', '.join(known.__members__)}"
        )
    try:  # torchvision renames old keys
        model = torchvision.models.get_model(name, weights=known[entry])
    except Exception as error:  # for example URLError, a time-out, a wrong hash, a full disk
        raise UserError(
            f"cannot download weights {entry} of {name} from {known[entry].url} ({one_line(error)}): "
            "check the network, or download that file by hand and give its path"
        ) from error
    state: dict[str, Tensor] = model.state_dict()
    return state


def _other_classifier(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The only module whose tensors differ in shape, if they differ only in the first dimension; else ''.

    This is the classifier: if a layer inside the network differed, the next layer would differ too.
    """
    differing = [key for key in own if key in found and own[key].shape != found[key].shape]
    modules = {key.rpartition(".")[0] for key in differing}
    in_outputs = all(own[key].ndim and own[key].shape[1:] == found[key].shape[1:] for key in differing)
    module = modules.pop() if len(modules) == 1 and in_outputs else ""
    return module if f"{module}.weight" in differing else ""


def _classes_of_heads(own: Mapping[str, Tensor], found: Mapping[str, Tensor], built: int) -> int:
    """The classes of weights that differ from a model only in having another number of them; 0 if it is more than that.

    ``built``: the classes of the model, which may have several layers with a row, or as many rows as anchors, for each.
    """
    classes = set[float]()
    for key in own.keys() & found.keys():
        one, other = own[key].shape, found[key].shape
        if one != other:
            alike = len(one) == len(other) > 0 and one[1:] == other[1:] and one[0] % built == 0
            classes.add(other[0] / (one[0] // built) if alike else math.nan)
    then = classes.pop() if len(classes) == 1 else math.nan
    return int(then) if then.is_integer() else 0


def _belongs(key: str, module: str) -> bool:
    return bool(module) and key.rpartition(".")[0] == module


def _misfits(own: Mapping[str, Tensor], found: Mapping[str, Tensor], head: str) -> list[str]:
    """What does not fit, one phrase for each kind of misfit."""
    missing, unexpected = misfitting_names(own.keys(), found.keys())
    shapes = [
        f"{key} {list(found[key].shape)} for {list(own[key].shape)}"
        for key in found
        if key in own and own[key].shape != found[key].shape
    ]
    missing = [key for key in missing if not _belongs(key, head)]
    kinds = (("missing", missing), ("unexpected", unexpected), ("with another shape", shapes))
    return [
        f"{len(keys)} keys {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in kinds
        if keys
    ]
