"""AdaRound: chooses which weights to round up and which down, layer by layer, from unlabelled images without training.

    W~   = scale * clamp(floor(W / scale) + h, low, high)      h = clamp(sigmoid(V) * (ZETA - GAMMA) + GAMMA, 0, 1)
    loss = mean over outputs of (f(W x) - f(W~ x_hat))^2 / noise  +  LAMBDA * mean over weights of 1 - |2 h - 1|^beta

(Nagel et al. 2020). x is the layer's input in the float network; x_hat is its input in the quantized network, whose
earlier layers are already rounded. f is the layer followed by the batch normalization and activation functions that are
the only readers of its output. V starts where W~ = W and is optimized by Adam. The second term, which is left out in
the first fifth of the steps, drives every h to 0 or 1 while beta falls from 20 to 2. A weight that is exactly a code,
such as zero, or lies beyond the range, does not change.

``noise`` is the error that rounding to nearest adds to an output channel: the mean of
(f(W x_hat) - f(W_nearest x_hat))^2. No two output channels share a weight, so dividing each channel by a constant moves
no optimum; it gives LAMBDA the same meaning for any scale of the outputs and any number of weights or bits. If rounding
does not change a channel at all, for example before a ReLU that is always zero, the second term alone decides: its
weights are rounded to nearest.

A range that is not fixed yet becomes max |w|, as without AdaRound. The range with the least squared error gave the same
result at 8 bits, within the spread of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qat.base.errors import UserError
from qat.base.number_format import NumberFormat
from qat.compute.precision import exact_float32
from qat.fake_quantize.prepare import WEIGHT_QUANTIZERS, copy_for_evaluation, weights_and_quantizers
from qat.fake_quantize.quantizer import (
    per_channel,
    quantize,
    weight_amax,
)
from qat.graph.fx_network import kind_of, label
from qat.graph.operations import ACTIVATIONS, OpKind
from qat.graph.stepper import Stepper

ZETA, GAMMA = 1.1, -0.1  # h reaches 0 and 1 at finite V
LAMBDA = 1.0
BETA = (20.0, 2.0)
_WARM_START = 0.2
_LEARNING_RATE = 3e-2
_IMAGES = 32  # per step
_IN_F: tuple[OpKind, ...] = ("batch_norm", *ACTIVATIONS)


@dataclass(frozen=True)
class Rounded:
    """A rounded layer and the mean squared error of f against the float network, for nearest rounding and for ours."""

    layer: str
    mse_nearest: float
    mse: float


def adaround(
    prepared: fx.GraphModule,
    batches: Sequence[Tensor],
    steps: int = 1000,
    on_layer: Callable[[str], None] | None = None,
    seed: int = 0,
) -> list[Rounded]:
    """Rounds every quantized weight of a calibrated network to the codes that change its layer's output least.

    The weights are replaced by code * scale, in place, and the ranges of their quantizers are fixed, so that quantizing
    them again gives exactly those codes. A channel for which this is not better than rounding to nearest is rounded to
    nearest. If layers share a weight, the first one decides.

    Args:
        prepared: a calibrated model from qat.fake_quantize.prepare. It is changed only at the very end, so an error
            leaves it unchanged.
        batches: normalized images [N, C, H, W] on any device; use only images of the calibration split.
        steps: steps of Adam for each layer.
        on_layer: called with the label of every layer before it is rounded, to show progress.
        seed: seed of the order of the images. Equal seeds give equal weights, on a CPU to the last bit.

    Memory on the model's device: for all images, the tensors of both networks that later layers will read, and twice
    the output of one layer. For ResNet50 this is at most 15 MB per image of 224 px.

    Returns the layers in the order of the network.
    Raises UserError when there are no images, or when an output is NaN or infinite, as in a network that is not
    calibrated.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: it must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), exact_float32():
        images = _shuffle_into_batches(batches, generator)
        rounding = _Rounding(prepared, images, steps, generator)
        found = []
        for layer in _layers(prepared):
            if on_layer is not None:
                on_layer(layer.label)
            found.append(rounding.round(layer))
        rounding.write(prepared)
    return found


