"""What single layers gain by INT8 on one GPU, as measured by deploy.kernels, and what placement reads from it.

Where nothing is known about a layer there is a cautious answer: of grouped convolutions only widths of 4, 8 and 16
channels and multiples of 32 are taken for fast.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from qat.base import own_json
from qat.base.console import say
from qat.base.writing import atomic_write
from qat.graph.network import ConstantWeight

_SHIPPED = Path(__file__).parent / "profiles" / "h200-8.6.0.json"
_MOST_PADDING = 1.6  # times as many channels: the most that was measured, and INT8 moves half the bytes
_FEW = 16  # with fewer input or output channels other kernels are used
_PATCH = 4  # a convolution whose stride is its extent, and at least this, cuts an image into patches

Operation = Literal["convolution", "transposed_convolution", "shuffled_convolution", "linear", "average_pool", "gate"]
WeightScales = Literal["output", "input", "tensor"]
"""Which channels of a weight have a scale of their own: those of its output, those of its input, or none."""
Activation = Literal["relu", "swish", "swish of codes"]
"""What stands behind a layer and fuses into its kernel; a swish of codes has a quantizer between them, and does not."""


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """A layer by what kernels depend on.

    Attributes:
        operation: what it computes. A gate is squeeze-and-excitation: x * sigmoid(linear(mean of x)). A shuffled
            convolution computes what a transposed one of the same extent and stride does: a 1x1 convolution makes the
            pixels of each patch as channels, which are then moved there.
        in_channels, out_channels: of a linear layer, its features.
        groups: of a convolution; ``in_channels`` of them make it depthwise.
        kernel: extents in height and width; (0, 0): those of the whole image.
        stride, dilation: in both directions.
        pixels: height and width of its input; of a linear layer, how many rows each image has.
        weight_scales: how its weight is quantized.
        activation: behind it.
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
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        known = self.operation in get_args(Operation) and self.weight_scales in get_args(WeightScales)
        known = known and self.activation in get_args(Activation)
        counts = (self.in_channels, self.out_channels, self.groups, self.stride, self.dilation, self.pixels)
        if not known or len(self.kernel) != 2 or not all(type(one) is int for one in (*counts, *self.kernel)):
            raise ValueError(f"{self!r} does not describe a layer")
        if min(counts) < 1 or min(self.kernel) < 0 or self.in_channels % self.groups:
            raise ValueError(f"{self!r} does not describe a layer")

    @property
    def group_width(self) -> int:
        """Input channels in a group."""
        return self.in_channels // self.groups

    def __str__(self) -> str:
        parts = [self.operation.replace("_", " "), f"{self.in_channels} -> {self.out_channels}"]
        if self.groups > 1:
            parts.append("depthwise" if self.group_width == 1 else f"{self.group_width} a group")
        if self.operation not in ("linear", "gate"):
            parts.append("x".join(map(str, self.kernel)) if any(self.kernel) else "global")
        parts += [f"stride {self.stride}"] * (self.stride > 1) + [f"dilation {self.dilation}"] * (self.dilation > 1)
        parts += [f"scales by {self.weight_scales}"] * (self.weight_scales != "output")
        parts += [self.activation] * (self.activation != "relu")
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
            if milliseconds is not None and not (type(milliseconds) in (int, float) and 0 < milliseconds < math.inf):
                raise ValueError(f"{milliseconds!r} is no time")
        if self.in_int8 not in (None, True, False) or type(self.significant) is not bool or type(self.error) is not str:
            raise ValueError(f"{self.kind} has entries of other types")

    @property
    def gain(self) -> float | None:
        """How many times as fast the network is with the layer in INT8; None if that was not measured."""
        return self.float_ms / self.int8_ms if self.int8_ms and self.float_ms else None

    @property
    def gains(self) -> bool:
        """Whether it is faster in INT8, beyond the spread, and was in INT8 as far as the builder tells."""
        return self.gain is not None and self.gain > 1 and self.significant and self.in_int8 is not False

    @property
    def loses(self) -> bool:
        """Whether it is slower in INT8, beyond the spread, or TensorRT has no INT8 kernel for it."""
        return self.int8_ms is None or (self.gain is not None and self.gain < 1 and self.significant)

    @property
    def outcome(self) -> str:
        """For people."""
        return "refused in INT8" if self.int8_ms is None else f"{self.gain or 0:.2f} times as fast in INT8"


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
        found = own_json.read(path, cls, "profile of kernels", "python -m deploy.kernels makes one")
        return replace(found, kinds=tuple(found.kinds))

    def write(self, path: Path) -> None:
        """Writes it as JSON, a kind a line. Raises UserError when the disk does not take it."""
        content = asdict(self)
        kinds = ",\n".join(json.dumps(kind) for kind in content.pop("kinds"))
        with atomic_write(path) as temporary:
            temporary.write_text(f'{json.dumps(content)[:-1]}, "kinds": [\n{kinds}\n]}}\n', encoding="utf-8")

    @classmethod
    @functools.cache
    def shipped(cls) -> KernelProfile:
        """The one that comes with the rules."""
        return cls.read(_SHIPPED)

    def __str__(self) -> str:
        return f"{self.gpu}, TensorRT {self.tensorrt}"

    def like(
        self, operation: Operation, weight: ConstantWeight, activation: Activation = "relu"
    ) -> MeasuredKind | None:
        """The measured layer that is like this one, with the nearest number of channels; None if there is none.

        Alike are layers of the same extents and strides, or that cut an image into patches; both have few channels or
        neither, unless they are transposed; both are depthwise, or have groups of the same width. Grouped ones need not
        have the same extents. Dilations are not told apart. Behind the measured one stands ``activation``.
        """
        wanted = _traits(
            operation, weight.in_channels, weight.out_channels, weight.groups, weight.kernel, weight.stride
        )
        channels = math.log(weight.in_channels * weight.out_channels)
        kinds = [one for one in self.kinds if one.kind.activation == activation and one.kind.dilation == 1]
        alike = [one for one in kinds if _traits_of(one.kind) == wanted]
        return min(
            alike,
            key=lambda one: abs(math.log(one.kind.in_channels * one.kind.out_channels) - channels),
            default=None,
        )

    def swish_of_codes(self, weight: ConstantWeight) -> MeasuredKind | None:
        """The measured convolution like this one, if a quantizer before its swish made it faster; else None."""
        found = self.like("convolution", weight, "swish of codes")
        if found is None or found.int8_ms is None:
            return None
        fused = [one for one in self.kinds if one.kind == replace(found.kind, activation="swish")]
        return found if any(one.int8_ms is None or found.int8_ms < one.int8_ms for one in fused) else None

    def of_group_width(self, width: int, stride: int = 1) -> MeasuredKind | None:
        """The grouped convolution with groups of ``width`` channels, if possible with this stride."""
        found = [one for one in self.kinds if one.kind.operation == "convolution" and one.kind.groups > 1]
        found = [one for one in found if one.kind.group_width == width > 1]
        return min(found, key=lambda one: (one.kind.stride != stride, one.kind.in_channels), default=None)

    def fast_group_width(self, width: int) -> int | None:
        """The smallest width from ``width`` on whose grouped convolutions gain; None if that is too much padding."""
        widths = range(width, math.floor(width * _MOST_PADDING) + 1)
        return next((wider for wider in widths if self._is_fast(wider)), None)

    def _is_fast(self, width: int) -> bool:
        found = self.of_group_width(width)
        return found.gains if found is not None else width in (4, 8, 16) or width % 32 == 0


