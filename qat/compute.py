"""What computes a training step, and how: device, type of arithmetic, memory layout, compilation.

Quantization itself is float32 in all of them (qat/quantizer.py). Evaluation does not use them: it is float32, as the
exported network is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from qat.artifact import UserError

_NEVER = 2**31 - 1

Amp = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Compute:
    """``amp``: the type that convolutions and matrix products of training compute in."""

    device: torch.device
    amp: torch.dtype = torch.float32
    channels_last: bool = False
    compiled: bool = False

    @classmethod
    def of(cls, device: str, amp: Amp = "auto", compiled: bool | None = None) -> Compute:
        """What the options ask for; auto: on a GPU bfloat16, channels last and compiled, on a CPU nothing of it.

        Raises UserError when the device cannot be used.
        """
        found = _device(device)
        gpu = found.type == "cuda"
        dtype = (torch.bfloat16 if gpu else torch.float32) if amp == "auto" else getattr(torch, amp)
        return cls(found, dtype, channels_last=gpu, compiled=gpu if compiled is None else compiled)

    def place(self, model: nn.Module) -> nn.Module:
        """``model`` on the device, in the memory layout; in place."""
        model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def images(self, images_NCHW: Tensor) -> Tensor:
        """A batch on the device, in the memory layout, without waiting for the copy."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images_NCHW.to(self.device, non_blocking=True).contiguous(memory_format=layout)

    def forward(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """What computes ``model`` in training: compiled for batches of one size, where that is asked for."""
        return torch.compile(model, fullgraph=True, dynamic=False) if self.compiled else model

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Around the forward pass of training."""
        return torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps gradients in the range of float16, and on a GPU leaves out steps whose gradients are not finite."""
        if self.amp == torch.float16:
            return torch.amp.GradScaler(self.device.type)
        return torch.amp.GradScaler(
            self.device.type, init_scale=1.0, growth_interval=_NEVER, enabled=self.device.type == "cuda"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}): use --device cpu, or auto") from error
