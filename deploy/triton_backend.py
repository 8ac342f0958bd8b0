"""What a Triton server's Python backend runs: an engine on the GPU, or an ONNX file in ONNX Runtime on the processor.

The model.py that ``python -m deploy.triton --backend python`` writes takes ``TritonPythonModel`` from here. Triton
calls it in a process of its own for each instance of a model, with the requests that its dynamic batching has put
together. An engine's batches are computed in threads, several at the same time, so that copies overlap with computing;
their responses are sent when they are there.

Tensors pass as DLPack and never as the backend's own NumPy arrays. A server that was built for NumPy 1 (tritonserver
2.51 was) reads arrays of NumPy 2 as empty and gives zeros for an input, both without an error.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deploy import cuda
from deploy.runtime import Engine
from deploy.triton_config import ENGINE, ONNX
from qat.base.artifact import Sidecar, read_sidecar
from qat.base.errors import one_line

IN_FLIGHT = 3
"""How many batches of an engine are on their way at the same time in each instance."""

Arrays = Mapping[str, np.ndarray]
"""Inputs or outputs by name, [N, ...] each."""


class TritonPythonModel:
    """A model of Triton's Python backend. The names and the order of its methods are Triton's."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the file beside model.py. What it raises makes the model unavailable, and is in the server's log."""
        import triton_python_backend_utils as backend  # Triton's own; only its processes have it

        self._backend = backend
        self._config = json.loads(args["model_config"])
        self._open = ExitStack()
        self._threads: Threads | None = None
        folder = Path(args["model_repository"], args["model_version"])
        if (folder / ONNX).is_file():
            instances = sum(group["count"] for group in self._config["instance_group"])
            self._sidecar, self._run = open_onnx(folder / ONNX, threads=threads_for(instances))
        else:
            cuda.use_device(int(args["model_instance_device_id"]))
            self._sidecar, self._run = open_engine(folder / ENGINE, self._open)
            self._threads = self._open.enter_context(Threads(IN_FLIGHT))

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Computes the requests as one batch. Returns a response for each; a request that fails gets an error.

        Of an engine it returns None, as soon as the batch is on its way; then responses are sent.
        """
        if self._threads is None:
            return self._responses(requests)
        self._threads.start(partial(self._send, requests))
        return None

    def finalize(self) -> None:
        """Waits for what is on its way, and frees what ``initialize`` loaded."""
        self._open.close()

    def _send(self, requests: Sequence[Any]) -> None:
        for request, response in zip(requests, self._responses(requests), strict=True):
            sender = request.get_response_sender()
            sender.send(response, flags=self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _responses(self, requests: Sequence[Any]) -> list[Any]:
        try:
            asked = [self._inputs(request) for request in requests]
            together = self._config["max_batch_size"] > 0  # else the shape of a request is the whole batch
            return [self._response(found) for found in answer(self._run, asked, together=together)]
        except Exception as error:  # whoever waits for a response must get one
            return [self._response(error) for _ in requests]

    def _inputs(self, request: Any) -> Arrays:
        get = self._backend.get_input_tensor_by_name
        return {spec.name: np.from_dlpack(get(request, spec.name)) for spec in self._sidecar.inputs}

    def _response(self, found: Arrays | Exception) -> Any:
        if isinstance(found, Exception):
            return self._backend.InferenceResponse(error=self._backend.TritonError(one_line(found)))
        tensor = self._backend.Tensor.from_dlpack
        return self._backend.InferenceResponse([tensor(name, _ForTriton(array)) for name, array in found.items()])


Run = Callable[[Sequence[Arrays]], Arrays]
"""Inputs of one or more requests -> outputs of all of them, as one batch in their order."""


def open_onnx(path: Path, *, threads: int = 0) -> tuple[Sidecar, Run]:
    """An ONNX file in ONNX Runtime, which computes as ``deploy.evaluate`` does, with ``threads``; 0 for all cores.

    Raises UserError when the file is not the one that its sidecar was written for, or does not load.
    """
    from export.session import run, runs_in_onnx_runtime, session

    sidecar = read_sidecar(path, "onnx")
    with runs_in_onnx_runtime(path):
        loaded = session(path, threads=threads)
    return sidecar, lambda requests: run(loaded, _joined(requests, {spec.name: None for spec in sidecar.inputs}))


def open_engine(path: Path, close: ExitStack) -> tuple[Sidecar, Run]:
    """An engine in ``deploy.Engine``, for IN_FLIGHT threads; ``close`` frees it.

    Requests are put together in pinned memory. Raises UserError as ``Engine.load`` does.
    """
    sidecar = read_sidecar(path, "engine")
    engine = close.enter_context(Engine.load(path, contexts=IN_FLIGHT))
    free: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    for _ in range(IN_FLIGHT):
        free.put(_by_name(engine.pinned_input(engine.max_batch), engine.inputs))

    def run(requests: Sequence[Arrays]) -> Arrays:
        pinned = free.get()
        try:
            return _by_name(engine(_joined(requests, pinned)), engine.outputs)
        finally:
            free.put(pinned)

    return sidecar, run


class Threads:
    """Does ``count`` things at the same time; ``start`` waits while so many are not done. Leaving it waits for all."""

    def __init__(self, count: int) -> None:
        self._free, self._pool = threading.Semaphore(count), ThreadPoolExecutor(count)

    def start(self, work: Callable[[], None]) -> None:
        """Begins ``work``, which raises nothing."""
        self._free.acquire()
        self._pool.submit(work).add_done_callback(lambda _: self._free.release())

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()


def answer(run: Run, asked: Sequence[Arrays], *, together: bool) -> list[Arrays | Exception]:
    """The outputs of each request, or why there are none.

    Requests that are computed ``together`` and fail are computed one by one, so that an error is only in the answer of
    the request that made it.
    """
    if together and len(asked) > 1:
        try:
            return list(_split(run(asked), [len(next(iter(inputs.values()))) for inputs in asked]))
        except Exception:
            pass  # the request that it comes from says it below
    return [_alone(run, inputs) for inputs in asked]


def threads_for(instances: int) -> int:
    """How many threads each of ``instances`` processes gets, so that together they have the cores of this one."""
    return max(1, len(os.sched_getaffinity(0)) // instances)


def _alone(run: Run, inputs: Arrays) -> Arrays | Exception:
    try:
        return run([inputs])
    except Exception as error:  # whatever it is, it is this request's
        return error


def _joined(requests: Sequence[Arrays], buffers: Mapping[str, np.ndarray | None]) -> dict[str, np.ndarray]:
    """The inputs of all requests, one after the other, in the buffer of that name if there is one and it is enough."""
    found = {}
    for name, buffer in buffers.items():
        arrays = [inputs[name] for inputs in requests]
        count = sum(map(len, arrays))
        if buffer is not None and count <= len(buffer):
            found[name] = np.concatenate(arrays, out=buffer[:count])
        else:
            found[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return found


def _split(outputs: Arrays, counts: Sequence[int]) -> list[Arrays]:
    """The outputs of each request, of ``counts`` images, out of those of all."""
    ends = np.cumsum(counts)
    if any(len(array) != ends[-1] for array in outputs.values()):
        raise ValueError("an output has another batch than the inputs")
    return [
        {name: array[end - count : end] for name, array in outputs.items()}
        for count, end in zip(counts, ends, strict=True)
    ]


def _by_name(found: Any, specs: Sequence[Any]) -> dict[str, Any]:
    """What ``Engine`` gives and takes without a name where there is only one."""
    return found if isinstance(found, dict) else {specs[0].name: found}


class _ForTriton:
    """An array whose DLPack capsule Triton can take.

    Triton frees the array itself, and renames the capsule in a way that NumPy does not know. NumPy's destructor of the
    capsule would print an error for each.
    """

    def __init__(self, array: np.ndarray) -> None:
        self._array = np.ascontiguousarray(array)

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self._array.__dlpack__(**options)
        _remove_destructor(capsule, None)
        return capsule

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


_remove_destructor = ctypes.pythonapi.PyCapsule_SetDestructor
_remove_destructor.argtypes = [ctypes.py_object, ctypes.c_void_p]
