"""A network that torch.compile compiles for training; if that fails, training continues without compilation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.base.console import say, warn
from qat.base.errors import one_line
from qat.compute.inductor import training_backend


class CompiledNetwork(nn.Module):
    """Compiles a model at its first batch of ``images`` images; if that fails, warns and runs the model as it is.

    ``graphs``: use CUDA graphs, which record the kernels and launch them together. Launching the kernels of a ResNet50
    step one by one takes a CPU 25 ms, while the GPU needs 12 ms to compute them for 256 images of 32 pixels
    (benchmarks/gpu_training_step.txt).
    """

    graphs_fit = True  # whether CUDA graphs fit into the GPU's memory, as far as is known

    def __init__(self, model: nn.Module, images: int, graphs: bool) -> None:
        super().__init__()
        self.model, self.images, self.graphs = model, images, graphs
        self.begun = False
        backend = partial(_compile, graphs=graphs)
        self.whole = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)

    def forward(self, x: Tensor) -> Any:
        """The output of the model for ``x`` [N, ...]."""
        if len(x) != self.images:
            return self.model(x)
        if not self.begun:
            say("compiling the training step, which takes about a minute")
            self.begun = True
        try:
            return self.whole(x)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            reason = "the network was recompiled too often; TORCH_LOGS=recompiles shows why"
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = one_line(error)
        warn(f"torch.compile failed ({reason}): training continues without it, as with --compile False")
        self.whole = self.model
        return self.model(x)


def _compile(network: fx.GraphModule, inputs: Any, graphs: bool) -> Any:
    """The backend. It is called again after ``Compute.release``, when ``graphs_fit`` may have changed."""
    return training_backend(network, inputs, graphs and CompiledNetwork.graphs_fit)
