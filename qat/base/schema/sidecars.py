"""What the sidecar of each kind of artifact says beyond what all have: its figures, and its details.

Each of their entries may be missing, because older versions did not write it, or a checkpoint was saved from Python:
what a command needs it asks for (Entries in qat/base/artifact.py). What is there is as stated here, to the leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from qat.base.choices import BuilderName, EnginePrecision, ExportPrecision, FloatType, InputKind, WeightStorage
from qat.base.schema.engines import (
    BuildEntry,
    BuilderEntry,
    DeviceEntry,
    FindingEntry,
    KernelEntry,
    LayerEntry,
    LayerTypeEntry,
    ProfileEntry,
    RangesEntry,
    RepetitionEntry,
    SpeedEntry,
)
from qat.base.schema.leaves import Count, Digest, Name, Number, Share
from qat.base.schema.networks import (
    CodeEntry,
    ModelEntry,
    OpEntry,
    OutputEntry,
    PlacementEntry,
    ReferenceEntry,
    TensorRatio,
    check_order,
)


@dataclass(frozen=True)
class MadeByEntry:
    """The command that made it, when, and the versions of the program and its libraries."""

    command: tuple[str, ...] = ()
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)


Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Images = Annotated[int, Meta(ge=1, le=2**53)]


# --- checkpoints


@dataclass(frozen=True)
class TestEntry:
    """An accuracy on the test split."""

    test_top1: Share
    test_loss: Number
    test_images: Images


@dataclass(frozen=True)
class EpochEntry:
    """Figures of one epoch."""

    train_loss: Number
    validation_top1: Share
    validation_loss: Number
    learning_rate: Number


@dataclass(frozen=True)
class AgreementEntry:
    """Quantized against float, on images that were held out."""

    top1: Share | None
    sqnr_db: Number | None
    images: Count
    outputs: tuple[OutputEntry, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CheckpointFigures:
    """What was measured as it was made."""

    float: TestEntry | UnsetType = UNSET
    ptq: TestEntry | UnsetType = UNSET
    qat: TestEntry | UnsetType = UNSET
    agreement: AgreementEntry | UnsetType = UNSET
    float_history: tuple[EpochEntry, ...] | UnsetType = UNSET
    qat_history: tuple[EpochEntry, ...] | UnsetType = UNSET


@dataclass(frozen=True)
class DataEntry:
    """Where its images come from."""

    source: Name
    root: Name
    image_size: Annotated[int, Meta(ge=1, le=65536)] | None = None
    labelled: bool = True


@dataclass(frozen=True, kw_only=True)
class CheckpointDetails:
    """How its network is built again, and how it was made."""

    model: ModelEntry | UnsetType | None = UNSET
    placement: PlacementEntry | UnsetType = UNSET
    network: tuple[OpEntry, ...] | UnsetType = UNSET
    rules: dict[str, str] | UnsetType = UNSET
    amax: dict[str, Number] | UnsetType = UNSET
    code: CodeEntry | UnsetType | None = UNSET
    answers: dict[str, tuple[tuple[Number, ...], ...]] | UnsetType = UNSET
    trainable: bool | UnsetType = UNSET
    bits: Annotated[int, Meta(ge=2, le=8)] | UnsetType = UNSET
    data: DataEntry | UnsetType = UNSET
    splits: dict[str, Count] | UnsetType = UNSET
    calibration_images: Images | UnsetType = UNSET
    seed: Seed | UnsetType = UNSET
    calibrator: str | UnsetType = UNSET
    weight_calibrator: str | UnsetType = UNSET
    smoothquant: Number | UnsetType | None = UNSET
    adaround: Count | UnsetType = UNSET
    processes: Images | UnsetType = UNSET
    recipes: dict[str, dict[str, Any]] | UnsetType = UNSET

    def __post_init__(self) -> None:
        check_order(self.network or ())
        for name, answers in (self.answers or {}).items():
            if len({len(answer) for answer in answers}) > 1:
                raise ValueError(f"answers of output {name!r} have several lengths")


# --- ONNX files


@dataclass(frozen=True)
class ParityEntry:
    """Against another runtime, or the float network. ``images``: of a checkpoint's file; ``inputs``: of another one."""

    outputs: tuple[OutputEntry, ...] = ()
    layers: tuple[TensorRatio, ...] = ()
    source: str | UnsetType = UNSET
    images: Count | UnsetType = UNSET
    inputs: Count | UnsetType = UNSET
    other_top1: Count | UnsetType | None = UNSET
    smallest_logit_cosine: Number | None = None
    same_top1: Share | UnsetType = UNSET
    sqnr_db: Number | None = None
    worst_layer: TensorRatio | None = None

    def __post_init__(self) -> None:
        of_checkpoint = (self.source, self.images, self.other_top1)
        if self.inputs is UNSET and (self.same_top1 is not UNSET or UNSET in of_checkpoint):
            raise ValueError("neither source, images and other_top1, nor inputs")


@dataclass(frozen=True)
class AgainstFloatEntry:
    """Against the float network."""

    name: str
    images: Count
    other_top1: Count | None
    outputs: tuple[OutputEntry, ...]


@dataclass(frozen=True)
class RecordedEntry:
    """Against the accuracy that the checkpoint records."""

    top1: Share
    images: Images
    recorded_top1: Share
    recorded_images: Images


@dataclass(frozen=True)
class MergingEntry:
    """What merging shortcuts has changed."""

    images: Count
    other_top1: Count | None
    sqnr_db: Number | None


