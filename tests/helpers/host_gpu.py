"""A GPU in the host's memory, for machines without one: it stands for CUDA's runtime and for one engine of TensorRT.

Everything of ours above it is the real code: deploy/cuda.py, arrays.py, executor.py, runtime.py. The engine computes
``y = 3 x + 1`` for float32 [N, 4], at once instead of later; contexts can be made to fail as they do on a GPU.
"""

# ruff: noqa: N802 - the names are CUDA's

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploy import cuda
from deploy.loaded_engine import LoadedEngine
from deploy.runtime import Engine
from deploy.settings import Profile
from qat.base.artifact import TensorSpec

VALUES = 4
INPUT, OUTPUT = TensorSpec("x", (-1, VALUES), "float32"), TensorSpec("y", (-1, VALUES), "float32")


def answer_to(x: np.ndarray) -> np.ndarray:
    """What the engine answers."""
    return 3 * x + 1


class HostGpu:
    """CUDA's runtime as deploy/cuda.py calls it. Counts memory; unknown names are those of the real package."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._real = runtime
        self._lock = threading.Lock()
        self._handles = itertools.count(1)
        self._memory: dict[int, Any] = {}
        self._pinned: set[int] = set()
        self._captures: dict[int, list[Callable[[], None]]] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._last = threading.local()
        self.bytes = 0
        self.most_bytes = 1 << 30
        self.dead = False
        self.break_next_context = False
        self.contexts = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if callable(value) and name.startswith("cuda") and not isinstance(value, type):
            raise NotImplementedError(name)
        return value

    # --- memory

    def cudaMalloc(self, size: int) -> tuple[Any, int]:
        with self._lock:
            if self.dead:
                return self._fault(), 0
            if self.bytes + size > self.most_bytes:
                return self._error("cudaErrorMemoryAllocation"), 0
            made = ctypes.create_string_buffer(size)
            address = ctypes.addressof(made)
            self._memory[address] = made
            self.bytes += size
        return self._ok(), address

    def cudaMallocAsync(self, size: int, stream: int) -> tuple[Any, int]:
        return self.cudaMalloc(size)

    def cudaMallocHost(self, size: int) -> tuple[Any, int]:
        error, address = self.cudaMalloc(size)
        self._pinned.add(address)
        return error, address

    def cudaFree(self, address: int) -> tuple[Any]:
        with self._lock:
            self.bytes -= len(self._memory.pop(address))
            self._pinned.discard(address)
        return (self._ok(),)

    def cudaFreeAsync(self, address: int, stream: int) -> tuple[Any]:
        return self.cudaFree(address)

    def cudaFreeHost(self, address: int) -> tuple[Any]:
        return self.cudaFree(address)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: int) -> tuple[Any]:
        if self.dead:
            return (self._fault(),)
        ctypes.memmove(target, source, size)
        return (self._ok(),)

    def cudaPointerGetAttributes(self, address: int) -> tuple[Any, Any]:
        host = self._real.cudaMemoryType.cudaMemoryTypeHost
        pinned = any(start <= address < start + len(self._memory[start]) for start in list(self._pinned))
        return self._ok(), SimpleNamespace(type=host if pinned else None)

    def cudaMemGetInfo(self) -> tuple[Any, int, int]:
        return self._ok(), self.most_bytes - self.bytes, self.most_bytes

    # --- streams, events, graphs

    def cudaStreamCreateWithFlags(self, flags: Any) -> tuple[Any, int]:
        return (self._fault(), 0) if self.dead else (self._ok(), next(self._handles))

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        return (self._fault() if self.dead else self._ok(),)

    def cudaStreamDestroy(self, stream: int) -> tuple[Any]:
        return (self._ok(),)

    def cudaEventCreateWithFlags(self, flags: Any) -> tuple[Any, int]:
        return self._ok(), next(self._handles)

    def cudaEventDestroy(self, event: int) -> tuple[Any]:
        return (self._ok(),)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any]:
        self._captures[stream] = []
        return (self._ok(),)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, Any]:
        return self._ok(), self._captures.pop(stream)

    def cudaGraphInstantiate(self, captured: list[Callable[[], None]], flags: int) -> tuple[Any, int]:
        handle = next(self._handles)
        self._graphs[handle] = captured
        return self._ok(), handle

    def cudaGraphDestroy(self, captured: Any) -> tuple[Any]:
        return (self._ok(),)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any]:
        del self._graphs[graph]
        return (self._ok(),)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any]:
        if self.dead:
            return (self._fault(),)
        try:
            for work in self._graphs[graph]:
                work()
        except RuntimeError:
            return (self._error("cudaErrorLaunchFailure"),)
        return (self._ok(),)

    # --- the rest

    def cudaGetDevice(self) -> tuple[Any, int]:
        return self._ok(), 0

    def cudaSetDevice(self, number: int) -> tuple[Any]:
        return (self._ok(),)

    def cudaGetLastError(self) -> tuple[Any]:
        """The last error of this thread, which is then forgotten, except that of a GPU that does no more."""
        found, self._last.error = getattr(self._last, "error", self._ok()), self._ok()
        return (found,)

    def cudaGetErrorString(self, error: Any) -> tuple[Any, bytes]:
        return self._ok(), b"on the stand-in"

    def launch(self, stream: int, work: Callable[[], None]) -> None:
        """Does ``work``, or records it where ``stream`` captures."""
        if stream in self._captures:
            self._captures[stream].append(work)
        else:
            work()

    def _ok(self) -> Any:
        return self._real.cudaError_t.cudaSuccess

    def _fault(self) -> Any:
        return self._error("cudaErrorIllegalAddress")

    def _error(self, name: str) -> Any:
        self._last.error = getattr(self._real.cudaError_t, name)
        return self._last.error


class HostContext:
    """TensorRT's IExecutionContext of the engine."""

    def __init__(self, gpu: HostGpu) -> None:
        self._gpu, self._addresses = gpu, dict[str, int]()
        self._shape: tuple[int, ...] = ()
        self.broken = False
        gpu.contexts += 1

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self._gpu.launch(stream, self._compute)
        return True

    def _compute(self) -> None:
        if self._gpu.break_next_context:
            self._gpu.break_next_context, self.broken = False, True
        if self.broken:
            raise RuntimeError("this context is broken")
        count = int(np.prod(self._shape))
        x, y = (
            np.frombuffer((ctypes.c_float * count).from_address(self._addresses[name]), np.float32) for name in "xy"
        )
        y[:] = answer_to(x)


def install(monkeypatch: pytest.MonkeyPatch) -> HostGpu:
    """The stand-in, in place of CUDA's runtime."""
    made = HostGpu()
    monkeypatch.setattr(cuda, "_runtime", lambda: made)
    return made


def load(gpu: HostGpu, *, contexts: int = 2, batches: Profile = Profile(1, 8, 32)) -> Engine:  # noqa: B008
    """The engine, in the stand-in's memory."""
    loaded = LoadedEngine.__new__(LoadedEngine)
    loaded.inputs, loaded.outputs, loaded.profiles = (INPUT,), (OUTPUT,), (batches,)
    loaded.lock, loaded.cuda_engine, loaded._runtime = threading.Lock(), None, None  # type: ignore[assignment]
    loaded.toolkit = SimpleNamespace(  # type: ignore[assignment]
        create_context=lambda engine, scratch: HostContext(gpu), scratch_bytes=lambda engine: 1000
    )
    loaded.log = SimpleNamespace(last_errors=lambda: "none")  # type: ignore[assignment]
    return Engine(loaded, contexts=contexts)
