"""Folded network -> explicit-precision ONNX: opset 20, dynamic batch, INT8 weights, Q/DQ nodes named by their layers.

A network without quantizers becomes an ONNX model of float32 or, by ``with_ends``, of float16.

torch.onnx does the translation; export/ops.py keeps the Q/DQ pairs whole on the way. Afterwards nodes get names: each
is called after the path of the module that it came from, so that the engine's layers can be traced back to the model.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript.optimizer import fold_constants_ir
from torch import Tensor, fx, nn

from export import ops
from export.equations import lower_equations
from export.fold import DequantizeInput, QuantizeDequantize
from export.names import unused_name
from export.onnx_network import WEIGHTED
from export.reuse_concats import reuse_concats
from export.shapes import constant_of, drop_expands, simplify_shapes
from export.source_images import SourceImages, placed
from qat.base.choices import InputKind
from qat.base.errors import UserError
from qat.data.preprocessing import Preprocessing

INPUT_NAME, OUTPUT_NAME = "input", "logits"  # of a network that takes one image and answers logits
_EXAMPLE_BATCH = 2  # not 0 or 1: torch.export would take these for constants


def with_ends(
    folded: fx.GraphModule,
    preprocessing: Preprocessing | None,
    kind: InputKind,
    dtype: torch.dtype = torch.float32,
    source: SourceImages | None = None,
) -> fx.GraphModule:
    """A copy of ``folded`` that computes in ``dtype``, takes an input of ``kind`` and returns float32 tensors.

    float32-nchw: [N, 3, H, W], normalized; or whatever float32 tensor the network takes, [N, ...].
    uint8-nhwc: [N, H, W, 3] in RGB; a cast, a transposition and the normalization come before the network.
    uint8-nchw: [N, 3, H, W] in RGB; likewise, without the transposition.
    int8-nchw: [N, 3, H, W], normalized and quantized by ``input_scale``.
    With ``source`` the uint8 inputs have its height and width, and are resized before they are normalized.

    A network with several inputs takes float32-nchw only.

    Raises UserError when ``kind`` is int8-nchw and ``folded`` does not quantize its input, when ``kind`` is one of the
    uint8 inputs and there is no ``preprocessing``, or when it is another kind for several inputs.
    """
    network = copy.deepcopy(folded).to(dtype)
    inputs = network.graph.find_nodes(op="placeholder")
    if kind != "float32-nchw" and len(inputs) > 1:
        raise UserError(
            f"--input {kind} is for networks with one image as input, and this one has {len(inputs)} inputs"
        )
    if kind == "int8-nchw":
        network.set_submodule(_input_quantizer_path(network), DequantizeInput(input_quantizer(network)))
        return network
    graph = network.graph
    behind = next(node for node in graph.nodes if node.op != "placeholder")
    from_bytes = kind in ("uint8-nhwc", "uint8-nchw")
    for given in inputs:
        readers, x = list(given.users), given
        # These are nodes of the same graph. In a module around it the exporter would lose track of which module calls
        # which function.
        with graph.inserting_before(behind):
            if from_bytes or dtype != torch.float32:
                x = graph.call_method("to", (x, dtype))
            if kind == "uint8-nhwc":
                x = graph.call_method("permute", (x, 0, 3, 1, 2))
            if source is not None:
                x = graph.call_function(placed, (x, *source.arguments()))
            if from_bytes:
                for function, name, values in _normalization(preprocessing, kind):
                    network.register_buffer(name, values.to(dtype))
                    x = graph.call_function(function, (x, graph.get_attr(name)))
        for reader in readers:
            reader.replace_input_with(given, x)
    if dtype != torch.float32:
        output = graph.output_node()
        for answer in output.all_input_nodes:
            with graph.inserting_before(output):
                output.replace_input_with(answer, graph.call_method("to", (answer, torch.float32)))
    graph.lint()
    network.recompile()
    return network


def input_scale(folded: fx.GraphModule) -> float:
    """The scale that the network's input is quantized by. Raises UserError when it is not quantized."""
    return float(input_quantizer(folded).scale)


def input_quantizer(folded: fx.GraphModule) -> QuantizeDequantize:
    """What quantizes the network's input. Raises UserError when nothing does, or something else reads it too."""
    module = folded.get_submodule(_input_quantizer_path(folded))
    assert isinstance(module, QuantizeDequantize)
    return module


def _input_quantizer_path(folded: fx.GraphModule) -> str:
    """Path of the quantizer that is the only reader of the network's input."""
    given, *others = folded.graph.find_nodes(op="placeholder")
    if others:
        raise UserError("the network has several inputs: leave out --input int8-nchw")
    readers = [str(node.target) for node in given.users if node.op == "call_module"]
    if len(given.users) != 1 or not readers or not isinstance(folded.get_submodule(readers[0]), QuantizeDequantize):
        raise UserError("the network's input is not quantized, so it cannot be INT8: leave out --input int8-nchw")
    return readers[0]


def _normalization(
    preprocessing: Preprocessing | None, kind: InputKind
) -> Iterator[tuple[Callable[..., Any], str, Tensor]]:
    """(x / 255 - mean) / std as one multiplication and one addition: the function, a name and its other operand."""
    if preprocessing is None:
        raise UserError(
            f"--input {kind} makes preprocessing part of the network, and there is none: give preprocessing"
        )
    mean, deviation = (np.array(values, np.float64) for values in (preprocessing.mean, preprocessing.std))
    for function, name, values in (
        (operator.mul, "input_factor", 1 / (255 * deviation)),
        (operator.add, "input_shift", -mean / deviation),
    ):
        yield function, name, torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)


