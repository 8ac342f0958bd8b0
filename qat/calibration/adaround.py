"""AdaRound: which weights to round up and which down, chosen layer by layer from unlabelled images, without training.

    W~   = scale * clamp(floor(W / scale) + h, low, high)      h = clamp(sigmoid(V) * (ZETA - GAMMA) + GAMMA, 0, 1)
    loss = mean over outputs of (f(W x) - f(W~ x_hat))^2 / noise  +  LAMBDA * mean over weights of 1 - |2 h - 1|^beta

(Nagel et al. 2020). x is the layer's input in the float network, x_hat that in the quantized one, whose earlier layers
are rounded already. f is the layer with the batch normalization and the activation function that alone read it. V
starts where W~ = W and is moved by Adam; the second term, without which the first fifth of the steps does, drives every
h to 0 or 1 while beta falls from 20 to 2. A weight that is a code already, as zero is, or lies beyond the range, stays.

``noise`` is what rounding to nearest adds to an output channel: the mean of (f(W x_hat) - f(W_nearest x_hat))^2. No two
output channels share a weight, so dividing each by a constant moves no optimum; it gives one LAMBDA its meaning for
outputs of any scale, any number of weights and of bits. A channel that rounding does not change, as behind a ReLU that
never opens, is rounded to nearest by the second term alone.

A range that is not fixed yet becomes max |w|, as it is without AdaRound. That of the least squared error gave the same
at 8 bits, within the spread of seeds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qat.base.errors import UserError
from qat.base.number_format import NumberFormat
from qat.compute.precision import exact_float32
from qat.fake_quantize.prepare import WEIGHT_QUANTIZERS, weights_and_quantizers
from qat.fake_quantize.quantizer import (
    ActivationQuantizer,
    WeightQuantizer,
    per_channel,
    quantize,
    weight_amax,
)
from qat.graph.fx_network import kind_of, label
from qat.graph.operations import OpKind
from qat.graph.stepper import Stepper

ZETA, GAMMA = 1.1, -0.1  # h reaches 0 and 1 at finite V
LAMBDA = 1.0
BETA = (20.0, 2.0)
_WARM_START = 0.2
_LEARNING_RATE = 3e-2
_IMAGES = 32  # of a step
_IN_F: tuple[OpKind, ...] = ("batch_norm", "activation", "unfused_activation")


@dataclass(frozen=True)
class Rounded:
    """A layer that was rounded: the mean squared error of what f makes of the images, against the float network."""

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

    Weights become code * scale, in place, and their quantizers' ranges are fixed: each gives exactly those codes. A
    channel that comes out no better than by rounding to nearest is rounded to nearest. Of layers that share a weight
    the first one decides.

    Args:
        prepared: from qat.fake_quantize.prepare, calibrated; changed at the very end, so not at all where this raises.
        batches: normalized images [N, C, H, W] on any device; only those that calibration may see.
        steps: of Adam, for each layer.
        on_layer: called with the label of every layer before it is rounded, to show progress.
        seed: of the order of the images. Equal seeds give equal weights, on a CPU to the last bit.

    Kept on the model's device meanwhile are, of all images, both networks' tensors that layers from here on will
    read, and twice the output of one layer: at most 15 MB an image of 224 px in ResNet50.

    Returns the layers in the network's order.
    Raises UserError where there is no image, or where an output is NaN or infinite, as in a network not calibrated.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps round nothing: give at least 1")
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
    """``nodes``: what f consists of, the layer's function or module among them."""

    label: str
    quantizer: str  # the path of the weight's quantizer
    nodes: tuple[fx.Node, ...]


def _layers(prepared: fx.GraphModule) -> Iterator[_Layer]:
    """Every layer that decides on a weight, in the network's order."""
    weights = {path: weight for path, weight, _ in weights_and_quantizers(prepared)}
    modules, decided = dict(prepared.named_modules()), set()
    for node in prepared.graph.nodes:
        path = f"{node.target}.weight_quantizer" if node.op == "call_module" else f"{WEIGHT_QUANTIZERS}.{node.name}"
        if path in weights and id(weights[path]) not in decided:
            decided.add(id(weights[path]))
            quantizers = [source for source in node.all_input_nodes if source.target == path]
            yield _Layer(label(node), path, (*quantizers, node, *_nodes_that_follow(node, modules)))


