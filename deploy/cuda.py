"""CUDA through cuda-python: errors as one line, and memory, streams, events and graphs that free themselves.

Every object here owns one thing of the GPU and gives it back on ``close``, which may be called twice. Streams are made
non-blocking: they do not wait for the legacy default stream unless they are told to.
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
OUT_OF_MEMORY = "use a smaller batch or fewer contexts, or end other programs on the GPU"
LEGACY_STREAM = 1
"""The handle of CUDA's legacy default stream, on which libraries work unless told otherwise."""


# What a user can do about other faults of the driver.
_REMEDIES = {
    "cudaErrorSystemDriverMismatch": "it was updated while in use; restart the machine",
    "cudaErrorCompatNotSupportedOnDevice": "CUDA's forward compatibility does not work on this GPU; update the driver",
    "cudaErrorInitializationError": "it does not start; look whether nvidia-smi works",
    "cudaErrorDevicesUnavailable": "another program has the GPU for itself; end it or wait for it",
    "cudaErrorStubLibrary": "a stub was found in its place; take the folder of CUDA's stubs out of LD_LIBRARY_PATH",
    "cudaErrorSystemNotReady": "a service of the driver is not running; see NVIDIA's fabric manager",
    "cudaErrorNotPermitted": "this user may not use the GPU; ask for the permission",
}


@dataclass(frozen=True)
class Device:
    """The GPU in use, and the driver: ``driver`` is its own version, ``cuda`` the newest CUDA version that it runs."""

    name: str
    capability: str
    driver: str
    cuda: str
    memory_gib: float


def device() -> Device:
    """The current GPU. Raises UserError when there is no driver, none that is new enough, or no GPU."""
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
    """Calls a function of cuda-python; returns its value, or a tuple of them.

    Raises UserError for what the user can mend (no driver, no memory), RuntimeError for the rest.
    """
    error, *values = function(*arguments)
    if int(error) != 0:
        raise _explained(error, function.__name__)
    return None if not values else values[0] if len(values) == 1 else tuple(values)


class Stream:
    """A CUDA stream; ``handle`` is what TensorRT and other libraries take."""

    def __init__(self) -> None:
        cuda = _runtime()
        self._stream = call(cuda.cudaStreamCreateWithFlags, cuda.cudaStreamNonBlocking)

    @property
    def handle(self) -> int:
        """The stream's address."""
        return int(self._stream)

    def synchronize(self) -> None:
        """Waits until all work on the stream is done."""
        call(_runtime().cudaStreamSynchronize, self._stream)

    def wait(self, event: Event) -> None:
        """Makes further work on the stream wait for ``event``."""
        call(_runtime().cudaStreamWaitEvent, self._stream, event.raw, 0)

    @contextmanager
    def capture(self) -> Iterator[list[CudaGraph]]:
        """Records what the block launches on the stream, instead of running it; afterwards the list holds the graph."""
        cuda = _runtime()
        graphs: list[CudaGraph] = []
        # Thread-local: other threads may allocate and launch meanwhile.
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
        """Runs it behind the work that the stream has already; returns at once."""
        call(_runtime().cudaGraphLaunch, self._graph, stream)

    def close(self) -> None:
        """Frees it."""
        if self._graph is not None:
            call(_runtime().cudaGraphExecDestroy, self._graph)
            self._graph = None


class Event:
    """A point in a stream's work; ``timed`` ones tell the time between two."""

    def __init__(self, timed: bool = False) -> None:
        cuda = _runtime()
        flags = cuda.cudaEventDefault if timed else cuda.cudaEventDisableTiming
        self.raw = call(cuda.cudaEventCreateWithFlags, flags)

    def record(self, stream: int) -> Event:
        """Marks the end of the work that the stream has now."""
        call(_runtime().cudaEventRecord, self.raw, stream)
        return self

    def synchronize(self) -> None:
        """Waits until it has happened."""
        call(_runtime().cudaEventSynchronize, self.raw)

    def milliseconds_since(self, start: Event) -> float:
        """Time between two timed events that have both happened."""
        return float(call(_runtime().cudaEventElapsedTime, start.raw, self.raw))

    def close(self) -> None:
        """Frees it."""
        if self.raw is not None:
            call(_runtime().cudaEventDestroy, self.raw)
            self.raw = None


class DeviceMemory:
    """``size`` bytes of the GPU's memory at ``address``. Raises UserError when they are not free."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(_allocated(_runtime().cudaMalloc, size, "GPU"))

    def close(self) -> None:
        """Frees it."""
        if self.address:
            call(_runtime().cudaFree, self.address)
            self.address = 0


class PooledMemory:
    """``size`` bytes at ``address`` from CUDA's pool, for results: neither taking nor freeing waits for the GPU."""

    def __init__(self, size: int, stream: int) -> None:
        """The memory can be used behind the work that ``stream`` has now."""
        self.size = size
        self.address = int(_allocated(_runtime().cudaMallocAsync, size, "GPU", stream))

    def close(self) -> None:
        """Gives it back behind the work of the legacy default stream."""
        if self.address:
            call(_runtime().cudaFreeAsync, self.address, LEGACY_STREAM)
            self.address = 0


class PinnedMemory:
    """``size`` bytes of host memory that the GPU copies from and to by itself."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(_allocated(_runtime().cudaMallocHost, size, "pinned host"))

    def array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Its beginning as an array, which must not be used after ``close``."""
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
    """Copies ``size`` bytes between any two addresses, host or GPU; asynchronous where the host's are pinned."""
    cuda = _runtime()
    call(cuda.cudaMemcpyAsync, target, source, size, cuda.cudaMemcpyKind.cudaMemcpyDefault, stream)


def is_pinned(address: int) -> bool:
    """Whether the GPU can copy from the host memory at ``address`` by itself."""
    cuda = _runtime()
    attributes = call(cuda.cudaPointerGetAttributes, address)
    return bool(attributes.type == cuda.cudaMemoryType.cudaMemoryTypeHost)


def free_memory() -> int:
    """Bytes of the GPU's memory that are free."""
    return int(call(_runtime().cudaMemGetInfo)[0])


def current_device() -> int:
    """Number of the GPU that this thread uses."""
    return int(call(_runtime().cudaGetDevice))


def use_device(number: int) -> None:
    """Makes this thread use a GPU; each thread begins with the first one."""
    call(_runtime().cudaSetDevice, number)


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise UserError(f"cuda-python is not installed ({error}): {INSTALL}") from error
    return runtime


def _allocated(function: Callable[..., tuple[Any, ...]], size: int, kind: str, *arguments: Any) -> Any:
    cuda = _runtime()
    error, address = function(max(size, 1), *arguments)
    if error == cuda.cudaError_t.cudaErrorMemoryAllocation:
        cuda.cudaGetLastError()  # forgets it, so that the next call is not blamed
        free, total = call(cuda.cudaMemGetInfo)
        raise UserError(
            f"out of {kind} memory: asked for {size / GIB:.2f} GiB, the GPU has {free / GIB:.2f} of {total / GIB:.2f} "
            f"GiB free; {OUT_OF_MEMORY}"
        )
    if int(error) != 0:
        raise _explained(error, function.__name__)
    return address


def _explained(error: Any, function: str) -> Exception:
    cuda = _runtime()
    codes = cuda.cudaError_t
    if error in (codes.cudaErrorNoDevice, codes.cudaErrorInsufficientDriver):
        _, driver = cuda.cudaDriverGetVersion()
        if not driver:
            return UserError("no NVIDIA driver is found: run this on a machine with an NVIDIA GPU and its driver")
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