def example_input(input_shape: Sequence[int], kind: InputKind, batch: int = _EXAMPLE_BATCH) -> Tensor:
    """Zeros of the shape and type that a network exported with ``kind`` takes.

    ``input_shape`` is that of the folded network, without the batch: [C, H, W] for images.
    """
    type_name, _, layout = kind.partition("-")
    shape = list(input_shape)
    if layout == "nhwc":
        channels, height, width = shape
        shape = [height, width, channels]
    return torch.zeros(batch, *shape, dtype=getattr(torch, type_name))


def emit(
    network: nn.Module,
    example: Tensor | Mapping[str, Tensor],
    metadata: Mapping[str, str],
    outputs: Sequence[str] = (OUTPUT_NAME,),
) -> ir.Model:
    """Translates a folded network (export/fold.py) into ONNX.

    Args:
        network: maps tensors, batch first, to one tensor or a tuple of them, batch first.
        example: inputs of the right shapes and types, by name, in the order of the network's arguments; or the only
            one. Their first dimension becomes dynamic.
        metadata: is written into the model's metadata.
        outputs: the names of the outputs.
    """
    examples = {INPUT_NAME: example} if isinstance(example, Tensor) else dict(example)
    batch = torch.export.Dim("batch")
    with _quiet_exporter():
        program = torch.onnx.export(
            network.eval(),
            tuple(examples.values()),
            dynamo=True,
            opset_version=ops.OPSET,
            input_names=list(examples),
            output_names=list(outputs),
            dynamic_shapes=tuple({0: batch} for _ in examples),
            custom_translation_table=ops.TRANSLATIONS,
            optimize=False,  # the optimizer would fold DequantizeLinear nodes of small weights to float
            verbose=False,
        )
    assert program is not None
    model = program.model
    for clean in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
    ):
        clean(model)
    _split_into_tensors(model.graph)
    # Computes sizes and bounds now that the exporter computes in the graph. Weights stay codes.
    fold_constants_ir(model, should_fold=lambda node: False if node.op_type == "DequantizeLinear" else None)
    simplify_shapes(model.graph)
    drop_expands(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    reuse_concats(model.graph)
    lower_equations(model.graph)
    _name_by_module(model.graph, _layers(network))
    _drop_exporter_notes(model)
    model.producer_name, model.producer_version = "int8-qat-pipeline", None
    model.metadata_props.update(metadata)
    return model


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silences what the exporter prints and warns about its own work: a user cannot do anything about it."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _split_into_tensors(graph: ir.Graph) -> None:
    """Replaces SplitToSequence by Split: the exporter splits into a sequence, and TensorRT only knows Split."""
    for node in list(graph):
        if node.op_type != "SplitToSequence":
            continue
        given, sizes = node.inputs
        takers = node.outputs[0].consumers()
        assert given is not None
        assert given.shape is not None
        assert sizes is not None
        assert sizes.const_value is not None
        axis = node.attributes.get_int("axis", 0)
        extent, parts = given.shape[axis], sizes.const_value.numpy()
        assert isinstance(extent, int), "only the batch is dynamic, and it is not split"
        if not parts.shape:
            parts = np.diff([*range(0, extent, int(parts)), extent])
        lengths = constant_of(graph, f"{node.outputs[0].name}_lengths", parts.tolist())
        split = ir.Node("", "Split", [given, lengths], [ir.AttrInt64("axis", axis)], num_outputs=len(parts))
        split.metadata_props.update(node.metadata_props)
        graph.insert_before(node, split)
        for taker in takers:
            index = taker.inputs[1]
            assert index is not None
            assert index.const_value is not None
            part = split.outputs[int(index.const_value.numpy())]
            part.shape, part.type = taker.outputs[0].shape, taker.outputs[0].type
            ir.convenience.replace_all_uses_with(taker.outputs[0], part)
        graph.remove([*takers, node], safe=True)


def _name_by_module(graph: ir.Graph, layers: set[str]) -> None:
    """Names each node and its outputs after the module's path, and a Q or DQ after the tensor that it quantizes."""
    outputs = set(graph.outputs)
    taken: set[str] = {value.name or "" for value in (*graph.inputs, *graph.outputs)} | set(graph.initializers)
    # A linear layer may be several nodes: the matrix product gets the layer's name.
    for node in sorted(graph, key=lambda node: node.op_type not in WEIGHTED):
        unique = unused_name(_node_name(node, layers), taken)
        taken.add(unique)
        node.name = unique
        for index, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = unique if len(node.outputs) == 1 else unused_name(f"{unique}_{index}", taken)
                taken.add(value.name)


def _layers(network: nn.Module) -> set[str]:
    """Paths of the modules that are one layer: they have no children but the quantizer of their weight."""
    found = {path: {name for name, _ in module.named_children()} for path, module in network.named_modules() if path}
    return {path for path, children in found.items() if children <= {"weight_quantizer"}}


def _node_name(node: ir.Node, layers: set[str]) -> str:
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        scale = node.inputs[1]
        assert scale is not None
        tensor = (scale.name or "").removesuffix(".scale").removeprefix("activation_quantizers.")
        return f"{tensor}/{'quantize' if node.op_type == 'QuantizeLinear' else 'dequantize'}"
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    modules = [scope for scope in scopes[:-1] if scope]
    path = modules[-1] if modules else ""
    if path not in layers:  # a function that a module with children calls: layer1.0 -> layer1.0.add
        path = f"{path}.{node.op_type.lower()}".removeprefix(".")
    return path


def _drop_exporter_notes(model: ir.Model) -> None:
    """Removes the exporter's stack traces: half a megabyte, with paths of the machine that exported."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
