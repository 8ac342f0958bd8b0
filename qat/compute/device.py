"""How a training step is computed: device, type of arithmetic, memory layout, compilation, several processes.

Quantization itself is always computed in float32 (qat/fake_quantize/quantizer.py). Evaluation uses only the device, the
layout and the processes: it runs in float32, like the exported network.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.base.choices import Amp
from qat.base.errors import UserError
from qat.compute.compiled import CompiledNetwork
from qat.compute.fused_relu import fuse_relus
from qat.compute.one_pixel import OnePixelProducts
from qat.compute.processes import SINGLE_PROCESS, Processes, local_rank

_NEVER = 2**31 - 1
# ResNet50 at 224 px and batch 256 on an H200: with quantizers, compiling takes 59 s and saves 87 ms per step; without,
# 43 s and 18 ms (benchmarks/gpu_training_step.txt). Smaller batches save less.
_STEPS_THAT_PAY = 1000
_LEAST_FLOAT16 = 2.0**-10


@dataclass(frozen=True)
class Compute:
    """How to compute. ``amp``: the type in which training computes convolutions and matrix products."""

    device: torch.device
    amp: torch.dtype = torch.float32
    channels_last: bool = False
    compiled: bool | None = False
    """None: compile if that saves more time than it takes, on a GPU and for many steps."""
    processes: Processes = SINGLE_PROCESS

    @classmethod
    def from_options(cls, device: str, amp: Amp = "auto", compiled: bool | None = None) -> Compute:
        """What the options ask for. ``auto`` is bfloat16 on a GPU that has it, else float32. GPUs use channels last.

        Raises UserError when the device cannot be used.
        """
        found = _device(device)
        gpu = found.type == "cuda"
        fast = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = (torch.bfloat16 if fast else torch.float32) if amp == "auto" else getattr(torch, amp)
        return cls(found, dtype, channels_last=gpu, compiled=compiled if gpu else bool(compiled))

    def place(self, model: nn.Module) -> nn.Module:
        """Moves ``model`` to the device and into the memory layout, in place, and returns it."""
        model.to(self.device)
        for parameter in model.parameters() if self.channels_last else ():
            if parameter.ndim == 4:  # others, such as the weights of Conv3d, have no such layout
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return model

    def images(self, images_NCHW: Tensor) -> Tensor:
        """A batch on the device and in the memory layout; does not wait for the copy."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images_NCHW.to(self.device, non_blocking=True).contiguous(memory_format=layout)

    def forward(self, model: nn.Module, images: int, steps: int, accumulates: bool = False) -> nn.Module:
        """The module to call for ``model`` in training; it shares the modules of ``model``.

        It is compiled for batches of ``images`` images if the options ask for that, or if it pays over ``steps`` steps.
        With several processes, gradients are averaged over them. ``accumulates``: gradients of several batches are
        summed; then CUDA graphs are not used, because each backward pass would overwrite the gradients of the last.
        """
        merged = fuse_relus(model)
        compiled = steps >= _STEPS_THAT_PAY if self.compiled is None else self.compiled
        graphs = self.device.type == "cuda" and not accumulates
        if compiled and graphs:
            torch.cuda.empty_cache()  # CUDA graphs cannot use the memory that torch's cache holds
        if compiled:
            return self.processes.parallel(CompiledNetwork(merged, images, graphs))
        return self.processes.parallel(OnePixelProducts(merged) if self.device.type == "cpu" else merged)

    def release(self) -> None:
        """Frees the memory that compiled models hold for CUDA graphs. They are compiled again when next called."""
        if "torch._inductor" in sys.modules:
            torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def give_up_graphs(self, network: nn.Module) -> bool:
        """Stops the use of CUDA graphs, whose memory other work cannot use; returns whether ``network`` used them.

        ``network``: what ``forward`` returned. With several processes nothing changes, because all would have to agree.
        """
        if not (isinstance(network, CompiledNetwork) and network.graphs and CompiledNetwork.graphs_fit):
            return False
        CompiledNetwork.graphs_fit = False
        self.release()
        return True

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context for the forward pass of training."""
        return torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32)

    @property
    def least_scale(self) -> float:
        """The least gradient scale that is acceptable: below it, ``scaler`` has skipped too many steps."""
        return _LEAST_FLOAT16 if self.amp == torch.float16 else 1.0

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps gradients in the range of float16; on a GPU it also skips steps whose gradients are not finite."""
        if self.amp == torch.float16:
            return torch.amp.GradScaler(self.device.type)
        return torch.amp.GradScaler(
            self.device.type, init_scale=1.0, growth_interval=_NEVER, enabled=self.device.type == "cuda"
        )


def compile_for_training(model: nn.Module, batch_size: int, *, compiled: bool = True) -> nn.Module:
    """A faster module to call instead of ``model`` in your own training loop; it shares the modules of ``model``.

    Each ReLU is fused with the quantizer that is its only reader. torch.compile compiles the step at the first batch of
    ``batch_size`` images, which takes about a minute; batches of other sizes run without compilation. Codes and
    gradients do not change. Evaluate, save and export ``model`` itself.

    Args:
        model: a model from ``prepare`` (or a float module), on the device on which it is trained.
        batch_size: number N of images in a batch [N, C, H, W].
        compiled: False leaves out torch.compile.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return Compute(device, compiled=compiled).forward(model, batch_size, steps=_STEPS_THAT_PAY)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and (index := local_rank()) is not None:
        if index >= torch.cuda.device_count():
            raise UserError(
                f"there are at least {index + 1} processes, but only {torch.cuda.device_count()} GPUs: "
                f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        name = f"cuda:{index}"
        torch.cuda.set_device(index)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}): give --device cpu, or auto") from error
