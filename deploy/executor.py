"""One inference at a time: a stream, buffers, scratch memory, and a CUDA graph for each batch size.

A CUDA graph belongs to the execution context that it was captured from and to the shapes of that moment, so every batch
size has a context of its own. All contexts of an executor share its scratch memory. That is why an executor runs one
inference at a time.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy import cuda
from deploy.arrays import DeviceArray, InputBatch, shape_for_batch, size_in_bytes
from deploy.build_log import raise_if_out_of_memory
from deploy.loaded_engine import LoadedEngine
from qat.base.artifact import TensorSpec

if TYPE_CHECKING:
    import tensorrt as trt

GRAPHS_PER_EXECUTOR = 16
"""How many batch sizes an executor keeps a context and a graph for. The least recently used one is dropped."""


class BoundContext:
    """The engine, ready to run one batch size on an executor's buffers."""

    def __init__(self, executor: Executor, batch: int) -> None:
        engine = executor.engine
        self.batch, self._executor = batch, executor
        self._graph: cuda.CudaGraph | None = None
        self._profiler: Any = None
        profile = engine.profile_for(batch)
        with engine.lock:
            self.context: trt.IExecutionContext = engine.toolkit.create_context(engine.cuda_engine, executor.scratch)
        accepted = True
        if len(engine.profiles) > 1:
            accepted = self.context.set_optimization_profile_async(profile, executor.stream.handle)
            executor.stream.synchronize()
        for spec in engine.inputs:
            accepted &= self.context.set_input_shape(spec.name, shape_for_batch(spec, batch))
        for spec in (*engine.inputs, *engine.outputs):
            accepted &= self.context.set_tensor_address(spec.name, executor.buffers[spec.name].address)
        if not accepted:
            raise RuntimeError(f"TensorRT does not take a batch of {batch}: {engine.log.last_errors()}")
        self.run()  # the first run does work that cannot be captured
        self._graph = self._capture_graph()

    def launch(self) -> None:
        """Starts the engine on the executor's stream, from the input buffers to the output buffers. Does not wait."""
        if self._graph is None:
            self._enqueue()
        else:
            self._graph.launch(self._executor.stream.handle)

    def run(self) -> None:
        """Runs the engine once, without its graph, and waits."""
        self._enqueue()
        self._executor.stream.synchronize()

    @property
    def stream(self) -> int:
        """Handle of the stream that ``launch`` uses."""
        return self._executor.stream.handle

    def synchronize(self) -> None:
        """Waits until all launches are done."""
        self._executor.stream.synchronize()

    @property
    def uses_graph(self) -> bool:
        """Whether ``launch`` replays a CUDA graph; some networks cannot be captured."""
        return self._graph is not None

    def layer_milliseconds(self, runs: int) -> dict[str, float]:
        """Mean time of each layer over ``runs`` inferences in milliseconds, by layer name, from TensorRT's profiler."""
        totals: dict[str, float] = {}
        base = self._executor.engine.toolkit.module.IProfiler

        class Profiler(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                totals[layer_name] = totals.get(layer_name, 0.0) + ms

        self._profiler = Profiler()  # must live as long as the context, which keeps using it
        self.context.profiler = self._profiler
        self.context.enqueue_emits_profile = True
        for _ in range(runs):
            self.run()
        return {name: total / runs for name, total in totals.items()}

    def close(self) -> None:
        """Frees the graph and the context."""
        if self._graph is not None:
            self._graph.close()
        self._graph = None
        del self.context

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self._executor.stream.handle):
            raise_if_out_of_memory(self._executor.engine.log)
            raise RuntimeError(f"TensorRT could not run the engine: {self._executor.engine.log.last_errors()}")

    def _capture_graph(self) -> cuda.CudaGraph | None:
        captured: list[cuda.CudaGraph] = []
        for _ in range(2):  # an operation of another thread on the whole GPU can break a capture
            with contextlib.suppress(RuntimeError), self._executor.stream.capture() as graphs:
                captured = graphs  # filled when the block ends
                self._enqueue()
            if captured:
                return captured[0]
        return None


