"""How an engine is to be built: its precision, its batch sizes, and the options of the builder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from qat.base.artifact import sidecar_path
from qat.base.choices import Constraints, EnginePrecision, ImplicitCalibrator
from qat.base.errors import UserError
from qat.base.outputs import READS, READS_IMAGES, Writes
from qat.base.own_json import JsonError, typed


def beside_artifact(path: Path, options: object = None) -> tuple[Path, ...]:
    """What is written with an engine or a cache: its sidecar."""
    return (sidecar_path(path),)


ENGINES = Writes(folder=True, default=lambda options: options.model.with_name("engines"), locked=lambda path: False)
"""A folder of engines, which several runs may fill: each engine is claimed by the run that builds it."""

# Several builds may read a calibration cache that is there.
_CACHE = Writes(beside=beside_artifact, locked=lambda path: not path.exists())


@dataclass(frozen=True)
class Profile:
    """An optimization profile: the batch sizes that an engine takes, and the one that it is tuned for.

    Example: ``Profile(1, 8, 32)`` takes 1 to 32 images and is tuned for 8. ``Profile(128, 128, 128)`` is a fixed batch.
    Raises UserError unless 1 <= min <= opt <= max.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UserError(f"profile {self}: must have 1 <= min <= opt <= max")

    @classmethod
    def parse(cls, text: str) -> Profile:
        """``1,8,32`` -> min 1, opt 8, max 32. A single number is a fixed batch. Raises UserError for any other text."""
        try:
            numbers = [int(word) for word in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            numbers *= 3
        if len(numbers) != 3:
            raise UserError(f"profile {text!r}: give MIN,OPT,MAX, such as 1,8,32, or one number for a fixed batch")
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.min},{self.opt},{self.max}"

    @property
    def fixed(self) -> bool:
        """Whether it takes only one batch size."""
        return self.min == self.max


DEFAULT_PROFILES = (Profile(1, 8, 32),)


