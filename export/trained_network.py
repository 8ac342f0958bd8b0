"""What is exported: the network of a checkpoint, or a calibrated model in memory, and what is known about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from export.reference import Sample, random_images, sample
from qat.base.artifact import Parent
from qat.base.errors import UserError
from qat.base.number_format import BITS
from qat.checkpoint import Checkpoint, load_checkpoint
from qat.data.parts import NO_LABEL
from qat.data.preprocessing import Preprocessing
from qat.fake_quantize.prepare import ACTIVATION_QUANTIZERS, activation_quantizers, placement_of, weights_and_quantizers

_RANDOM_INPUTS = 8


@dataclass(frozen=True)
class TrainedNetwork:
    """A prepared and calibrated network.

    Attributes:
        model: maps float32 [N, ``input_shape``] to logits [N, classes].
        name: what messages call it.
        input_shape: of one input, [C, H, W].
        preprocessing: how images become inputs; None if that is not known.
        stated_preprocessing: the same as the sidecar of an ONNX file states it; {} if it is not known.
        class_names: () if they are not known.
        checkpoint: where the network comes from; None for a model in memory.
        images: to compare on: uint8 [N, C, H, W], or float32 [N, ``input_shape``] without ``preprocessing``. None for
            those of the checkpoint, or random ones.
    """

    model: fx.GraphModule
    name: str
    input_shape: tuple[int, ...]
    preprocessing: Preprocessing | None
    stated_preprocessing: Mapping[str, Any]
    class_names: tuple[str, ...]
    checkpoint: Checkpoint | None = None
    images: Tensor | None = field(default=None, repr=False)

    @classmethod
    def from_checkpoint(cls, path: Path) -> TrainedNetwork:
        """Reads a checkpoint. Raises UserError when it cannot be read."""
        checkpoint = load_checkpoint(path)
        preprocessing, sidecar = checkpoint.preprocessing, checkpoint.sidecar
        shape = preprocessing.input_shape
        stated = dict(sidecar.preprocessing)
        return cls(checkpoint.model, str(path), shape, preprocessing, stated, sidecar.class_names, checkpoint)

    @classmethod
    def from_model(
        cls,
        model: fx.GraphModule,
        preprocessing: Preprocessing | None,
        input_shape: Sequence[int] | None,
        class_names: Sequence[str],
        images: Tensor | np.ndarray | None,
    ) -> TrainedNetwork:
        """A model that ``prepare`` made; ``preprocessing`` or ``input_shape`` tells what it takes.

        Raises UserError when neither does, when ``model`` has no quantizers, or when ``images`` do not fit.
        """
        if not isinstance(model, fx.GraphModule) or not hasattr(model, ACTIVATION_QUANTIZERS):
            raise UserError(
                f"a {type(model).__name__} without quantizers cannot be exported: give the path of a checkpoint, or "
                "what prepare (of qat) made of the model"
            )
        if preprocessing is not None:
            shape: tuple[int, ...] = preprocessing.input_shape
            if input_shape is not None and tuple(input_shape) != shape:
                raise UserError(
                    f"input_shape {list(input_shape)} differs from that of the preprocessing, {list(shape)}: give one"
                )
        elif input_shape:
            shape = tuple(input_shape)
        else:
            raise UserError("nothing tells what the model takes: give preprocessing, or input_shape as [C, H, W]")
        given = None if images is None else torch.as_tensor(images).cpu()
        wanted = torch.float32 if preprocessing is None else torch.uint8
        if given is not None and (given.dtype != wanted or tuple(given.shape[1:]) != shape or not len(given)):
            raise UserError(
                f"images are {given.dtype} {list(given.shape)}, and must be {wanted} {['N', *shape]}: correct them"
            )
        stated = {} if preprocessing is None else asdict(preprocessing)
        return cls(model, "the model", shape, preprocessing, stated, tuple(class_names), None, given)

    def check_exportable(self) -> None:
        """Raises UserError when a quantizer has no range, or a number format that an ONNX file cannot hold."""
        activations = activation_quantizers(self.model)
        formats = [quantizer.format for quantizer in activations.values()]
        formats += [quantizer.format for _, _, quantizer in weights_and_quantizers(self.model)]
        if simulated := next((one for one in formats if not one.onnx_type), None):
            raise UserError(
                f"{self.name} simulates {simulated.name}, which no engine computes: train with --bits {BITS}"
            )
        unknown = [name for name, quantizer in activations.items() if quantizer.amax.isnan()]
        if unknown:
            raise UserError(
                f"{self.name} has no range for {len(unknown)} of {len(activations)} tensors, first {unknown[0]}: "
                "calibrate it"
            )

    def parent(self, child: Path) -> Parent | None:
        """What the file ``child`` records of the checkpoint."""
        if self.checkpoint is None:
            return None
        return Parent.from_file(child, Path(self.name), self.checkpoint.sidecar.sha256)

    @property
    def metadata(self) -> dict[str, str]:
        """What the ONNX file says about where it comes from."""
        return {} if self.checkpoint is None else {"checkpoint_sha256": self.checkpoint.sidecar.sha256}

    @property
    def details(self) -> dict[str, Any]:
        """What the ONNX file's sidecar must say because no checkpoint does."""
        return {} if self.checkpoint is not None else {"placement": placement_of(self.model).to_json()}

    def sample(self, count: int) -> Sample:
        """Up to ``count`` images to compare on; without preprocessing, float32 inputs as the network takes them."""
        if self.images is not None:
            chosen = self.images[:count]
            return Sample(chosen, torch.full((len(chosen),), NO_LABEL), "the caller's images")
        if self.checkpoint is not None:
            return sample(self.checkpoint, count)
        if self.preprocessing is not None:
            return random_images(self.preprocessing.input_shape, count)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(min(count, _RANDOM_INPUTS), *self.input_shape, generator=generator)
        return Sample(x, torch.full((len(x),), NO_LABEL), "random inputs")

    def normalize(self, images: Tensor) -> Tensor:
        """What ``sample`` gave -> what the network takes, float32 [N, ``input_shape``]."""
        return images if self.preprocessing is None else self.preprocessing.normalize(images)
