"""Names and shapes of the inputs and outputs of an ONNX file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from export.emit import INPUT_NAME, OUTPUT_NAME
from qat.base.errors import UserError
from qat.graph.inputs import Inputs


def output_shapes(folded: fx.GraphModule, inputs: Inputs) -> list[tuple[int, ...]]:
    """The shape of each output for a batch of one."""
    with torch.no_grad():
        answer = folded(*inputs.random(1).values())
    tensors: Sequence[Tensor] = (answer,) if isinstance(answer, Tensor) else answer
    return [tuple(tensor.shape) for tensor in tensors]


def names_of_inputs(inputs: Inputs, given: Sequence[str]) -> tuple[str, ...]:
    """The names ``given``; without any, "input" for one input, and the names of the arguments for several.

    Raises UserError when they are not as many as there are inputs.
    """
    own = tuple(inputs.shapes) if len(inputs.shapes) > 1 else (INPUT_NAME,)
    return _chosen(own, given, "input")


def names_of_outputs(folded: fx.GraphModule, shapes: Sequence[Sequence[int]], given: Sequence[str]) -> tuple[str, ...]:
    """The names ``given``; without any, "logits" for [N, classes], and the paths in the model's answer for several.

    Raises UserError when they are not as many as there are outputs.
    """
    paths: tuple[str, ...] = folded.meta["outputs"]
    if len(shapes) == 1:
        own: tuple[str, ...] = (OUTPUT_NAME,) if len(shapes[0]) == 2 else (paths[0] or "output",)
    else:
        own = tuple(f"output_{path}" if path[:1].isdigit() else path for path in paths)
    return _chosen(own, given, "output")


def _chosen(own: tuple[str, ...], given: Sequence[str], kind: str) -> tuple[str, ...]:
    chosen = tuple(given) or own
    if len(chosen) != len(own) or len(set(chosen)) != len(own):
        raise UserError(f"{kind}_names are {', '.join(chosen)}: give one of its own for each of {', '.join(own)}")
    return chosen
