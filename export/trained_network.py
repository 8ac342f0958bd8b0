"""What is exported: the network of a checkpoint, or a calibrated model in memory, and what is known about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from export.reference import Sample, random_images, sample
from export.source_images import SourceImages
from qat.base.artifact import Parent
from qat.base.errors import UserError
from qat.base.number_format import BITS
from qat.checkpoint import Checkpoint, load_checkpoint
from qat.data.parts import NO_LABEL
from qat.data.preprocessing import Preprocessing
from qat.fake_quantize.prepare import (
    ACTIVATION_QUANTIZERS,
    activation_quantizers,
    copy_for_evaluation,
    placement_of,
    weights_and_quantizers,
)
from qat.graph.inputs import Inputs
from qat.graph.network_record import network_to_json
from qat.graph.tracing import network_of

Images = Tensor | np.ndarray | Mapping[str, Tensor | np.ndarray]
"""Of the only input, or by input."""
_RANDOM_INPUTS = 8


@dataclass(frozen=True)
class TrainedNetwork:
    """A prepared and calibrated network.

    Attributes:
        model: maps float32 [N, ...] of the shapes in ``inputs`` to one tensor, or to nested ones.
        name: what messages call it.
        inputs: the shapes of its inputs without the batch, by the names of the model's arguments.
        preprocessing: how images become inputs; None if that is not known.
        stated_preprocessing: the same as the sidecar of an ONNX file states it; {} if it is not known.
        class_names: () if they are not known.
        checkpoint: where the network comes from; None for a model in memory.
        images: to compare on, by input: uint8 [N, C, H, W] for the first, or float32 as ``inputs`` says without
            ``preprocessing``. None for those of the checkpoint, or random ones.
        source: the images that the file takes, where it resizes them itself.
    """

    model: fx.GraphModule
    name: str
    inputs: Inputs
    preprocessing: Preprocessing | None
    stated_preprocessing: Mapping[str, Any]
    class_names: tuple[str, ...]
    checkpoint: Checkpoint | None = None
    images: Mapping[str, Tensor] | None = field(default=None, repr=False)
    source: SourceImages | None = None

    @classmethod
    def from_checkpoint(
        cls,
        path: Path,
        allow_changed_model: bool = False,
        source_size: tuple[int, int] | None = None,
        trust_code: bool = False,
    ) -> TrainedNetwork:
        """Reads a checkpoint. Raises UserError when it cannot be read, its model has changed, or is not trusted."""
        checkpoint = load_checkpoint(path, allow_changed_model=allow_changed_model, trust_code=trust_code)
        model, sidecar = checkpoint.model, checkpoint.sidecar
        images = checkpoint.image_preprocessing
        source = SourceImages.of(source_size, images)
        stated = dict(sidecar.preprocessing) | _stated(source)
        inputs, classes = model.meta["inputs"], sidecar.class_names
        return cls(model, str(path), inputs, images, stated, classes, checkpoint, source=source)

    @classmethod
    def from_model(
        cls,
        model: fx.GraphModule,
        preprocessing: Preprocessing | None,
        class_names: Sequence[str],
        images: Images | None,
        source_size: tuple[int, int] | None = None,
    ) -> TrainedNetwork:
        """A model that ``prepare`` made.

        Raises UserError when ``model`` has no quantizers, or when ``preprocessing`` or ``images`` do not fit.
        """
        if not isinstance(model, fx.GraphModule) or not hasattr(model, ACTIVATION_QUANTIZERS):
            raise UserError(
                f"a {type(model).__name__} without quantizers cannot be exported: give the path of a checkpoint, or "
                "what prepare (of qat) made of the model"
            )
        inputs: Inputs = model.meta["inputs"]
        first = next(iter(inputs.shapes.values()))
        if preprocessing is not None and first != preprocessing.input_shape:
            raise UserError(
                f"preprocessing makes images of {list(preprocessing.input_shape)}, and the model was "
                f"prepared for {list(first)}: correct one of them"
            )
        source = SourceImages.of(source_size, preprocessing)
        expected = list(inputs.shapes.values()) if source is None else [source.input_shape]
        given = None if images is None else _checked(images, inputs, expected, preprocessing is not None)
        stated = {} if preprocessing is None else asdict(preprocessing) | _stated(source)
        return cls(model, "the model", inputs, preprocessing, stated, tuple(class_names), None, given, source)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of its first input, without the batch."""
        return next(iter(self.inputs.shapes.values()))

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

    def float_network(self) -> tuple[str, Callable[..., Any]]:
        """The network without quantizers: what the user calls it, and what maps its inputs to its answer.

        Of a checkpoint it is what the model's own code builds, not a trace.
        """
        given = self._own_network
        if self.checkpoint is None or given is None:
            return "the model", copy_for_evaluation(self.model, quantized=False).cpu()
        name = self.checkpoint.sidecar.details["model"]["name"]
        return name, lambda *x: self.inputs.call(given, dict(zip(self.inputs.shapes, x, strict=True)))

    @cached_property
    def _own_network(self) -> nn.Module | None:
        """What the model's own code builds, in evaluation; None where there is no such code."""
        return None if self.checkpoint is None else self.checkpoint.float_network()

    def parent(self, child: Path) -> Parent | None:
        """What the file ``child`` records of the checkpoint."""
        if self.checkpoint is None:
            return None
        return Parent.from_file(child, Path(self.name), self.checkpoint.sidecar.sha256)

    @property
    def metadata(self) -> dict[str, str]:
        """What the ONNX file says about where it comes from, and what the model's own code says that it must."""
        if self.checkpoint is None:
            return {}
        own = getattr(self._own_network, "file_metadata", None)
        return {"checkpoint_sha256": self.checkpoint.sidecar.sha256, **(own(self.input_shape) if own else {})}

    @property
    def recorded_figures(self) -> Mapping[str, Any]:
        """What was measured when the checkpoint was made, if the file is compared on the same images."""
        return {} if self.checkpoint is None or self.source is not None else self.checkpoint.sidecar.figures

    @property
    def details(self) -> dict[str, Any]:
        """What the ONNX file's sidecar must say because no checkpoint does."""
        if self.checkpoint is not None:
            return {}
        network = network_to_json(network_of(self.model))
        return {"placement": placement_of(self.model).to_json(), "network": network}

    def sample(self, count: int) -> Sample:
        """Up to ``count`` images to compare on; without preprocessing, float32 inputs as the network takes them."""
        if self.images is not None:
            first, *others = (tensor[:count] for tensor in self.images.values())
            return Sample(first, torch.full((len(first),), NO_LABEL), "the caller's images", tuple(others))
        if self.source is not None:
            return self.source.enlarged(replace(self, source=None).sample(count))
        if self.checkpoint is not None:
            return sample(self.checkpoint, count)
        if self.preprocessing is not None:
            return random_images(self.preprocessing.input_shape, count)
        first, *others = self.inputs.random(min(count, _RANDOM_INPUTS)).values()
        return Sample(first, torch.full((len(first),), NO_LABEL), "random inputs", tuple(others))

    def normalize(self, images: Tensor) -> Tensor:
        """What ``sample`` gave for the first input -> what the network takes, float32 [N, ``input_shape``]."""
        fitted = images if self.source is None else self.source.fit(images)
        return fitted if self.preprocessing is None else self.preprocessing.normalize(fitted)

    def check_classes(self, shapes: Sequence[Sequence[int]]) -> None:
        """Raises UserError when the network has class names, and they are not as many as its logits."""
        names = self.class_names
        if names and [list(shape[1:]) for shape in shapes] != [[len(names)]]:
            found = " and ".join(str(["N", *shape[1:]]) for shape in shapes)
            raise UserError(
                f"{self.name} answers {found}, and there are {len(names)} class names: give one for each of its logits "
                "[N, classes], or none for another network"
            )

    @property
    def file_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the file's inputs without the batch, images as [C, H, W]."""
        return list(self.inputs.shapes.values()) if self.source is None else [self.source.input_shape]


