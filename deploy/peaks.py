"""What the GPU at hand can do at most, measured: bytes copied, and operations in INT8 and in FP16."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from deploy import cuda
from deploy.float_twin import onnx_package
from deploy.kernel_sweep import KernelSweep
from deploy.measure import layer_times
from deploy.runtime import Engine
from deploy.trt import Toolkit
from qat.base.console import say
from qat.rules.kernel_profile import LayerKind

_COPIED = 2**29
_WARM_UP, _RUNS = 3, 20
_BATCH = 64
# Large enough to keep a GPU busy: 2.4e11 multiplications and additions for each batch.
_LAYER = LayerKind(operation="convolution", in_channels=512, out_channels=512, kernel=(3, 3), pixels=28)


@dataclass(frozen=True)
class Peaks:
    """``bytes_per_s``: read and written by a copy within the GPU's memory. ``int8_per_s``, ``fp16_per_s``: operations
    of a large convolution, a multiplication and an addition counting as two."""

    bytes_per_s: float
    int8_per_s: float
    fp16_per_s: float


def measure_peaks(toolkit: Toolkit) -> Peaks:
    """The peaks of the GPU at hand; two small engines are built for it.

    Raises UserError when there is not enough memory, or TensorRT refuses the engines.
    """
    operations = 2 * _BATCH * _LAYER.pixels**2 * _LAYER.in_channels * _LAYER.out_channels * 9
    with tempfile.TemporaryDirectory() as folder, onnx_package():
        from export.kernel_networks import LAYER

        sweep, seconds = KernelSweep(toolkit, Path(folder), _BATCH), []
        for quantized in (True, False):
            built = sweep.build(_LAYER, quantized=quantized)
            with Engine.from_plan(built.plan, toolkit) as engine:
                times = layer_times(engine, _BATCH, _RUNS)
            seconds.append(sum(spent for layer, spent in times if LAYER in layer.onnx_nodes) / 1000)
    found = Peaks(_copied_per_second(), operations / seconds[0], operations / seconds[1])
    say(
        f"peaks: {found.bytes_per_s / 1e9:,.0f} GB/s, INT8 {found.int8_per_s / 1e12:,.0f} and "
        f"FP16 {found.fp16_per_s / 1e12:,.0f} TOPS"
    )
    return found


def _copied_per_second() -> float:
    """Bytes that a copy within the GPU's memory reads and writes a second."""
    with ExitStack() as stack:
        source, target = (stack.enter_context(closing(cuda.DeviceMemory(_COPIED))) for _ in range(2))
        stream = stack.enter_context(closing(cuda.Stream()))
        start, end = (stack.enter_context(closing(cuda.Event(timed=True))) for _ in range(2))
        for _ in range(_WARM_UP):
            cuda.copy(target.address, source.address, _COPIED, stream.handle)
        start.record(stream.handle)
        for _ in range(_RUNS):
            cuda.copy(target.address, source.address, _COPIED, stream.handle)
        end.record(stream.handle)
        stream.synchronize()
        return 2 * _COPIED * _RUNS / (end.milliseconds_since(start) / 1000)
