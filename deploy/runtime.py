"""Runs an engine: buffers, streams and CUDA graphs are taken care of.

    with Engine.load("runs/model.engine") as engine:
        logits = engine(images)                     # NumPy in, NumPy out
        logits = engine(torch_tensor_on_the_gpu)    # GPU in, GPU out: anything with __cuda_array_interface__
        for logits in engine.map(batches): ...      # copies overlap with computing

An engine holds several *executors*. An executor has all that one inference at a time needs: a stream, buffers for
inputs and outputs, scratch memory, and for each batch size that it has met an execution context with a CUDA graph
captured from it. Executors work at the same time, which is what lets copies overlap with computing.

Thread safety: ``__call__``, ``map`` and ``pinned`` may be called from any number of threads at once. Each call takes an
executor and waits when all are taken. ``close`` waits for running calls to end; a call after it raises ValueError.
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
from typing import TYPE_CHECKING, Any

from deploy import cuda
from deploy.arrays import InputBatch, pinned_array, read_inputs, sized
from deploy.buildlog import BuildLog
from deploy.executor import Executor
from deploy.settings import BuildSettings, Profile
from deploy.trt import Toolkit, find_toolkit, numpy_name, sizes
from qat.base.artifact import Sidecar, TensorSpec, parent_paths, read_sidecar, sha256_of, sidecar_path
from qat.base.choices import BuilderName
from qat.base.errors import UserError

if TYPE_CHECKING:
    import tensorrt as trt

SECONDS_BETWEEN_LOOKS = 0.05
"""How often a call that waits for an executor looks whether the engine has been closed."""


class Engine:
    """An engine in the GPU's memory; see the head of this module. Use it as a context manager, or call ``close``."""

    def __init__(
        self,
        plan: bytes,
        toolkit: Toolkit,
        *,
        contexts: int = 3,
        host_code: bool = False,
        weights: Path | None = None,
    ) -> None:
        """``plan`` is the serialized engine, ``contexts`` the number of executors: two overlap copies with computing, a
        third keeps the GPU busy while the host turns from one result to the next.

        ``host_code`` lets an engine bring code for the CPU along, as version-compatible ones do. ``weights`` is the
        ONNX file that a stripped engine takes its weights from.
        Raises UserError when the engine does not load or its buffers do not fit into the GPU's memory.
        """
        if contexts < 1:
            raise UserError(f"{contexts} contexts: needed is 1 at least")
        self.toolkit, self.contexts = toolkit, contexts
        self.log = BuildLog()
        self.lock = threading.Lock()  # TensorRT makes contexts for one thread at a time
        self._runtime, self.plan = toolkit.load(plan, self.log, host_code)
        if weights is not None:
            toolkit.refit(self.plan, weights, self.log)
        self.inputs, self.outputs = _io(self.plan, toolkit.module)
        self.profiles = _profiles(self.plan, self.inputs)
        self._closed = False
        self._device = cuda.current_device()
        self._all = threading.Lock()
        self._maps: weakref.WeakSet[_Map] = weakref.WeakSet()
        self._free: queue.Queue[Executor] = queue.Queue()
        self._executors: list[Executor] = []
        try:
            for _ in range(contexts):
                self._executors.append(Executor(self))
                self._free.put(self._executors[-1])
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_plan(cls, plan: Any, toolkit: Toolkit, settings: BuildSettings, *, contexts: int = 1) -> Engine:
        """An engine that has just been built with ``settings``."""
        return cls(bytes(plan), toolkit, contexts=contexts, host_code=settings.version_compatible)

    @classmethod
    def load(cls, path: str | Path, *, contexts: int = 3, trust: bool = False) -> Engine:
        """Loads an engine that python -m deploy.build wrote.

        An engine file can make TensorRT do anything, so it must be the one that its sidecar was written for; ``trust``
        loads any. Raises UserError when it is not, was built by another TensorRT version or for another GPU, is
        truncated, or when there is no GPU, driver or memory.
        """
        path = Path(path)
        sidecar = _trusted_sidecar(path) if trust else read_sidecar(path, "engine")
        toolkit = _toolkit_here(path, sidecar)
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
        if sidecar is None:
            return cls(plan, toolkit, contexts=contexts)
        settings = sidecar.details.get("settings", {})
        weights = _weights_of_stripped(path, sidecar) if settings.get("strip_weights") else None
        host_code = bool(settings.get("version_compatible"))
        return cls(plan, toolkit, contexts=contexts, host_code=host_code, weights=weights)

    def __call__(self, batch: Any) -> Any:
        """Computes one batch and waits for the result.

        Args:
            batch: the input, shape ``[N, ...]`` as in ``inputs``, or a dict of inputs by name. NumPy arrays are copied
                to the GPU; arrays with ``__cuda_array_interface__`` must be C-contiguous and never leave it.

        Returns:
            The output, or a dict of outputs by name where there are several: NumPy arrays for NumPy arrays,
            ``DeviceArray`` for arrays on the GPU.

        Raises UserError when shape, type or batch size is not one that the engine takes.
        """
        inputs = self._checked(batch)
        executor = self._wait_for_executor()
        try:
            executor.submit(inputs)
            return _one_or_all(executor.result())
        finally:
            self._give(executor)

    def map(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Computes batches, in order, as many at a time as there are executors: copies of one overlap with another.

        Takes and yields what ``__call__`` does. An array in pinned memory (``pinned``) is copied from where it lies
        and must not be changed until its result has been yielded; others are copied by the CPU first, which can cost
        more than all the rest. ``batches`` must not use the engine itself: it may find all executors taken.
        """
        running = _Map(self, batches)
        self._maps.add(running)
        return running

    def pinned(self, batch: int) -> Any:
        """An uninitialized input for ``batch`` images (a dict, where there are several) in pinned host memory."""
        return _one_or_all({spec.name: pinned_array(sized(spec, batch), spec.dtype) for spec in self.inputs})

    @contextmanager
    def all_executors(self) -> Iterator[list[Executor]]:
        """All executors, which other callers wait for meanwhile: for measuring."""
        with self._all, ExitStack() as stack:  # one at a time: two could wait for each other
            taken = []
            for _ in range(self.contexts):
                taken.append(self._wait_for_executor())
                stack.callback(self._give, taken[-1])
            yield taken

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    @property
    def max_batch(self) -> int:
        """The largest batch that the engine takes."""
        return max(profile.max for profile in self.profiles)

    def profile_for(self, batch: int) -> int:
        """Index of the optimization profile that suits ``batch`` best. Raises UserError when there is none."""
        fitting = [i for i, profile in enumerate(self.profiles) if profile.min <= batch <= profile.max]
        if not fitting:
            ranges = " or ".join(f"{p.min} to {p.max}" if p.min < p.max else str(p.max) for p in self.profiles)
            raise UserError(
                f"a batch of {batch} is outside what the engine takes ({ranges}): split or pad the batch, or build "
                "with other --profiles"
            )
        return min(fitting, key=lambda index: abs(self.profiles[index].opt - batch))

    def close(self) -> None:
        """Waits for running calls, ends ``map`` where it was left, and frees all memory; may be called twice."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
        with ExitStack() as stack:  # every step is taken, also where one before it fails; the last one is first
            stack.callback(self._forget)
            for executor in self._executors:
                stack.callback(executor.close)
            stack.callback(self._collect_executors)
            stack.callback(self._end_maps)
            cuda.use_device(self._device)

    def _end_maps(self) -> None:
        with ExitStack() as stack:
            for running in self._maps:
                stack.callback(running.close)

    def _collect_executors(self) -> None:
        """Waits until all executors are given back."""
        for _ in self._executors:
            self._free.get()

    def _forget(self) -> None:
        self._executors.clear()
        del self.plan, self._runtime

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked(self, batch: Any) -> InputBatch:
        inputs = read_inputs(batch, self.inputs)
        self.profile_for(inputs.batch)
        return inputs

    def _take(self, wait: bool) -> Executor | None:
        """An executor; None when none is free and there is no waiting. Raises ValueError when the engine is closed."""
        cuda.use_device(self._device)
        while not self._closed:  # asked again and again: who waits may hold an executor that ``close`` waits for
            try:
                return self._free.get(block=wait, timeout=SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                if not wait:
                    return None
        raise ValueError("the engine is closed")

    def _wait_for_executor(self) -> Executor:
        executor = self._take(wait=True)
        assert executor is not None
        return executor

    def _give(self, executor: Executor) -> None:
        try:
            executor.settle()
        finally:
            self._free.put(executor)

    def _finish(self, pending: deque[Executor]) -> Any:
        """The result of the inference that was begun first."""
        executor = pending[0]
        outputs = executor.result()
        self._give(pending.popleft())
        return _one_or_all(outputs)


def _in_flight(engine: Engine, batches: Iterable[Any]) -> Generator[Any, None, bool]:
    """Submits batches while there are executors, and yields results in order; returns True after the last one."""
    pending: deque[Executor] = deque()
    try:
        for batch in batches:
            inputs = engine._checked(batch)
            # Waiting for an executor while holding others could be waiting for each other: finish one instead.
            while (executor := engine._take(wait=not pending)) is None:
                yield engine._finish(pending)
            pending.append(executor)
            executor.submit(inputs)
        while pending:
            yield engine._finish(pending)
        return True
    finally:
        with ExitStack() as stack:  # gives back all, also where one fails
            for executor in pending:
                stack.callback(engine._give, executor)


class _Map(Iterator[Any]):
    """A running ``Engine.map``, which the engine can end when it is closed.

    The generator does not know this object: without a circle, its executors are free as soon as the caller drops it.
    """

    def __init__(self, engine: Engine, batches: Iterable[Any]) -> None:
        self._engine, self._complete = engine, False
        self._results = _in_flight(engine, batches)

    def __next__(self) -> Any:
        try:
            found = next(self._results)
        except StopIteration as end:
            self._complete = self._complete or bool(end.value)
            if not self._complete:
                raise ValueError("the engine is closed") from None
            raise
        except ValueError:
            self.close()
            raise
        if self._engine.closed:  # it could not be ended while it was computing
            self.close()
        return found

    def close(self) -> None:
        """Gives its executors back, unless it is computing in another thread, which does so when it has its result."""
        with suppress(ValueError):
            self._results.close()


def _one_or_all(arrays: dict[str, Any]) -> Any:
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _io(plan: trt.ICudaEngine, module: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a loaded engine."""
    found: dict[Any, list[TensorSpec]] = {module.TensorIOMode.INPUT: [], module.TensorIOMode.OUTPUT: []}
    for name in map(plan.get_tensor_name, range(plan.num_io_tensors)):
        spec = TensorSpec(name, sizes(plan.get_tensor_shape(name)), numpy_name(plan.get_tensor_dtype(name)))
        found[plan.get_tensor_mode(name)].append(spec)
    return tuple(found[module.TensorIOMode.INPUT]), tuple(found[module.TensorIOMode.OUTPUT])


def _profiles(plan: trt.ICudaEngine, inputs: tuple[TensorSpec, ...]) -> tuple[Profile, ...]:
    """The batch sizes of each optimization profile; those of a fixed engine are all the same."""
    first = inputs[0]
    shapes = [plan.get_tensor_profile_shape(first.name, index) for index in range(plan.num_optimization_profiles)]
    return tuple(Profile(*(int(shape[0]) for shape in three)) for three in shapes)


def why_not_here(path: Path, sidecar: Sidecar | None) -> str:
    """Why an engine cannot run on this machine: no GPU, another GPU, another version; empty when it can."""
    try:
        _toolkit_here(path, sidecar)
    except UserError as error:
        return str(error)
    return ""


def _toolkit_here(path: Path, sidecar: Sidecar | None) -> Toolkit:
    """What runs an engine on this machine. Raises UserError when nothing does."""
    device = cuda.device()
    builder: BuilderName = sidecar.details["builder"]["name"] if sidecar else "tensorrt"
    toolkit = find_toolkit(builder)
    if sidecar is not None:
        _check_built_for(path, sidecar, toolkit, device)
    return toolkit


def _weights_of_stripped(path: Path, sidecar: Sidecar) -> Path:
    """The ONNX file that a stripped engine was made from. Raises UserError when it is not there or another one."""
    assert sidecar.parent is not None
    for candidate in parent_paths(path, sidecar.parent):
        if candidate.is_file() and sha256_of(candidate) == sidecar.parent.sha256:
            return candidate
    raise UserError(
        f"{path} was built without weights and needs those of {Path(sidecar.parent.file).name} (SHA-256 "
        f"{sidecar.parent.sha256}): put that file beside it"
    )


def _trusted_sidecar(path: Path) -> Sidecar | None:
    """The sidecar of a file that is loaded in any case: it only helps to choose the runtime."""
    if not path.is_file():
        raise UserError(f"no file {path}: check the path, or make it with python -m deploy.build")
    try:
        return read_sidecar(path, "engine", trust=True) if sidecar_path(path).exists() else None
    except UserError:
        return None


def _check_built_for(path: Path, sidecar: Sidecar, toolkit: Toolkit, device: cuda.Device) -> None:
    """Says why an engine cannot load here, in better words than TensorRT's."""
    details = sidecar.details
    built = details["builder"]["version"]
    if built != toolkit.version and not details.get("version_compatible"):
        raise UserError(
            f"{path} was built by version {built}, here is {toolkit.title}: build it again here, or install {built}"
        )
    if toolkit.name == "tensorrt-rtx":
        if device.capability not in details["compute_capabilities"]:
            raise UserError(
                f"{path} was built for compute capabilities {' '.join(details['compute_capabilities'])}, this GPU "
                f"({device.name}) has {device.capability}: build it again for that"
            )
    elif device.name != details["gpu"] and not details.get("hardware_compatible"):
        raise UserError(
            f"{path} was built for {details['gpu']}, this GPU is {device.name}: build it again here, or with "
            "--hardware-compatible"
        )