def _stated(source: SourceImages | None) -> dict[str, Any]:
    """What the sidecar's preprocessing says of images that the file resizes: [height, width]."""
    return {} if source is None else {"source_size": [source.height, source.width]}


def _checked(images: Images, inputs: Inputs, shapes: Sequence[tuple[int, ...]], as_bytes: bool) -> dict[str, Tensor]:
    """``images`` by input. Raises UserError when they do not fit; ``as_bytes``: the first are to be uint8."""
    named = images if isinstance(images, Mapping) else {next(iter(inputs.shapes)): images}
    if named.keys() != inputs.shapes.keys():
        raise UserError(f"images are given for {', '.join(named)}, and the inputs are {', '.join(inputs.shapes)}")
    found = {name: torch.as_tensor(named[name]).cpu() for name in inputs.shapes}
    for index, (given, shape) in enumerate(zip(found.values(), shapes, strict=True)):
        wanted = torch.uint8 if as_bytes and not index else torch.float32
        if given.dtype != wanted or tuple(given.shape[1:]) != shape or not len(given):
            raise UserError(
                f"images are {given.dtype} {list(given.shape)}, and must be {wanted} {['N', *shape]}: correct them"
            )
    if len({len(given) for given in found.values()}) > 1:
        counts = ", ".join(f"{len(given)} {name}" for name, given in found.items())
        raise UserError(f"images are {counts}: give as many of each")
    return found
