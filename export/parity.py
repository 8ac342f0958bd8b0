"""PyTorch against ONNX Runtime: does the written file compute what was trained?

A comparison of the logits alone says little: one code that rounds the other way changes everything behind it. So each
stretch between two quantizers is compared on the same inputs: PyTorch gets ONNX Runtime's quantized tensors, and what
it computes from them is compared with what ONNX Runtime computed. For a file without quantizers only the outputs are
compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxruntime import InferenceSession
from torch import Tensor, fx, nn

from export.fold import QuantizeDequantize
from export.pad_groups import GroupedAxis
from export.session import run, session, session_with_tensors, sqnr_db
from qat.base.errors import UserError
from qat.base.output_agreement import OutputAgreement
from qat.base.sqnr import worst_first
from qat.fake_quantize.prepare import ACTIVATION_QUANTIZERS


@dataclass(frozen=True)
class LayerParity:
    """How well the two agree on one tensor; ``sqnr_db`` is None if they are bitwise equal."""

    tensor: str
    sqnr_db: float | None

    def __str__(self) -> str:
        return "bitwise equal" if self.sqnr_db is None else f"{self.sqnr_db:.1f} dB at {self.tensor}"


@dataclass(frozen=True)
class Parity:
    """``images`` were run through both. ``outputs`` were compared on all of them.

    ``layers`` were compared on the first few; outputs of floating-point values come last. The classes and the cosine of
    the logits are those of a network that is known to answer logits [N, classes], and None for another.
    """

    images: int
    other_top1: int | None
    smallest_logit_cosine: float | None
    layers: tuple[LayerParity, ...]
    outputs: tuple[OutputAgreement, ...]

    @property
    def worst(self) -> LayerParity | None:
        """The layer that agrees least; None of a network that has only outputs of integers."""
        return min(self.layers, key=lambda layer: worst_first(layer.sqnr_db), default=None)

    @property
    def least_db(self) -> float | None:
        """That of the worst layer; None if all are bitwise equal."""
        return None if self.worst is None else self.worst.sqnr_db

    def to_json(self) -> dict[str, Any]:
        """For the sidecar."""
        return asdict(self) | {"worst_layer": None if self.worst is None else asdict(self.worst)}

    def __str__(self) -> str:
        if self.other_top1 is None:
            answers = f"on {self.images} inputs, {', '.join(map(str, self.outputs))}"
        else:
            answers = (
                f"{self.other_top1} of {self.images} images with another top-1, smallest logit cosine "
                f"{self.smallest_logit_cosine:.6f}"
            )
        if self.worst is None:
            return answers
        compared = f"worst of {len(self.layers)} layers: " if len(self.layers) > 1 else ""
        return f"{answers}; {compared}{self.worst}"


Given = Tensor | Sequence[Tensor]
"""What a network takes: its only input, or all of them."""


def measure(
    folded: fx.GraphModule,
    model: Path | bytes,
    batches: Iterable[tuple[Given, Tensor | Mapping[str, Tensor]]],
    layer_images: int,
    *,
    logits: bool = False,
    wider: Mapping[str, GroupedAxis] | None = None,
) -> tuple[Parity, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Compares ``folded`` with the ONNX file made from it.

    Args:
        folded: from export.fold; takes float32 tensors, batch first.
        model: the ONNX file, or its content.
        batches: (inputs of ``folded``, the same as the file takes them: its only input, or all by name).
        layer_images: how many images of the first batch are compared layer by layer.
        logits: whether the only output is known to be logits [N, classes].
        wider: tensors of the file that have zero channels which ``folded`` has not (export/pad_groups.py).

    Returns:
        How well the two agree, and the outputs of ``folded`` and of the file on all images, [N, ...] each.

    Raises:
        UserError: the file computes values that are not finite.
    """
    whole = session(model)
    names = [output.name for output in whole.get_outputs()]
    ours: list[tuple[Tensor, ...]] = []
    theirs: list[tuple[Tensor, ...]] = []
    layers: tuple[LayerParity, ...] | None = None
    for inputs, given in batches:
        x = _several(inputs)
        feed = _feed(whole, given)
        if layers is None:
            first = {name: value[:layer_images] for name, value in feed.items()}
            layers = _layers(folded, model, tuple(one[:layer_images] for one in x), first, wider or {})
        with torch.no_grad():
            ours.append(_several(folded(*x)))
        theirs.append(tuple(map(torch.from_numpy, whole.run(names, feed))))
        if not all(value.isfinite().all() for value in theirs[-1] if value.is_floating_point()):
            raise UserError(
                "the exported network answers NaN or infinity: a value in it exceeds what its type holds "
                "(float16: 65504); export with another --precision, or train again"
            )
    assert layers is not None, "no image to compare on"
    if unknown := [layer.tensor for layer in layers if layer.sqnr_db is not None and math.isnan(layer.sqnr_db)]:
        raise UserError(
            f"the exported network computes NaN or infinity before {unknown[0]}: a value exceeds what its type holds; "
            "export with another --precision or --float-type"
        )
    answers, found = (tuple(map(torch.cat, zip(*parts, strict=True))) for parts in (ours, theirs))
    outputs = tuple(
        OutputAgreement.measure(name, mine.numpy(), other.numpy())
        for name, mine, other in zip(names, answers, found, strict=True)
    )
    other_top1, cosine = _compare_classes(answers[0], found[0]) if logits else (None, None)
    return Parity(len(answers[0]), other_top1, cosine, layers, outputs), answers, found


