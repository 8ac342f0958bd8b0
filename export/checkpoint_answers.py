"""What PyTorch answers for the checkpoint that an ONNX file was made from: quantized, and in float by its own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from export.fold import fold, fold_float
from export.trained_network import TrainedNetwork
from qat.base.choices import ExportPrecision
from qat.graph.outputs import leaves

Answer = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Images uint8 [N, H, W, C] -> the outputs by name, [N, ...] each."""


def answers_of_checkpoint(
    path: Path, names: Sequence[str], precision: ExportPrecision, *, trust_code: bool = False
) -> tuple[Answer, Answer]:
    """The network of a checkpoint as it was exported, and in float.

    Args:
        path: the checkpoint, which says how images become inputs.
        names: the outputs of the ONNX file.
        precision: that of the ONNX file; what is not int8 has no quantizers.
        trust_code: run the code that a stranger's checkpoint names.

    Raises UserError when the checkpoint cannot be read, or its model has changed.
    """
    network = TrainedNetwork.from_checkpoint(path, trust_code=trust_code)
    folded = fold(network.model)[0] if precision == "int8" else fold_float(network.model)
    paths: tuple[str, ...] = folded.meta["outputs"]
    _, own = network.float_network()

    def prepared(images_NHWC: np.ndarray) -> torch.Tensor:
        return network.normalize(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).contiguous())

    @torch.no_grad()
    def exported(images_NHWC: np.ndarray) -> dict[str, np.ndarray]:
        answer = folded(prepared(images_NHWC))
        parts = (answer,) if isinstance(answer, torch.Tensor) else answer
        return _named(names, parts)

    @torch.no_grad()
    def in_float(images_NHWC: np.ndarray) -> dict[str, np.ndarray]:
        found: Mapping[str, torch.Tensor] = dict(leaves(own(prepared(images_NHWC))))
        return _named(names, [found[path] for path in paths])

    return exported, in_float


def _named(names: Sequence[str], parts: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: part.numpy() for name, part in zip(names, parts, strict=True)}
