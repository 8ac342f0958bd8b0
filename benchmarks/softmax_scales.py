"""What the range of a softmax's output costs: fixed at 1, as is common, or calibrated, for spread and peaked attention.

    PYTHONPATH=. python -m benchmarks.softmax_scales

A ViT of four blocks at 224 px (197 tokens), weights at random, whose attention spreads over all tokens or peaks at few,
by the size of the weights that make q and k. Printed is the signal-to-noise ratio of the quantized network against the
float one on other images than it was calibrated on, with all other ranges by max. Needs timm.
"""

from __future__ import annotations

import math
import warnings

import timm
import torch
from torch import Tensor, nn

from qat.base.choices import Calibrator
from qat.base.console import table
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import activation_quantizers, prepare

CALIBRATORS: tuple[Calibrator, ...] = ("max", "mse", "entropy", "percentile")
IMAGES = 8


def network(factor: float) -> nn.Module:
    """A small ViT, whose attention peaks the more, the larger ``factor`` is."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=100).eval()
    sizes = {"attn.qkv": 0.025 * factor, "attn.proj": 0.06, "mlp.fc1": 0.06, "mlp.fc2": 0.04}
    for block in model.blocks:
        for name, size in sizes.items():
            nn.init.normal_(block.get_submodule(name).weight, 0, size)
    nn.init.normal_(model.head.weight, 0, 0.05)
    return model


def sqnr_db(expected: Tensor, found: Tensor) -> float:
    """In dB."""
    return 10 * math.log10(float(expected.square().sum() / (expected - found).square().sum()))


@torch.no_grad()
def compare(model: nn.Module) -> dict[str, tuple[float, float]]:
    """By how the softmax is calibrated: the mean of its ranges, and the signal-to-noise ratio of the output in dB."""
    calibration, test = torch.randn(2, IMAGES, 3, 224, 224).unbind()
    expected, found = model(test), {}
    for name in ("fixed at 1", *CALIBRATORS):
        prepared = prepare(model, input_shape=calibration.shape[1:])
        softmax = [one for tensor, one in activation_quantizers(prepared).items() if "softmax" in tensor]
        if name in CALIBRATORS:
            calibrate_ranges(prepared, [calibration], name)  # type: ignore[arg-type]
        chosen = [one.amax.item() if name in CALIBRATORS else 1.0 for one in softmax]
        calibrate_ranges(prepared, [calibration], "max")
        for one, amax in zip(softmax, chosen, strict=True):
            one.amax.fill_(amax)
        found[name] = (sum(chosen) / len(chosen), sqnr_db(expected, prepared(test)))
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    rows = []
    for attention, factor in (("spread", 1), ("between", 3), ("peaked", 6)):
        found = compare(network(factor))
        rows += [(attention, name, f"{amax:.3f}", f"{ratio:.1f} dB") for name, (amax, ratio) in found.items()]
    table("Softmax in INT8", ("attention", "range of the softmax", "mean amax", "output against float"), rows)


if __name__ == "__main__":
    main()