def _nodes_that_follow(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The normalization and activation functions that follow, as long as each has one reader; their constants too."""
    found: list[fx.Node] = []
    while len(node.users) == 1:
        (reader,) = node.users
        constants = [source for source in reader.all_input_nodes if source is not node]
        if kind_of(reader, modules) not in _IN_F or any(source.op != "get_attr" for source in constants):
            break
        found += [*constants, reader]
        node = reader
    return found


def _shuffle_into_batches(batches: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """All images, shuffled, in mini-batches."""
    if not sum(map(len, batches)):
        raise UserError("AdaRound got no images: give a calibration split of at least one batch")
    images = torch.cat(list(batches))
    return list(images[torch.randperm(len(images), generator=generator).to(images.device)].split(_IMAGES))


class _Rounding:
    """Two copies of a network under way, one in float, one quantized and rounded up to here."""

    def __init__(
        self, prepared: fx.GraphModule, images: Sequence[Tensor], steps: int, generator: torch.Generator
    ) -> None:
        self.steps, self.generator, self.batches = steps, generator, range(len(images))
        in_float, self._fake_quantize = (_copy_for_evaluation(prepared, enabled) for enabled in (False, True))
        self._steppers = [Stepper(model, prepared.graph, images) for model in (in_float, self._fake_quantize)]
        self._weights = {
            path: (weight, quantizer) for path, weight, quantizer in weights_and_quantizers(self._fake_quantize)
        }

    def round(self, layer: _Layer) -> Rounded:
        """Rounds the weight of ``layer``, and of all that share it, in the quantized copy."""
        for stepper in self._steppers:
            stepper.run_to(layer.nodes[0])
        in_float, quantized = self._steppers
        weight, quantizer = self._weights[layer.quantizer]
        if quantizer.amax is None:
            quantizer.fix(weight_amax(weight, quantizer.axis))
        assert quantizer.amax is not None
        scale = per_channel(quantizer.scale(weight), weight.ndim, quantizer.axis)
        channels = 1 if weight.ndim > 2 else -1  # of the output

        def error(targets: Sequence[Tensor]) -> Tensor:
            """Mean squared, of each output channel: [C], float64."""
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
        # A grouped transposed convolution has several output channels to a scale.
        worse = (rounded - nearest).view(-1, scale.numel()).sum(0) >= 0
        weight.copy_(torch.where(per_channel(worse, weight.ndim, quantizer.axis), by_nearest, chosen) * scale)
        for other, shared in self._weights.values():
            if other is weight and shared.amax is None and shared.axis == quantizer.axis:
                shared.fix(quantizer.amax)
        return Rounded(layer.label, float(nearest.mean()), float(error(targets).mean()))

    def _order(self) -> list[int]:
        """The mini-batch of every step: each once, in a random order, again and again."""
        rounds = math.ceil(self.steps / len(self.batches))
        orders = [torch.randperm(len(self.batches), generator=self.generator) for _ in range(rounds)]
        order: list[int] = torch.cat(orders)[: self.steps].tolist()
        return order

    def write(self, prepared: fx.GraphModule) -> None:
        """Gives ``prepared`` the weights and ranges of the quantized copy."""
        for path, weight, quantizer in weights_and_quantizers(prepared):
            rounded, same = self._weights[path]
            weight.copy_(rounded)
            if quantizer.amax is None and same.amax is not None:
                quantizer.fix(same.amax)


class _SoftRounding(nn.Module):
    """Stands where a weight's quantizer stood: each weight between its two codes, V being what is learned."""

    def __init__(self, weight: Tensor, scale: Tensor, number_format: NumberFormat) -> None:
        """``scale`` broadcasts against ``weight``."""
        super().__init__()
        quotient = weight.float() / scale
        below, above = (
            code.clamp(number_format.low, number_format.high) for code in (quotient.floor(), quotient.ceil())
        )
        self.below, self.gap = below * scale, (above - below) * scale  # gap: 0 of weights that are or get a code
        self.up = quotient - quotient.floor()  # h(V)
        self.V = nn.Parameter(torch.logit((self.up - GAMMA) / (ZETA - GAMMA)))

    def forward(self, weight: Tensor) -> Tensor:
        """The soft weight; of ``weight`` only its type is used."""
        self.up = (self.V.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        return torch.addcmul(self.below, self.up, self.gap).to(weight.dtype)

    def undecided(self, beta: float) -> Tensor:
        """Of the last forward pass: 0 where every weight is at one of its codes, at most 1: []."""
        return 1 - (2 * self.up - 1).abs().pow(beta).mean()

    def hard(self) -> Tensor:
        """The weight, each at the nearer of its codes."""
        return torch.where(self.V >= 0, self.below + self.gap, self.below)


def _beta(done: float) -> float | None:
    """The exponent when the fraction ``done`` of the steps is over; None as long as there is no second term."""
    first, last = BETA
    if done < _WARM_START:
        return None
    return last + (first - last) * (1 - (done - _WARM_START) / (1 - _WARM_START))


def _copy_for_evaluation(prepared: fx.GraphModule, enabled: bool) -> fx.GraphModule:
    """A copy in eval mode without gradients, all of whose quantizers are ``enabled`` or not."""
    model = copy.deepcopy(prepared).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (ActivationQuantizer, WeightQuantizer)):
            module.enabled = enabled
    return model


def _mean_square(differences: Iterator[Tensor], channels: int) -> Tensor:
    """Over all but the dimension ``channels``: [C], float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for difference in differences:
        rows = difference.movedim(channels, 0).flatten(1)  # [C, K]
        total = total.to(rows.device) + rows.square().sum(1).double()
        count += rows.shape[1]
    return total / count
