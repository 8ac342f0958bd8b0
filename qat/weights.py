"""Loads the weights of a float model, from a file or from torchvision, and tells which preprocessing they expect.

Weights must fit the model key by key. The one exception is a classifier with another number of classes, which then
keeps its random weights. Only tensors are unpickled.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qat.base.errors import UserError, one_line
from qat.calibration.pytorch_quantization import split_ranges
from qat.data.preprocessing import ImagePreset, Interpolation, three_floats
from qat.models import ModelSpec, build_model, name_of, spec_for, torchvision_names

_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads of googlenet and inception_v3 in torchvision's weight files
_MOST_COMMON = 1000  # classes: ImageNet's


def load_weights(model: nn.Module, weights: str) -> tuple[str, dict[str, Tensor]]:
    """Loads ``weights`` into ``model``, which ``build_model`` built.

    Returns a line that says what was loaded, and the activation ranges if ``weights`` is a checkpoint of
    pytorch-quantization.

    Args:
        model: the model, which is changed.
        weights: a .safetensors file, a .pth or .pt file that holds a state dict (nothing else is unpickled), or
            torchvision's name of weights for the model, such as 'IMAGENET1K_V2' or 'DEFAULT'.

    Raises:
        UserError: no such weights, a damaged file, a failed download, or keys that do not fit the model.
    """
    found, ranges = split_ranges(_tensors(name_of(model), weights))
    head = _load(model, weights, found)
    if not head:
        return f"weights: {weights}", ranges
    then, now = (len(tensors[f"{head}.weight"]) for tensors in (found, model.state_dict()))
    line = f"weights: {weights}, except {head}: it has {then} classes there and {now} here, so it starts at random"
    return line, ranges


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A float model all of whose weights were loaded.

    ``ranges``: activation ranges from a checkpoint of pytorch-quantization. ``class_names``: () if the weights do not
    come with any.
    """

    spec: ModelSpec
    model: nn.Module
    ranges: Mapping[str, Tensor]
    class_names: tuple[str, ...]


def build_pretrained(name: str, weights: str, classes: int | None = None, channels: int = 3) -> Pretrained:
    """The model ``name`` with as many classes as the classifier in ``weights`` has rows; see ``load_weights``.

    ``classes``: their number, for a model whose classifier cannot be told from its other layers.
    ``channels``: those of its images, 1 or 3.

    Raises:
        UserError: as ``build_model`` and ``load_weights`` do, and when the weights have another number of classes.
    """
    found, ranges = split_ranges(_tensors(name, weights))
    spec = spec_for(name, classes or _MOST_COMMON, channels)
    model = build_model(spec)
    remedy = "" if classes else f", or their --classes if they are not {_MOST_COMMON}"
    if head := _other_classifier(model.state_dict(), found):
        rows = len(found[f"{head}.weight"])
        if classes:
            raise UserError(f"weights {weights} have {rows} classes ({head}), not {classes}: leave out --classes")
        spec, remedy = spec_for(name, rows, channels), ""
        model = build_model(spec)
    if _load(model, weights, found, remedy):
        raise UserError(
            f"weights {weights} have {rows} classes, but {name} has another number when it is built for {rows}: "
            "correct the model"
        )
    return Pretrained(spec, model, ranges, () if _is_file(weights) else _categories(name, weights))


def _load(model: nn.Module, weights: str, found: Mapping[str, Tensor], remedy: str = "") -> str:
    """Loads the tensors ``found``; returns the path of a classifier with other classes, which is not loaded, or ''."""
    if getattr(model, "aux_logits", None) is False:
        found = {key: tensor for key, tensor in found.items() if not key.startswith(_AUXILIARY)}
    own = model.state_dict()
    head = _other_classifier(own, found)
    misfits = _misfits(own, {key: tensor for key, tensor in found.items() if not _belongs(key, head)}, head)
    if misfits:
        if not all("with another shape" in misfit for misfit in misfits):
            remedy = ""  # another number of classes would not help
        raise UserError(
            f"weights {weights} do not fit the model: {'; '.join(misfits)}; give weights of this model{remedy}"
        )
    fitting = {key: tensor for key, tensor in found.items() if not _belongs(key, head)}
    model.load_state_dict(own | fitting)
    return head


def _is_file(weights: str) -> bool:
    path = Path(weights).expanduser()
    return path.exists() or path.suffix in (".safetensors", ".pth", ".pt")


def _tensors(name: str, weights: str) -> dict[str, Tensor]:
    """The state dict of ``weights`` of model ``name``, from a file or from torchvision."""
    return _state_dict(Path(weights).expanduser()) if _is_file(weights) else _torchvision_weights(name, weights)


def preset_of_weights(name: str, weights: str | None) -> ImagePreset:
    """The preprocessing of photographs with which ``weights`` of model ``name`` were trained.

    It is ImageNet's usual one if neither torchvision nor timm knows it.
    """
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


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a file; it may be nested in 'state_dict' or 'model', and a prefix 'module.' is removed."""
    found = _read(path)
    while isinstance(found, Mapping):
        inner = next((key for key in ("state_dict", "model") if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = found[inner]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        content = ", ".join(map(str, list(found)[:5])) if isinstance(found, Mapping) else type(found).__name__
        raise UserError(f"{path} does not hold a state dict (found: {content or 'nothing'}): save model.state_dict()")
    prefix = "module." if all(key.startswith("module.") for key in found) else ""
    return {key.removeprefix(prefix): tensor for key, tensor in found.items()}


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read safely is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a weights file, or holds Python objects; unpickling those can run any code and is refused: "
            "save only the tensors, torch.save(model.state_dict(), file)"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot read weights file {path}: {error.strerror or one_line(error)}; check the path"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"weights file {path} is truncated or damaged ({one_line(error)}): get it again") from error


def _other_classifier(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The only module whose tensors differ in shape, if they differ only in the first dimension; else ''.

    This is the classifier: if a layer inside the network differed, the next layer would differ too.
    """
    differing = [key for key in own if key in found and own[key].shape != found[key].shape]
    modules = {key.rpartition(".")[0] for key in differing}
    in_outputs = all(own[key].ndim and own[key].shape[1:] == found[key].shape[1:] for key in differing)
    module = modules.pop() if len(modules) == 1 and in_outputs else ""
    return module if f"{module}.weight" in differing else ""


def _belongs(key: str, module: str) -> bool:
    return bool(module) and key.rpartition(".")[0] == module


def _misfits(own: Mapping[str, Tensor], found: Mapping[str, Tensor], head: str) -> list[str]:
    """What does not fit, one phrase for each kind of misfit. num_batches_tracked may be missing, as in old files."""
    missing = [
        key for key in own if key not in found and not key.endswith("num_batches_tracked") and not _belongs(key, head)
    ]
    unexpected = [key for key in found if key not in own]
    shapes = [
        f"{key} {list(found[key].shape)} for {list(own[key].shape)}"
        for key in found
        if key in own and own[key].shape != found[key].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("with another shape", shapes))
    return [
        f"{len(keys)} keys {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in kinds
        if keys
    ]
