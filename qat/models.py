"""Builds a float model from its name; qat/weights.py loads its weights.

The description of a model (ModelSpec) is short and goes into the checkpoint's sidecar, so that the model can be built
again without unpickling anything.

Four defaults differ from torchvision's, each for a reason:
- zero_init_residual=True for the ResNet family: without it ResNet50 does not converge on small data.
- No auxiliary heads for googlenet and inception_v3: they cost time in training and are not exported.
- transform_input=True for the same two: their ImageNet weights were trained with another normalization of the images,
  and with this option the model converts. The conversion is a fixed factor and shift, so it makes no difference to a
  model trained from scratch.
- weights_backbone=None for segmentation models and detectors, which would otherwise download weights.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torchvision
from torch import nn

from qat.base.artifact import sha256_of
from qat.base.console import say
from qat.base.errors import UserError, one_line
from qat.base.text import did_you_mean
from qat.base.user_code import run_file
from qat.graph.reparameterization import advice
from qat.graph.tracing import TracedModel, network_of, trace
from qat.pretrained.torchvision_detectors import build_detector, detector_names
from qat.pretrained.ultralytics_models import PREFIX, build_ultralytics

_NO_AUXILIARY = {"aux_logits": False, "init_weights": False, "transform_input": True}
_NAME = "model_name"  # attribute of a built model; qat/weights.py finds torchvision's weights by it


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model by name.

    ``name``: a model of torchvision ('resnet50'), 'timm/NAME', 'ultralytics/FILE'
    (qat/pretrained/ultralytics_models.py), or 'path/file.py:function', which is called as function(num_classes=...,
    **kwargs), or without num_classes if it does not take it. ``kwargs`` are passed to the constructor and must be
    representable in JSON.
    """

    name: str
    num_classes: int
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ModelCode:
    """The file that a model was built from: its absolute path, and the SHA-256 of its content."""

    file: str
    sha256: str


def code_of(name: str) -> ModelCode | None:
    """The file that the model ``name`` is built from; None if it is a library's, or is gone."""
    file = Path(name.rpartition(":")[0]).expanduser().resolve()
    if ".py:" not in name or not file.is_file():
        return None
    return ModelCode(str(file), sha256_of(file))


def spec_for(name: str, num_classes: int, channels: int, options: Mapping[str, Any] = {}) -> ModelSpec:
    """The model ``name`` for images of 1 or 3 channels. Only timm's can be told; others have what they have.

    ``options``: more arguments of its constructor.
    """
    told = {"in_chans": channels} if name.startswith("timm/") and channels != 3 else {}
    return ModelSpec(name, num_classes, {**told, **options})


def options_for_size(name: str, pixels: int | None) -> dict[str, Any]:
    """What builds the model ``name`` for images of ``pixels`` x ``pixels``, if it is one of timm's for a fixed size."""
    if not name.startswith("timm/") or pixels is None or not importlib.util.find_spec("timm"):
        return {}
    import timm

    usual = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    other = usual is not None and usual.fixed_input_size and usual.input_size[-1] != pixels
    return {"img_size": pixels} if other else {}


def trace_on_images(
    model: nn.Module, name: str, shape: tuple[int, int, int], *, training: bool | None = None
) -> TracedModel:
    """Traces the model ``name`` for images [C, H, W], and prints advice on it; see qat.graph.tracing.trace.

    Raises UserError when it cannot be traced; when it takes images of other channels, the message says so.
    """
    try:
        traced = trace(model, shape, training=training)
    except UserError:
        _check_channels(model, name, shape[0])
        raise
    if line := advice(model, traced.meta["inputs"]):
        say(line)
    return traced


def answers_classes(traced: TracedModel) -> bool:
    """Whether it answers one tensor [N, values], which logits are."""
    return len(_output_shape(traced)) == 2


def check_logits(traced: TracedModel, name: str, classes: int) -> None:
    """Raises UserError when the model ``name`` does not answer logits [N, ``classes``]."""
    shape = _output_shape(traced)
    if shape != (1, classes):
        found = f"a tensor of shape {list(shape)}" if shape else "something other than one tensor"
        raise UserError(
            f"for one image, model {name} returns {found}; it must return logits of shape [1, {classes}]: "
            "give a classification model"
        )


def _output_shape(traced: TracedModel) -> tuple[int, ...]:
    """The shape of the only output for one image; () if there are several, or it is not known."""
    (output,) = (op for op in network_of(traced) if op.kind == "output")
    return output.shape or ()


def _check_channels(model: nn.Module, name: str, channels: int) -> None:
    """Raises UserError when the first convolution of a model that failed takes another number of channels."""
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is None or first.in_channels == channels:
        return
    remedy = f"--channels {first.in_channels}" if first.in_channels in (1, 3) else "a model of 1 or 3 channels"
    raise UserError(f"model {name} takes {first.in_channels} channels, and the images have {channels}: give {remedy}")


