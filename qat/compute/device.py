"""What computes a training step, and how: device, type of arithmetic, memory layout, compilation, several processes.

Quantization itself is float32 in all of them (qat/fake_quantize/quantizer.py). Evaluation does not use them: it is
float32, as the exported network is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.base.choices import Amp
from qat.base.console import say, warn
from qat.base.errors import UserError, one_line
from qat.compute.fused_relu import fuse_relus
from qat.compute.inductor import training_backend
from qat.compute.one_pixel import OnePixelProducts
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
        if compiled:
            return self.processes.parallel(_Compiled(merged, images, graphs))
        return self.processes.parallel(OnePixelProducts(merged) if self.device.type == "cpu" else merged)

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
        if not (isinstance(network, _Compiled) and network.graphs and _Compiled.graphs_fit):
            return False
        _Compiled.graphs_fit = False
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


class _Compiled(nn.Module):
    """Compiles a model at its first batch of ``images``; one that cannot be compiled stays as it is, with a warning.

    ``graphs``: its kernels are recorded, and sent to the GPU together. One by one they take a CPU 25 ms a step of
    ResNet50, and the GPU 12 ms with 256 images of 32 pixels (benchmarks/gpu_training_step.txt).
    """

    graphs_fit = True  # into the GPU's memory, as far as is known

    def __init__(self, model: nn.Module, images: int, graphs: bool) -> None:
        super().__init__()
        self.model, self.images, self.graphs = model, images, graphs
        self.begun = False
        backend = partial(_compile, graphs=graphs)
        self.whole = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)

    def forward(self, x: Tensor) -> Any:
        if len(x) != self.images:
            return self.model(x)
        if not self.begun:
            say("compiling the training step, which takes about a minute")
            self.begun = True
        try:
            return self.whole(x)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            reason = "the network changed more often than it allows; TORCH_LOGS=recompiles shows where"
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = one_line(error)
        warn(f"torch.compile fails ({reason}): training goes on without, as with --compile False")
        self.whole = self.model
        return self.model(x)


def _compile(network: fx.GraphModule, inputs: Any, graphs: bool) -> Any:
    """The backend, asked for at the first batch and after ``release``: whether graphs fit may have changed."""
    return training_backend(network, inputs, graphs and _Compiled.graphs_fit)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 in convolutions and matrix products, as long as it lasts: the engine and ONNX Runtime have none."""
    cudnn: Any = torch.backends.cudnn
    backends = (cudnn.conv, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


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
