"""Proves a trace: the model that was given and its trace compute the same from the same random inputs.

A trace follows one path through the model's code. Whatever decided for that path, a default argument, a type, a cached
value, this comparison does not ask; it compares answers, gradients and statistics with the model's own.
"""

from __future__ import annotations

import copy
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.base.console import warn
from qat.base.errors import UserError
from qat.graph.inputs import Inputs
from qat.graph.outputs import leaves
from qat.graph.torch_patches import without_checkpoints
from qat.graph.tracer import raised_where

_BATCH = 2
_TOLERANCE = 1e-3  # of the norm: attention is computed in another order, everything else in the same
_LEARNT = ("the answer", "the parameters that get a gradient", "the statistics that move")


class NotProvedError(Exception):
    """The trace computes something else than the model."""


class Reference:
    """The model as it was given, and what it answers."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = copy.deepcopy(model), inputs
        wake(self.model)
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
        self.given = inputs.random(_BATCH, device)
        self.answer = self._evaluate()

    def _evaluate(self) -> Any:
        """The answer in evaluation. Raises UserError when it is not a network's."""
        state = _state(self.model)
        answer, drew = self._call()
        if drew:
            raise UserError(
                "the model draws random numbers in evaluation: its answers cannot be compared with those of another "
                "network; draw them in training only"
            )
        if (later := _state(self.model)) != state:  # it keeps something: the next answers must not depend on it
            again, _ = self._call()
            if _state(self.model) != later or _difference(answer, again):
                name = next(key for key in later if later[key] != state.get(key))
                raise UserError(
                    f"the model changes its {name} at every call in evaluation: answers must not depend on it"
                )
        _check_answer(answer)
        return answer

    def _call(self) -> tuple[Any, bool]:
        """The answer in evaluation, and whether random numbers were drawn."""
        given = {name: tensor.clone() for name, tensor in self.given.items()}
        with torch.random.fork_rng(_cuda(self.given)), torch.no_grad(), warnings.catch_warnings():
            torch.manual_seed(0)
            warnings.simplefilter("ignore")  # the model's own: they come when it is used
            state = torch.random.get_rng_state()
            try:
                answer = self.inputs.call(self.model.eval(), given)
            except Exception as error:  # a model may raise anything
                raise UserError(
                    f"the model does not take {self._images()}: it was stopped by {raised_where(error)}: "
                    "give another --image-size (input_shape), or correct the model"
                ) from error
            drew = not torch.equal(state, torch.random.get_rng_state())
        for name, tensor in self.given.items():
            if not _same(tensor, given[name]):
                raise UserError(f"the model changes its input {name} in place: let it work on a copy")
        return answer, drew

    def _images(self) -> str:
        shown = [f"{name} {'x'.join(map(str, shape))}" for name, shape in self.inputs.shapes.items()]
        return f"one image of {shown[0].partition(' ')[2]}" if len(shown) == 1 else " and ".join(shown)

    def prove_evaluation(self, traced: nn.Module) -> None:
        """Raises NotProvedError when ``traced`` answers something else in evaluation."""
        mode = traced.training
        with _woken(traced), torch.no_grad():
            answer = traced.eval()(*(tensor.clone() for tensor in self.given.values()))
        traced.train(mode)
        if found := _difference(self.answer, answer):
            raise NotProvedError(f"its trace answers something else than the model: {found}")
        if not any(one.isfinite().any() for _, one in leaves(answer) if isinstance(one, Tensor)):
            warn("the model answers random inputs with NaN or infinity only: its trace could not be compared with it")

    def prove_training(self, traced: nn.Module) -> None:
        """Raises NotProvedError when ``traced`` learns something else in training: answers, gradients or statistics."""
        theirs = self._train(self.model, lambda given: self.inputs.call(self.model, given))
        with _woken(traced), _kept_buffers(traced):
            ours = self._train(traced, lambda given: traced(*given.values()))
        for what, mine, reference in zip(_LEARNT, ours, theirs, strict=True):
            found = _difference(reference, mine)
            if what != _LEARNT[0] and (other := sorted(reference.keys() ^ mine.keys())):
                found = f"({', '.join(other[:3])}{', ...' if len(other) > 3 else ''})"
            if found:
                raise NotProvedError(f"in training, its trace differs from the model in {what} {found}")

    def _train(self, model: nn.Module, call: Any) -> tuple[dict[str, Any], dict[str, bool], dict[str, Any]]:
        """The answer in training, which parameters get a gradient, and the statistics that it moved."""
        model.train()
        before = _buffers(model)
        with (
            torch.random.fork_rng(_cuda(self.given)),
            torch.enable_grad(),
            without_checkpoints(),
            warnings.catch_warnings(),
        ):
            torch.manual_seed(0)
            warnings.simplefilter("ignore")
            try:
                answer = call({name: tensor.clone() for name, tensor in self.given.items()})
            except Exception as error:  # a model may raise anything
                raise NotProvedError(f"the model fails in training: {raised_where(error)}") from error
        learn = _with_gradient(answer)
        gradients = {name: True for name, one in sorted(model.named_parameters()) if id(one) in learn}
        moved = {name: after for name, after in _buffers(model).items() if not _same(before[name], after)}
        answers = {path: _detached(value) for path, value in leaves(answer)}
        return answers, gradients, moved


