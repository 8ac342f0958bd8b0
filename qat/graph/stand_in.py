"""What stands for tensors, and for the batch size, while a model's code runs to be traced (qat/graph/tracer.py)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, fx
from torch.fx.node import map_aggregate

from qat.graph.set_item import set_item


class UntraceableError(Exception):
    """The model's code asks for something that only real images could answer."""


class Recorder(Protocol):
    """What records operations: the tracer."""

    busy: bool
    """It is running an operation on samples, and records nothing."""
    graph: fx.Graph

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None) -> Any:
        """Records an operation; returns what the model's code gets."""

    def sampling(self) -> AbstractContextManager[None]:
        """While operations run on samples, nothing is recorded."""


class Traced(fx.Proxy):
    """Stands for a tensor, or for a number that depends on the batch size, while the model's code runs.

    ``samples``: what it would be for each of the two batch sizes; tensors are without data.
    """

    tracer: Any  # a Recorder

    def __init__(self, node: fx.Node, tracer: Any, samples: tuple[Any, Any]) -> None:
        super().__init__(node, tracer)
        self.samples = samples

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("samples", "tracer", "node"):
            raise AttributeError(name)
        with self.tracer.sampling():
            found = getattr(self.samples[0], name)
        if callable(found) and not isinstance(found, Tensor):
            return lambda *args, **kwargs: self.tracer.create_proxy("call_method", name, (self, *args), kwargs)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        if not isinstance(self.samples[0], Tensor):
            raise TypeError(f"object of type {type(self.samples[0]).__name__} has no len()")
        one, two = (len(sample) for sample in self.samples)
        if one != two:
            raise UntraceableError("it asks for the batch size as a number")
        return one

    def __iter__(self) -> Iterator[Any]:
        get: Any = operator.getitem
        return (get(self, index) for index in range(len(self)))

    def __index__(self) -> int:
        raise UntraceableError(self._unknown())

    __int__ = __index__

    def __float__(self) -> float:
        raise UntraceableError(self._unknown())

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", set_item, (self, key, value), {})

    def _unknown(self) -> str:
        tensor = isinstance(self.samples[0], Tensor)
        return "it asks for the values of a tensor" if tensor else "it asks for the batch size as a number"

    def _in_place(self, function: Callable[[Any, Any], Any], other: Any, name: str) -> Any:
        """Records ``x += y`` as what it is; torch.fx would record ``x = x + y``, as if nobody else read x."""
        if not isinstance(self.samples[0], Tensor):
            return NotImplemented
        return self.tracer.create_proxy("call_function", function, (self, other), {}, name)

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other, "add")

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other, "sub")

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other, "mul")

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other, "truediv")


class Shape(tuple[Any, ...]):
    """A shape whose batch size is a stand-in."""

    def numel(self) -> Any:
        """The number of elements."""
        product: Any = 1
        for extent in self:
            product = product * extent
        return product


def is_traced(value: Any) -> bool:
    """Whether ``value`` is a stand-in."""
    return issubclass(type(value), Traced)


def sample_of(value: Any, which: int) -> Any:
    """The sample of a stand-in for one of the two batch sizes; any other value itself."""
    return value.samples[which] if is_traced(value) else value


def are_equal(one: Any, two: Any) -> bool:
    """Whether two samples are plain values and the same."""
    if isinstance(one, (tuple, list)):
        return len(one) == len(two) and all(are_equal(*parts) for parts in zip(one, two, strict=True))
    return not isinstance(one, Tensor) and bool(one == two)


def any_traced(values: Any) -> bool:
    """Whether there is a stand-in anywhere in nested ``values``."""
    found: list[bool] = []
    map_aggregate(values, lambda value: found.append(is_traced(value)))
    return any(found)
