"""Modules that compute one thing in training and another in evaluation; qat/graph/modes.py makes them."""

from __future__ import annotations

from typing import Any

from torch import nn


class ByMode(nn.Module):
    """Computes one graph in training and another in evaluation.

    ``inputs_of_evaluation``: how many of its inputs, which come first, evaluation reads.
    """

    def __init__(self, training: nn.Module, evaluation: nn.Module, inputs_of_evaluation: int) -> None:
        super().__init__()
        self.in_training, self.in_evaluation = training, evaluation
        self.inputs_of_evaluation = inputs_of_evaluation

    def forward(self, *tensors: Any) -> Any:
        """What the graph of the present mode answers."""
        return self.in_training(*tensors) if self.training else self.in_evaluation(*tensors)


class OnlyInTraining(ByMode):
    """In evaluation it returns its first input, as dropout does."""
