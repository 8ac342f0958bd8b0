"""The float engine of a Q/DQ file: what INT8 has to be faster than."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deploy.builder import BuiltEngine, build
from deploy.measure import Latency, latencies
from deploy.runtime import Engine
from deploy.settings import BuildSettings
from deploy.trt import Toolkit
from qat.base.errors import UserError


@dataclass(frozen=True)
class SpeedCheck:
    """An INT8 engine and the FP16 engine of the same network, measured in turns."""

    int8: Latency
    float16: Latency

    @property
    def wins(self) -> bool:
        """Whether INT8 is faster beyond the spread."""
        return self.int8.beats(self.float16)

    def to_json(self) -> dict[str, Any]:
        """As the sidecar of an engine has it."""
        return {"int8": asdict(self.int8), "float16": asdict(self.float16), "int8_wins": self.wins}

    def __str__(self) -> str:
        ratio = self.float16.median / self.int8.median
        times = f"INT8 {self.int8.median:.4f} ms, FP16 {self.float16.median:.4f} at batch {self.int8.batch}"
        if self.wins:
            return f"{times}: INT8 is {ratio:.2f} times as fast"
        return f"{times}: INT8 is not faster beyond the spread ({ratio:.2f} times as fast)"


def build_float_twin(
    toolkit: Toolkit, model: Path, settings: BuildSettings, timing_cache: bytes | None = None
) -> BuiltEngine:
    """Builds the FP16 engine of the float network behind a Q/DQ file.

    Args:
        toolkit: the builder.
        model: the Q/DQ file.
        settings: those of its INT8 engine.
        timing_cache: as in deploy.builder.build.

    Raises UserError when the file has no Q/DQ nodes, or TensorRT refuses the network.
    """
    try:
        toolkit.typing("fp16")
        half = replace(settings, precision="fp16")
    except UserError:  # only strongly typed networks: the types are in the file
        half = settings
    with tempfile.TemporaryDirectory() as folder, onnx_package():
        from export.fewer_quantizers import write_float_twin

        path = Path(folder) / "float.onnx"
        write_float_twin(model, path, half=half.precision == "explicit")
        return build(toolkit, path, half, timing_cache)


def check_speed(toolkit: Toolkit, int8: BuiltEngine, float16: BuiltEngine, batch: int, runs: int = 200) -> SpeedCheck:
    """Measures two engines in turns, with at least ``runs`` timed inferences each. Needs the GPU they are built for."""
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(Engine.from_plan(built.plan, toolkit, contexts=1))
            for name, built in (("int8", int8), ("float16", float16))
        }
        return SpeedCheck(**latencies(engines, batch, runs))


@contextmanager
def onnx_package() -> Iterator[None]:
    """Raises UserError when the packages that read and write ONNX files are not installed."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"writing variants of the file needs another package: pip install {error.name}") from error
