"""SmoothQuant: outliers of LayerNorms' outputs are moved into the weights of the linear layers that read them.

    s_c = max |x_c|^alpha / max |w_c|^(1 - alpha)      x_c / s_c  and  s_c * w_c  in place of  x_c  and  w_c

(Xiao et al. 2023). x_c is channel c of a LayerNorm's output [..., C] on the calibration images; w_c are the columns for
that channel in the weights [O, C] of all layers that read it. The LayerNorm's weight and bias [C] are divided by s, so
the float network computes the same function but for rounding, with as many operations; and one scale fits all channels
of x better. With alpha = 1 the channels of x become alike, with alpha = 0 those of w. Which LayerNorms can be smoothed,
qat/calibration/layer_norms.py says.

A channel that is zero in x or w keeps s = 1: nothing is known about it. For the others s is kept within ``LIMITS``: no
s overflows where a channel is almost zero, and a LayerNorm's weight near 1 stays a normal number of float16 (6e-5 to
65504), in which the export can write it. Any s > 0 leaves the function as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qat.base.console import say, warn
from qat.base.errors import UserError
from qat.base.text import first_of
from qat.calibration.activation_ranges import Batch, in_order
from qat.calibration.layer_norms import LayerNorm, find_layer_norms
from qat.compute.precision import exact_float32
from qat.compute.processes import SINGLE_PROCESS, Processes
from qat.fake_quantize.prepare import activation_quantizers, copy_for_evaluation, placement_of, weights_and_quantizers
from qat.fake_quantize.quantizer import per_channel
from qat.graph.fx_network import label
from qat.rules.placement import Placement

LIMITS = (1e-4, 1e4)


@dataclass(frozen=True)
class Smoothed:
    """A LayerNorm and the linear layers that read it. If it was left alone there are none, and ``reason`` says why."""

    norm: str
    layers: tuple[str, ...] = ()
    reason: str = ""


def smoothquant(
    prepared: fx.GraphModule,
    batches: Iterable[Batch],
    alpha: float = 0.5,
    on_batch: Callable[[], None] | None = None,
) -> list[Smoothed]:
    """Moves outliers of LayerNorms into the layers that read them, in place, before ranges are calibrated.

    Args:
        prepared: a model from qat.fake_quantize.prepare whose ranges are not set. It is changed only at the very end,
            so an error leaves it unchanged.
        batches: normalized inputs of the model, on any device; use only images of the calibration split.
        alpha: from 0 to 1; 0.5 is usual. The head of this module says what it does.
        on_batch: called after every batch, to show progress.

    Returns every LayerNorm in the order of the network, smoothed or left alone; [] if there is none.
    Raises UserError when ranges are set, when there is no batch, or when a LayerNorm's output is NaN or infinite.
    """
    activations = (one.amax for one in activation_quantizers(prepared).values())
    weights = (quantizer.amax for _, _, quantizer in weights_and_quantizers(prepared))
    if not all(amax.isnan() for amax in activations) or any(amax is not None for amax in weights):
        raise UserError(
            "the model has ranges, which smoothing would invalidate: call qat.smoothquant before they are set"
        )
    return smooth(prepared, placement_of(prepared), batches, alpha, on_batch)


@torch.no_grad()
def smooth(
    model: fx.GraphModule,
    placement: Placement,
    batches: Iterable[Batch],
    alpha: float,
    on_batch: Callable[[], None] | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> list[Smoothed]:
    """Does what ``smoothquant`` does, to a traced model or to one that was prepared with ``placement``.

    If several ``processes`` share the images, each smooths its own model, all with the same result.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: it must be within 0 to 1")
    with exact_float32():
        in_float = copy_for_evaluation(model, quantized=False)
        found = list(find_layer_norms(model, in_float, placement))
        norms = [one for one in found if isinstance(one, LayerNorm)]
        maxima = _Maxima(in_float, model.graph, norms)
        largest = maxima.over(batches, on_batch, processes) if norms else []
    for norm, x in zip(norms, largest, strict=True):
        columns = [layer.weight.transpose(0, layer.axis).flatten(1) for layer in norm.layers]  # [C, O] each
        s = smoothing_factors(x, torch.cat(columns, 1).abs().amax(1), alpha)
        for parameter in norm.parameters:
            parameter.div_(s)
        for layer in norm.layers:
            layer.weight.mul_(per_channel(s, 2, layer.axis))
    return [
        Smoothed(label(one.node), tuple(layer.label for layer in one.layers))
        if isinstance(one, LayerNorm)
        else Smoothed(label(one.node), reason=one.reason)
        for one in found
    ]


def smoothing_factors(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """s, [C] float64, for the largest magnitude of each channel of the activations and of the weights, [C] each."""
    x, w = x.double(), w.double()
    return torch.where((x > 0) & (w > 0), (x**alpha / w ** (1 - alpha)).clamp(*LIMITS), 1.0)


def say_smoothed(found: Sequence[Smoothed]) -> None:
    """Prints how many LayerNorms were smoothed, and why others were not; a warning if none was."""
    smoothed, alone = [one for one in found if one.layers], dict[str, list[str]]()
    for one in found:
        if one.reason:
            alone.setdefault(one.reason, []).append(one.norm)
    left = "; ".join(f"{len(names)} left alone, {reason}: {first_of(names)}" for reason, names in alone.items())
    if not smoothed:
        warn(f"--smoothquant changes nothing: {left or 'this network has no LayerNorms'}")
        return
    layers = sum(len(one.layers) for one in smoothed)
    done = f"SmoothQuant: {len(smoothed)} LayerNorms smoothed, which {layers} linear layers read"
    say(f"{done}; {left}" if left else done)


class _Maxima(fx.Interpreter):
    """Runs a network and keeps the largest magnitude of each channel of LayerNorms' outputs, [C] each."""

    def __init__(self, model: fx.GraphModule, graph: fx.Graph, norms: Sequence[LayerNorm]) -> None:
        """``graph``: that of the network of which ``model`` is a copy."""
        super().__init__(model, graph=graph)
        self._largest = {norm.node: torch.zeros_like(norm.parameters[0]) for norm in norms}

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node."""
        result = super().run_node(n)
        if n in self._largest:
            low, high = result.flatten(0, -2).aminmax(dim=0)
            self._largest[n] = torch.stack([self._largest[n], -low, high]).amax(0)
        return result

    def over(
        self, batches: Iterable[Batch], on_batch: Callable[[], None] | None, processes: Processes
    ) -> Sequence[Tensor]:
        """The maxima over all images of all processes. Raises UserError without images, or when one is not finite."""
        given = False
        for batch in batches:
            self.run(*in_order(batch, self.module))
            given = True
            if on_batch is not None:
                on_batch()
        if not any(processes.any(given)):
            raise UserError("SmoothQuant got no images: give a calibration split of at least one batch")
        # Infinity instead of NaN, whose maximum is not defined: so all processes raise the same error.
        ours = torch.cat(list(self._largest.values())).nan_to_num(nan=math.inf, posinf=math.inf)
        largest: Sequence[Tensor] = torch.split(processes.largest(ours), [len(one) for one in self._largest.values()])
        for node, x in zip(self._largest, largest, strict=True):
            if not x.isfinite().all():
                raise UserError(f"the output of {label(node)} has NaN or infinity: a weight is NaN; give other weights")
        return largest
