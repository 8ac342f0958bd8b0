"""What differs in torch while a model is traced: functions that take a stand-in for a number or draw at random."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from qat.graph.stand_in import Recorder, Traced, UntraceableError, any_traced

_FACTORIES = ("zeros", "ones", "empty", "full", "arange", "linspace", "eye", "tensor", "as_tensor")
_RANDOM = ("rand", "randn", "randint", "randperm", "normal", "bernoulli")
_TAKE_EXTENTS = ("expand", "reshape", "view", "repeat", "new_zeros", "new_ones", "new_empty")  # as x.expand(n, 3)


class _Record(TorchFunctionMode):
    """Records functions of torch that read a stand-in where torch itself would not look, or that draw at random."""

    def __init__(self, tracer: Recorder) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if self.tracer.busy or not (any_traced((args, kwargs)) or name in _RANDOM):
            return func(*args, **kwargs)
        if func is Tensor.__getitem__:
            return self.tracer.create_proxy("call_function", operator.getitem, args, kwargs)
        if func is Tensor.__setitem__:
            raise UntraceableError("it writes a part of an input into a constant")
        if is_tensor_method_or_property(func):
            return self.tracer.create_proxy("call_method", name, args, kwargs)
        return self.tracer.create_proxy("call_function", func, args, kwargs, self.tracer.graph._target_to_str(name))


@contextmanager
def tracing_patches(tracer: Recorder) -> Iterator[None]:
    """What differs in torch while ``tracer`` traces a model."""

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if tracer.busy or not any_traced((args, kwargs)):
                return function(*args, **kwargs)
            return tracer.create_proxy("call_function", function, args, kwargs)

        return call

    def recorded_method(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if tracer.busy or not any_traced(args[1:]):
                return method(*args, **kwargs)
            return tracer.create_proxy("call_method", name, args, kwargs)

        return call

    is_instance = builtins.isinstance

    def answers_for_samples(value: Any, classes: Any) -> bool:
        # Not by __class__: then torch's C++ code would take a stand-in for a tensor, too, and read its memory.
        if type(value) is Traced and is_instance(value.samples[0], classes):
            return True
        return is_instance(value, classes)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(builtins, "isinstance", answers_for_samples))
        for name in _TAKE_EXTENTS:
            stack.enter_context(mock.patch.object(Tensor, name, recorded_method(name)))
        for name in (*_FACTORIES, *_RANDOM):
            stack.enter_context(mock.patch.object(torch, name, recorded(getattr(torch, name))))
        stack.enter_context(without_checkpoints())
        # Functions marked with torch.fx.wrap are not kept whole: their operations are to be known too.
        stack.enter_context(mock.patch.dict(fx._symbolic_trace._wrapped_fns_to_patch, clear=True))
        fast = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)  # one opaque function for a whole layer
        stack.enter_context(_Record(tracer))
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Everything is computed in its own type, also inside of an autocast of the caller.

    An autocast also keeps casts of weights for later; those of tensors without data would be of no use.
    """
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Activation checkpoints, which hide the operations inside from tracing and from autograd, only call."""

    def call(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)

    def around_call(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    module = torch.utils.checkpoint
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module.CheckpointFunction, "apply", call))
        for name in list(vars(module)):
            if name.startswith("_checkpoint_without_reentrant_generator"):  # its end differs between versions of torch
                stack.enter_context(mock.patch.object(module, name, around_call))
        yield