def given_profile(path: Path | None) -> KernelProfile | None:
    """The profile of ``path``, about which it says what it lacks; None for None.

    Raises UserError when it cannot be read, or is no profile.
    """
    if path is None:
        return None
    profile = KernelProfile.read(path)
    known = set(map(_traits_of, (one.kind for one in profile.kinds)))
    missing = {_traits_of(one.kind): str(one.kind) for one in KernelProfile.shipped().kinds}
    lacking = [name for traits, name in missing.items() if traits is not None and traits not in known]
    said = f"profile {path}: {len(profile.kinds)} kinds of layers, measured on {profile}"
    if lacking:
        said += f"; {len(lacking)} are missing, such as {lacking[0]}: there the rules are cautious"
    say(said)
    return profile


def _traits_of(kind: LayerKind) -> tuple[object, ...] | None:
    if kind.weight_scales != ("input" if kind.operation == "transposed_convolution" else "output"):
        return None
    kernel, stride = ((), ()) if kind.operation == "linear" else (kind.kernel, (kind.stride, kind.stride))
    return _traits(kind.operation, kind.in_channels, kind.out_channels, kind.groups, kernel, stride)


def _traits(
    operation: Operation, inside: int, outside: int, groups: int, kernel: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[object, ...]:
    """What decides which kernels a layer has."""
    few = (inside < _FEW, outside < _FEW) if operation != "transposed_convolution" else ()
    if groups > 1:
        return (operation, inside // groups, (kernel, stride) if inside == groups else ())
    patches = kernel == stride and min(kernel, default=0) >= _PATCH
    return (operation, few, "patches" if patches else (kernel, stride))
