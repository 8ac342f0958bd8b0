"""Runs an engine. Buffers, streams and CUDA graphs are managed here.

    with Engine.load("runs/model.engine") as engine:
        logits = engine(images)                     # NumPy in, NumPy out
        logits = engine(torch_tensor_on_the_gpu)    # GPU in, GPU out: anything with __cuda_array_interface__
        for logits in engine.map(batches): ...      # copies overlap with computing

An engine has several *executors* (deploy/executor.py). An executor has all that one inference at a time needs: a
stream, buffers for inputs and outputs, scratch memory, and for each batch size an execution context with a CUDA graph
captured from it. Executors work at the same time, so that copies overlap with computing.

Thread safety: ``__call__``, ``map`` and ``pinned_input`` may be called from any number of threads at once. Each call
takes an executor and waits while all are taken. ``close`` waits for running calls to end. A call after ``close`` raises
EngineClosedError, which is a ValueError.

Failures: an error is raised by the call whose inference failed, and by no other. Its executor is closed and made anew
before it is used again. After an error that the whole process cannot recover from, such as an illegal address, every
call raises one.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from deploy import cuda
from deploy.arrays import InputBatch, pinned_array, read_inputs, shape_for_batch
from deploy.executor import Executor
from deploy.loaded_engine import LoadedEngine
from deploy.settings import BuildSettings, Profile
from deploy.trt import Toolkit
from qat.base.artifact import TensorSpec
from qat.base.errors import UserError

SECONDS_BETWEEN_LOOKS = 0.05
"""How often a call that waits for an executor checks whether the engine has been closed."""


class EngineClosedError(ValueError):
    """The engine is closed, and the call was not computed."""

    def __init__(self) -> None:
        super().__init__("the engine is closed")


class Engine:
    """An engine that is ready to run. Use it as a context manager, or call ``close``.

    Example::

        with Engine.load("runs/model.engine") as engine:
            logits = engine(images)    # as engine.inputs says, such as float32 [N, 3, 224, 224] -> float32 [N, 1000]
    """

    def __init__(self, loaded: LoadedEngine, *, contexts: int = 3) -> None:
        """Allocates all buffers. The engine then owns ``loaded`` and closes it.

        Args:
            loaded: the deserialized engine.
            contexts: the number of executors. Two overlap copies with computing; a third keeps the GPU busy while the
                host turns from one result to the next.

        Raises UserError when the buffers do not fit into the GPU's memory.
        """
        _check_contexts(contexts)
        self.loaded, self.contexts = loaded, contexts
        self._closed = False
        self._device = cuda.current_device()
        self._all = threading.Lock()
        self._maps: weakref.WeakSet[_RunningMap] = weakref.WeakSet()
        self._free: queue.Queue[Executor] = queue.Queue()
        self._executors: list[Executor] = []
        try:
            for _ in range(contexts):
                self._executors.append(Executor(loaded))
                self._free.put(self._executors[-1])
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_plan(
        cls, plan: Any, toolkit: Toolkit, settings: BuildSettings | None = None, *, contexts: int = 1
    ) -> Engine:
        """An engine that ``toolkit`` has just built, with ``settings`` or the default ones."""
        _check_contexts(contexts)
        host_code = settings is not None and settings.version_compatible
        return cls(LoadedEngine(bytes(plan), toolkit, host_code=host_code), contexts=contexts)

    @classmethod
    def load(cls, path: str | Path, *, contexts: int = 3, trust: bool = False) -> Engine:
        """Loads an engine file that python -m deploy.build or ``build_engine`` wrote.

        Args:
            path: the engine; its sidecar is beside it.
            contexts: how many inferences can run at the same time.
            trust: load the file even if it is not the one that the sidecar was written for. An engine file can make
                TensorRT execute anything, so trust only files whose origin you know.

        Raises UserError when the file is not the sidecar's, was built by another version of TensorRT or for another
        GPU, or is truncated, and when there is no GPU, no driver or not enough GPU memory.
        """
        _check_contexts(contexts)
        return cls(LoadedEngine.load(Path(path), trust=trust), contexts=contexts)

    def __call__(self, batch: Any) -> Any:
        """Computes one batch and waits for the result.

        Args:
            batch: the input, shape ``[N, ...]`` as in ``inputs``, or a dict of inputs by name. NumPy arrays are copied
                to the GPU; arrays with ``__cuda_array_interface__`` must be C-contiguous and never leave it.

        Returns:
            The output, or a dict of outputs by name if there are several: NumPy arrays for NumPy arrays,
            ``DeviceArray`` for arrays on the GPU.

        Raises UserError when the engine does not take this shape, type or batch size.
        """
        inputs = self._check_inputs(batch)
        executor = self._wait_for_executor()
        try:
            executor.submit(inputs)
            return _single_or_dict(executor.result())
        finally:
            self._return_executor(executor)

    def map(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Computes batches in order, as many at a time as there are executors. Their copies and computing overlap.

        Takes and yields what ``__call__`` does. An array in pinned memory (``pinned_input``) is copied directly and
        must not be changed until its result has been yielded. Other arrays are first copied by the CPU, which can cost
        more than everything else. ``batches`` must not use the engine itself: all executors may be taken.
        """
        running = _RunningMap(self, batches)
        self._maps.add(running)
        return running

    def pinned_input(self, batch: int) -> Any:
        """An uninitialized input for ``batch`` images in pinned host memory; a dict if there are several inputs."""
        return _single_or_dict(
            {spec.name: pinned_array(shape_for_batch(spec, batch), spec.dtype) for spec in self.inputs}
        )

    @property
    def toolkit(self) -> Toolkit:
        """The TensorRT that runs the engine."""
        return self.loaded.toolkit

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, shape (-1 for a dynamic batch) and NumPy type of each input."""
        return self.loaded.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Name, shape (-1 for a dynamic batch) and NumPy type of each output."""
        return self.loaded.outputs

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The batch sizes of each optimization profile."""
        return self.loaded.profiles

    @property
    def max_batch(self) -> int:
        """The largest batch that the engine takes."""
        return self.loaded.max_batch

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    @contextmanager
    def all_executors(self) -> Iterator[list[Executor]]:
        """All executors, for measuring. Other callers wait meanwhile."""
        with self._all, ExitStack() as stack:  # one caller at a time: two could wait for each other
            taken = []
            for _ in range(self.contexts):
                taken.append(self._wait_for_executor())
                stack.callback(self._return_executor, taken[-1])
            yield taken

    def close(self) -> None:
        """Waits for running calls, ends every ``map`` that is not complete, and frees all memory.

        It may be called twice.
        """
        with self.loaded.lock:
            if self._closed:
                return
            self._closed = True
        with ExitStack() as stack:  # runs every step, even if one fails; the last one that is added runs first
            stack.callback(self.loaded.close)
            stack.callback(self._close_executors)
            stack.callback(self._collect_executors)
            stack.callback(self._end_maps)
            cuda.use_device(self._device)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_maps(self) -> None:
        with ExitStack() as stack:
            for running in self._maps:
                stack.callback(running.close)

    def _collect_executors(self) -> None:
        """Waits until all executors are returned."""
        for _ in self._executors:
            self._free.get()

    def _close_executors(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._executors.clear)
            for executor in self._executors:
                stack.callback(executor.close)

    def _check_inputs(self, batch: Any) -> InputBatch:
        inputs = read_inputs(batch, self.inputs)
        self.loaded.profile_for(inputs.batch)
        return inputs

    def _take_executor(self, wait: bool) -> Executor | None:
        """An executor, or None if none is free and ``wait`` is false. Raises EngineClosedError."""
        cuda.use_device(self._device)
        # Checked again and again, because a waiting call may hold other executors, for which ``close`` waits.
        while not self._closed:
            try:
                executor = self._free.get(block=wait, timeout=SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                if not wait:
                    return None
                continue
            return self._made_anew(executor) if executor.failed else executor
        raise EngineClosedError

    def _made_anew(self, failed: Executor) -> Executor:
        """An executor in place of one that failed. If none can be made, this call has the error, and the next tries."""
        try:
            with suppress(Exception):  # why it failed has been said
                failed.close()
            made = Executor(self.loaded)
        except BaseException:
            self._free.put(failed)
            raise
        self._executors[self._executors.index(failed)] = made
        return made

    def _wait_for_executor(self) -> Executor:
        executor = self._take_executor(wait=True)
        assert executor is not None
        return executor

    def _return_executor(self, executor: Executor) -> None:
        try:
            executor.settle()
        finally:
            self._free.put(executor)

    def _finish_first(self, pending: deque[Executor]) -> Any:
        """The result of the inference that was submitted first."""
        executor = pending[0]
        outputs = executor.result()
        self._return_executor(pending.popleft())
        return _single_or_dict(outputs)


def _submit_ahead(engine: Engine, batches: Iterable[Any]) -> Generator[Any, None, bool]:
    """Submits batches while there are executors, and yields results in order. Returns True after the last one."""
    pending: deque[Executor] = deque()
    try:
        for batch in batches:
            inputs = engine._check_inputs(batch)
            # Two maps that wait for an executor while they hold others could wait for each other: finish one instead.
            while (executor := engine._take_executor(wait=not pending)) is None:
                yield engine._finish_first(pending)
            pending.append(executor)
            executor.submit(inputs)
        while pending:
            yield engine._finish_first(pending)
        return True
    finally:
        with ExitStack() as stack:  # returns all, even if one fails
            for executor in pending:
                stack.callback(engine._return_executor, executor)


class _RunningMap(Iterator[Any]):
    """A running ``Engine.map``, which the engine can end when it is closed.

    The generator has no reference to this object. Without a reference cycle, the executors are free as soon as the
    caller drops it.
    """

    def __init__(self, engine: Engine, batches: Iterable[Any]) -> None:
        self._engine, self._complete = engine, False
        self._results = _submit_ahead(engine, batches)

    def __next__(self) -> Any:
        try:
            found = next(self._results)
        except StopIteration as end:
            self._complete = self._complete or bool(end.value)
            if not self._complete:
                raise EngineClosedError from None
            raise
        except ValueError:
            self.close()
            raise
        if self._engine.closed:  # it could not be ended while it was computing
            self.close()
        return found

    def close(self) -> None:
        """Returns its executors. If it is computing in another thread, that thread returns them with its result."""
        with suppress(ValueError):
            self._results.close()


def _check_contexts(contexts: int) -> None:
    """Raises UserError before an engine is loaded in vain."""
    if contexts < 1:
        raise UserError(f"{contexts} contexts: must be at least 1")


def _single_or_dict(arrays: dict[str, Any]) -> Any:
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays
