"""The shape of an input that a network takes, by its first layer."""

from torch import nn


def input_of(model: nn.Module) -> tuple[int, ...]:
    """Without the batch: [I] for a linear layer, [C, 8] or [C, 8, 8] for a convolution, larger for large networks."""
    layers = [module for module in model.modules() if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))]
    if not layers:
        return (16, 8, 8)
    first = layers[0]
    if isinstance(first, nn.Linear):
        return (first.in_features,)
    if isinstance(first, nn.Conv1d):
        return (first.in_channels, 8)
    side = 64 if len(layers) > 12 else 8
    return (first.in_channels, side, side)
