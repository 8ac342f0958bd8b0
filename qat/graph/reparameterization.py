"""Networks that are trained with more branches than they need: which call makes fewer layers compute the same.

The branches of such a block (RepVGG, MobileOne) are sums of convolutions, which one convolution can replace exactly. In
float both cost time only. Quantized, each branch is rounded on its own and each sum is read and written once more.
"""

from __future__ import annotations

import copy
import importlib.util

from torch import nn

_TIMM = ("reparameterize", "fuse")  # what timm.utils.reparameterize_model calls
_REPVGG = "switch_to_deploy"  # what RepVGG's own code, and what follows it, names it


def advice(model: nn.Module) -> str:
    """Which call leaves ``model``, which stays as it is, with fewer layers, and how many; '' if none does."""
    by_timm = any(hasattr(module, name) for module in model.modules() for name in _TIMM)
    by_block = any(hasattr(module, _REPVGG) for module in model.modules())
    if not by_timm and not by_block:
        return ""
    fewer, calls = copy.deepcopy(model).eval(), []
    try:
        if by_timm and importlib.util.find_spec("timm"):
            from timm.utils.model import reparameterize_model

            fewer = reparameterize_model(fewer, inplace=True)
            calls.append("timm.utils.reparameterize_model(model)")
        if by_block:
            for module in list(fewer.modules()):
                getattr(module, _REPVGG, lambda: None)()
            calls.append(f"{_REPVGG}() of its blocks")
    except Exception:  # code of the model, which may want more than a call
        return ""
    before, after = _layers(model), _layers(fewer)
    if after >= before:
        return ""
    return (
        f"{after} convolutions and linear layers could compute what {before} do: call {' and '.join(calls)} on the "
        "trained model, and quantize that"
    )


def _layers(model: nn.Module) -> int:
    return sum(isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) for module in model.modules())
