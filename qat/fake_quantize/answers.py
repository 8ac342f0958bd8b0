"""What a network answers to fixed inputs: a checkpoint records it, to notice when the code of its model has changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from qat.fake_quantize.prepare import copy_for_evaluation
from qat.graph.inputs import Inputs
from qat.graph.outputs import leaves
from qat.graph.torch_patches import without_autocast

_BATCH, _VALUES = 2, 64  # recorded of each output
_TOLERANCE = 0.02  # of what differs between the inputs: other machines and versions compute slightly other answers


@torch.no_grad()
@without_autocast()
def answers_of(prepared: fx.GraphModule) -> dict[str, list[list[float]]]:
    """By output: up to 64 values for each of two fixed random inputs, in evaluation and without quantizers.

    An output that is not finite, and one that holds no floating-point numbers, is left out.
    """
    inputs = prepared.meta["inputs"]
    assert isinstance(inputs, Inputs)
    device = next((tensor.device for tensor in (*prepared.parameters(), *prepared.buffers())), None)
    # A copy has its own forward: accelerate replaces that of a model that it trains by one with an autocast.
    answer = copy_for_evaluation(prepared, quantized=False)(*inputs.random(_BATCH, device).values())
    found = {path: value.detach().float().cpu() for path, value in leaves(answer) if isinstance(value, Tensor)}
    return {path: _some(value).tolist() for path, value in found.items() if value.isfinite().all()}


def same_answers(recorded: Mapping[str, list[list[float]]], prepared: fx.GraphModule) -> bool:
    """Whether ``prepared`` answers what ``answers_of`` recorded, but for rounding."""
    found = answers_of(prepared)
    if found.keys() != recorded.keys():
        return False
    for path, values in recorded.items():
        then, now = torch.tensor(values, dtype=torch.float64), torch.tensor(found[path], dtype=torch.float64)
        if then.shape != now.shape:
            return False
        differs_by_input = (then - then.mean(0)).norm() + 1e-4 * then.norm()
        if (now - then).norm() > _TOLERANCE * differs_by_input:
            return False
    return True


def _some(value: Tensor) -> Tensor:
    """[N, ...] -> [N, at most 64], equally spaced."""
    flat = value.reshape(len(value), -1)
    return flat[:, :: max(1, flat.shape[1] // _VALUES)][:, :_VALUES]
