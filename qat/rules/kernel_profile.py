"""What single layers gain by INT8 on one GPU, as measured by deploy.kernels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from qat.base.artifact import write_json
from qat.base.errors import UserError, one_line

Operation = Literal["convolution", "transposed_convolution", "linear", "average_pool", "gate"]
WeightScales = Literal["output", "input", "tensor"]
"""Which channels of a weight have a scale of their own: those of its output, those of its input, or none."""


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """A layer by what kernels depend on.

    Attributes:
        operation: what it computes. A gate is squeeze-and-excitation: x * sigmoid(linear(mean of x)).
        in_channels, out_channels: of a linear layer, its features.
        groups: of a convolution; ``in_channels`` of them make it depthwise.
        kernel: extents in height and width; (0, 0): those of the whole image.
        stride, dilation: in both directions.
        pixels: height and width of its input; of a linear layer, how many rows each image has.
        weight_scales: how its weight is quantized.
    """

    operation: Operation
    in_channels: int
    out_channels: int
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    dilation: int = 1
    pixels: int = 56
    weight_scales: WeightScales = "output"

    def __post_init__(self) -> None:
        known = self.operation in get_args(Operation) and self.weight_scales in get_args(WeightScales)
        counts = (self.in_channels, self.out_channels, self.groups, self.stride, self.dilation, self.pixels)
        if not known or len(self.kernel) != 2 or not all(isinstance(one, int) for one in (*counts, *self.kernel)):
            raise ValueError(f"{self!r} does not describe a layer")
        if min(counts) < 1 or min(self.kernel) < 0 or self.in_channels % self.groups:
            raise ValueError(f"{self!r} does not describe a layer")

    @property
    def group_width(self) -> int:
        """Input channels in a group."""
        return self.in_channels // self.groups

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> LayerKind:
        """As a profile has it."""
        return cls(**{**entry, "kernel": tuple(entry["kernel"])})

    def __str__(self) -> str:
        parts = [self.operation.replace("_", " "), f"{self.in_channels} -> {self.out_channels}"]
        if self.groups > 1:
            parts.append("depthwise" if self.group_width == 1 else f"{self.group_width} a group")
        if self.operation not in ("linear", "gate"):
            parts.append("x".join(map(str, self.kernel)) if any(self.kernel) else "global")
        parts += [f"stride {self.stride}"] * (self.stride > 1) + [f"dilation {self.dilation}"] * (self.dilation > 1)
        parts += [f"scales by {self.weight_scales}"] * (self.weight_scales != "output")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class MeasuredKind:
    """A kind inside of a small INT8 network, once in INT8 and once in float; the rest of the network is the same.

    Attributes:
        kind: the layer.
        int8_ms, float_ms: median milliseconds of the whole network; None if it could not be built.
        in_int8: whether the builder has run the layer in INT8 where it was asked to; None if it does not tell.
        significant: whether the two times differ beyond their spread.
        error: why the network with the INT8 layer could not be built.
    """

    kind: LayerKind
    int8_ms: float | None
    float_ms: float | None
    in_int8: bool | None
    significant: bool
    error: str = ""

    def __post_init__(self) -> None:
        for milliseconds in (self.int8_ms, self.float_ms):
            if milliseconds is not None and not (isinstance(milliseconds, float) and milliseconds > 0):
                raise ValueError(f"{milliseconds!r} is no time")

    @property
    def gain(self) -> float | None:
        """How many times as fast the network is with the layer in INT8; None if that was not measured."""
        return self.float_ms / self.int8_ms if self.int8_ms and self.float_ms else None

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> MeasuredKind:
        """As a profile has it."""
        return cls(**{**entry, "kind": LayerKind.from_json(entry["kind"])})


@dataclass(frozen=True)
class KernelProfile:
    """What was measured on one GPU with one version of TensorRT, for one batch size; ``date`` in ISO 8601."""

    gpu: str
    compute_capability: str
    tensorrt: str
    date: str
    batch: int
    kinds: Sequence[MeasuredKind]

    @classmethod
    def read(cls, path: Path) -> KernelProfile:
        """Raises UserError when the file cannot be read or is no profile."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kinds = tuple(MeasuredKind.from_json(entry) for entry in content.pop("kinds"))
            if not isinstance(content["batch"], int):
                raise ValueError(f"the batch is {content['batch']!r}")
            return cls(kinds=kinds, **content)
        except OSError as error:
            raise UserError(f"cannot read the profile {path} ({error}): check the path") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path} is no profile of kernels ({one_line(error)}): python -m deploy.kernels makes one"
            ) from error

    def write(self, path: Path) -> None:
        """Writes it as JSON. Raises UserError when the disk does not take it."""
        write_json(path, asdict(self))
