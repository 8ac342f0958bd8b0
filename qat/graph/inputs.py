"""The inputs of a network: their names, which are the model's argument names, and their shapes without the batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.base.errors import UserError


@dataclass(frozen=True)
class Inputs:
    """What a network is called with.

    ``shapes``: of each float32 input, without the batch, by name. ``keywords``: the names that are passed by keyword;
    the others are positional, in their order.
    """

    shapes: Mapping[str, tuple[int, ...]]
    keywords: frozenset[str] = field(default=frozenset())

    def call(self, model: nn.Module, given: Mapping[str, Any]) -> Any:
        """What ``model`` answers to the inputs ``given`` by name; its other arguments keep their defaults."""
        positional = [given[name] for name in self.shapes if name not in self.keywords]
        return model(*positional, **{name: given[name] for name in self.shapes if name in self.keywords})

    def random(self, batch: int, device: torch.device | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Normal random tensors [batch, ...] by name."""
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(batch, *shape, generator=generator).to(device) for name, shape in self.shapes.items()}


def inputs_of(model: nn.Module, given: Inputs | Sequence[int] | Mapping[str, Sequence[int]] | Any) -> Inputs:
    """The inputs of ``model``.

    Args:
        model: a float model.
        given: the shape of its only input without the batch, such as (3, 224, 224); the shapes of several by argument
            name, {"image": (3, 224, 224), "hint": (16, 56, 56)}; or several shapes in the order of the arguments.

    Raises:
        UserError: the model has no such argument, or needs another one.
    """
    if isinstance(given, Inputs):
        return given
    parameters = inspect.signature(model.forward).parameters
    if isinstance(given, Mapping):
        named = {name: _shape(shape) for name, shape in given.items()}
    else:
        shapes = [given] if all(isinstance(extent, int) for extent in given) else list(given)
        named = dict(zip(_positional_names(model, parameters, len(shapes)), map(_shape, shapes), strict=True))
    _check(model, parameters, named)
    return Inputs(named, _by_keyword(parameters, named))


def _shape(given: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(given)
    if not all(isinstance(extent, int) and extent > 0 for extent in shape):
        raise UserError(f"{shape} is not the shape of an input: give positive extents without the batch, (3, 224, 224)")
    return shape


def _positional_names(model: nn.Module, parameters: Mapping[str, inspect.Parameter], count: int) -> list[str]:
    names = [name for name, one in parameters.items() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    several = next((name for name, one in parameters.items() if one.kind is one.VAR_POSITIONAL), None)
    if several is not None:
        names += [f"{several}_{index}" for index in range(count - len(names))]
    if len(names) < count:  # keyword-only ones follow
        names += [name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY]
    if len(names) < count:
        taken = f"{type(model).__name__}.forward takes {len(names)} inputs"
        raise UserError(f"{taken}, and {count} shapes were given: give them by name")
    return names[:count]


def _check(model: nn.Module, parameters: Mapping[str, inspect.Parameter], named: Mapping[str, tuple[int, ...]]) -> None:
    several = [one for one in parameters.values() if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    unknown = [name for name in named if name not in parameters]
    if unknown and not several:
        raise UserError(
            f"{type(model).__name__}.forward has no argument {unknown[0]!r}: it has {', '.join(parameters) or 'none'}"
        )
    missing = [
        name
        for name, one in parameters.items()
        if name not in named and one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    if missing:
        raise UserError(
            f"{type(model).__name__}.forward also needs {', '.join(missing)}: give the shapes of all inputs by name, "
            'such as {"image": (3, 224, 224)}'
        )


def _by_keyword(parameters: Mapping[str, inspect.Parameter], named: Mapping[str, Any]) -> frozenset[str]:
    """The inputs that cannot be positional: behind an argument that is left out, or keyword-only."""
    positional: list[str] = []
    for name, one in parameters.items():
        if one.kind is one.VAR_POSITIONAL:
            positional += [given for given in named if given.startswith(f"{name}_") and given not in parameters]
        elif one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) and name in named:
            positional.append(name)
        else:
            break
    return frozenset(named) - frozenset(positional)
