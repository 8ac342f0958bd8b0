"""What a build is asked for: precision, batch sizes, and how the builder goes about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qat.base.choices import EnginePrecision
from qat.base.errors import UserError


@dataclass(frozen=True)
class Profile:
    """An optimization profile: the batch sizes that an engine takes, and the one that it is tuned for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UserError(f"profile {self}: needed is 1 <= min <= opt <= max")

    @classmethod
    def parse(cls, text: str) -> Profile:
        """``1,8,32`` -> min 1, opt 8, max 32; a single number is a fixed batch. Raises UserError."""
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
        """Whether it takes one batch size only."""
        return self.min == self.max


@dataclass(frozen=True, kw_only=True)
class BuilderOptions:
    """The builder's own options, as the command line has them too. The defaults are TensorRT's, but for TF32."""

    optimization_level: int = 3
    """0 (fast build) to 5 (fast engine)."""
    workspace_gib: float | None = None
    """Most scratch memory that a layer may use, in GiB; None is all of the GPU's."""
    timing_iterations: int | None = None
    """How often each tactic is timed; more makes the choice steadier and the build longer. None: the builder's own."""
    tactic_sources: tuple[str, ...] | None = None
    """Where kernels may come from, by the names of TensorRT's TacticSource; None: the builder's own choice."""
    aux_streams: int | None = None
    """Further streams that one inference may use for branches side by side; None: the builder's own choice."""
    tf32: bool = False
    """Whether float32 convolutions and matrix products may run on TF32 tensor cores."""
    hardware_compatible: bool = False
    """Whether the engine must run on every GPU from Ampere on, not on this one alone."""
    version_compatible: bool = False
    """Whether the engine must load in later versions of TensorRT."""
    refit: bool = False
    """Whether weights can be exchanged in the built engine."""
    strip_weights: bool = False
    """Whether weights are left out of the engine, to be refitted when it is loaded."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings(BuilderOptions):
    """All that one build is asked for."""

    precision: EnginePrecision = "explicit"
    profiles: tuple[Profile, ...] = (Profile(1, 8, 32),)
    """For networks whose batch is dynamic. A single fixed one makes the batch static, which is the fastest."""
    capabilities: tuple[str, ...] = ()
    """Compute capabilities such as ``8.9``, for TensorRT-RTX."""

    @classmethod
    def from_options(cls, options: BuilderOptions, **more: Any) -> BuildSettings:
        """``options`` of the builder, and the rest by name."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(BuilderOptions)}, **more)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> BuildSettings:
        """From what ``dataclasses.asdict`` gave and JSON kept, as the sidecar of an engine has it."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
        }
        return cls(**values | {"profiles": tuple(Profile(**profile) for profile in entry["profiles"])})

    def __post_init__(self) -> None:
        if not self.profiles:
            raise UserError("no profile: give one at least, such as 1,8,32")
        if len(self.profiles) > 1 and any(profile.fixed for profile in self.profiles):
            raise UserError("a fixed batch excludes further profiles: give MIN,OPT,MAX for each, or build twice")
        if not 0 <= self.optimization_level <= 5:
            raise UserError(f"optimization level {self.optimization_level}: the builder knows 0 to 5")
        if self.workspace_gib is not None and self.workspace_gib <= 0:
            raise UserError(f"workspace of {self.workspace_gib} GiB: needed is more than 0")
        if self.aux_streams is not None and self.aux_streams < 0:
            raise UserError(f"{self.aux_streams} further streams: needed is 0 at least")
        if self.timing_iterations is not None and self.timing_iterations < 1:
            raise UserError(f"{self.timing_iterations} timing iterations: needed is 1 at least")
