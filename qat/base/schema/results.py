"""What commands write with --json or --output, as far as other commands read it: an evaluation, a benchmark, an audit,
the costs of quantization. An entry with a default may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from msgspec import UNSET, Meta, UnsetType

from qat.base.schema.engines import FindingEntry, KernelEntry, LayerEntry
from qat.base.schema.leaves import Count, Digest, Number, Positive, Share, Size
from qat.base.schema.sidecars import MadeByEntry


@dataclass(frozen=True)
class DifferenceEntry:
    """A tensor that differs from ONNX Runtime's."""

    tensor: str
    node: str
    sqnr_db: Number


@dataclass(frozen=True)
class InsideEntry:
    """A tensor inside, against ONNX Runtime's."""

    tensor: str
    node: str
    sqnr_db: Number | None


@dataclass(frozen=True)
class DistanceEntry:
    """How far two answers are."""

    sqnr_db: Number | None
    equal_percent: Share | None


@dataclass(frozen=True)
class ScoresEntry:
    """mAP or mIoU, the figure that counts first, and by class."""

    figures: Annotated[dict[str, Number], Meta(min_length=1)]
    by_class: dict[str, Number | None]


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Of deploy.evaluate: ``engine`` or ``onnx`` says what was judged."""

    engine: Digest = ""
    onnx: Digest = ""
    images: Annotated[int, Meta(ge=1, le=2**53)]
    source: str
    top1: dict[str, Share | None]
    agreement: dict[str, Share]
    outputs: dict[str, DistanceEntry] = field(default_factory=dict)
    scores: dict[str, ScoresEntry] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)
    first_difference: DifferenceEntry | None = None
    layers: tuple[InsideEntry, ...] = ()
    made_by: MadeByEntry = field(default_factory=MadeByEntry)

    def __post_init__(self) -> None:
        names = {tuple(sorted(one.figures)) for one in self.scores.values()}
        if len(names) > 1:
            raise ValueError("scores have other figures for one than for another")


@dataclass(frozen=True)
class MeasuredLatency:
    """Milliseconds of a candidate at one batch size."""

    name: str
    batch: Size
    median: Positive
    low: Positive
    high: Positive
    p99: Positive
    images_per_second: Number
    runs: Count = 0
    graph: bool = True


@dataclass(frozen=True)
class SlowerEntry:
    """A layer that takes longer in INT8, in milliseconds."""

    batch: Size
    node: str
    int8: Number
    fp16: Number


@dataclass(frozen=True)
class MeasuredFile:
    """An ONNX file that was measured."""

    sha256: Digest
    file: str = ""


@dataclass(frozen=True)
class MeasuringDevice:
    """The GPU that measured."""

    name: str
    driver: str


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """Of deploy.benchmark."""

    models: dict[str, MeasuredFile]
    builds: tuple[dict[str, Any], ...]
    latency: tuple[MeasuredLatency, ...]
    date: str
    tensorrt: str
    device: MeasuringDevice | None
    slower_in_int8: tuple[SlowerEntry, ...] = ()
    made_by: MadeByEntry = field(default_factory=MadeByEntry)


@dataclass(frozen=True)
class PeaksEntry:
    """What the GPU can do at most, a second."""

    bytes_per_s: Positive
    int8_per_s: Positive
    fp16_per_s: Positive


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """Of deploy.audit."""

    totals: dict[str, dict[str, Number]]
    layers: tuple[LayerEntry, ...]
    findings: tuple[FindingEntry, ...]
    engine: Digest = ""
    peaks: PeaksEntry | None = None
    batch: Size | None
    runs: Count
    kernels: tuple[KernelEntry, ...] = ()
    made_by: MadeByEntry = field(default_factory=MadeByEntry)


@dataclass(frozen=True)
class CostEntry:
    """What the quantization of an operation costs."""

    label: str
    loss_without: Number
    op: str = ""
    kind: str = ""
    sqnr_db: Number | None = None
    loss_alone: Number = 0.0
    multiply_adds: Number = 0.0


@dataclass(frozen=True)
class LossEntry:
    """Loss and accuracy."""

    top1: Share
    loss: Number | UnsetType = UNSET


@dataclass(frozen=True)
class StepEntry:
    """The accuracy with one operation more in float."""

    label: str
    top1: Share


@dataclass(frozen=True, kw_only=True)
class SensitivityResult:
    """Of qat.sensitivity."""

    operations: tuple[CostEntry, ...]
    target_drop: Number
    quantized: LossEntry
    checkpoint: Digest = ""
    images: Count = 0
    made_by: MadeByEntry = field(default_factory=MadeByEntry)


@dataclass(frozen=True, kw_only=True)
class FloatSteps:
    """What deploy.tune reads of the same file."""

    float: LossEntry
    quantized: LossEntry
    keep_float: tuple[StepEntry, ...]


RESULTS: Mapping[str, type[Any]] = {
    "evaluation": EvaluationResult,
    "onnx_evaluation": EvaluationResult,
    "benchmark": BenchmarkResult,
    "audit": AuditResult,
    "sensitivity": SensitivityResult,
}