def build_model(spec: ModelSpec, code: ModelCode | None = None, folder: Path | None = None) -> nn.Module:
    """The model, randomly initialized from torch's global generator, on the CPU, in training mode.

    ``code`` and ``folder`` tell where else 'file.py:function' may be: see ``model_file``.

    Raises UserError when there is no such model, or its constructor or function refuses the arguments.
    """
    name, options = spec.name, {"num_classes": spec.num_classes, **spec.kwargs}
    make: Callable[..., Any]
    if ".py:" in name:
        make = _function(name, code, folder)
        if not _takes_classes(make):
            del options["num_classes"]
    elif name.startswith("timm/"):
        make = _timm_builder(name.removeprefix("timm/"))
    elif name.startswith(PREFIX):
        make = partial(build_ultralytics, name.removeprefix(PREFIX))
    else:
        make = _torchvision_builder(name)
        options = _defaults(name) | options
    try:
        model = make(**options)
    except UserError:
        raise
    except Exception as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no arguments"
        raise UserError(
            f"model {name} cannot be built with {shown} ({type(error).__name__}: {one_line(error)}): correct the model"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} returned a {type(model).__name__}: it must return a torch.nn.Module")
    setattr(model, _NAME, name)
    return model


def name_of(model: nn.Module) -> str:
    """The name from which ``build_model`` built ``model``; '' for a model built otherwise."""
    return str(getattr(model, _NAME, ""))


# --- builders


def torchvision_names() -> list[str]:
    """Names of torchvision's classification and segmentation models, and of its detectors."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return [*names, *_segmentation_names(), *detector_names()]


def _segmentation_names() -> list[str]:
    names: list[str] = torchvision.models.list_models(module=torchvision.models.segmentation)
    return names


def _torchvision_builder(name: str) -> Callable[..., Any]:
    known = torchvision_names()
    if name not in known:
        raise UserError(
            f"unknown model {name!r}{did_you_mean(name, known)}: give one of torchvision's {len(known)} models, "
            "timm/NAME, ultralytics/FILE, or path/file.py:function"
        )
    if name in detector_names():
        return partial(build_detector, name)
    builder: Callable[..., Any] = torchvision.models.get_model_builder(name)
    return builder


def _defaults(name: str) -> dict[str, Any]:
    """The constructor arguments that differ from torchvision's defaults; see the module's docstring."""
    if torchvision.models.get_model_builder(name).__module__ == "torchvision.models.resnet":
        return {"zero_init_residual": True}
    if name in (*_segmentation_names(), *detector_names()):
        return {"weights_backbone": None}
    return dict(_NO_AUXILIARY) if name in ("googlenet", "inception_v3") else {}


def _timm_builder(name: str) -> Callable[..., Any]:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"model timm/{name} needs timm, which is not installed: pip install timm") from error
    if not timm.is_model(name):
        known = timm.list_models()
        raise UserError(
            f"timm {timm.__version__} has no model {name!r} among its {len(known)}: "
            f"check the name{did_you_mean(name, known)}"
        )
    return lambda **options: timm.create_model(name, pretrained=False, **options)


def model_file(name: str, code: ModelCode | None = None, folder: Path | None = None) -> Path:
    """The file of the model 'path/file.py:function'.

    It is looked for at that path, where ``code`` says that it was, and in ``folder``, that of a checkpoint. Among those
    that exist, one whose content is that of ``code`` comes first. Raises UserError when there is none.
    """
    file = Path(name.rpartition(":")[0]).expanduser()
    places = [file]
    if code is not None:
        places.append(Path(code.file))
    if folder is not None:
        places += [folder / file, folder / file.name]
    found = [place.resolve() for place in places if place.is_file()]
    if not found:
        looked = ", ".join(dict.fromkeys(str(place.parent.resolve()) for place in places))
        raise UserError(f"no file {file} for the model {name}, in {looked}: check the path")
    return next((path for path in found if code is not None and sha256_of(path) == code.sha256), found[0])


def _takes_classes(function: Callable[..., Any]) -> bool:
    """Whether the user's function takes num_classes by name; true of one that does not tell its parameters."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True
    named = parameters.get("num_classes")
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()) or (
        named is not None and named.kind in (named.POSITIONAL_OR_KEYWORD, named.KEYWORD_ONLY)
    )


def _function(name: str, code: ModelCode | None, folder: Path | None) -> Callable[..., Any]:
    """The function of 'path/file.py:function'; the file is run."""
    file, _, function = name.rpartition(":")
    path = model_file(name, code, folder)
    try:
        module = run_file(path, f"_model_{path.stem}")
    except Exception as error:
        raise UserError(
            f"{file} cannot be run ({type(error).__name__}: {one_line(error)}): correct the file"
        ) from error
    found: Callable[..., Any] | None = getattr(module, function, None)
    if not callable(found):
        defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{file} has no function {function!r}: give one that it has ({', '.join(defined) or 'none'})")
    return found
