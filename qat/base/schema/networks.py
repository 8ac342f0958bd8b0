"""What several files say of a network: images to inputs, operations, where quantizers stand, how far answers agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from qat.base.op_kind import OpKind
from qat.base.schema.leaves import Count, Digest, FileName, Name, Number, Positive, Shape, Share, Size


@dataclass(frozen=True, kw_only=True)
class PreprocessingEntry:
    """From images to inputs; qat/data/preprocessing.py says what each means. ``source_size``: [height, width]."""

    height: Size
    width: Size
    resize: Size
    mean: Annotated[tuple[Number, ...], Meta(min_length=1, max_length=3)]
    std: Annotated[tuple[Positive, ...], Meta(min_length=1, max_length=3)]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    color: Literal["RGB", "grey"] = "RGB"
    letterbox: bool = False
    source_size: tuple[Size, Size] | None = None
    input_scale: Positive | None = None

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == (1 if self.color == "grey" else 3):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} deviations for color {self.color}")
        if self.resize < min(self.height, self.width):
            raise ValueError(f"crops {self.height}x{self.width} out of {self.resize}")


@dataclass(frozen=True)
class ReadEntry:
    """Who reads a tensor through its quantizer."""

    reader: str
    rule: str


@dataclass(frozen=True)
class TensorEntry:
    """A quantized tensor."""

    tensor: str
    quantizer: str
    reads: tuple[ReadEntry, ...]


@dataclass(frozen=True)
class DecisionEntry:
    """What was decided for an operation."""

    op: str
    label: str
    kind: OpKind
    quantized: bool
    rule: str
    reason: str = ""
    group_widths: tuple[Size, Size] | None = None


@dataclass(frozen=True)
class PlacementEntry:
    """Where quantizers stand."""

    tensors: tuple[TensorEntry, ...]
    decisions: tuple[DecisionEntry, ...]
    keep_float: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpEntry:
    """An operation of the network; its inputs come before it."""

    name: str
    kind: OpKind
    label: str
    inputs: tuple[str, ...]
    shape: Shape | None
    weight: Shape | None


def check_order(network: tuple[OpEntry, ...]) -> None:
    """Raises ValueError when an operation comes twice, or before one that it reads."""
    known: set[str] = set()
    for op in network:
        if op.name in known or not known.issuperset(op.inputs):
            raise ValueError(f"operation {op.name!r} of the network comes twice, or before one that it reads")
        known.add(op.name)


@dataclass(frozen=True)
class ModelEntry:
    """How a float model is built again. What its arguments may do is decided by qat/pretrained/named_models.py."""

    name: Name
    num_classes: Annotated[int, Meta(ge=1, le=1_000_000)]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class CodeEntry:
    """The file that a model was built from."""

    file: Name
    sha256: Digest


@dataclass(frozen=True)
class TensorRatio:
    """A tensor, and its signal-to-noise ratio in dB; None if it is equal."""

    tensor: str
    sqnr_db: Number | None


@dataclass(frozen=True)
class OutputEntry:
    """An output, and how well two networks agree on it."""

    tensor: str
    sqnr_db: Number | None
    equal_percent: Share | None


@dataclass(frozen=True)
class ReferenceEntry:
    """The file of images with PyTorch's answers, beside the ONNX file."""

    file: FileName
    sha256: Digest
    images: Count
    source: str
    top1: Share | None
