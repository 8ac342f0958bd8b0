"""Gradients of what torch.compile makes, against those of the same network as it is."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from qat.compute.device import Compute

_STEPS = 4  # of a CUDA graph the first warms up and the second records


def _gradients(model: nn.Module, compute: Compute, x: Tensor) -> dict[str, Tensor]:
    """Of the last step, whose input is another one than the first's."""
    torch._dynamo.reset()
    placed = compute.place(copy.deepcopy(model)).train()
    forward = compute.forward(placed, len(x), steps=_STEPS)
    for step in range(_STEPS):
        placed.zero_grad(set_to_none=True)
        with compute.autocast():
            found = forward(compute.images(x.roll(step, -1)))
        found.float().square().mean().backward()
    assert not compute.compiled or forward.whole is not forward.model, "it could not be compiled"
    return {name: parameter.grad.detach().cpu() for name, parameter in placed.named_parameters()}


def gradient_errors(model: nn.Module, device: str, amp: torch.dtype, x: Tensor) -> dict[str, float]:
    """For each parameter of ``model``: distance of the compiled gradient from the plain one, relative to its length.

    To the length is added how far ``amp`` alone moves the plain gradient: terms that cancel may leave nothing else. The
    error of a gradient without length, all zeros, is 0 where the compiled one is zero too, and large elsewhere.
    """
    on = torch.device(device)
    exact, plain, compiled = (
        _gradients(model, Compute(on, dtype, compiled=compiled), x)
        for dtype, compiled in ((torch.float32, False), (amp, False), (amp, True))
    )
    lengths = {name: grad.norm() + (grad - exact[name]).norm() for name, grad in plain.items()}
    least = torch.finfo(torch.float32).tiny
    return {
        name: float((compiled[name] - grad).norm() / lengths[name].clamp(min=least)) for name, grad in plain.items()
    }
