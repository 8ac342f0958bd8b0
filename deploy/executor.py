"""One inference at a time: a stream, buffers, scratch memory, and a CUDA graph for each batch size.

A graph is tied to the execution context that it was captured from and to the shapes that it had, so every batch size
has a context of its own. They share the executor's scratch memory, which is why an executor runs one inference at a
time.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy import cuda
from deploy.arrays import DeviceArray, InputBatch, size_in_bytes, sized
from deploy.buildlog import raise_if_out_of_memory
from qat.base.artifact import TensorSpec

if TYPE_CHECKING:
    import tensorrt as trt

    from deploy.runtime import Engine

GRAPHS_PER_EXECUTOR = 16
"""Batch sizes of which an executor keeps the context and graph; the one longest unused gives way."""


class BoundContext:
    """The engine, ready to run one batch size on an executor's buffers."""

    def __init__(self, executor: Executor, batch: int) -> None:
        engine = executor.engine
        self.batch, self._executor = batch, executor
        self._graph: cuda.CudaGraph | None = None
        self._profiler: Any = None
        profile = engine.profile_for(batch)
        with engine.lock:
            self.context: trt.IExecutionContext = engine.toolkit.create_context(engine.plan, executor.scratch)
        taken = True
        if len(engine.profiles) > 1:
            taken = self.context.set_optimization_profile_async(profile, executor.stream.handle)
            executor.stream.synchronize()
        for spec in engine.inputs:
            taken &= self.context.set_input_shape(spec.name, sized(spec, batch))
        for spec in (*engine.inputs, *engine.outputs):
            taken &= self.context.set_tensor_address(spec.name, executor.buffers[spec.name].address)
        if not taken:
            raise RuntimeError(f"TensorRT does not take a batch of {batch}: {engine.log.last_errors()}")
        self._enqueue()  # the first run does what cannot be captured
        executor.stream.synchronize()
        self._graph = self._captured()

    def launch(self) -> None:
        """Runs the engine on the executor's stream, from its input buffers to its output buffers; returns at once."""
        if self._graph is None:
            self._enqueue()
        else:
            self._graph.launch(self._executor.stream.handle)

    @property
    def stream(self) -> int:
        """Handle of the stream that ``launch`` works on."""
        return self._executor.stream.handle

    def synchronize(self) -> None:
        """Waits for all launches."""
        self._executor.stream.synchronize()

    @property
    def uses_graph(self) -> bool:
        """Whether ``launch`` replays a CUDA graph; some networks cannot be captured."""
        return self._graph is not None

    def layer_milliseconds(self, runs: int) -> dict[str, float]:
        """Mean time of each layer over ``runs``, by its name, from TensorRT's profiler."""
        totals: dict[str, float] = {}
        base = self._executor.engine.toolkit.module.IProfiler

        class Profiler(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                totals[layer_name] = totals.get(layer_name, 0.0) + ms

        self._profiler = Profiler()  # lives as long as the context, which goes on using it
        self.context.profiler = self._profiler
        self.context.enqueue_emits_profile = True
        for _ in range(runs):
            self._enqueue()
            self._executor.stream.synchronize()
        return {name: total / runs for name, total in totals.items()}

    def close(self) -> None:
        """Frees graph and context."""
        if self._graph is not None:
            self._graph.close()
        self._graph = None
        del self.context

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self._executor.stream.handle):
            raise_if_out_of_memory(self._executor.engine.log)
            raise RuntimeError(f"TensorRT could not run the engine: {self._executor.engine.log.last_errors()}")

    def _captured(self) -> cuda.CudaGraph | None:
        captured: list[cuda.CudaGraph] = []
        for _ in range(2):  # what another thread does to the whole GPU can break a capture
            with contextlib.suppress(RuntimeError), self._executor.stream.capture() as graphs:
                captured = graphs  # filled when the block ends
                self._enqueue()
            if captured:
                return captured[0]
        return None


class Executor:
    """See the head of this module. Its buffers hold the largest batch that the engine takes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._bound: OrderedDict[int, BoundContext] = OrderedDict()
        self._staging: dict[str, cuda.PinnedMemory] = {}
        self._outputs: dict[str, Any] = {}
        self._held: InputBatch | None = None
        self.stream: cuda.Stream
        self.scratch: cuda.DeviceMemory
        self.buffers: dict[str, cuda.DeviceMemory] = {}
        self._own: contextlib.ExitStack = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            self.stream = cuda.Stream()
            undo.callback(self.stream.close)
            self.scratch = cuda.DeviceMemory(engine.toolkit.scratch_bytes(engine.plan))
            undo.callback(self.scratch.close)
            for spec in (*engine.inputs, *engine.outputs):
                memory = cuda.DeviceMemory(size_in_bytes(spec, engine.max_batch))
                undo.callback(memory.close)
                self.buffers[spec.name] = memory
            self._waiting = cuda.Event()
            undo.callback(self._waiting.close)
            self._own = undo.pop_all()

    def bind(self, batch: int) -> BoundContext:
        """The engine for ``batch`` images; made at the first use."""
        if batch not in self._bound:
            if len(self._bound) == GRAPHS_PER_EXECUTOR:
                self._bound.popitem(last=False)[1].close()
            self._bound[batch] = BoundContext(self, batch)
        self._bound.move_to_end(batch)
        return self._bound[batch]

    def submit(self, inputs: InputBatch) -> None:
        """Starts an inference: copies in, computes and copies out, all behind one another on the stream."""
        bound = self.bind(inputs.batch)
        stream = self.stream.handle
        self._held = inputs  # their memory must live until it has been copied
        for array in inputs.arrays:
            source = array.address
            if array.stream is not None:
                self.stream.wait(self._waiting.record(array.stream))
            elif not cuda.is_pinned(array.address):
                staged = self._pinned(array.spec).array(sized(array.spec, inputs.batch), array.spec.dtype)
                np.copyto(staged, array.owner)
                source = staged.ctypes.data
            cuda.copy(self.buffers[array.spec.name].address, source, array.size, stream)
        bound.launch()
        for spec in self.engine.outputs:
            shape = sized(spec, inputs.batch)
            target: DeviceArray | np.ndarray
            if inputs.on_gpu:
                target = DeviceArray(shape, spec.dtype, stream)
                address = target.memory.address
            else:
                target = self._pinned(spec).array(shape, spec.dtype)
                address = target.ctypes.data
            self._outputs[spec.name] = target
            cuda.copy(address, self.buffers[spec.name].address, size_in_bytes(spec, inputs.batch), stream)

    def result(self) -> dict[str, Any]:
        """Waits for what was submitted; the outputs by name, which belong to the caller."""
        self.stream.synchronize()
        self._held = None
        found, self._outputs = self._outputs, {}
        return {name: array.copy() if isinstance(array, np.ndarray) else array for name, array in found.items()}

    def settle(self) -> None:
        """Waits for whatever was submitted and forgets it."""
        self.stream.synchronize()
        self._held = None
        self._outputs = {}

    def close(self) -> None:
        """Frees everything, also where a part of that fails."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._own.close)
            for memory in self._staging.values():
                stack.callback(memory.close)
            for bound in self._bound.values():
                stack.callback(bound.close)
            stack.callback(self.stream.synchronize)
        self._bound.clear()
        self._staging.clear()

    def _pinned(self, spec: TensorSpec) -> cuda.PinnedMemory:
        if spec.name not in self._staging:
            self._staging[spec.name] = cuda.PinnedMemory(size_in_bytes(spec, self.engine.max_batch))
        return self._staging[spec.name]
