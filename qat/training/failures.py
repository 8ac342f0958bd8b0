"""Finds why a training step failed: which tensor first became NaN or infinite, or how many images would have fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def first_not_finite(model: nn.Module, batches: Iterable[Tensor]) -> str:
    """The first tensor of ``model``, in the order of computation, that holds NaN or infinity; '' if none does.

    The model is run on one batch after another until something is not finite. The parameters of a module come before
    its output. If no batch shows anything, all parameters are checked, and buffers last, because running statistics
    only follow an earlier fault.
    """
    for x in batches:
        if found := _first_of(model, x):
            return found
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not _finite(tensor):
            return name
    return ""


def _first_of(model: nn.Module, x: Tensor) -> str:
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            own = module.named_parameters(recurse=False)
            bad = [f"{name}.{entry}" for entry, tensor in own if not _finite(tensor)]
            if not bad and isinstance(output, Tensor) and not _finite(output):
                bad = [f"the output of {name}"]
            found.extend(bad)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if name and not any(module.children())]
    hooks = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def largest_fitting_batch(step: Callable[[int], None], images: int) -> int:
    """The largest of ``images`` / 2, / 4, ... for which ``step`` does not run out of GPU memory; 0 if there is none."""
    while (images := images // 2) > 1:
        torch.cuda.empty_cache()
        try:
            step(images)
        except torch.OutOfMemoryError:
            continue
        return images
    return 0


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
