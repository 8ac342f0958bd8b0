"""Records what a model computes as a torch.fx graph, while everything but the batch size is known.

The model's own Python code runs. The tensors in it are stand-ins (``Traced``) that know their type and shape, because
each recorded operation also runs on tensors without data, for two batch sizes. What is equal for both is a plain value
to the model's code: the number of channels, the height, the length of a tuple. What differs depends on the batch size
and stays a stand-in, which computes along but cannot decide a branch.

torch.export would take nearly every model too, but it gives up the modules: the names of the state dict, the mode of a
dropout, the statistics of a batch normalization, which training needs.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
import torchvision
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate

from qat.base.errors import UserError, one_line
from qat.graph.attention import FUSED, attention, attention_of_products
from qat.graph.einsum import product_of_einsum
from qat.graph.inputs import Inputs
from qat.graph.outputs import leaves
from qat.graph.stand_in import Shape, Traced, UntraceableError, any_traced, are_equal, is_traced, sample_of
from qat.graph.torch_patches import tracing_patches

_BATCHES = (5040, 7560)  # they stand for all sizes; both can be divided by 1 to 10
_VIEWS = ("view", "view_as", "reshape", "reshape_as", "flatten", "squeeze", "expand", "expand_as", "narrow")
_NEW = ("new_zeros", "new_ones", "new_full", "new_tensor", "new_empty")
# Modules of which only the shape is asked; running them on tensors without data takes long.
_SAME_SHAPE = (nn.modules.batchnorm._BatchNorm, nn.ReLU, nn.SiLU, nn.GELU, nn.LayerNorm, nn.modules.dropout._DropoutNd)


class Tracer(fx.Tracer):
    """Traces a module for inputs of given shapes. Modules that behave differently in training are not inlined."""

    def __init__(self) -> None:
        super().__init__()
        self.busy = False  # running an operation on samples
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._inputs = Inputs({})
        self._of_batch: set[fx.Node] = set()  # numbers that depend on the batch size

    def trace_for(self, model: nn.Module, inputs: Inputs) -> fx.Graph:
        """The graph of ``model`` in its present mode.

        Raises UserError naming the line of the model that cannot be traced.
        """
        self._inputs = inputs
        try:
            with tracing_patches(self), torch.enable_grad():
                graph = self.trace(model)
        except UserError:
            raise
        except Exception as error:  # a model may raise anything
            raise UserError(why_untraceable(error)) from error
        _drop_unused(graph)
        return graph

    # --- what torch.fx calls

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The function to trace, and its arguments: the inputs, and the model's own defaults for all others."""
        given = {name: self._placeholder(name, shape) for name, shape in self._inputs.shapes.items()}

        def answer() -> Any:
            found = self._inputs.call(self.root, given)
            for path, part in leaves(found):
                if is_traced(part) and part.samples[0].shape[:1] == part.samples[1].shape[:1]:
                    what = f"the model answers a tensor {path}".rstrip()
                    raise UserError(f"{what} whose first dimension is not the batch")
            return found

        return answer, []

    def _placeholder(self, name: str, shape: Sequence[int]) -> Traced:
        device = next((tensor.device for tensor in (*self.root.parameters(), *self.root.buffers())), None)
        with self._fake:
            samples = tuple(torch.empty(batch, *shape, device=device) for batch in _BATCHES)
        return Traced(self.create_node("placeholder", name, (), {}), self, samples)  # type: ignore[arg-type]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True for modules that become one node."""
        if isinstance(m, (nn.modules.batchnorm._BatchNorm, torchvision.ops.StochasticDepth, torch.jit.ScriptModule)):
            return True
        if isinstance(m, torchvision.ops.FrozenBatchNorm2d):
            return True
        contains_layers = any(True for _ in m.children())
        return super().is_leaf_module(m, module_qualified_name) and not contains_layers

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Called for every call of a module."""
        if self.busy:
            return forward(*args, **kwargs)
        answer = super().call_module(m, forward, args, kwargs)
        for part in parts_of_norm(m).values():
            answer = part(answer)
        return answer

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Called for every access to a parameter or buffer of a module."""
        return attr_val if self.busy else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """What stands for ``a`` in the graph."""
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, dict) and is_dataclass(a):  # transformers answers such; torch.fx makes a plain dict of it
            parts = {field.name: self.create_arg(getattr(a, field.name)) for field in fields(a)}
            return self.create_node("call_function", type(a), (), parts)
        return super().create_arg(a)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """Records one operation; returns a plain value if its result is known, otherwise stand-ins."""
        if kind == "call_function" and target is nn.functional.multi_head_attention_forward:
            return attention(*args, **kwargs)
        if kind == "call_function" and target is nn.functional.scaled_dot_product_attention:
            mixed = attention_of_products(*args, **kwargs)
            mixed.node.meta[FUSED] = True
            return mixed
        if target is torch.einsum and len(args) == 2 and isinstance(args[1], (list, tuple)):
            args = (args[0], *args[1])
        if target is torch.einsum and len(args) == 3 and isinstance(args[0], str):
            product = product_of_einsum(*args)
            if product is not None:
                return product
        if kind == "call_method" and target in _NEW and not any_traced((args[1:], kwargs)):
            sample: Tensor = args[0].samples[0]
            return getattr(torch.empty(0, dtype=sample.dtype, device=sample.device), target)(*args[1:], **kwargs)
        args, kwargs = _positive_axes(target, args, kwargs)
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs), name, type_expr)
        if not torch.is_grad_enabled():
            node.meta["no_grad"] = True
        if kind == "get_attr":
            with self.sampling():
                tensor = operator.attrgetter(target)(self.root)
            return Traced(node, self, (tensor, tensor))
        one, two = (self._sample(kind, target, args, kwargs, which) for which in (0, 1))
        if _takes_all(target, args, one, two):
            self.graph.erase_node(node)
            return args[0]
        return self._known(node, one, two)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The truth of a stand-in, where all batch sizes agree."""
        samples: Any = obj.samples
        one, two = samples
        compares = obj.node.target in (operator.eq, operator.ne) and not isinstance(one, Tensor)
        # Two extents grow with the batch on a line: equal for two batch sizes, they are equal for all. What is computed
        # from extents, such as a remainder, is not.
        extents = all(node.target in (operator.getitem, "size") for node in obj.node.all_input_nodes)
        if compares and extents and one is two is (obj.node.target is operator.eq):
            return bool(one)
        what = "the values of a tensor" if isinstance(one, Tensor) else "the batch size"
        raise UntraceableError(f"it branches on {what}")

    # --- samples

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """While operations run on samples, nothing is recorded."""
        before, self.busy = self.busy, True
        try:
            with self._fake:
                yield
        finally:
            self.busy = before

    def _sample(self, kind: str, target: Any, args: Any, kwargs: Any, which: int) -> Any:
        args, kwargs = map_aggregate((args, kwargs), lambda value: sample_of(value, which))
        with self.sampling():
            if kind == "call_module":
                called = self.root.get_submodule(target)
                if isinstance(called, _SAME_SHAPE) and len(args) == 1:
                    return torch.empty_like(args[0])
                with _in_evaluation(called) as module:
                    return module(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)

    def _known(self, node: fx.Node, one: Any, two: Any) -> Any:
        """What the model's code gets for the result of ``node``."""
        if isinstance(one, Tensor):
            node.meta |= {"tensor": True, "rank": one.ndim}
            return Traced(node, self, (one, two))
        if isinstance(one, (tuple, list)) and not are_equal(one, two):
            parts = [self._part(node, index, one[index], two[index]) for index in range(len(one))]
            if isinstance(one, torch.Size):
                return Shape(parts)
            return type(one)(*parts) if hasattr(one, "_fields") else type(one)(parts)
        if isinstance(one, (int, float)) and (one != two or not self._of_batch.isdisjoint(node.all_input_nodes)):
            self._of_batch.add(node)
            return Traced(node, self, (one, two))
        if not node.users:
            self.graph.erase_node(node)
        return one

    def _part(self, node: fx.Node, index: int, one: Any, two: Any) -> Any:
        if are_equal(one, two):
            return one
        made = self.create_node("call_function", operator.getitem, (node, index), {})
        made.meta |= {key: node.meta[key] for key in ("no_grad",) if key in node.meta}
        return self._known(made, one, two)


