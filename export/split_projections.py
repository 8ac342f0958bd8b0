"""Makes one linear layer whose output is only cut into parts several layers, as q, k and v of an attention.

TensorRT-RTX multiplies such a layer in float: it moves the cut in front of the product, and dequantizes the weight for
that. Layers of their own stay INT8, and the builder computes them at once. Codes, scales and answers stay the same.
Parts of ``attn.qkv`` are called ``attn.qkv.0``, ``attn.qkv.1``, ``attn.qkv.2``; the file's metadata names the wholes.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from export.fold import Dequantize
from export.projection_parts import Part, are_whole, part_of
from qat.fake_quantize.layers import QuantizedLinear
from qat.graph.fx_network import kind_of
from qat.graph.inputs import Inputs
from qat.graph.operations import COMMUTING

_BATCHES = (2, 3)


def split_projections(folded: fx.GraphModule, inputs: Inputs) -> list[str]:
    """Splits them in a folded network, in place; ``inputs`` are its inputs. Returns the paths of those layers."""
    modules = dict(folded.named_modules())
    calls = Counter(str(node.target) for node in folded.graph.find_nodes(op="call_module"))
    values = [_run(folded, inputs, batch) for batch in _BATCHES]
    _read_sizes_from_input(folded, values)
    done: list[str] = []
    for node in list(folded.graph.nodes):
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, QuantizedLinear) or not isinstance(layer.weight_quantizer, Dequantize):
            continue
        if calls[str(node.target)] == 1 and (parts := _parts(node, modules, values)):
            _split(folded, node, layer, parts)
            done.append(str(node.target))
    if done:
        folded.graph.eliminate_dead_code()
        folded.delete_all_unused_submodules()
        folded.graph.lint()
        folded.recompile()
    return done


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node, and keeps what it gives."""
        self.values[n] = super().run_node(n)
        return self.values[n]


def _run(folded: fx.GraphModule, inputs: Inputs, batch: int) -> dict[fx.Node, Any]:
    """What every node gives for a batch, as tensors without data."""
    recorder = _Recorder(folded)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        recorder.run(*(mode.from_tensor(torch.zeros(batch, *shape)) for shape in inputs.shapes.values()))
    return recorder.values


def _read_sizes_from_input(folded: fx.GraphModule, values: list[dict[fx.Node, Any]]) -> None:
    """Makes sizes constants, or multiples of the batch size, so that no tensor is read for its size alone.

    What the new nodes give is added to ``values``.
    """
    given = folded.graph.find_nodes(op="placeholder")
    with folded.graph.inserting_after(given[-1]):
        batch = folded.graph.call_method("size", (given[0], 0))
    sizes: dict[int, Any] = {1: batch}
    for node in [node for node in folded.graph.nodes if node is not batch]:
        one, two = (found.get(node) for found in values)
        if type(one) is not int or type(two) is not int or node.op == "placeholder":
            continue
        if one == two:
            node.replace_all_uses_with(one)
        elif one * _BATCHES[1] == two * _BATCHES[0] and one % _BATCHES[0] == 0:
            times = one // _BATCHES[0]
            if times not in sizes:
                with folded.graph.inserting_after(batch):
                    sizes[times] = folded.graph.call_function(operator.mul, (batch, times))
            node.replace_all_uses_with(sizes[times])
    for found, images in zip(values, _BATCHES, strict=True):
        found |= {size: images * times for times, size in sizes.items()}
    folded.graph.eliminate_dead_code()
    folded.recompile()


def _parts(
    node: fx.Node, modules: Mapping[str, nn.Module], values: list[dict[fx.Node, Any]]
) -> list[tuple[fx.Node, Part]]:
    """The parts that a layer's output is cut into, in order; [] if it is not cut, or something else reads it."""
    for_batches = []
    for known in values:
        shape, found = tuple(known[node].shape), {}
        numbered = torch.arange(math.prod(shape)).reshape(shape)
        for leaf, moved in _leaves(node, numbered, modules, known):
            part = None if moved is None else part_of(moved.numpy(), shape)
            if part is None:
                return []
            found[leaf] = part
        for_batches.append(found)
    one, two = for_batches
    parts = [(leaf, part.for_any_batch(two[leaf])) for leaf, part in one.items() if leaf in two]
    known_parts = [(leaf, part) for leaf, part in parts if part is not None]
    known_parts.sort(key=lambda part: part[1].features.start)
    whole = len(known_parts) == len(one) == len(two)
    return known_parts if whole and are_whole([part for _, part in known_parts], values[0][node].shape[-1]) else []


def _leaves(
    node: fx.Node, numbered: Tensor, modules: Mapping[str, nn.Module], values: dict[fx.Node, Any]
) -> Iterator[tuple[fx.Node, Tensor | None]]:
    """The moved copies of a tensor that something else than data movement reads, of ``numbered``, which stands for it.

    None is given where that is not known.
    """
    waiting: list[tuple[fx.Node, Any]] = [(node, numbered)]
    while waiting:
        current, value = waiting.pop()
        moves = [kind_of(reader, dict(modules)) in COMMUTING and reader.op != "call_module" for reader in current.users]
        if not all(moves) or not moves:
            known = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
            yield current, value if not any(moves) and known else None
            continue
        for reader in current.users:
            args, kwargs = fx.map_arg((reader.args, reader.kwargs), (values | {current: value}).__getitem__)
            target: Any = reader.target
            try:
                moved = getattr(args[0], target)(*args[1:], **kwargs) if reader.op == "call_method" else None
                moved = target(*args, **kwargs) if reader.op == "call_function" else moved
            except (RuntimeError, TypeError, ValueError, IndexError):
                yield reader, None
                continue
            waiting.append((reader, moved))


def _split(folded: fx.GraphModule, node: fx.Node, layer: QuantizedLinear, parts: list[tuple[fx.Node, Part]]) -> None:
    quantizer, whole = layer.weight_quantizer, str(node.target)
    assert isinstance(quantizer, Dequantize)
    folded.set_submodule(whole, nn.Module())
    for number, (leaf, part) in enumerate(parts):
        chosen = slice(part.features.start, part.features.stop)
        own = copy.copy(layer)
        own._parameters, own._buffers, own._modules = {}, {}, {}
        own.out_features = len(part.features)
        own.register_buffer("weight", layer.weight[chosen].clone())
        own.bias = None if layer.bias is None else nn.Parameter(layer.bias[chosen].clone(), requires_grad=False)
        own.add_module("weight_quantizer", Dequantize(quantizer.scale[chosen], quantizer.axis, quantizer.format))
        path = f"{whole}.{number}"
        folded.add_submodule(path, own)
        with folded.graph.inserting_before(node):
            made = folded.graph.call_module(path, (node.args[0],))
        with folded.graph.inserting_before(leaf):
            shaped = folded.graph.call_method("reshape", (made, part.shape))
            moved = folded.graph.call_method("permute", (shaped, part.order))
        for new in (made, shaped, moved):
            new.meta = dict(node.meta)
        stack = {key: at for key, at in node.meta.get("nn_module_stack", {}).items() if at[0] != whole}
        made.meta["nn_module_stack"] = stack | {path: (path, type(own))}
        leaf.replace_all_uses_with(moved)