def _with_gradient(answer: Any) -> set[int]:
    """The ids of the parameters that a loss of ``answer`` would have a gradient for."""
    waiting = [one.grad_fn for _, one in leaves(answer) if isinstance(one, Tensor)]
    seen: set[Any] = {None}
    found: set[int] = set()
    while waiting:
        step: Any = waiting.pop()
        if step in seen:
            continue
        seen.add(step)
        found.add(id(getattr(step, "variable", None)))
        waiting += [before for before, _ in step.next_functions]
    return found


def _check_answer(answer: Any) -> None:
    tensors = [one for _, one in leaves(answer) if isinstance(one, Tensor)]
    if not tensors:
        raise UserError(f"the model answers {type(answer).__name__}: it must answer a tensor, or several")
    for tensor in tensors:
        if tensor.ndim == 0 or tensor.shape[0] % _BATCH:
            raise UserError(
                f"for {_BATCH} images, the model answers a tensor of shape {list(tensor.shape)}: "
                "its first dimension must be the batch"
            )


def _difference(expected: Any, found: Any) -> str:
    """Where two nested answers differ; '' if nowhere."""
    if type(expected) is not type(found) and not isinstance(expected, OrderedDict):  # a graph makes dicts
        return f"a {type(found).__name__} for a {type(expected).__name__}"
    theirs, ours = dict(leaves(expected)), dict(leaves(found))
    if list(theirs) != list(ours):
        return f"{', '.join(list(theirs)[:4]) or 'one value'} became {', '.join(list(ours)[:4]) or 'one value'}"
    for path, reference in theirs.items():
        mine = ours[path]
        if not isinstance(reference, Tensor) or not isinstance(mine, Tensor):
            if isinstance(reference, Tensor) or isinstance(mine, Tensor) or reference != mine:
                return f"{path} is {mine!r} for {reference!r}".strip()
        elif reference.shape != mine.shape:
            return f"{path} has shape {list(mine.shape)} for {list(reference.shape)}".strip()
        elif not _same(reference, mine, _TOLERANCE):
            return f"{path} by {_distance(reference, mine):.3g} of its norm".strip()
    return ""


def _same(reference: Tensor, other: Tensor, tolerance: float = 0.0) -> bool:
    if torch.equal(reference, other):
        return True
    if not reference.is_floating_point():
        return False
    finite = reference.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return False
    return _distance(reference[finite], other[finite]) <= tolerance


def _distance(reference: Tensor, other: Tensor) -> float:
    norm = reference.double().norm()
    return float((reference.double() - other.double()).norm() / norm) if norm else float((other != 0).any())


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in sorted(model.named_buffers())}


def _state(model: nn.Module) -> dict[str, str]:
    """What modules keep in buffers and plain attributes, as text."""
    kept = {
        f"{path}.{key}".lstrip("."): value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") and isinstance(value, (bool, int, float, str, Tensor, list, tuple, dict, type(None)))
    }
    kept |= dict(model.named_buffers())
    return {
        name: f"{list(value.shape)} {value.double().sum()}" if isinstance(value, Tensor) else str(value)
        for name, value in kept.items()
        if name.rpartition(".")[2] != "training"
    }


def _cuda(given: Mapping[str, Tensor]) -> list[int]:
    return sorted({tensor.get_device() for tensor in given.values() if tensor.is_cuda})


def wake(model: nn.Module) -> None:
    """Gives parameters that are zero, and hide the branch behind them, random values; equal ones for equal names."""
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.is_floating_point() and parameter.detach().abs().max() < 1e-2:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            random = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data = random.to(parameter)


@contextmanager
def _woken(model: nn.Module) -> Iterator[None]:
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    wake(model)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = before[name]


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    before = _buffers(model)
    try:
        yield
    finally:
        for name, tensor in model.named_buffers():
            tensor.copy_(before[name])
