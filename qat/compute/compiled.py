"""A network that torch.compile compiles for training, and what happens where it cannot."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.base.console import warn
from qat.base.errors import one_line
from qat.compute.inductor import training_backend


class CompiledNetwork(nn.Module):
    """Compiles a model at its first batch of ``images``; one that cannot be compiled stays as it is, with a warning.

    ``graphs``: its kernels are recorded, and sent to the GPU together. One by one they take a CPU 25 ms a step of
    ResNet50, and the GPU 12 ms with 256 images of 32 pixels (benchmarks/gpu_training_step.txt).
    """

    graphs_fit = True  # into the GPU's memory, as far as is known

    def __init__(self, model: nn.Module, images: int, graphs: bool) -> None:
        super().__init__()
        self.model, self.images, self.graphs = model, images, graphs
        backend = partial(_compile, graphs=graphs)
        self.whole = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)

    def forward(self, x: Tensor) -> Any:
        """What the model makes of ``x`` [N, ...]."""
        if len(x) != self.images:
            return self.model(x)
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
    return training_backend(network, inputs, graphs and CompiledNetwork.graphs_fit)
