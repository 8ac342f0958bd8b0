"""The one place that knows TensorRT's versions: 8.6, 10.x, 11.x and TensorRT-RTX 1.7.

It decides which builder a machine can use, how a network is created and typed there, and where the
builder tells what the final layers are. Everything else in deploy/ works through ``Toolkit`` and the part
of the Python API that all these versions share.

What differs, and what is done about it:
- Typing. A strongly typed network takes every precision from its Q/DQ nodes. 8.6 has weakly typed
  networks only: there the INT8 and FP16 builder flags allow what the Q/DQ nodes ask for, and the sidecar
  says "weak".
- EXPLICIT_BATCH must be set in 8.6, is ignored in 10.x and does not exist later: it is set where it
  exists.
- Final layers. TensorRT has a GPU and loads the engine, so the engine inspector answers. TensorRT-RTX
  builds ahead of time, often without any GPU: its verbose log lists the layers.

Run for this file: TensorRT-RTX 1.7 (tests/deploy). The branches of 8.6, 10.x and 11.x follow NVIDIA's API
documentation and were not run: they need a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qat.artifact import UserError

BuilderName = Literal["tensorrt", "tensorrt-rtx"]

# The wheel of ONNX Runtime's TensorRT-RTX provider carries the libraries; the order is that of loading.
RTX_LIBRARY_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
RTX_LIBRARIES = ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")
RTX_BINDINGS = "tensorrt_rtx_bindings"
RTX_INSTALL = "pip install tensorrt-rtx-cu13-bindings onnxruntime-ep-nv-tensorrt-rtx-cu13"
TENSORRT_INSTALL = "a machine with an NVIDIA GPU and its driver, and there pip install tensorrt"

# TensorRT's names of data types -> NumPy's.
_NUMPY_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
_WEIGHTS_LINE = re.compile(r"^Total Weights Memory: (\d+) bytes", re.MULTILINE)


@dataclass
class BuildLog:
    """Everything that parser and builder said, in order: pairs of severity (``ERROR`` ...) and text."""

    messages: list[tuple[str, str]] = field(default_factory=list)

    def texts(self, *severities: str) -> list[str]:
        """The messages of these severities, each once, in order; of all severities when none is named."""
        chosen = (text for severity, text in self.messages if not severities or severity in severities)
        return list(dict.fromkeys(chosen))

    def errors(self) -> list[str]:
        """Errors and internal errors."""
        return self.texts("ERROR", "INTERNAL_ERROR")

    def weights_bytes(self) -> int | None:
        """Bytes that the engine's weights take, or None where the builder does not log them."""
        found = [match for text in self.texts() for match in _WEIGHTS_LINE.findall(text)]
        return int(found[-1]) if found else None