class Executor:
    """Runs one inference at a time of a loaded engine. Its buffers hold the largest batch that the engine takes.

    Attributes:
        failed: whether an inference failed. Its stream and contexts may then be of no use: ``Engine`` replaces it.
    """

    def __init__(self, engine: LoadedEngine) -> None:
        """Allocates stream, scratch memory and buffers. Raises UserError when the GPU's memory is too small."""
        self.engine = engine
        self.failed = False
        self._contexts: OrderedDict[int, BoundContext] = OrderedDict()
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
            self.scratch = cuda.DeviceMemory(engine.toolkit.scratch_bytes(engine.cuda_engine))
            undo.callback(self.scratch.close)
            for spec in (*engine.inputs, *engine.outputs):
                memory = cuda.DeviceMemory(size_in_bytes(spec, engine.max_batch))
                undo.callback(memory.close)
                self.buffers[spec.name] = memory
            self._waiting = cuda.Event()
            undo.callback(self._waiting.close)
            self._own = undo.pop_all()

    def bind(self, batch: int) -> BoundContext:
        """The engine for ``batch`` images, made at the first use."""
        if batch not in self._contexts:
            if len(self._contexts) == GRAPHS_PER_EXECUTOR:
                self._contexts.popitem(last=False)[1].close()
            self._contexts[batch] = BoundContext(self, batch)
        self._contexts.move_to_end(batch)
        return self._contexts[batch]

    def submit(self, inputs: InputBatch) -> None:
        """Starts an inference: copies in, computes and copies out, one after the other on the stream."""
        with self._noticing_failure():
            self._submit(inputs)

    def _submit(self, inputs: InputBatch) -> None:
        context = self.bind(inputs.batch)
        stream = self.stream.handle
        self._held = inputs  # their memory must live until it is copied
        for array in inputs.arrays:
            source = array.address
            if array.stream is not None:
                self.stream.wait(self._waiting.record(array.stream))
            elif not cuda.is_pinned(array.address):
                staged = self._staging_memory(array.spec).array(
                    shape_for_batch(array.spec, inputs.batch), array.spec.dtype
                )
                np.copyto(staged, array.owner)
                source = staged.ctypes.data
            cuda.copy(self.buffers[array.spec.name].address, source, array.size, stream)
        context.launch()
        for spec in self.engine.outputs:
            shape = shape_for_batch(spec, inputs.batch)
            target: DeviceArray | np.ndarray
            if inputs.on_gpu:
                target = DeviceArray(shape, spec.dtype, stream)
                address = target.memory.address
            else:
                target = self._staging_memory(spec).array(shape, spec.dtype)
                address = target.ctypes.data
            self._outputs[spec.name] = target
            cuda.copy(address, self.buffers[spec.name].address, size_in_bytes(spec, inputs.batch), stream)

    def result(self) -> dict[str, Any]:
        """Waits for the submitted inference. Returns its outputs by name; they belong to the caller."""
        with self._noticing_failure():
            self.stream.synchronize()
        self._held = None
        found, self._outputs = self._outputs, {}
        return {name: array.copy() if isinstance(array, np.ndarray) else array for name, array in found.items()}

    def settle(self) -> None:
        """Waits for the submitted inference, if there is one, and drops its outputs."""
        try:
            with self._noticing_failure():
                self.stream.synchronize()
        finally:
            self._held = None
            self._outputs = {}

    def close(self) -> None:
        """Frees everything, even if a part of that fails. It may be called twice."""
        staging, self._staging = self._staging, {}
        contexts, self._contexts = self._contexts, OrderedDict()
        with contextlib.ExitStack() as stack:
            stack.callback(self._own.close)
            for memory in staging.values():
                stack.callback(memory.close)
            for context in contexts.values():
                stack.callback(context.close)
            if self.stream.open:
                stack.callback(self.stream.synchronize)

    @contextlib.contextmanager
    def _noticing_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.failed = True
            raise

    def _staging_memory(self, spec: TensorSpec) -> cuda.PinnedMemory:
        if spec.name not in self._staging:
            self._staging[spec.name] = cuda.PinnedMemory(size_in_bytes(spec, self.engine.max_batch))
        return self._staging[spec.name]
