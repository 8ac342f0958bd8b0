"""Finds the LayerNorms that only quantized linear layers read, which SmoothQuant can smooth.

Operations that move data may lie between, if they keep the channels last: a reshape, the windows of a Swin, a slice of
tokens. That is not judged by their names: they run on a tensor that holds the numbers of the channels.

Shapes: C channels, the last dimension of a LayerNorm's output [..., C]; O output channels of a linear layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.fake_quantize.quantizer import ActivationQuantizer, WeightQuantizer
from qat.graph.fx_network import arguments, kind_of, label, weight_axis, weight_source
from qat.graph.tracing import network_of
from qat.rules.placement import Placement

NO_WEIGHT = "without a weight for each channel"
READ = "read by something other than quantized linear layers"
NOT_LAST = "whose channels are not last where they are read"
NO_PARAMETER = "with a weight, or a reader's weight, that is no parameter"
SHARED = "with a weight, or a reader's weight, that is used elsewhere too"


@dataclass(frozen=True)
class Layer:
    """A linear layer. ``axis``: the dimension of its input channels in ``weight``: 1 of [O, C], 0 of [C, O]."""

    label: str
    weight: nn.Parameter
    axis: int


@dataclass(frozen=True)
class LayerNorm:
    """A LayerNorm that can be smoothed. ``parameters``: its weight and bias, [C] each, or the weight alone."""

    node: fx.Node
    parameters: tuple[nn.Parameter, ...]
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class LeftAlone:
    """A LayerNorm that cannot be smoothed, and why."""

    node: fx.Node
    reason: str


def find_layer_norms(
    model: fx.GraphModule, in_float: fx.GraphModule, placement: Placement
) -> Iterator[LayerNorm | LeftAlone]:
    """Every LayerNorm of ``model``, which is traced or prepared, in the order of the network.

    ``in_float``: a copy of ``model`` in evaluation without quantizers; it runs on two random inputs.
    """
    search = _Search(model, in_float, {one.op for one in placement.decisions_about("linear") if one.quantized})
    for node in search.norms:
        judged = search.judge(node)
        yield LeftAlone(node, judged) if isinstance(judged, str) else judged


class _Search:
    """``quantized``: the names of the quantized linear layers."""

    def __init__(self, model: fx.GraphModule, in_float: fx.GraphModule, quantized: Collection[str]) -> None:
        self._model, self._quantized, self._modules = model, quantized, dict(model.named_modules())
        kinds, nodes = {op.name: op.kind for op in network_of(model)}, list(model.graph.nodes)
        self.norms = [node for node in nodes if kinds.get(node.name) == "layer_norm"]
        moves = ("data_movement", "split", "dropout")
        movers = {node for node in nodes if kinds.get(node.name) in moves or self._is_quantizer(node)}
        self._numbers = _channel_numbers(in_float, model.graph, self.norms, movers)
        self._uses: Counter[int] = Counter()  # of parameters, by their memory
        for node in nodes:
            if node.op == "get_attr" and isinstance(tensor := self._value(node), Tensor):
                self._uses[_memory(tensor)] += len(node.users)
            elif node.op == "call_module":
                self._uses.update(map(_memory, self._modules[str(node.target)].parameters()))

    def judge(self, norm: fx.Node) -> LayerNorm | str:
        """What is to be smoothed with ``norm``, or why it is left alone."""
        if norm.op == "call_module":
            module = self._modules[str(norm.target)]
            weight, bias = module.weight, module.bias
        else:
            weight, bias = (self._value(arguments(norm).get(name)) for name in ("weight", "bias"))
        if weight is None or getattr(weight, "ndim", 1) > 1:
            return NO_WEIGHT
        readers = self._readers(norm)
        if isinstance(readers, str):
            return readers
        parameters, layers = (weight,) if bias is None else (weight, bias), tuple(map(self._layer, readers))
        weights = (*parameters, *(layer.weight for layer in layers))
        if not all(isinstance(one, nn.Parameter) for one in weights):
            return NO_PARAMETER
        return SHARED if any(self._uses[_memory(one)] > 1 for one in weights) else LayerNorm(norm, parameters, layers)

    def _readers(self, norm: fx.Node) -> list[fx.Node] | str:
        """The quantized linear layers that read ``norm``, in their order; why it is left alone if others do."""
        found, waiting = set[fx.Node](), [norm]
        while waiting:
            tensor = waiting.pop()
            for reader in tensor.users:
                is_data = bool(reader.args) and reader.args[0] is tensor
                if is_data and reader in self._numbers:
                    waiting.append(reader)
                elif is_data and reader.name in self._quantized:
                    if not _are_last(self._numbers[tensor], self._numbers[norm].shape[-1]):
                        return NOT_LAST
                    found.add(reader)
                elif kind_of(reader, self._modules) != "shape":
                    return READ
        return [node for node in self._model.graph.nodes if node in found] or READ

    def _layer(self, node: fx.Node) -> Layer:
        if node.op == "call_module":
            return Layer(label(node), self._modules[str(node.target)].weight, 1)
        source = weight_source(node)
        assert source is not None, "a placement quantizes only constant weights"
        if self._is_quantizer(source):
            (source,) = source.all_input_nodes
        return Layer(label(node), self._value(source), 0 if weight_axis(node) else 1)

    def _value(self, source: Any) -> Any:
        """The tensor that ``source`` reads from the model; what reads none, as it is."""
        is_stored = isinstance(source, fx.Node) and source.op == "get_attr"
        return attrgetter(str(source.target))(self._model) if is_stored else source

    def _is_quantizer(self, node: fx.Node) -> bool:
        return isinstance(self._modules.get(str(node.target)), (ActivationQuantizer, WeightQuantizer))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# --- where channels are


class _Numbers(fx.Interpreter):
    """Runs a network, and ``movers`` also on the numbers of channels, which begin at the outputs of ``norms``."""

    def __init__(
        self, model: fx.GraphModule, graph: fx.Graph, norms: Collection[fx.Node], movers: Collection[fx.Node]
    ) -> None:
        super().__init__(model, graph=graph)
        self._norms, self._movers = norms, movers
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node."""
        result = super().run_node(n)
        if n in self._norms:
            self.found[n] = torch.arange(1, result.shape[-1] + 1).to(result).expand(result.shape)
        elif n in self._movers and n.args and isinstance(data := n.args[0], fx.Node) and data in self.found:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.found[n] = getattr(self, n.op)(n.target, (self.found[data], *args[1:]), kwargs)
        return result


def _channel_numbers(
    model: fx.GraphModule, graph: fx.Graph, norms: Collection[fx.Node], movers: Collection[fx.Node]
) -> dict[fx.Node, Any]:
    """The outputs of ``norms``, and of the ``movers`` behind them, with the number of its channel as each value.

    Numbers begin at 1; what movers pad with is 0. The output of a mover may be several tensors.
    """
    first, run = next(model.parameters()), _Numbers(model, graph, norms, movers)
    with torch.no_grad():
        run.run(*(x.to(first) for x in model.meta["inputs"].random(2).values()))
    return run.found


def _are_last(numbers: Any, channels: int) -> bool:
    """Whether ``numbers`` are those of a tensor [..., ``channels``] with each channel, or zeros, in its place."""
    if not isinstance(numbers, Tensor) or numbers.shape[-1:] != (channels,):
        return False
    in_place = numbers == torch.arange(1, channels + 1).to(numbers)
    return bool((in_place | (numbers == 0)).all())
