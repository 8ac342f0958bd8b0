"""CUDA through cuda-python: errors as one line, and memory, streams, events and graphs that free themselves.

Every object here owns one GPU resource and frees it in ``close``, which may be called twice. Streams are non-blocking:
they do not wait for the legacy default stream unless they are told to.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qat.base.errors import UserError

if TYPE_CHECKING:
    from cuda.bindings import runtime

INSTALL = "pip install cuda-bindings"
GIB = 2**30
OUT_OF_MEMORY = "use a smaller batch or fewer contexts, or stop other programs on the GPU"
LEGACY_STREAM = 1
"""Handle of CUDA's legacy default stream, which libraries use unless they are told otherwise."""

# What a user can do about other errors of the driver.
_REMEDIES = {
    "cudaErrorSystemDriverMismatch": "it was updated while in use; restart the machine",
    "cudaErrorCompatNotSupportedOnDevice": "CUDA's forward compatibility does not work on this GPU; update the driver",
    "cudaErrorInitializationError": "it does not start; check that nvidia-smi works",
    "cudaErrorDevicesUnavailable": "another program uses the GPU exclusively; stop it or wait for it",
    "cudaErrorStubLibrary": "a stub library was loaded instead; remove the folder of CUDA's stubs from LD_LIBRARY_PATH",
    "cudaErrorSystemNotReady": "a service of the driver is not running; check NVIDIA's fabric manager",
    "cudaErrorNotPermitted": "this user may not use the GPU; ask for permission",
}


@dataclass(frozen=True)
class Device:
    """The GPU in use and its driver: ``driver`` is the driver's version, ``cuda`` the newest CUDA version it runs."""

    name: str
    capability: str
    driver: str
    cuda: str
    memory_gib: float


def device() -> Device:
    """The current GPU. Raises UserError when there is no driver or no GPU, or the driver is too old."""
    cuda = _runtime()
    count = call(cuda.cudaGetDeviceCount)
    if not count:
        raise UserError("the NVIDIA driver finds no GPU: run this on a machine that has one")
    properties = call(cuda.cudaGetDeviceProperties, call(cuda.cudaGetDevice))
    return Device(
        name=properties.name.decode().rstrip("\0"),
        capability=f"{properties.major}.{properties.minor}",
        driver=_driver_version(),
        cuda=_cuda_version(call(cuda.cudaDriverGetVersion)),
        memory_gib=properties.totalGlobalMem / GIB,
    )


def call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Calls a function of cuda-python. Returns its value, or a tuple if there are several.

    Raises UserError for what the user can fix (no driver, no memory), RuntimeError for the rest.
    """
    error, *values = function(*arguments)
    if int(error) != 0:
        # The thread's next user of CUDA, such as TensorRT for another request, would take it for its own.
        _runtime().cudaGetLastError()
        raise _error_for(error, function.__name__)
    return None if not values else values[0] if len(values) == 1 else tuple(values)


class Stream:
    """A CUDA stream. TensorRT and other libraries take its ``handle``."""

    def __init__(self) -> None:
        cuda = _runtime()
        self._stream = call(cuda.cudaStreamCreateWithFlags, cuda.cudaStreamNonBlocking)

    @property
    def handle(self) -> int:
        """The stream's address."""
        return int(self._stream)

    @property
    def open(self) -> bool:
        """Whether it is not closed yet."""
        return self._stream is not None

    def synchronize(self) -> None:
        """Waits until all work on the stream is done."""
        call(_runtime().cudaStreamSynchronize, self._stream)

    def wait(self, event: Event) -> None:
        """Makes further work on the stream wait for ``event``."""
        call(_runtime().cudaStreamWaitEvent, self._stream, event.raw, 0)

    @contextmanager
    def capture(self) -> Iterator[list[CudaGraph]]:
        """Records what the block launches on the stream instead of running it. Then the list has the graph."""
        cuda = _runtime()
        graphs: list[CudaGraph] = []
        # Thread-local, so that other threads may allocate and launch meanwhile.
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(cuda.cudaStreamBeginCapture, self._stream, mode)
        try:
            yield graphs
        except BaseException:
            cuda.cudaStreamEndCapture(self._stream)  # its own error would hide the cause
            raise
        graphs.append(CudaGraph(call(cuda.cudaStreamEndCapture, self._stream)))

    def close(self) -> None:
        """Frees it."""
        if self._stream is not None:
            call(_runtime().cudaStreamDestroy, self._stream)
            self._stream = None


class CudaGraph:
    """An executable CUDA graph."""

    def __init__(self, captured: runtime.cudaGraph_t) -> None:
        cuda = _runtime()
        try:
            self._graph = call(cuda.cudaGraphInstantiate, captured, 0)
        finally:
            call(cuda.cudaGraphDestroy, captured)

    def launch(self, stream: int) -> None:
        """Starts it after the work that the stream already has. Does not wait."""
        call(_runtime().cudaGraphLaunch, self._graph, stream)

    def close(self) -> None:
        """Frees it."""
        if self._graph is not None:
            call(_runtime().cudaGraphExecDestroy, self._graph)
            self._graph = None


class Event:
    """A point in a stream's work. Two events that are ``timed`` tell the time between them."""

    def __init__(self, timed: bool = False) -> None:
        cuda = _runtime()
        flags = cuda.cudaEventDefault if timed else cuda.cudaEventDisableTiming
        self.raw = call(cuda.cudaEventCreateWithFlags, flags)

    def record(self, stream: int) -> Event:
        """Marks the end of the work that the stream already has."""
        call(_runtime().cudaEventRecord, self.raw, stream)
        return self

    def synchronize(self) -> None:
        """Waits until the work before it is done."""
        call(_runtime().cudaEventSynchronize, self.raw)

    def milliseconds_since(self, start: Event) -> float:
        """Milliseconds between two timed events that have both happened."""
        return float(call(_runtime().cudaEventElapsedTime, start.raw, self.raw))

    def close(self) -> None:
        """Frees it."""
        if self.raw is not None:
            call(_runtime().cudaEventDestroy, self.raw)
            self.raw = None