@dataclass(frozen=True)
class _Layer:
    """``nodes``: the nodes of f, including the layer's own function or module."""

    label: str
    quantizer: str  # the path of the weight's quantizer
    nodes: tuple[fx.Node, ...]


def _layers(prepared: fx.GraphModule) -> Iterator[_Layer]:
    """Every layer that decides the rounding of a weight, in the order of the network."""
    weights = {path: weight for path, weight, _ in weights_and_quantizers(prepared) if isinstance(weight, nn.Parameter)}
    modules, decided = dict(prepared.named_modules()), set()
    for node in prepared.graph.nodes:
        path = f"{node.target}.weight_quantizer" if node.op == "call_module" else f"{WEIGHT_QUANTIZERS}.{node.name}"
        if path in weights and id(weights[path]) not in decided:
            decided.add(id(weights[path]))
            quantizers = [source for source in node.all_input_nodes if source.target == path]
            yield _Layer(label(node), path, (*quantizers, node, *_nodes_that_follow(node, modules)))


def _nodes_that_follow(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The normalization and activation functions that follow while each has one reader, and their constants."""
    found: list[fx.Node] = []
    while len(node.users) == 1:
        (reader,) = node.users
        constants = [source for source in reader.all_input_nodes if source is not node]
        folded = isinstance(modules.get(str(reader.target)), nn.Identity)  # qat/fake_quantize/folded_norms.py
        computes = folded or kind_of(reader, modules) in _IN_F
        if not computes or any(source.op != "get_attr" for source in constants):
            break
        found += [*constants, reader]
        node = reader
    return found


def _shuffle_into_batches(batches: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """All images, shuffled, in mini-batches."""
    if not sum(map(len, batches)):
        raise UserError("AdaRound got no images: give a calibration split of at least one batch")
    images = torch.cat(list(batches))
    shuffled = images[torch.randperm(len(images), generator=generator).to(images.device)]
    return list(torch.split(shuffled, _IMAGES))


class _Rounding:
    """Two copies of a network: one in float, and one quantized, which is rounded layer by layer."""

    def __init__(
        self, prepared: fx.GraphModule, images: Sequence[Tensor], steps: int, generator: torch.Generator
    ) -> None:
        self.steps, self.generator, self.batches = steps, generator, range(len(images))
        in_float, self._fake_quantize = (
            copy_for_evaluation(prepared, quantized=quantized) for quantized in (False, True)
        )
        self._steppers = [Stepper(model, prepared.graph, images) for model in (in_float, self._fake_quantize)]
        self._weights = {
            path: (weight, quantizer) for path, weight, quantizer in weights_and_quantizers(self._fake_quantize)
        }

    def round(self, layer: _Layer) -> Rounded:
        """Rounds the weight of ``layer`` in the quantized copy, for all layers that share it."""
        for stepper in self._steppers:
            stepper.run_to(layer.nodes[0])
        in_float, quantized = self._steppers
        weight, quantizer = self._weights[layer.quantizer]
        if quantizer.amax is None:
            quantizer.fix(weight_amax(weight, quantizer.axis))
        assert quantizer.amax is not None
        scale = per_channel(quantizer.scale(weight), weight.ndim, quantizer.axis)
        channels = 1 if weight.ndim > 2 else -1  # dimension of the output's channels

        def error(targets: Sequence[Tensor]) -> Tensor:
            """Mean squared error of each output channel: [C], float64."""
            differences = (quantized.output_of(layer.nodes, batch) - targets[batch] for batch in self.batches)
            return _mean_square(differences, channels)

        targets = [in_float.output_of(layer.nodes, batch) for batch in self.batches]
        quantizer.enabled = False
        unrounded = [quantized.output_of(layer.nodes, batch) for batch in self.batches]
        quantizer.enabled = True
        noise, nearest = error(unrounded), error(targets)
        del unrounded
        if not nearest.isfinite().all():
            raise UserError(f"the output of {layer.label} is NaN or infinite: calibrate the network before rounding it")

        soft = _SoftRounding(weight, scale, quantizer.format)
        self._fake_quantize.set_submodule(layer.quantizer, soft)
        gain = torch.where(noise > 0, 1 / noise, 0).float()  # [C]
        optimizer = torch.optim.Adam(soft.parameters(), lr=_LEARNING_RATE, fused=True)
        for step, batch in enumerate(self._order()):
            with torch.enable_grad():
                difference = quantized.output_of(layer.nodes, batch) - targets[batch]
                loss = (difference.square() * per_channel(gain, difference.ndim, channels)).mean()
                if (beta := _beta(step / self.steps)) is not None:
                    loss = loss + LAMBDA * soft.undecided(beta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self._fake_quantize.set_submodule(layer.quantizer, quantizer)

        by_nearest, chosen = (quantize(w, scale, quantizer.format) for w in (weight, soft.hard()))
        weight.copy_(chosen * scale)
        rounded = error(targets)
        axis = 1 if quantizer.axis is None else quantizer.axis
        # A grouped transposed convolution has several output channels per index of its weight's axis.
        worse = (rounded - nearest).view(-1, weight.shape[axis]).sum(0) >= 0
        weight.copy_(torch.where(per_channel(worse, weight.ndim, axis), by_nearest, chosen) * scale)
        for other, shared in self._weights.values():
            if other is weight and shared.amax is None and shared.axis == quantizer.axis:
                shared.fix(quantizer.amax)
        return Rounded(layer.label, float(nearest.mean()), float(error(targets).mean()))

    def _order(self) -> list[int]:
        """The mini-batch of every step: all mini-batches in random order, repeated in new orders."""
        rounds = math.ceil(self.steps / len(self.batches))
        orders = [torch.randperm(len(self.batches), generator=self.generator) for _ in range(rounds)]
        order: list[int] = torch.cat(orders)[: self.steps].tolist()
        return order

    def write(self, prepared: fx.GraphModule) -> None:
        """Gives ``prepared`` the weights and ranges of the quantized copy."""
        for path, weight, quantizer in weights_and_quantizers(prepared):
            rounded, same = self._weights[path]
            if not isinstance(weight, nn.Parameter):
                continue  # computed: it keeps rounding to nearest
            weight.copy_(rounded)
            if quantizer.amax is None and same.amax is not None:
                quantizer.fix(same.amax)


class _SoftRounding(nn.Module):
    """Replaces the quantizer of a weight: each weight lies between its two codes, and V is learned."""

    def __init__(self, weight: Tensor, scale: Tensor, number_format: NumberFormat) -> None:
        """``scale`` broadcasts against ``weight``."""
        super().__init__()
        quotient = weight.float() / scale
        below, above = (
            code.clamp(number_format.low, number_format.high) for code in (quotient.floor(), quotient.ceil())
        )
        self.below, self.gap = below * scale, (above - below) * scale  # gap: 0 for codes and weights beyond the range
        self.up = quotient - quotient.floor()  # h(V)
        self.V = nn.Parameter(torch.logit((self.up - GAMMA) / (ZETA - GAMMA)))

    def forward(self, weight: Tensor) -> Tensor:
        """The soft weight, in the type of ``weight``, whose values are not used."""
        self.up = (self.V.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        return torch.addcmul(self.below, self.up, self.gap).to(weight.dtype)

    def undecided(self, beta: float) -> Tensor:
        """How far the weights of the last forward pass are from their codes: [], 0 if all are at a code, at most 1."""
        return 1 - (2 * self.up - 1).abs().pow(beta).mean()

    def hard(self) -> Tensor:
        """The weights, each at the nearer of its two codes by the learned V."""
        return torch.where(self.V >= 0, self.below + self.gap, self.below)


def _beta(done: float) -> float | None:
    """The exponent after the fraction ``done`` of the steps; None while the second term is left out."""
    first, last = BETA
    if done < _WARM_START:
        return None
    return last + (first - last) * (1 - (done - _WARM_START) / (1 - _WARM_START))


def _mean_square(differences: Iterator[Tensor], channels: int) -> Tensor:
    """Mean square over all dimensions except ``channels``: [C], float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for difference in differences:
        rows = difference.movedim(channels, 0).flatten(1)  # [C, K]
        total = total.to(rows.device) + rows.square().sum(1).double()
        count += rows.shape[1]
    return total / count
