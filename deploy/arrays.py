"""What goes into and comes out of an engine: NumPy arrays, and GPU arrays with ``__cuda_array_interface__``."""

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
    """One input: ``size`` bytes of C-contiguous memory at ``address``, kept alive by ``owner``."""

    spec: TensorSpec
    address: int
    size: int
    owner: Any
    stream: int | None
    """Handle of the CUDA stream that computes its values; None for an array on the host."""


@dataclass(frozen=True)
class InputBatch:
    """All inputs of one inference, on the host or on the GPU."""

    batch: int
    arrays: tuple[InputArray, ...]
    on_gpu: bool


class DeviceArray:
    """An output in the GPU's memory. ``torch.as_tensor(x, device="cuda")`` uses it without a copy.

    Its values are complete when the call that returned it returns. Its memory is reused as soon as the object is
    deleted, so work that reads it on a stream other than the default one must be done by then.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, stream: int = cuda.LEGACY_STREAM) -> None:
        """Uninitialized memory. Work that is added to ``stream`` from now on may write it."""
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
        """Its values, copied to the host."""
        array = np.empty(self.shape, self.dtype)
        stream = cuda.Stream()  # synchronizing the whole GPU would break graph captures of other threads
        try:
            cuda.copy(array.ctypes.data, self.memory.address, self.size, stream.handle)
            stream.synchronize()
        finally:
            stream.close()
        return array


def pinned_array(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An uninitialized array in pinned host memory, which is freed together with the array."""
    memory = cuda.PinnedMemory(math.prod(shape) * np.dtype(dtype).itemsize)
    array = memory.array(shape, dtype)
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base  # views of the array keep this owner alive, and with it the memory
    weakref.finalize(owner, _close_quietly, memory)
    return array


def read_inputs(given: Any, specs: Sequence[TensorSpec]) -> InputBatch:
    """Checks a caller's arrays against the engine's inputs.

    Args:
        given: an array, or a dict of arrays by input name.
        specs: the engine's inputs.

    Raises UserError that names what differs.
    """
    arrays = given if isinstance(given, Mapping) else {specs[0].name: given}
    names = [spec.name for spec in specs]
    if sorted(arrays) != sorted(names):
        raise UserError(f"the engine has the inputs {', '.join(names)}; given: {', '.join(map(str, arrays))}")
    read = [_read_input(arrays[spec.name], spec) for spec in specs]
    if len({batch for _, batch in read}) > 1:
        sizes = ", ".join(f"{array.spec.name} {batch}" for array, batch in read)
        raise UserError(f"the inputs have different batch sizes: {sizes}")
    if len({array.stream is None for array, _ in read}) > 1:
        raise UserError("some inputs are on the host and some on the GPU: put all of them on one side")
    array, batch = read[0]
    return InputBatch(batch, tuple(array for array, _ in read), array.stream is not None)


def shape_for_batch(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """The tensor's shape with ``batch`` in place of a dynamic batch."""
    return tuple(batch if size == -1 else size for size in spec.shape)


def size_in_bytes(spec: TensorSpec, batch: int) -> int:
    """How many bytes the tensor takes for ``batch`` images."""
    return math.prod(shape_for_batch(spec, batch)) * np.dtype(spec.dtype).itemsize


def _read_input(given: Any, spec: TensorSpec) -> tuple[InputArray, int]:
    interface = getattr(given, "__cuda_array_interface__", None)
    if interface is None:
        if not isinstance(given, np.ndarray):
            raise UserError(
                f"input {spec.name!r} is a {type(given).__name__}: give a NumPy array, or one on the GPU "
                "with __cuda_array_interface__"
            )
        _check_fits(spec, given.shape, given.dtype)
        array = np.ascontiguousarray(given)
        return InputArray(spec, array.ctypes.data, array.nbytes, array, None), array.shape[0]
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    _check_fits(spec, shape, dtype)
    strides = interface.get("strides")
    if strides is not None and not _is_contiguous(shape, strides, dtype.itemsize):
        raise UserError(
            f"input {spec.name!r} is not C-contiguous on the GPU: make it contiguous (torch: .contiguous())"
        )
    stream = interface.get("stream") or _current_stream(given) or cuda.LEGACY_STREAM
    size = math.prod(shape) * dtype.itemsize
    return InputArray(spec, interface["data"][0], size, given, stream), shape[0]


def _current_stream(given: Any) -> int:
    """The stream that torch computes a tensor on, which the array interface does not name; 0 for other arrays."""
    if not type(given).__module__.startswith("torch"):
        return 0
    return int(sys.modules["torch"].cuda.current_stream(given.device).cuda_stream)


def _check_fits(spec: TensorSpec, shape: tuple[int, ...], dtype: np.dtype) -> None:
    wanted = ", ".join("N" if size == -1 else str(size) for size in spec.shape)
    if len(shape) != len(spec.shape) or shape[1:] != spec.shape[1:]:
        raise UserError(f"input {spec.name!r} has shape {list(shape)}; the engine takes [{wanted}]")
    if dtype != np.dtype(spec.dtype):
        raise UserError(f"input {spec.name!r} is {dtype}; the engine takes {spec.dtype}: convert it first")


def _is_contiguous(shape: tuple[int, ...], strides: Sequence[int], itemsize: int) -> bool:
    wanted = [math.prod(shape[index + 1 :]) * itemsize for index in range(len(shape))]
    return all(found == want or size == 1 for size, found, want in zip(shape, strides, wanted, strict=True))


def _close_quietly(memory: cuda.PooledMemory | cuda.PinnedMemory) -> None:
    with contextlib.suppress(Exception):  # at the end of the program CUDA may already be shut down
        memory.close()
