"""What is said of engines and the GPU: how they were built, their layers, how fast they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from qat.base.choices import BuilderName, Constraints, EnginePrecision
from qat.base.schema.leaves import Count, Digest, Number, Positive, Size


@dataclass(frozen=True)
class BuilderEntry:
    """Which TensorRT built it."""

    name: BuilderName
    version: str


@dataclass(frozen=True)
class DeviceEntry:
    """The GPU, and its driver."""

    name: str
    capability: str
    driver: str
    cuda: str
    memory_gib: Number


@dataclass(frozen=True)
class ProfileEntry:
    """Batch sizes."""

    min: Size
    opt: Size
    max: Size

    def __post_init__(self) -> None:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"{self.min}, {self.opt}, {self.max} must rise")


@dataclass(frozen=True, kw_only=True)
class BuildEntry:
    """The settings of a build: deploy/settings.py says what each means."""

    profiles: Annotated[tuple[ProfileEntry, ...], Meta(min_length=1)] = ()
    capabilities: tuple[str, ...] = ()
    optimization_level: Annotated[int, Meta(ge=0, le=5)] = 3
    workspace_gib: Positive | None = None
    timing_iterations: Size | None = None
    tactic_sources: tuple[str, ...] | None = None
    aux_streams: Count | None = None
    precision: EnginePrecision = "explicit"
    strict: bool = False
    layer: tuple[str, ...] = ()
    output_type: tuple[str, ...] = ()
    constraints: Constraints = "obey"
    tf32: bool = False
    hardware_compatible: bool = False
    version_compatible: bool = False
    refit: bool = False
    strip_weights: bool = False


@dataclass(frozen=True)
class LayerEntry:
    """A final layer; ``milliseconds`` where it was measured."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx_nodes: tuple[str, ...]
    format: str = ""
    tactic: str = ""
    output_bytes: Count = 0
    precision: str = ""
    milliseconds: Number | None = None


@dataclass(frozen=True)
class FindingEntry:
    """A convolution or matrix product, and what it runs in."""

    node: str
    operation: Literal["convolution", "matrix product"]
    declared_int8: bool
    precision: str
    cause: str = ""
    has_kernel: bool = True
    in_part: bool = False


@dataclass(frozen=True)
class KernelEntry:
    """A kernel that ran."""

    name: str
    microseconds: Number


@dataclass(frozen=True)
class LayerTypeEntry:
    """The type that was asked for a layer, and the one it has."""

    layer: str
    kind: Literal["precision", "output type"]
    asked: str
    found: str = ""


@dataclass(frozen=True)
class RepetitionEntry:
    """The latency of several builds, in milliseconds."""

    batch: Size
    milliseconds: Annotated[tuple[Positive, ...], Meta(min_length=1)]


@dataclass(frozen=True)
class LatencyEntry:
    """The time of an inference in milliseconds."""

    batch: Size
    runs: Count
    median: Positive
    low: Positive
    high: Positive
    p99: Positive
    graph: bool = True


@dataclass(frozen=True)
class SpeedEntry:
    """INT8 against FP16."""

    int8: LatencyEntry
    float16: LatencyEntry
    written: Literal["int8", "float16"] = "int8"
    int8_wins: bool = False


@dataclass(frozen=True)
class RangesEntry:
    """Where the ranges of implicit INT8 come from."""

    by_hand: str | None
    calibrator: str | None
    images: Count | None
    images_sha256: Digest | None
    from_cache: bool
