"""The float engine of a Q/DQ file: what INT8 has to be faster than."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from deploy.builder import BuiltEngine, build
from deploy.measure import Latency, latencies_of_built
from deploy.settings import BuilderOptions, BuildSettings
from deploy.trt import Toolkit
from qat.base.choices import EnginePrecision
from qat.base.console import say, warn
from qat.base.errors import UserError


@dataclass(frozen=True)
class SpeedCheck:
    """An INT8 engine and the FP16 engine of the same network, measured in turns, and which of them is ``written``."""

    int8: Latency
    float16: Latency
    written: Literal["int8", "float16"] = "int8"

    @property
    def wins(self) -> bool:
        """Whether INT8 is faster beyond the spread."""
        return self.int8.beats(self.float16)

    def to_json(self) -> dict[str, Any]:
        """As the sidecar of an engine has it."""
        return asdict(self) | {"int8_wins": self.wins}

    def __str__(self) -> str:
        ratio = self.float16.median / self.int8.median
        times = f"INT8 {self.int8.median:.4f} ms, FP16 {self.float16.median:.4f} at batch {self.int8.batch}"
        if self.wins:
            return f"{times}: INT8 is {ratio:.2f} times as fast"
        return f"{times}: INT8 is not faster beyond the spread ({ratio:.2f} times as fast)"


@dataclass(frozen=True, eq=False)
class FloatTwinEngine:
    """The FP16 engine of a network, and what it was built with."""

    built: BuiltEngine
    settings: BuildSettings


def check_comparable(toolkit: Toolkit, options: BuilderOptions, *, verify: bool) -> None:
    """Raises UserError when engines cannot be timed here, or there is no INT8 engine to compare."""
    if not verify:
        raise UserError("--fall-back needs to know which engine is faster: give --verify-speed too")
    if toolkit.device is None:
        raise UserError("--verify-speed times engines, which needs a GPU: leave it out")
    if options.precision != "explicit":
        raise UserError(f"--verify-speed is for Q/DQ files, not --precision {options.precision}: leave it out")
    if options.strip_weights:
        raise UserError("an engine without weights cannot be timed: leave out --strip-weights or --verify-speed")


def verify(
    toolkit: Toolkit, model: Path, int8: BuiltEngine, settings: BuildSettings
) -> tuple[SpeedCheck, FloatTwinEngine]:
    """Builds the float twin of a Q/DQ file, and compares its speed with the INT8 engine's at the first OPT batch.

    Says which is faster. Raises UserError as ``build_float_twin`` does.
    """
    say("building the FP16 engine to compare with")
    floats = build_float_twin(toolkit, model, settings)
    batch = int8.profiles[0].opt if int8.profiles else int8.inputs[0].shape[0]
    speed = check_speed(toolkit, int8, floats.built, batch)
    (say if speed.wins else warn)(str(speed))
    return speed, floats


def build_float_twin(
    toolkit: Toolkit, model: Path, settings: BuildSettings, timing_cache: bytes | None = None
) -> FloatTwinEngine:
    """Builds the FP16 engine of the float network behind a Q/DQ file.

    Args:
        toolkit: the builder.
        model: the Q/DQ file.
        settings: those of its INT8 engine.
        timing_cache: as in deploy.builder.build.

    Raises UserError when the file has no Q/DQ nodes, or TensorRT refuses the network.
    """
    half = replace(settings, precision=float_precision(toolkit))
    with tempfile.TemporaryDirectory() as folder, onnx_package():
        from export.fewer_quantizers import write_float_twin

        path = Path(folder) / "float.onnx"
        write_float_twin(model, path, half=half.precision == "explicit")
        return FloatTwinEngine(build(toolkit, path, half, timing_cache), half)


def float_precision(toolkit: Toolkit) -> EnginePrecision:
    """How a float32 network becomes an FP16 engine: ``fp16``, or ``explicit`` where types are those of the file."""
    try:
        toolkit.typing("fp16")
    except UserError:
        return "explicit"
    return "fp16"


def check_speed(toolkit: Toolkit, int8: BuiltEngine, float16: BuiltEngine, batch: int, runs: int = 200) -> SpeedCheck:
    """Measures two engines in turns, with at least ``runs`` timed inferences each. Needs the GPU they are built for."""
    found = latencies_of_built(toolkit, {"int8": int8, "float16": float16}, batch, runs)
    return SpeedCheck(found["int8"], found["float16"])


@contextmanager
def onnx_package() -> Iterator[None]:
    """Raises UserError when the packages that read and write ONNX files are not installed."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"writing variants of the file needs another package: pip install {error.name}") from error