def parts_of_norm(module: nn.Module) -> dict[str, nn.Module]:
    """What timm's batch normalizations apply to what they normalized, in order; {} for another module."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return {}
    return {name: part for name, part in module.named_children() if name in ("drop", "act")}


def _takes_all(target: Any, args: Sequence[Any], one: Any, two: Any) -> bool:
    """Whether an operation gives its whole input as it is: x[:, :h] of h rows, or a view with the same shape."""
    if not args or not is_traced(args[0]) or not isinstance(one, Tensor):
        return False
    if target is operator.getitem:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        views = all(part is Ellipsis or isinstance(part, slice) for part in index)
    else:
        views = getattr(target, "__name__", target) in _VIEWS
    given = args[0].samples
    return views and all(
        isinstance(before, Tensor) and before.shape == after.shape and before.dtype == after.dtype
        for before, after in zip(given, (one, two), strict=True)
    )


@contextmanager
def _in_evaluation(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` in evaluation, where it has the same shapes and moves no statistics."""
    modes = [(each, each.training) for each in module.modules()]
    try:
        yield module.eval()
    finally:
        for each, training in modes:
            each.training = training


def _positive_axes(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Counts the axes of a mean from the front, so that a mean over height and width is known as one.

    That of a softmax is counted from the back.
    """
    if target in ("softmax", torch.softmax, torch.nn.functional.softmax) and args and is_traced(args[0]):
        rank, (given, *others) = args[0].samples[0].ndim, args
        if others and isinstance(others[0], int) and others[0] >= 0:
            return (given, others[0] - rank, *others[1:]), kwargs
        if isinstance(kwargs.get("dim"), int) and kwargs["dim"] >= 0:
            return args, kwargs | {"dim": kwargs["dim"] - rank}
    if target not in ("mean", torch.mean) or not args or not is_traced(args[0]):
        return args, kwargs
    axes = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(axes, (tuple, list)):
        return args, kwargs
    rank = args[0].samples[0].ndim
    positive = tuple(axis % rank for axis in axes)
    return ((args[0], positive, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"dim": positive})


def _drop_unused(graph: fx.Graph) -> None:
    """Removes shapes and parts of tuples that nobody reads."""
    for node in reversed(graph.nodes):
        reads_size = node.target in (getattr, "size", operator.getitem) or node.target in _ARITHMETIC
        if node.op in ("call_function", "call_method") and reads_size and not node.users:
            graph.erase_node(node)


_ARITHMETIC = tuple(
    getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
)


def why_untraceable(error: Exception) -> str:
    """One line: what stopped the trace, and at which line of the model's code."""
    remedy = "make that line independent of it, or quantize a submodule without it"
    return f"the model cannot be traced; it was stopped by {raised_where(error)}: {remedy}"


def raised_where(error: Exception) -> str:
    """The line of the model's code that raised ``error``, and what it raised."""
    outside = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    where = f"{outside[-1].filename}:{outside[-1].lineno}: {outside[-1].line}" if outside else "inside torch"
    reason = str(error) if isinstance(error, UntraceableError) else f"{type(error).__name__}: {one_line(error)}"
    return f"{where} ({reason})"


def _is_ours(file: str) -> bool:
    folders = (Path(torch.__file__).parent, Path(__file__).parent)
    return file.startswith("<") or any(folder in Path(file).parents for folder in folders) or "contextlib" in file