class DeviceMemory:
    """``size`` bytes of GPU memory at ``address``. Raises UserError when there is not enough free memory."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(_allocate(_runtime().cudaMalloc, size, "GPU"))

    def close(self) -> None:
        """Frees it."""
        if self.address:
            call(_runtime().cudaFree, self.address)
            self.address = 0


class PooledMemory:
    """``size`` bytes at ``address`` from CUDA's pool, for results: neither allocating nor freeing waits for the GPU."""

    def __init__(self, size: int, stream: int) -> None:
        """The memory can be used after the work that ``stream`` already has."""
        self.size = size
        self.address = int(_allocate(_runtime().cudaMallocAsync, size, "GPU", stream))

    def close(self) -> None:
        """Frees it after the work of the legacy default stream."""
        if self.address:
            call(_runtime().cudaFreeAsync, self.address, LEGACY_STREAM)
            self.address = 0


class PinnedMemory:
    """``size`` bytes of host memory that the GPU can read and write without the CPU."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(_allocate(_runtime().cudaMallocHost, size, "pinned host"))

    def array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """An array over its first bytes. It must not be used after ``close``."""
        count = math.prod(shape) * np.dtype(dtype).itemsize
        assert count <= self.size
        view: Any = (ctypes.c_byte * count).from_address(self.address)
        return np.frombuffer(view, dtype=dtype).reshape(shape)

    def close(self) -> None:
        """Frees it."""
        if self.address:
            call(_runtime().cudaFreeHost, self.address)
            self.address = 0


def copy(target: int, source: int, size: int, stream: int) -> None:
    """Copies ``size`` bytes between any two addresses, host or GPU. Asynchronous if the host memory is pinned."""
    cuda = _runtime()
    call(cuda.cudaMemcpyAsync, target, source, size, cuda.cudaMemcpyKind.cudaMemcpyDefault, stream)


def is_pinned(address: int) -> bool:
    """Whether the host memory at ``address`` is pinned, so that the GPU can copy it without the CPU."""
    cuda = _runtime()
    attributes = call(cuda.cudaPointerGetAttributes, address)
    return bool(attributes.type == cuda.cudaMemoryType.cudaMemoryTypeHost)


def free_memory() -> int:
    """How many bytes of GPU memory are free."""
    return int(call(_runtime().cudaMemGetInfo)[0])


def total_memory() -> int:
    """How many bytes of memory the GPU has."""
    return int(call(_runtime().cudaMemGetInfo)[1])


def current_device() -> int:
    """Index of the GPU that this thread uses."""
    return int(call(_runtime().cudaGetDevice))


def use_device(number: int) -> None:
    """Makes this thread use the GPU with this index. Every thread starts with GPU 0."""
    call(_runtime().cudaSetDevice, number)


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise UserError(f"cuda-python is not installed ({error}): {INSTALL}") from error
    return runtime


def _allocate(function: Callable[..., tuple[Any, ...]], size: int, kind: str, *arguments: Any) -> Any:
    cuda = _runtime()
    error, address = function(max(size, 1), *arguments)
    if error == cuda.cudaError_t.cudaErrorMemoryAllocation:
        cuda.cudaGetLastError()  # clears the error, so that the next call does not report it
        free, total = call(cuda.cudaMemGetInfo)
        raise UserError(
            f"out of {kind} memory: {size / GIB:.2f} GiB are needed, the GPU has {free / GIB:.2f} of {total / GIB:.2f} "
            f"GiB free; {OUT_OF_MEMORY}"
        )
    if int(error) != 0:
        raise _error_for(error, function.__name__)
    return address


def _error_for(error: Any, function: str) -> Exception:
    cuda = _runtime()
    codes = cuda.cudaError_t
    if error in (codes.cudaErrorNoDevice, codes.cudaErrorInsufficientDriver):
        _, driver = cuda.cudaDriverGetVersion()
        if not driver:
            return UserError("there is no NVIDIA driver: run this on a machine with an NVIDIA GPU and its driver")
        if error == codes.cudaErrorNoDevice:
            return UserError("the NVIDIA driver finds no GPU: run this on a machine that has one")
        _, needed = cuda.cudaRuntimeGetVersion()
        return UserError(
            f"the NVIDIA driver is too old: it runs CUDA {_cuda_version(driver)}, cuda-python needs "
            f"{_cuda_version(needed)}; update the driver, or install an older cuda-bindings"
        )
    if error == codes.cudaErrorMemoryAllocation:
        return UserError(f"out of GPU memory: {OUT_OF_MEMORY}")
    if remedy := _REMEDIES.get(codes(error).name):
        return UserError(f"the NVIDIA driver cannot be used ({codes(error).name}): {remedy}")
    _, text = cuda.cudaGetErrorString(error)
    return RuntimeError(f"{function}: {codes(error).name}, {text.decode()}")


def _cuda_version(number: int) -> str:
    """13020 -> ``13.2``."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver_version() -> str:
    for path in ("/sys/module/nvidia/version", "/proc/driver/nvidia/version"):
        try:
            text = Path(path).read_text()
        except OSError:
            continue
        if match := re.search(r"\d+\.\d+(\.\d+)?", text):
            return match[0]
    return "unknown"
