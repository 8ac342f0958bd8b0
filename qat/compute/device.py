"""What computes a training step, and how: device, type of arithmetic, memory layout, compilation, several processes.

Quantization itself is float32 in all of them (qat/fake_quantize/quantizer.py). Evaluation does not use them: it is
float32, as the exported network is.
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
from qat.compute.processes import SINGLE_PROCESS, Processes, local_rank

_NEVER = 2**31 - 1
# ResNet50, 224 px, batch 256 on an H200: compiling takes 59 s and saves 87 ms a step with quantizers, 43 s and 18 ms
# without (benchmarks/gpu_training_step.txt); smaller batches save less.
_STEPS_THAT_PAY = 1000
_LEAST_FLOAT16 = 2.0**-10


@dataclass(frozen=True)
class Compute:
    """``amp``: the type that convolutions and matrix products of training compute in."""

    device: torch.device
    amp: torch.dtype = torch.float32
    channels_last: bool = False
    compiled: bool | None = False
    """None: where it saves more time than it takes, on a GPU and for many steps."""
    processes: Processes = SINGLE_PROCESS

    @classmethod
    def from_options(cls, device: str, amp: Amp = "auto", compiled: bool | None = None) -> Compute:
        """What the options ask for; auto: on a GPU bfloat16 and channels last, on a CPU nothing of it.

        Raises UserError when the device cannot be used.
        """
        found = _device(device)
        gpu = found.type == "cuda"
        fast = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = (torch.bfloat16 if fast else torch.float32) if amp == "auto" else getattr(torch, amp)
        return cls(found, dtype, channels_last=gpu, compiled=compiled if gpu else bool(compiled))

    def place(self, model: nn.Module) -> nn.Module:
        """``model`` on the device, in the memory layout; in place."""
        model.to(self.device)
        for parameter in model.parameters() if self.channels_last else ():
            if parameter.ndim == 4:  # there may be others, of Conv3d for instance
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return model

    def images(self, images_NCHW: Tensor) -> Tensor:
        """A batch on the device, in the memory layout, without waiting for the copy."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images_NCHW.to(self.device, non_blocking=True).contiguous(memory_format=layout)

    def forward(self, model: nn.Module, images: int, steps: int, accumulates: bool = False) -> nn.Module:
        """What computes ``model`` in training; shares its modules.

        Compiled for batches of ``images``, where that is asked for and works, or pays in so many ``steps``; where
        several processes train, its gradients are averaged over them. ``accumulates``: gradients of several batches
        are added up, which must not lie where the next backward pass of a CUDA graph puts its own.
        """
        merged = fuse_relus(model)
        compiled = steps >= _STEPS_THAT_PAY if self.compiled is None else self.compiled
        graphs = self.device.type == "cuda" and not accumulates
        if compiled and graphs:
            torch.cuda.empty_cache()  # what is recorded cannot take memory that is only kept for later
        return self.processes.parallel(CompiledNetwork(merged, images, graphs) if compiled else merged)

    def release(self) -> None:
        """Gives back what compiled models hold: memory of CUDA graphs. Called again, they are compiled again."""
        if "torch._inductor" in sys.modules:
            torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def give_up_graphs(self, network: nn.Module) -> bool:
        """No CUDA graphs from now on, whose memory other work cannot use. Whether there were some.

        ``network``: what ``forward`` gave. Several processes go on as they are: they would have to agree.
        """
        if not (isinstance(network, CompiledNetwork) and network.graphs and CompiledNetwork.graphs_fit):
            return False
        CompiledNetwork.graphs_fit = False
        self.release()
        return True

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Around the forward pass of training."""
        return torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32)

    @property
    def least_scale(self) -> float:
        """The scale of the gradients below which ``scaler`` has left out too many steps."""
        return _LEAST_FLOAT16 if self.amp == torch.float16 else 1.0

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps gradients in the range of float16, and on a GPU leaves out steps whose gradients are not finite."""
        if self.amp == torch.float16:
            return torch.amp.GradScaler(self.device.type)
        return torch.amp.GradScaler(
            self.device.type, init_scale=1.0, growth_interval=_NEVER, enabled=self.device.type == "cuda"
        )


def compile_for_training(model: nn.Module, batch_size: int, *, compiled: bool = True) -> nn.Module:
    """What to call in a training loop of one's own in the place of ``model``, whose modules it shares: faster.

    Each ReLU is one operation with the quantizer that alone reads it, and torch.compile compiles the step at the first
    batch of ``batch_size`` images, which takes about a minute; other sizes are computed without. Codes and gradients
    stay what they were. Evaluate, save and export ``model`` itself.

    Args:
        model: from ``prepare`` (or a float module), on the device that it is trained on.
        batch_size: images [N, C, H, W] in a batch.
        compiled: False only fuses the ReLUs.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return Compute(device, compiled=compiled).forward(model, batch_size, steps=_STEPS_THAT_PAY)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and (index := local_rank()) is not None:
        if index >= torch.cuda.device_count():
            raise UserError(
                f"{index + 1} or more processes, but {torch.cuda.device_count()} GPUs: "
                f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        name = f"cuda:{index}"
        torch.cuda.set_device(index)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}): use --device cpu, or auto") from error