@dataclass(frozen=True)
class Toolkit:
    """A usable builder: TensorRT's or TensorRT-RTX's Python module, and what this version of it can do."""

    name: BuilderName
    module: Any
    gpu: str | None = None
    """Name of the GPU that engines are built for; None when the builder works ahead of time, without one."""

    @property
    def version(self) -> str:
        """For example ``1.7.1.116``."""
        return str(self.module.__version__)

    @property
    def title(self) -> str:
        """For example ``TensorRT-RTX 1.7.1.116``."""
        return {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[self.name] + f" {self.version}"

    @property
    def typing(self) -> Literal["strong", "weak"]:
        """``strong`` where every precision comes from the network, ``weak`` where builder flags allow it."""
        strong = hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
        return "strong" if strong or self.name == "tensorrt-rtx" else "weak"

    @property
    def reports_progress(self) -> bool:
        """Whether a build tells how far it is, and can be cancelled."""
        return hasattr(self.module, "IProgressMonitor")

    def compute_capabilities(self) -> tuple[str, ...]:
        """What can be built for ahead of time, such as ``("7.5", "8.0")``; empty when only the GPU here."""
        if self.name == "tensorrt":
            return ()
        numbers = [int(name[2:]) for name in dir(self.module.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
        return tuple(f"{number // 10}.{number % 10}" for number in sorted(numbers))

    def logger(self, log: BuildLog) -> Any:
        """An ILogger that writes every message, verbose ones too, to ``log``."""
        base = self.module.ILogger

        class Recorder(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                log.messages.append((severity.name, message))

        return Recorder()

    def create_network(self, builder: Any) -> Any:
        """An empty network with explicit batch, strongly typed where that exists."""
        flags = self.module.NetworkDefinitionCreationFlag
        wanted = [getattr(flags, name, None) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED")]
        return builder.create_network(sum(1 << int(flag) for flag in wanted if flag is not None))

    def create_config(self, builder: Any, capabilities: Sequence[str] = ()) -> Any:
        """A builder configuration for INT8 Q/DQ networks that records every final layer.

        ``capabilities`` are compute capabilities such as ``"8.6"``, for a builder that works ahead of time.
        Raises UserError when one of them is not supported.
        """
        config = builder.create_builder_config()
        config.profiling_verbosity = self.module.ProfilingVerbosity.DETAILED
        if self.typing == "weak":
            config.set_flag(self.module.BuilderFlag.INT8)
            config.set_flag(self.module.BuilderFlag.FP16)
        names = [self._capability_name(capability) for capability in dict.fromkeys(capabilities)]
        if names:
            config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(getattr(self.module.ComputeCapability, name), index)
        return config

    def _capability_name(self, capability: str) -> str:
        supported = self.compute_capabilities()
        if not supported:
            raise UserError(
                f"{self.title} builds for the GPU of this machine ({self.gpu}) only: leave out "
                "--compute-capabilities, or choose --builder tensorrt-rtx"
            )
        if capability not in supported:
            raise UserError(
                f"{self.title} does not build for compute capability {capability!r}: choose from {', '.join(supported)}"
            )
        return "SM" + capability.replace(".", "")

    @contextlib.contextmanager
    def report_progress(self, config: Any, report: Callable[[float, str], None]) -> Iterator[None]:
        """While the block builds, calls ``report(fraction done, phase)`` and lets Ctrl-C cancel the build.

        An exception must not pass through TensorRT's C++ code, so Ctrl-C only sets a mark, on which the
        monitor cancels the build and KeyboardInterrupt is raised afterwards. Without a monitor Ctrl-C ends the
        process at once; nothing has been written by then.
        """
        interrupted: list[int] = []

        def mark(signal_number: int, _frame: object) -> None:
            interrupted.append(signal_number)

        if self.reports_progress:
            config.progress_monitor = _monitor(self.module, report, lambda: not interrupted)
        before = signal.signal(signal.SIGINT, mark if self.reports_progress else signal.SIG_DFL)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if interrupted:
            raise KeyboardInterrupt("the build was cancelled and nothing was written")

    def final_layers(self, log: BuildLog, plan: Any) -> tuple[Literal["log", "inspector"], str]:
        """What the builder says about the engine's final layers, and in which form: see deploy/audit.py.

        ``plan`` is the serialized engine. TensorRT-RTX answers from ``log``; TensorRT loads and inspects it.
        """
        if self.name == "tensorrt-rtx":
            return "log", "\n".join(log.texts("VERBOSE"))
        runtime = self.module.Runtime(self.logger(log))
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise UserError(
                f"{self.title} cannot load the engine that it has just built: {' '.join(log.errors()[-2:])}"
            )
        context = _context_at_optimum(engine, self.module)
        inspector = engine.create_engine_inspector()
        inspector.execution_context = context  # without it, the types of a dynamic batch are "N/A"
        return "inspector", inspector.get_engine_information(self.module.LayerInformationFormat.JSON)


def find_toolkit(choice: Literal["auto"] | BuilderName = "auto") -> Toolkit:
    """The builder asked for; ``auto`` is TensorRT where it and a GPU are usable, else TensorRT-RTX.

    Raises UserError that names every builder tried, why it failed and what to install.
    """
    finders: dict[str, Callable[[], Toolkit]] = {"tensorrt": _find_tensorrt, "tensorrt-rtx": _find_rtx}
    failures = []
    for name, find in finders.items():
        if choice not in ("auto", name):
            continue
        try:
            return find()
        except (ImportError, OSError, RuntimeError) as error:
            failures.append(f"{name} ({' '.join(str(error).split())})")
    remedy = {"tensorrt": TENSORRT_INSTALL, "tensorrt-rtx": RTX_INSTALL}.get(
        choice, f"{RTX_INSTALL} (needs no GPU), or use {TENSORRT_INSTALL}"
    )
    raise UserError(f"no TensorRT builder is usable. Tried: {'; '.join(failures)}. To install: {remedy}")


def _context_at_optimum(engine: Any, module: Any) -> Any:
    """An execution context in which every dynamic input has the size that its profile is optimized for."""
    context = engine.create_execution_context()
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        is_input = engine.get_tensor_mode(name) == module.TensorIOMode.INPUT
        if is_input and -1 in tuple(engine.get_tensor_shape(name)):
            _, optimum, _ = engine.get_tensor_profile_shape(name, 0)
            context.set_input_shape(name, optimum)
    return context


def numpy_name(data_type: Any) -> str:
    """TensorRT's data type in NumPy's words: ``DataType.FLOAT`` -> ``float32``."""
    return _NUMPY_NAMES.get(data_type.name, data_type.name.lower())


def _find_tensorrt() -> Toolkit:
    if importlib.util.find_spec("tensorrt") is None:
        raise ImportError("the package tensorrt is not installed")
    gpu = _gpu_name()
    return Toolkit("tensorrt", importlib.import_module("tensorrt"), gpu)


def _find_rtx() -> Toolkit:
    # The meta package loads its own libraries; the bindings alone need them loaded first.
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        return Toolkit("tensorrt-rtx", importlib.import_module("tensorrt_rtx"))
    if importlib.util.find_spec(RTX_BINDINGS) is None:
        raise ImportError(f"the package {RTX_BINDINGS} is not installed")
    spec = importlib.util.find_spec(RTX_LIBRARY_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the package {RTX_LIBRARY_PACKAGE}, which carries its libraries, is not installed")
    folder = Path(spec.submodule_search_locations[0])
    for pattern in RTX_LIBRARIES:
        library = next(iter(sorted(folder.glob(pattern))), None)
        if library is None:
            raise ImportError(f"no {pattern} in {folder}")
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return Toolkit("tensorrt-rtx", importlib.import_module(RTX_BINDINGS))


def _gpu_name() -> str:
    """Name of the first GPU, asked from the driver itself: torch and CUDA's runtime need not be installed."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise RuntimeError("no NVIDIA driver: libcuda.so.1 is not found") from None
    if status := driver.cuInit(0):
        raise RuntimeError(f"the NVIDIA driver finds no usable GPU: cuInit returns {status}")
    name = ctypes.create_string_buffer(256)
    if status := driver.cuDeviceGetName(name, len(name), 0):
        raise RuntimeError(f"the NVIDIA driver finds no usable GPU: cuDeviceGetName returns {status}")
    return name.value.decode()


def _monitor(module: Any, report: Callable[[float, str], None], go_on: Callable[[], bool]) -> Any:
    base = module.IProgressMonitor
    open_phases: dict[str, tuple[int, int]] = {}  # name -> (steps done, steps), outermost first

    def tell() -> None:
        fraction, share = 0.0, 1.0
        for done, steps in open_phases.values():
            share /= max(steps, 1)
            fraction += done * share
        report(min(fraction, 1.0), next(reversed(open_phases), ""))

    class Monitor(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            open_phases[phase_name] = (0, num_steps)
            tell()

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in open_phases:
                open_phases[phase_name] = (step + 1, open_phases[phase_name][1])
            tell()
            return go_on()

        def phase_finish(self, phase_name: str) -> None:
            open_phases.pop(phase_name, None)

    return Monitor()
