"""PyTorch against ONNX Runtime: does the written file compute what was trained?

A comparison of the logits alone says little: one code that rounds the other way changes everything behind it. So each
stretch between two quantizers is compared on the same inputs: PyTorch gets ONNX Runtime's quantized tensors, and what
it computes from them is compared with what ONNX Runtime computed. For a file without quantizers only the logits are
compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from export.emit import OUTPUT_NAME
from export.fold import QuantizeDequantize
from export.session import run, session, session_with_tensors, sqnr_db
from qat.base.errors import UserError
from qat.base.text import decibels
from qat.fake_quantize.prepare import ACTIVATION_QUANTIZERS


@dataclass(frozen=True)
class LayerParity:
    """How well the two agree on one tensor; ``sqnr_db`` is None if they are bitwise equal."""

    tensor: str
    sqnr_db: float | None


@dataclass(frozen=True)
class Parity:
    """``images`` were run through both. ``layers`` were compared on the first few of them; the outputs come last.

    ``other_top1``: images of another class; None if the outputs are not logits [N, classes]. ``sqnr_db``: of the
    outputs for all images; None if they are bitwise equal.
    """

    images: int
    other_top1: int | None
    sqnr_db: float | None
    smallest_logit_cosine: float
    layers: tuple[LayerParity, ...]

    @property
    def worst(self) -> LayerParity:
        """The layer that agrees least."""
        return min(self.layers, key=lambda layer: math.inf if layer.sqnr_db is None else layer.sqnr_db)

    def to_json(self) -> dict[str, Any]:
        """For the sidecar."""
        return asdict(self) | {"worst_layer": asdict(self.worst)}

    def __str__(self) -> str:
        worst = "bitwise equal" if self.worst.sqnr_db is None else f"{self.worst.sqnr_db:.1f} dB at {self.worst.tensor}"
        if self.other_top1 is None:
            outputs = f"outputs of {self.images} images: {decibels(self.sqnr_db)}, smallest cosine"
        else:
            outputs = f"{self.other_top1} of {self.images} images with another top-1, smallest logit cosine"
        compared = f"worst of {len(self.layers)} layers: " if len(self.layers) > 1 else ""
        return f"{outputs} {self.smallest_logit_cosine:.6f}; {compared}{worst}"


def measure(
    folded: fx.GraphModule, model: Path, batches: Iterable[tuple[Tensor, Tensor]], layer_images: int
) -> tuple[Parity, Tensor]:
    """Compares ``folded`` with the ONNX file made from it.

    Args:
        folded: from export.fold; takes float32 [N, 3, H, W].
        model: the ONNX file.
        batches: (input of ``folded``, the same images as the file takes them).
        layer_images: how many images of the first batch are compared layer by layer.

    Returns:
        How well the two agree, and the outputs of ``folded`` on all images, float32 [N, classes] or [N, ...].

    Raises:
        UserError: the file computes values that are not finite.
    """
    whole = session(model)
    ours, theirs = [], []
    layers: tuple[LayerParity, ...] = ()
    for x_NCHW, given in batches:
        if not layers:
            layers = _layers(folded, model, x_NCHW[:layer_images], given[:layer_images])
        with torch.no_grad():
            ours.append(folded(x_NCHW))
        theirs.append(torch.from_numpy(whole.run([OUTPUT_NAME], {whole.get_inputs()[0].name: given.numpy()})[0]))
        if not theirs[-1].isfinite().all():
            raise UserError(
                "the exported network answers NaN or infinity: a value in it exceeds what its type holds "
                "(float16: 65504); export with another --precision, or train again"
            )
    assert layers, "no image to compare on"
    outputs = torch.cat(ours)
    return _compare(outputs, torch.cat(theirs), layers), outputs


def _compare(ours: Tensor, theirs: Tensor, layers: tuple[LayerParity, ...]) -> Parity:
    """Compares outputs [N, ...]. They choose a class for each image only if they are [N, classes]."""
    other = int((ours.argmax(1) != theirs.argmax(1)).sum()) if ours.ndim == 2 else None
    cosine = nn.functional.cosine_similarity(ours.double().flatten(1), theirs.double().flatten(1)).min()
    return Parity(len(ours), other, sqnr_db(ours.numpy(), theirs.numpy()), min(1.0, float(cosine)), layers)


def _layers(folded: fx.GraphModule, model: Path, x_NCHW: Tensor, given: Tensor) -> tuple[LayerParity, ...]:
    proto = onnx.load(model)
    quantizes = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    dequantized = {node.input[0]: node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    shown = {node.input[0] for node in quantizes} | {dequantized[node.output[0]] for node in quantizes}
    values = run(session_with_tensors(model, shown), given.numpy())
    by_quantizer: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for node in quantizes:
        name = node.input[1].split(f"{ACTIVATION_QUANTIZERS}.")[-1].removesuffix(".scale")
        before, after = values.get(node.input[0]), values[dequantized[node.output[0]]]
        by_quantizer.setdefault(name, []).append((given.numpy() if before is None else before, after))
    compared = _WithOnnxCodes(folded, by_quantizer)
    with torch.no_grad():
        logits = compared.run(x_NCHW)
    last = LayerParity(OUTPUT_NAME, sqnr_db(values[OUTPUT_NAME], logits.numpy()))
    return (*compared.layers, last)


class _WithOnnxCodes(fx.Interpreter):
    """Runs the folded module, but every quantizer returns what ONNX Runtime computed there."""

    def __init__(self, folded: fx.GraphModule, values: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
        super().__init__(folded)
        self._values = values
        self.layers: list[LayerParity] = []

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, QuantizeDequantize) or target.split(".")[-1] not in self._values:
            return super().call_module(target, args, kwargs)
        before, after = self._values[target.split(".")[-1]].pop(0)
        if before.shape == tuple(args[0].shape):  # else it is the image before the preprocessing inside the network
            self.layers.append(LayerParity(target.split(".")[-1], sqnr_db(before, args[0].numpy())))
        return torch.from_numpy(after)
