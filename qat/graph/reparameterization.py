"""Networks that are trained with more branches than they need: which call makes fewer layers compute the same.

The branches of such a block (RepVGG, MobileOne) are sums of convolutions, which one convolution can replace exactly. In
float both cost time only. Quantized, each branch is rounded on its own and each sum is read and written once more.

Other networks have methods of the same names that do something else, so a call is named only if the network answers
the same after it.
"""

from __future__ import annotations

import copy
import importlib.util

import torch
from torch import Tensor, nn

from qat.graph.inputs import Inputs
from qat.graph.outputs import leaves

_TIMM = ("reparameterize", "fuse")  # what timm.utils.reparameterize_model calls
_REPVGG = "switch_to_deploy"  # what RepVGG's own code, and what follows it, names it
_TOLERANCE = 1e-3  # of the largest value: other sums of the same products


def advice(model: nn.Module, inputs: Inputs) -> str:
    """Which call leaves ``model``, which stays as it is, with fewer layers, and how many; '' if none does.

    ``inputs``: what it takes.
    """
    by_timm = any(hasattr(module, name) for module in model.modules() for name in _TIMM)
    by_block = any(hasattr(module, _REPVGG) for module in model.modules())
    if not by_timm and not by_block:
        return ""
    try:
        fewer, calls = copy.deepcopy(model).eval(), list[str]()
        before = _answers(fewer, inputs)
        if by_timm and importlib.util.find_spec("timm"):
            from timm.utils.model import reparameterize_model

            fewer = reparameterize_model(fewer, inplace=True)
            calls.append("timm.utils.reparameterize_model(model)")
        if by_block:
            for module in list(fewer.modules()):
                getattr(module, _REPVGG, lambda: None)()
            calls.append(f"{_REPVGG}() of its blocks")
        alike = _are_alike(before, _answers(fewer, inputs))
    except Exception:  # code of the model, which may want more than a call
        return ""
    layers, needed = _layers(model), _layers(fewer)
    if needed >= layers or not alike:
        return ""
    return (
        f"{needed} convolutions and linear layers could compute what {layers} do: call {' and '.join(calls)} on the "
        "trained model, and quantize that"
    )


@torch.no_grad()
def _answers(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    device = next((weight.device for weight in model.parameters()), None)
    answer = inputs.call(model, inputs.random(1, device))
    return [part.float() for _, part in leaves(answer) if isinstance(part, Tensor)]


def _are_alike(before: list[Tensor], after: list[Tensor]) -> bool:
    if len(before) != len(after):
        return False
    pairs = zip(before, after, strict=True)
    return all(
        one.shape == other.shape and bool(((one - other).abs() <= _TOLERANCE * one.abs().max()).all())
        for one, other in pairs
    )


def _layers(model: nn.Module) -> int:
    return sum(isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) for module in model.modules())
