"""The optimizer: its parameter groups, its state as named tensors, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qat.training.recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with weight decay only on matrices and kernels, not on biases, normalization and learned ranges."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    ranges = [parameter for name, parameter in named if name.endswith(".amax")]
    others = [parameter for name, parameter in named if not name.endswith(".amax")]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": recipe.weight_decay, "factor": 1.0},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0, "factor": 1.0},
        {"params": ranges, "weight_decay": 0.0, "factor": recipe.ranges_lr},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for _, parameter in named)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=recipe.lr, fused=fused)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: ``<parameter's position>.<entry>``."""
    entries = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, entry in entries.items() for name, value in entry.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restores the state, in the memory layout of the parameters, which the fused optimizer requires."""
    content = optimizer.state_dict()
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        content["state"].setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(content)
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if value.shape == parameter.shape:
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def update_average(average: AveragedModel, model: nn.Module, decay: float) -> None:
    """One step of the moving average of parameters and buffers; the first step copies ``model``.

    It replaces ``AveragedModel.update_parameters``, which copies its count of steps to the GPU and makes the CPU wait.
    """
    update = get_ema_multi_avg_fn(decay if average.n_averaged else 0.0)
    average.n_averaged += 1
    ours, theirs = ([*one.parameters(), *one.buffers()] for one in (average.module, model))
    for dtype in {tensor.dtype for tensor in ours}:
        update(*([tensor for tensor in one if tensor.dtype == dtype] for one in (ours, theirs)), 0)
