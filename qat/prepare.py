"""A float model in, the same model with quantizers at the placed points out.

The result is a torch.fx GraphModule. Its state dict has the keys of the float model, unchanged (of all modules that
``forward`` calls), and beside them one
``activation_quantizers.<tensor>.amax`` for every quantized activation; weight quantizers have no state.
"""

from __future__ import annotations

import copy
import itertools
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from qat.artifact import UserError
from qat.layers import quantized_layer
from qat.network import network_from_fx
from qat.placement import Placement, place
from qat.quantizer import ActivationQuantizer

ACTIVATION_QUANTIZERS = "activation_quantizers"


class Tracer(fx.Tracer):
    """Keeps whole what must not be inlined: what behaves differently in training and in evaluation."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True for modules that become one node."""
        mode_dependent = (nn.modules.batchnorm._BatchNorm, torchvision.ops.StochasticDepth)
        return isinstance(m, mode_dependent) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """A traced copy of ``model``, in its mode and usable in both. Raises UserError naming the line that stops fx."""
    model = copy.deepcopy(model)
    training = model.training
    try:
        evaluated = Tracer().trace(model.eval())
        traced = fx.GraphModule(model, Tracer().trace(model.train()), type(model).__name__)
    except (
        fx.proxy.TraceError,
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        NotImplementedError,
    ) as error:
        raise UserError(_why_untraceable(error)) from error
    _check_modes_agree(evaluated, traced.graph)
    _keep_dropout_modes(traced)
    for node in traced.graph.nodes:
        if hasattr(nn.ModuleDict, node.name):  # x.to(...) makes a node "to", which no submodule can be called
            node.name = f"{node.name}_"
    traced.recompile()
    return traced.train(training)


def prepare(model: nn.Module, placement: Placement | None = None) -> fx.GraphModule:
    """A copy of ``model`` with fake quantization inserted; calibrate it before use (qat.calibrate).

    Args:
        model: a float model that torch.fx can trace.
        placement: decisions to apply, for one that was saved; None derives them from the graph (qat.placement).

    Raises:
        UserError: the model cannot be traced, or ``placement`` was made for another one.
    """
    traced = trace(model)
    if placement is None:
        placement = place(network_from_fx(traced))
    nodes = {node.name: node for node in traced.graph.nodes}
    _check_fits(placement, nodes)

    for decision in placement.weights:
        if decision.quantized:
            target = str(nodes[decision.op].target)
            module = traced.get_submodule(target)
            if not hasattr(module, "weight_quantizer"):  # a module may be called twice
                traced.set_submodule(target, quantized_layer(module))
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


def placement_of(prepared: fx.GraphModule) -> Placement:
    """The decisions that a prepared model was made with."""
    return prepared.meta["placement"]


def activation_quantizers(prepared: nn.Module) -> dict[str, ActivationQuantizer]:
    """The activation quantizers of a prepared model, by the name of their tensor."""
    quantizers = prepared.get_submodule(ACTIVATION_QUANTIZERS)
    return {name: module for name, module in quantizers.named_children() if isinstance(module, ActivationQuantizer)}


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _check_fits(placement: Placement, nodes: dict[str, fx.Node]) -> None:
    named = {tensor.tensor for tensor in placement.tensors} | {decision.op for decision in placement.weights}
    missing = sorted(named - nodes.keys())
    if missing:
        raise UserError(
            f"the placement names {len(missing)} operations that this model lacks, first {missing[0]!r}: "
            "it was made for another model or by another version; train again"
        )


def _check_modes_agree(evaluated: fx.Graph, trained: fx.Graph) -> None:
    """A trace follows one branch of ``if self.training``, which would then be taken in both modes."""
    sequences = [[(node.op, node.target) for node in graph.nodes] for graph in (evaluated, trained)]
    for evaluation, training in itertools.zip_longest(*sequences, fillvalue=("", "nothing")):
        if evaluation != training:
            raise UserError(
                f"the model computes {evaluation[1]} in evaluation where it computes {training[1]} in training, and "
                "torch.fx can keep only one: put what depends on self.training into torch.nn.Dropout or "
                "torchvision.ops.StochasticDepth, or switch it off"
            )


def _keep_dropout_modes(traced: fx.GraphModule) -> None:
    """Turns F.dropout(x, p, training=<baked in>) into a module, which follows train() and eval()."""
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and node.target is F.dropout:
            probability = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            traced.add_submodule(f"{node.name}_module", nn.Dropout(float(probability)))
            with traced.graph.inserting_before(node):
                replacement = traced.graph.call_module(f"{node.name}_module", (node.args[0],))
            node.replace_all_uses_with(replacement)
            traced.graph.erase_node(node)
            replacement.name = node.name


def _why_untraceable(error: Exception) -> str:
    torch_folder = str(Path(torch.__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if not frame.filename.startswith(torch_folder)]
    where = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "inside torch"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"torch.fx cannot trace this model, stopped by {where} ({reason}): "
        "make that line independent of tensor values, or quantize a submodule without it"
    )
