"""Arrays that go into and come out of an engine: NumPy's on the host, and any with ``__cuda_array_interface__``."""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy import cuda
from qat.base.artifact import TensorSpec
from qat.base.errors import UserError


@dataclass(frozen=True)
class InputArray:
    """An input as given: C-contiguous memory at ``address``, kept alive by ``owner``."""

    spec: TensorSpec
    address: int
    size: int
    owner: Any
    stream: int | None
    """The stream that its values are computed on, for arrays on the GPU; None for those on the host."""


@dataclass(frozen=True)
class InputBatch:
    """All inputs of one inference, on the host or on the GPU."""

    batch: int
    arrays: tuple[InputArray, ...]
    on_gpu: bool


class DeviceArray:
    """An output in the GPU's memory; ``torch.as_tensor(x, device="cuda")`` takes it as it is.

    Its values are complete when the call that returned it returns. The memory is free for further results as soon as
    the object is gone: work on another stream than the default one must be done by then.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, stream: int = cuda.LEGACY_STREAM) -> None:
        """Uninitialized, to be written by the work that ``stream`` gets from now on."""
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.memory = cuda.PooledMemory(self.size, stream)
        weakref.finalize(self, _close_quietly, self.memory)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.memory.address, False),
            "strides": None,
            "version": 3,
            "stream": None,
        }

    def numpy(self) -> np.ndarray:
        """A copy on the host."""
        array = np.empty(self.shape, self.dtype)
        stream = cuda.Stream()  # waiting for the whole GPU would break graphs that other threads are capturing
        try:
            cuda.copy(array.ctypes.data, self.memory.address, self.size, stream.handle)
            stream.synchronize()
        finally:
            stream.close()
        return array


def pinned_array(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An uninitialized array in pinned memory, which is freed with it."""
    memory = cuda.PinnedMemory(math.prod(shape) * np.dtype(dtype).itemsize)
    array = memory.array(shape, dtype)
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base  # views of the array keep this one alive, and with it the memory
    weakref.finalize(owner, _close_quietly, memory)
    return array


def read_inputs(given: Any, specs: Sequence[TensorSpec]) -> InputBatch:
    """Checks what a caller gives against the engine's inputs. Raises UserError that names what differs."""
    arrays = given if isinstance(given, Mapping) else {specs[0].name: given}
    names = [spec.name for spec in specs]
    if sorted(arrays) != sorted(names):
        raise UserError(f"the engine has the inputs {', '.join(names)}; given: {', '.join(map(str, arrays))}")
    read = [_read(arrays[spec.name], spec) for spec in specs]
    if len({batch for _, batch in read}) > 1:
        sizes = ", ".join(f"{array.spec.name} {batch}" for array, batch in read)
        raise UserError(f"the inputs have different batch sizes: {sizes}")
    if len({array.stream is None for array, _ in read}) > 1:
        raise UserError("some inputs are on the host and some on the GPU: put all on one side")
    array, batch = read[0]
    return InputBatch(batch, tuple(array for array, _ in read), array.stream is not None)


def sized(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """The tensor's shape for ``batch`` images."""
    return tuple(batch if size == -1 else size for size in spec.shape)


def size_in_bytes(spec: TensorSpec, batch: int) -> int:
    """Bytes of the tensor for ``batch`` images."""
    return math.prod(sized(spec, batch)) * np.dtype(spec.dtype).itemsize


def _read(given: Any, spec: TensorSpec) -> tuple[InputArray, int]:
    interface = getattr(given, "__cuda_array_interface__", None)
    if interface is None:
        if not isinstance(given, np.ndarray):
            raise UserError(
                f"input {spec.name!r} is a {type(given).__name__}: give a NumPy array, or one on the GPU "
                "with __cuda_array_interface__"
            )
        _check(spec, given.shape, given.dtype)
        array = np.ascontiguousarray(given)
        return InputArray(spec, array.ctypes.data, array.nbytes, array, None), array.shape[0]
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    _check(spec, shape, dtype)
    strides = interface.get("strides")
    if strides is not None and not _is_contiguous(shape, strides, dtype.itemsize):
        raise UserError(f"input {spec.name!r} is not C-contiguous on the GPU: make it so (torch: .contiguous())")
    stream = interface.get("stream") or _current_stream(given) or cuda.LEGACY_STREAM
    size = math.prod(shape) * dtype.itemsize
    return InputArray(spec, interface["data"][0], size, given, stream), shape[0]


def _current_stream(given: Any) -> int:
    """The stream that torch computes a tensor on, which its interface does not name; 0 for other arrays."""
    if not type(given).__module__.startswith("torch"):
        return 0
    return int(sys.modules["torch"].cuda.current_stream(given.device).cuda_stream)


def _check(spec: TensorSpec, shape: tuple[int, ...], dtype: np.dtype) -> None:
    wanted = ", ".join("N" if size == -1 else str(size) for size in spec.shape)
    if len(shape) != len(spec.shape) or shape[1:] != spec.shape[1:]:
        raise UserError(f"input {spec.name!r} has shape {list(shape)}; the engine takes [{wanted}]")
    if dtype != np.dtype(spec.dtype):
        raise UserError(f"input {spec.name!r} is {dtype}; the engine takes {spec.dtype}: convert it first")


def _is_contiguous(shape: tuple[int, ...], strides: Sequence[int], itemsize: int) -> bool:
    wanted = [math.prod(shape[index + 1 :]) * itemsize for index in range(len(shape))]
    return all(found == want or size == 1 for size, found, want in zip(shape, strides, wanted, strict=True))


def _close_quietly(memory: cuda.PooledMemory | cuda.PinnedMemory) -> None:
    with contextlib.suppress(Exception):  # at the end of the program CUDA may be gone already
        memory.close()
