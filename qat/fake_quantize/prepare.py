"""Inserts quantizers into a float model at the points that placement chose.

The result is a torch.fx GraphModule. Its state dict has the keys of the float model, unchanged (for all modules that
``forward`` calls, but for folded normalizations, see ``prepare``), and in addition
``activation_quantizers.<tensor>.amax`` for every quantized activation. Weight quantizers have no state unless their
range is fixed or learned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from operator import attrgetter

import torch
from torch import Tensor, fx, nn

from qat.base.console import say
from qat.base.errors import UserError
from qat.fake_quantize.folded_norms import FOLDED_NORMS, fold_norm_behind
from qat.fake_quantize.layers import quantized_layer
from qat.fake_quantize.quantizer import ActivationQuantizer, WeightQuantizer
from qat.graph.attention import fuse_attention
from qat.graph.constants import constant_value
from qat.graph.fx_network import weight_axis, weight_source
from qat.graph.network import Network, Op
from qat.graph.operations import WEIGHTED
from qat.graph.reparameterization import advice
from qat.graph.tracing import Shapes, TracedModel, network_of, trace
from qat.rules.kernel_profile import KernelProfile
from qat.rules.place import place
from qat.rules.placement import Placement

ACTIVATION_QUANTIZERS = "activation_quantizers"
WEIGHT_QUANTIZERS = "weight_quantizers"  # for weights that a function reads; a module has its own quantizer


def prepare(
    model: nn.Module,
    placement: Placement | None = None,
    *,
    input_shape: Shapes,
    keep_float: Iterable[str] = (),
    profile: KernelProfile | None = None,
    training: bool | None = None,
) -> TracedModel:
    """A copy of ``model`` with fake quantization inserted; calibrate it before use (qat.calibration.activation_ranges).

    The copy is proved to compute what ``model`` does: both answer the same random inputs. A batch normalization that
    alone reads an INT8 transposed convolution is then folded into it, because its weight has one scale, and training
    goes on without it: calibrate and train such a network from weights that were trained in float. An Identity takes
    its place, the convolution gets a bias, and the state dict lacks the keys of the normalization.

    Args:
        model: a float model; it is not changed.
        placement: the decisions to apply, for example saved ones; None derives them from the graph (qat.rules.place).
        input_shape: the shape of one input without the batch, (3, 224, 224); of several inputs by the names of the
            model's arguments, {"image": (3, 224, 224), "hint": (16, 56, 56)}. The copy takes any batch of these.
        keep_float: patterns of what stays in float (qat.rules.place.place).
        profile: what deploy.kernels measured on a GPU; None for what was measured on an H200.
        training: whether the copy must be trainable; None: if it can be, else its ``train()`` says why it cannot;
            False: only what the model computes in evaluation is looked at.

    Raises:
        UserError: the model does not take ``input_shape``, its copy would compute something else, it has quantizers
            already, ``placement`` was made for another model, or a pattern matches nothing.
    """
    if hasattr(model, ACTIVATION_QUANTIZERS):
        raise UserError("the model has quantizers already: give the float model that it was prepared from")
    traced = trace(model, input_shape, training=training)
    network = network_of(traced)
    if placement is None:
        if line := advice(model, traced.meta["inputs"]):
            say(line)
        placement = place(network, keep_float, profile=profile)
    nodes = {node.name: node for node in traced.graph.nodes}
    _check_fits(placement, nodes)
    _check_weighted(placement, network)

    traced.meta[FOLDED_NORMS] = {}
    for decision in placement.weights:
        if decision.quantized:
            fold_norm_behind(traced, nodes[decision.op])
            _quantize_weight(traced, nodes[decision.op])
    fuse_attention(traced, {decision.op for decision in placement.decisions if decision.quantized})
    quantizers = nn.ModuleDict({tensor.quantizer: ActivationQuantizer() for tensor in placement.tensors})
    traced.add_submodule(ACTIVATION_QUANTIZERS, quantizers.train(traced.training))
    for tensor in placement.tensors:
        source = nodes[tensor.tensor]
        with traced.graph.inserting_after(source):
            quantized = traced.graph.call_module(f"{ACTIVATION_QUANTIZERS}.{tensor.quantizer}", (source,))
        for read in tensor.reads:
            nodes[read.reader].replace_input_with(source, quantized)
    traced.graph.lint()
    traced.recompile()
    traced.meta["placement"] = placement
    return traced.to(_device(model))


def _quantize_weight(traced: fx.GraphModule, node: fx.Node) -> None:
    if node.op == "call_module":
        target = str(node.target)
        module = traced.get_submodule(target)
        if not hasattr(module, "weight_quantizer"):  # a module may be called twice
            traced.set_submodule(target, quantized_layer(module))
        return
    source = weight_source(node)
    assert source is not None, "a placement quantizes only constant weights"
    path = f"{WEIGHT_QUANTIZERS}.{node.name}"
    traced.add_submodule(path, WeightQuantizer(weight_axis(node)).train(traced.training))
    with traced.graph.inserting_before(node):
        node.replace_input_with(source, traced.graph.call_module(path, (source,)))


def weights_and_quantizers(prepared: fx.GraphModule) -> Iterator[tuple[str, Tensor, WeightQuantizer]]:
    """Every quantized weight, as (path of its quantizer, weight, quantizer).

    A weight that is no nn.Parameter was computed from parameters: it can be read only.
    """
    for path, module in prepared.named_modules():
        if isinstance(quantizer := getattr(module, "weight_quantizer", None), WeightQuantizer):
            yield f"{path}.weight_quantizer", module.get_parameter("weight"), quantizer
    for node in prepared.graph.find_nodes(op="call_module"):
        if str(node.target).startswith(f"{WEIGHT_QUANTIZERS}."):
            quantizer = prepared.get_submodule(str(node.target))
            assert isinstance(quantizer, WeightQuantizer)
            source = node.all_input_nodes[0]
            computed = source.op != "get_attr"
            weight = constant_value(source, prepared) if computed else attrgetter(str(source.target))(prepared)
            yield str(node.target), weight, quantizer


def constant_weights(prepared: fx.GraphModule) -> Iterator[tuple[Op, Tensor, int | None]]:
    """Every constant weight, quantized or not: (its first operation, weight, axis of the output channels).

    The axis is that of the scales: None for a transposed convolution, [I, O/groups, *kernel], which has one scale. A
    weight that is no nn.Parameter was computed from parameters.
    """
    nodes = {node.name: node for node in prepared.graph.nodes}
    seen: set[str] = set()
    for op in network_of(prepared):
        if op.weight is None or op.weight.tensor in seen:
            continue
        seen.add(op.weight.tensor)
        node = nodes[op.name]
        if node.op == "call_module":
            axis = None if op.kind == "transposed_convolution" else 0
            yield op, prepared.get_submodule(str(node.target)).get_parameter("weight"), axis
            continue
        source = weight_source(node)
        assert source is not None
        if str(source.target).startswith(f"{WEIGHT_QUANTIZERS}."):
            (source,) = source.all_input_nodes
        yield op, _value_in_evaluation(source, prepared), weight_axis(node)


def _value_in_evaluation(source: fx.Node, prepared: fx.GraphModule) -> Tensor:
    """The value of a constant; in training, computing it may move statistics, such as those of a spectral norm."""
    modes = {module: module.training for module in prepared.modules()}
    try:
        prepared.eval()
        return constant_value(source, prepared)
    finally:
        for module, training in modes.items():
            module.training = training


def placement_of(prepared: fx.GraphModule) -> Placement:
    """The placement with which a prepared model was made."""
    placement: Placement = prepared.meta["placement"]
    return placement


def activation_quantizers(prepared: nn.Module) -> dict[str, ActivationQuantizer]:
    """The activation quantizers of a prepared model, by name (the name of a tensor that each quantizes)."""
    quantizers = prepared.get_submodule(ACTIVATION_QUANTIZERS)
    return {name: module for name, module in quantizers.named_children() if isinstance(module, ActivationQuantizer)}


def copy_for_evaluation(prepared: fx.GraphModule, *, quantized: bool) -> fx.GraphModule:
    """A copy in evaluation mode without gradients; with all quantizers, or as the float network."""
    model = copy.deepcopy(prepared).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (ActivationQuantizer, WeightQuantizer)):
            module.enabled = quantized
    return model


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _check_weighted(placement: Placement, network: Network) -> None:
    kinds = {op.name: op.kind for op in network}
    for decision in placement.weights:
        if decision.quantized and kinds.get(decision.op) not in WEIGHTED:
            raise UserError(
                f"the placement quantizes the weight of {decision.op!r}, which has none in this model: it was made for "
                "another one; train again with this model"
            )


def _check_fits(placement: Placement, nodes: dict[str, fx.Node]) -> None:
    named = {decision.op for decision in placement.decisions} | {reader for reader, _, _ in placement.reads()}
    named |= {name for tensor in placement.tensors for name in (tensor.tensor, tensor.quantizer)}
    missing = sorted(named - nodes.keys())
    if missing:
        raise UserError(
            f"the placement names {len(missing)} operations that this model does not have (first: {missing[0]!r}): "
            "it was made for another model or by another version; train again"
        )