def _several(given: Given) -> tuple[Tensor, ...]:
    return (given,) if isinstance(given, Tensor) else tuple(given)


def _feed(model: InferenceSession, given: Tensor | Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    named = {model.get_inputs()[0].name: given} if isinstance(given, Tensor) else given
    taken = {one.name for one in model.get_inputs()}
    return {name: tensor.numpy() for name, tensor in named.items() if name in taken}


def _compare_classes(ours: Tensor, theirs: Tensor) -> tuple[int, float]:
    """How many images get another class, and the smallest cosine of their logits [N, classes]; 1 where all are 0."""
    cosines = nn.functional.cosine_similarity(ours.double(), theirs.double())
    cosines = cosines.where((ours != theirs).any(1), 1.0)
    return int((ours.argmax(1) != theirs.argmax(1)).sum()), float(cosines.min())


def _layers(
    folded: fx.GraphModule,
    model: Path | bytes,
    x: tuple[Tensor, ...],
    given: Mapping[str, np.ndarray],
    wider: Mapping[str, GroupedAxis],
) -> tuple[LayerParity, ...]:
    proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
    quantizes = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    dequantized = {node.input[0]: node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    shown = {node.input[0] for node in quantizes} | {dequantized[node.output[0]] for node in quantizes}
    names = [output.name for output in proto.graph.output]
    values = run(session_with_tensors(proto, shown), given)
    values |= {name: axis.back.resized(values[name], 1) for name, axis in wider.items() if name in values}
    by_quantizer: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]] = {}
    stored = {one.name: one for one in proto.graph.initializer}
    for node in quantizes:
        name = node.input[1].split(f"{ACTIVATION_QUANTIZERS}.")[-1].partition(".scale")[0]  # behind it may be a type
        before, after = values.get(node.input[0]), values[dequantized[node.output[0]]]
        scale = numpy_helper.to_array(stored[node.input[1]]) if node.input[1] in stored else None
        by_quantizer.setdefault(name, []).append((given[node.input[0]] if before is None else before, after, scale))
    compared = _WithOnnxCodes(folded, by_quantizer)
    with torch.no_grad():
        answers = _several(compared.run(*x))
    last = [
        LayerParity(name, sqnr_db(values[name], answer.numpy()))
        for name, answer in zip(names, answers, strict=True)
        if answer.is_floating_point()
    ]
    return (*compared.layers, *last)


class _WithOnnxCodes(fx.Interpreter):
    """Runs the folded module, but every quantizer returns what ONNX Runtime computed there.

    ``values``: by quantizer, the tensors before and behind it, and its scale in the file.
    """

    def __init__(
        self, folded: fx.GraphModule, values: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]]
    ) -> None:
        super().__init__(folded)
        self._values = values
        self.layers: list[LayerParity] = []

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, QuantizeDequantize) or target.split(".")[-1] not in self._values:
            return super().call_module(target, args, kwargs)
        before, after, scale = self._values[target.split(".")[-1]].pop(0)
        if (moved := _moved_factor(module, scale)) != 1:
            before, after = before * np.float32(moved), after * np.float32(moved)
        if before.shape == tuple(args[0].shape):  # else it is the image before the preprocessing inside the network
            self.layers.append(LayerParity(target.split(".")[-1], sqnr_db(before, args[0].numpy())))
        return torch.from_numpy(after).float()


def _moved_factor(module: QuantizeDequantize, scale: np.ndarray | None) -> float:
    """How many times as large the tensor is in PyTorch, where a factor moved elsewhere (export/fold_factors.py).

    A scale of 16 bits differs by its rounding, too.
    """
    if scale is None or scale.size != 1:
        return 1.0
    factor = float(module.scale) / float(scale.item())
    return factor if abs(factor - 1) > (0 if scale.dtype == np.float32 else 2**-7) else 1.0