@dataclass(frozen=True, kw_only=True)
class BuilderOptions:
    """The builder's own options, which python -m deploy.build has too. The defaults are TensorRT's, except for TF32.

    Example: ``BuilderOptions(optimization_level=5, timing_iterations=8)``.
    """

    optimization_level: int = 3
    """0 (fast build) to 5 (fast engine)."""
    workspace_gib: float | None = None
    """The most scratch memory that a layer may use, in GiB. None: all of the GPU's memory."""
    timing_iterations: int | None = None
    """How often each tactic is timed. More gives a steadier choice and a longer build. None: the builder decides."""
    tactic_sources: tuple[str, ...] | None = None
    """Where kernels may come from, by the names of TensorRT's TacticSource. None: the builder decides."""
    aux_streams: int | None = None
    """How many auxiliary streams one inference may use to run branches in parallel. None: the builder decides."""
    precision: EnginePrecision = "explicit"
    """explicit: as the file says, INT8 where it has Q/DQ nodes. The others take a float32 file: fp32, tf32, fp16, bf16,
    or int8, which needs --data, --calibration-cache or --ranges. Newer versions have no fp16, bf16 and int8: there the
    file says it."""
    strict: bool = False
    """For int8: no FP16 beside it. A layer that cannot run in INT8 runs in FP32."""
    layer: tuple[str, ...] = ()
    """PATTERN=TYPE: the layers whose names match the pattern (* ? []) compute in this type: fp32, fp16, bf16 or int8.
    Of several patterns that match a layer, the last counts."""
    output_type: tuple[str, ...] = ()
    """PATTERN=TYPE: likewise, the type in which layers write."""
    constraints: Constraints = "obey"
    """What the builder makes of --layer and --output-type. obey: it fails where it has no such kernel; prefer: it takes
    another type there; none: it takes what is fastest, and these are only hints."""
    tf32: bool = False
    """Whether float32 convolutions and matrix products may run on TF32 tensor cores."""
    hardware_compatible: bool = False
    """Whether the engine must run on every GPU from Ampere on, not only on this one."""
    version_compatible: bool = False
    """Whether the engine must load in later versions of TensorRT."""
    refit: bool = False
    """Whether the weights of the built engine can be replaced."""
    strip_weights: bool = False
    """Whether the engine is built without weights. They are read from the ONNX file when the engine is loaded."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """How one of TensorRT's own calibrators finds the ranges of implicit INT8."""

    data: Annotated[str | None, READS_IMAGES] = None
    """What to calibrate on. A folder of images (its train/, if it has one); a text file that
    lists the paths of images, one a line; digits, an .npz file or torchvision:NAME, as for qat.calibrate, with torch;
    or inputs as the network takes them, float32: an .npy file, or an .npz file with an array for each input."""
    calibrator: ImplicitCalibrator = "entropy2"
    """TensorRT's IInt8EntropyCalibrator2, IInt8MinMaxCalibrator, IInt8EntropyCalibrator or IInt8LegacyCalibrator."""
    images: int = 500
    """Images to calibrate on, at most."""
    calibration_batch: int = 32
    """Images in a batch of calibration, for a network with a dynamic batch."""
    calibrate_before_fusion: bool = False
    """For entropy and legacy: calibrate before layers are fused, so that tensors inside fused layers get ranges too.
    entropy2 and minmax always do."""
    quantile: float = 0.9999
    """Of the legacy calibrator: the share of the values, 0 to 1, that it does not clip."""
    regression_cutoff: float = 1.0
    """Of the legacy calibrator: the share of the largest value, 0 to 1, from which on it extrapolates the values."""
    mean: tuple[float, ...] | None = None
    """Mean of the normalization for each channel, of pixels in 0 to 1; by default the sidecar's, else ImageNet's."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the normalization, likewise."""
    data_root: Annotated[Path, READS] = Path("data")
    """Where torchvision's data sets are."""
    calibration_cache: Annotated[Path | None, _CACHE] = None
    """TensorRT's calibration cache: read if it is there and was made of the same model, images, calibrator and version,
    else written."""
    trust_cache: bool = False
    """Use the scales of the --calibration-cache whatever they were made of."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_root", Path(self.data_root))
        if self.calibration_cache is not None:  # as build_engine, the library takes text too
            object.__setattr__(self, "calibration_cache", Path(self.calibration_cache))
        for name, value in (("--images", self.images), ("--calibration-batch", self.calibration_batch)):
            if value < 1:
                raise UserError(f"{name} {value}: must be at least 1")
        for name, share in (("--quantile", self.quantile), ("--regression-cutoff", self.regression_cutoff)):
            if not 0 <= share <= 1:
                raise UserError(f"{name} {share}: must be 0 to 1")
        for name, numbers in (("--mean", self.mean or ()), ("--std", self.std or ())):
            if not all(map(math.isfinite, numbers)) or (name == "--std" and min(numbers, default=1) <= 0):
                wanted = "above 0" if name == "--std" else "finite"
                raise UserError(f"{name} {' '.join(f'{number:g}' for number in numbers)}: must be {wanted}")
        if self.data is None and (self.mean is not None or self.std is not None):
            raise UserError("--mean and --std are about the images of --data: give some")
        if self.trust_cache and self.calibration_cache is None:
            raise UserError("--trust-cache is about a --calibration-cache: give one")

    @property
    def asked_for(self) -> bool:
        """Whether there is anything to calibrate with."""
        return self.data is not None or self.calibration_cache is not None

    @property
    def method(self) -> str:
        """What determines the scales besides the images, in words."""
        of_legacy = f", quantile {self.quantile}, regression cutoff {self.regression_cutoff}"
        before = ", before fusion" if self.calibrate_before_fusion and self.calibrator in ("entropy", "legacy") else ""
        return self.calibrator + (of_legacy if self.calibrator == "legacy" else "") + before


@dataclass(frozen=True, kw_only=True)
class BuildSettings(BuilderOptions):
    """All settings of one build."""

    profiles: tuple[Profile, ...] = DEFAULT_PROFILES
    """The batch sizes of a network with a dynamic batch. A single fixed one makes it static, which is fastest."""
    capabilities: tuple[str, ...] = ()
    """Compute capabilities such as ``8.9``, for TensorRT-RTX."""

    @classmethod
    def from_options(cls, options: BuilderOptions, **more: Any) -> BuildSettings:
        """``options`` of the builder, and the other settings by name."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(BuilderOptions)}, **more)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> BuildSettings:
        """From the sidecar of an engine, which has the output of ``dataclasses.asdict`` as JSON.

        Raises UserError when an entry is of another type, or out of range.
        """
        try:
            return typed(entry, cls, "settings")
        except JsonError as fault:
            raise UserError(f"the sidecar of the engine misstates an entry ({fault}): build it again") from fault

    def __post_init__(self) -> None:
        if not self.profiles:
            raise UserError("there is no profile: give at least one, such as 1,8,32")
        if len(self.profiles) > 1 and any(profile.fixed for profile in self.profiles):
            raise UserError("a fixed batch allows no other profile: give MIN,OPT,MAX for each profile, or build twice")
        if self.strict and self.precision != "int8":
            raise UserError(f"--strict is for --precision int8, not {self.precision}: leave it out")
        if not 0 <= self.optimization_level <= 5:
            raise UserError(f"optimization level {self.optimization_level}: must be 0 to 5")
        if self.workspace_gib is not None and self.workspace_gib <= 0:
            raise UserError(f"workspace of {self.workspace_gib} GiB: must be more than 0")
        if self.aux_streams is not None and self.aux_streams < 0:
            raise UserError(f"{self.aux_streams} auxiliary streams: must be at least 0")
        if self.timing_iterations is not None and self.timing_iterations < 1:
            raise UserError(f"{self.timing_iterations} timing iterations: must be at least 1")
