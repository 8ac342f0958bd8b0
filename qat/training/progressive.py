"""Progressive quantization: a network that is quantized from its input on, more of it in each epoch."""

from __future__ import annotations

from torch import nn

from qat.fake_quantize.quantizer import ActivationQuantizer, WeightQuantizer


def quantize_part(model: nn.Module, share: float) -> None:
    """Turns on the first ``share`` of the weight quantizers and of the activation quantizers, and the others off."""
    for kind in (WeightQuantizer, ActivationQuantizer):
        quantizers = [module for module in model.modules() if isinstance(module, kind)]
        for index, quantizer in enumerate(quantizers):
            quantizer.enabled = index < share * len(quantizers)