@dataclass(frozen=True, kw_only=True)
class OnnxFigures:
    """What was measured as it was made."""

    bytes: Count | UnsetType = UNSET
    nodes: Count | UnsetType = UNSET
    export_seconds: Number | UnsetType = UNSET
    parity: ParityEntry | UnsetType = UNSET
    against_float: AgainstFloatEntry | UnsetType = UNSET
    against_recorded: RecordedEntry | UnsetType = UNSET
    merging: MergingEntry | UnsetType = UNSET


@dataclass(frozen=True)
class TunedEntry:
    """What deploy.tune left in float, and for what."""

    keep_float: tuple[str, ...]
    gpu: str
    tensorrt: str


@dataclass(frozen=True)
class KeptEntry:
    """A node that stays in float32, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class ChannelEntry:
    """A channel that is always zero."""

    layer: str
    channel: Count


@dataclass(frozen=True, kw_only=True)
class OnnxDetails:
    """The form of the file, and what stands beside it."""

    input: InputKind | UnsetType = UNSET
    precision: ExportPrecision | UnsetType = UNSET
    weights: WeightStorage | UnsetType = UNSET
    float_type: FloatType | UnsetType = UNSET
    opset: Count | UnsetType = UNSET
    padded: tuple[str, ...] | UnsetType = UNSET
    merged: tuple[str, ...] | UnsetType = UNSET
    dead_channels: tuple[ChannelEntry, ...] | UnsetType = UNSET
    kept_float32: tuple[KeptEntry, ...] | UnsetType = UNSET
    reference: ReferenceEntry | UnsetType | None = UNSET
    placement: PlacementEntry | UnsetType = UNSET
    network: tuple[OpEntry, ...] | UnsetType = UNSET
    tuned: TunedEntry | UnsetType = UNSET
    calibrator: str | UnsetType | None = UNSET
    weight_calibrator: str | UnsetType | None = UNSET
    calibration_cache: str | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        check_order(self.network or ())


# --- engines and caches


@dataclass(frozen=True, kw_only=True)
class EngineFigures:
    """What the build reported."""

    build_seconds: Number | UnsetType = UNSET
    engine_bytes: Count | UnsetType = UNSET
    weights_bytes: Count | UnsetType | None = UNSET
    layers: Count | UnsetType = UNSET
    convolutions_int8: Count | UnsetType = UNSET
    convolutions: Count | UnsetType = UNSET
    matrix_products_int8: Count | UnsetType = UNSET
    matrix_products: Count | UnsetType = UNSET
    layers_writing_fp32: Count | UnsetType = UNSET


@dataclass(frozen=True)
class SourceEntry:
    """What the sidecar of its ONNX file said."""

    figures: OnnxFigures
    made_by: MadeByEntry


@dataclass(frozen=True, kw_only=True)
class EngineDetails:
    """How it was built, and what it consists of."""

    builder: BuilderEntry | UnsetType = UNSET
    typing: Literal["strong", "weak"] | UnsetType = UNSET
    precision: EnginePrecision | UnsetType = UNSET
    compute_capabilities: tuple[str, ...] | UnsetType = UNSET
    gpu: str | UnsetType | None = UNSET
    profiles: tuple[ProfileEntry, ...] | UnsetType = UNSET
    settings: BuildEntry | UnsetType = UNSET
    findings: tuple[FindingEntry, ...] | UnsetType = UNSET
    layers: tuple[LayerEntry, ...] | UnsetType = UNSET
    provenance: str | UnsetType = UNSET
    device: DeviceEntry | UnsetType | None = UNSET
    timing_cache: str | UnsetType | None = UNSET
    float_weights: bool | UnsetType = UNSET
    without_range: tuple[str, ...] | UnsetType = UNSET
    ranges: RangesEntry | UnsetType | None = UNSET
    speed: SpeedEntry | UnsetType | None = UNSET
    layer_types: tuple[LayerTypeEntry, ...] | UnsetType = UNSET
    units: dict[str, bool] | UnsetType = UNSET
    repetition: RepetitionEntry | UnsetType | None = UNSET
    hardware_compatible: bool | UnsetType = UNSET
    version_compatible: bool | UnsetType = UNSET
    onnx: SourceEntry | UnsetType | None = UNSET
    kernels: tuple[KernelEntry, ...] | UnsetType = UNSET
    log: tuple[str, ...] | UnsetType = UNSET


@dataclass(frozen=True, kw_only=True)
class TimingCacheDetails:
    """Who made it."""

    name: BuilderName | UnsetType = UNSET
    version: str | UnsetType = UNSET
    gpu: str | UnsetType | None = UNSET


@dataclass(frozen=True, kw_only=True)
class CalibrationCacheDetails:
    """What its scales depend on."""

    model: Digest | UnsetType = UNSET
    images: Digest | UnsetType | None = UNSET
    calibrator: str | UnsetType = UNSET
    tensorrt: str | UnsetType = UNSET
    images_used: Count | UnsetType = UNSET


@dataclass(frozen=True)
class NoFigures:
    """A cache has no figures."""


FORMS: Mapping[str, tuple[type[Any], type[Any]]] = {
    "checkpoint": (CheckpointFigures, CheckpointDetails),
    "onnx": (OnnxFigures, OnnxDetails),
    "engine": (EngineFigures, EngineDetails),
    "timing-cache": (NoFigures, TimingCacheDetails),
    "calibration-cache": (NoFigures, CalibrationCacheDetails),
}
"""Figures and details of each kind."""
