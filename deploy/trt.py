"""Knows TensorRT's versions, with deploy/weak_typing.py and nothing else: 8.6, 10.x, 11.x and TensorRT-RTX 1.7.

It knows how a network is created and typed in each version, how a build is configured, where the builder lists the
final layers, and how an engine is loaded. Everything else in deploy/ uses ``Toolkit`` and the part of the Python API
that all these versions share. Which builder is installed is found by deploy/installed.py.

The differences, and how they are handled:

- Typing. A strongly typed network takes every precision from the network itself. 8.6 has only weakly typed networks:
  there the builder flags INT8 and FP16 allow what the Q/DQ nodes ask for, and the sidecar says "weak". FP16, BF16 and
  implicit INT8 from a float32 network need weak typing, which 8.6 and 10.x have.
- EXPLICIT_BATCH must be set in 8.6, is ignored in 10.x and does not exist later. It is set if it exists.
- Sharing an optimization profile between execution contexts is a preview feature of 8.6 and always on from 10.x.
- Final layers. TensorRT has a GPU and loads the engine, so the engine inspector lists them. TensorRT-RTX builds ahead
  of time, often without a GPU, so they are read from its verbose log.
- The weight scales of a transposed convolution lie along its input channels until 10.0 (8.6.0 was seen to refuse
  others), and along its output channels from 10.2. TensorRT-RTX takes both, and computes in float.
- A context that uses the caller's scratch memory: ``device_memory`` in 8.6, a strategy and ``set_device_memory`` later.

This file was run with TensorRT-RTX 1.7 (tests/deploy), TensorRT 8.6.0 (tests/gpu) and the lean runtime 10.16.1, both on
an H200. What builds with 10.x and 11.x follows NVIDIA's API documentation and the types of 10.13; it was not run.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deploy import cuda, weak_typing
from deploy.build_log import BuildLog, progress_monitor, raise_if_out_of_memory, recording_logger
from deploy.settings import BuildSettings
from qat.base.choices import BuilderName, EnginePrecision, ImplicitCalibrator
from qat.base.errors import UserError
from qat.base.onnx_structure import check_structure
from qat.base.streams import heeded
from qat.base.supervised import native

if TYPE_CHECKING:
    import tensorrt as trt

TimingCache = Literal["created", "reused", "replaced"]


@dataclass(frozen=True)
class Toolkit:
    """A usable builder: TensorRT's or TensorRT-RTX's Python module, and what this version of it can do."""

    name: BuilderName
    module: Any
    device: cuda.Device | None = None
    """The GPU that engines are built for. None if the builder works ahead of time, without a GPU."""
    lean: bool = False
    """Whether it only runs engines, version-compatible ones, and builds none."""

    @property
    def version(self) -> str:
        """For example ``1.7.1.116``."""
        return str(self.module.__version__)

    @property
    def title(self) -> str:
        """For example ``TensorRT-RTX 1.7.1.116``."""
        name = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[self.name] + (" lean runtime" * self.lean)
        return f"{name} {self.version}"

    def typing(self, precision: EnginePrecision = "explicit") -> Literal["strong", "weak"]:
        """``strong`` if every precision comes from the network, ``weak`` if builder flags allow it.

        Raises UserError when no typing of this version gives a float32 network this precision.
        """
        strong = hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or self.name == "tensorrt-rtx"
        if strong and precision in ("explicit", "fp32", "tf32"):
            return "strong"
        weak_typing.check_precision(self.module, self.title, precision)
        return "weak"

    @property
    def transposed_scale_axis(self) -> int | None:
        """Along which axis of a transposed convolution's weight [I, O, ...] its scales must lie; None if along any."""
        if self.name == "tensorrt-rtx":
            return None
        major, minor = map(int, self.version.split(".")[:2])
        return int((major, minor) >= (10, 2))

    @property
    def without_int8_kernels(self) -> tuple[str, ...]:
        """Types of layers that it computes in float, whatever the network declares."""
        return ("DECONVOLUTION",) if self.name == "tensorrt-rtx" else ()

    @property
    def times_kernels(self) -> bool:
        """Whether a build times kernels, so that a timing cache is of use."""
        return self.name == "tensorrt"

    @property
    def reports_progress(self) -> bool:
        """Whether a build reports its progress and can be cancelled."""
        return hasattr(self.module, "IProgressMonitor")

    def compute_capabilities(self) -> tuple[str, ...]:
        """What can be built for ahead of time, such as ``("7.5", "8.0")``. Empty if only this machine's GPU can."""
        if self.name == "tensorrt":
            return ()
        numbers = [int(name[2:]) for name in dir(self.module.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
        return tuple(f"{number // 10}.{number % 10}" for number in sorted(numbers))

    def logger(self, log: BuildLog) -> trt.ILogger:
        """An ILogger that appends every message to ``log``, including verbose ones."""
        return recording_logger(self.module.ILogger, log)

    def create_network(self, builder: trt.Builder, precision: EnginePrecision = "explicit") -> trt.INetworkDefinition:
        """An empty network with explicit batch, typed as ``typing(precision)`` says."""
        flags = self.module.NetworkDefinitionCreationFlag
        names = ("EXPLICIT_BATCH", "STRONGLY_TYPED") if self.typing(precision) == "strong" else ("EXPLICIT_BATCH",)
        wanted = [getattr(flags, name, None) for name in names]
        return builder.create_network(sum(1 << int(flag) for flag in wanted if flag is not None))

    def create_config(
        self, builder: trt.Builder, settings: BuildSettings, *, quantized: bool = True
    ) -> trt.IBuilderConfig:
        """A builder configuration that records every final layer, for a network with or without Q/DQ nodes.

        Raises UserError when this version does not have something that ``settings`` ask for.
        """
        self._check_ahead_of_time(settings)
        config = builder.create_builder_config()
        config.profiling_verbosity = self.module.ProfilingVerbosity.DETAILED
        config.builder_optimization_level = settings.optimization_level
        if self.typing(settings.precision) == "weak":
            weak_typing.allow_precision(self.module, config, settings, quantized=quantized)
        weak_typing.check_platform(self.units(builder), settings.precision)
        if settings.layer or settings.output_type:
            strong = self.typing(settings.precision) == "strong"
            weak_typing.constrain(self.module, self.title, config, settings.constraints, strongly_typed=strong)
        if not (settings.tf32 or settings.precision == "tf32"):
            config.clear_flag(self.module.BuilderFlag.TF32)
        for wanted, name in (
            (settings.version_compatible, "VERSION_COMPATIBLE"),
            (settings.refit, "REFIT"),
            (settings.strip_weights, "STRIP_PLAN"),
        ):
            if wanted:
                config.set_flag(self._flag(name))
        if settings.hardware_compatible:
            config.hardware_compatibility_level = self.module.HardwareCompatibilityLevel.AMPERE_PLUS
        if settings.workspace_gib is not None:
            pool = self.module.MemoryPoolType.WORKSPACE
            config.set_memory_pool_limit(pool, int(settings.workspace_gib * cuda.GIB))
        if settings.timing_iterations is not None:
            config.avg_timing_iterations = settings.timing_iterations
        if settings.aux_streams is not None:
            config.max_aux_streams = settings.aux_streams
        if settings.tactic_sources is not None:
            config.set_tactic_sources(self._tactic_sources(settings.tactic_sources))
        if sharing := getattr(self.module.PreviewFeature, "PROFILE_SHARING_0806", None):
            config.set_preview_feature(sharing, True)
        self._set_capabilities(config, settings.capabilities)
        return config

    def units(self, builder: trt.Builder) -> dict[str, bool]:
        """Whether the GPU has units for FP16, INT8 and TF32, as far as this version says it."""
        return weak_typing.units_of_platform(builder) if self.device else {}

    def calibrator_class(self, calibrator: ImplicitCalibrator) -> type[Any]:
        """TensorRT's class of a calibrator. Raises UserError when this version has none."""
        return weak_typing.calibrator_class(self.module, self.title, calibrator)

    def calibrate_before_fusion(self, config: trt.IBuilderConfig) -> None:
        """Lets calibration see the tensors that layers are fused over. Raises UserError if this version cannot."""
        weak_typing.calibrate_before_fusion(self.module, self.title, config)

    def refuses_int8_weights(self, log: BuildLog) -> bool:
        """Whether a build failed because of a bug of 8.6 with INT8 constants (export/float_weights.py).

        The first function merges convolutions of one input, the second gives a part of the network to the compiler
        Myelin.
        """
        faults = ("graphOptimizer.cpp::chooseHigherPrecision", "graphOptimizer.cpp::convertMyelinWeightsToFp32")
        return any(fault in text for text in log.errors() for fault in faults)

    def use_timing_cache(self, config: trt.IBuilderConfig, content: bytes) -> TimingCache:
        """Gives a build the tactic timings of earlier builds; b"" starts a new cache.

        8.6 accepts damaged caches without an error, so ``content`` must be known to be intact. Raises UserError if this
        builder times no tactics.
        """
        if not self.times_kernels:
            raise UserError(f"{self.title} does not time kernels when it builds: leave out --timing-cache")
        outcome: TimingCache = "reused" if content else "created"
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, False):
            outcome = "replaced"
            config.set_timing_cache(config.create_timing_cache(b""), False)
        return outcome

    def _check_ahead_of_time(self, settings: BuildSettings) -> None:
        """Raises UserError for options with which TensorRT-RTX was seen to fail without a useful message."""
        if self.name != "tensorrt-rtx":
            return
        if settings.hardware_compatible:
            raise UserError(f"{self.title} builds for a list of compute capabilities: list all of them instead")
        if settings.version_compatible:
            raise UserError(f"{self.title} has no version-compatible engines: leave the option out")
        if settings.refit or settings.strip_weights:
            raise UserError(f"{self.title} cannot make engines refittable when it builds without a GPU: leave it out")

    def _tactic_sources(self, names: tuple[str, ...]) -> int:
        known = self.module.TacticSource.__members__
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{self.title} has no tactic source {', '.join(unknown)}: choose from {', '.join(known)}")
        return sum(1 << int(known[name]) for name in names)

    def _flag(self, name: str) -> Any:
        flag = getattr(self.module.BuilderFlag, name, None)
        if flag is None:
            raise UserError(f"{self.title} does not have the option {name}: leave it out, or use another version")
        return flag

    def _set_capabilities(self, config: Any, capabilities: tuple[str, ...]) -> None:
        names = [self._capability_name(capability) for capability in dict.fromkeys(capabilities)]
        if names:
            config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(getattr(self.module.ComputeCapability, name), index)

    def _capability_name(self, capability: str) -> str:
        supported = self.compute_capabilities()
        if not supported:
            gpu = self.device.name if self.device else "none"
            raise UserError(
                f"{self.title} builds only for the GPU of this machine ({gpu}): leave out "
                "--compute-capabilities, or choose --builder tensorrt-rtx"
            )
        if capability not in supported:
            raise UserError(
                f"{self.title} does not build for compute capability {capability!r}: choose from {', '.join(supported)}"
            )
        return "SM" + capability.replace(".", "")

    @contextlib.contextmanager
    def report_progress(
        self, config: trt.IBuilderConfig, report: Callable[[float, str], None]
    ) -> Iterator[Callable[[], None]]:
        """While the block builds, calls ``report(fraction done, phase)`` and lets Ctrl-C, SIGTERM and SIGHUP cancel it.

        Yields what raises KeyboardInterrupt after Ctrl-C, for Python code that the builder calls back.

        An exception must not pass through TensorRT's C++ code. So Ctrl-C only sets a flag; the progress monitor sees it
        and cancels the build, and then KeyboardInterrupt is raised. Without a progress monitor Ctrl-C ends the process
        at once; nothing has been written by then. Only the main thread can have signal handlers: others leave it alone.
        """
        interrupted: list[int] = []

        def mark(signal_number: int, _frame: object) -> None:
            interrupted.append(signal_number)

        if self.reports_progress:
            base = self.module.IProgressMonitor
            config.progress_monitor = progress_monitor(base, report, lambda: not interrupted)
        main_thread = threading.current_thread() is threading.main_thread()
        handler = mark if self.reports_progress else signal.SIG_DFL
        before = {number: signal.signal(number, handler) for number in heeded()} if main_thread else {}

        def raise_if_interrupted() -> None:
            if interrupted:
                raise KeyboardInterrupt("the build was cancelled and nothing was written")

        try:
            yield raise_if_interrupted
        finally:
            for number, earlier in before.items():
                signal.signal(number, earlier)
        raise_if_interrupted()

    def load(self, plan: Any, log: BuildLog, host_code: bool = False) -> tuple[Any, trt.ICudaEngine]:
        """The runtime and the deserialized engine. The runtime must live as long as the engine.

        ``plan`` is the serialized engine. ``host_code`` allows the engine to run code of its own on the CPU:
        version-compatible engines contain their runtime. Raises UserError when it does not load.
        """
        runtime = self.module.Runtime(self.logger(log))
        if host_code:
            runtime.engine_host_code_allowed = True
        with native(f"{self.title} loading the engine"):
            engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise_if_out_of_memory(log)
            raise UserError(
                f"{self.title} cannot load the engine: it is truncated, or was built by another version or for another "
                f"GPU; build it again here ({log.last_errors()})"
            )
        return runtime, engine

    def create_context(self, engine: trt.ICudaEngine, memory: cuda.DeviceMemory) -> trt.IExecutionContext:
        """An execution context with ``memory`` as its scratch memory. Raises UserError when TensorRT makes none."""
        strategy = getattr(self.module, "ExecutionContextAllocationStrategy", None)
        if strategy is None:
            context = engine.create_execution_context_without_device_memory()
        else:
            context = engine.create_execution_context(strategy.USER_MANAGED)
        if context is None:
            raise UserError(f"TensorRT could not make an execution context: {cuda.OUT_OF_MEMORY}")
        if strategy is None:
            context.device_memory = memory.address  # type: ignore[attr-defined]
        else:
            context.set_device_memory(memory.address, memory.size)
        return context

    def refit(self, engine: trt.ICudaEngine, model: Path, log: BuildLog) -> None:
        """Gives a stripped engine the weights of its ONNX file. Raises UserError when they do not fit."""
        check_structure(model)
        logger = self.logger(log)
        refitter = self.module.Refitter(engine, logger)
        parser = self.module.OnnxParserRefitter(refitter, logger)
        if not parser.refit_from_file(str(model)) or not refitter.refit_cuda_engine():
            said = log.last_errors()
            raise UserError(f"the stripped engine does not take the weights of {model}: build it again ({said})")

    def scratch_bytes(self, engine: trt.ICudaEngine) -> int:
        """How many bytes of scratch memory an execution context needs."""
        return int(getattr(engine, "device_memory_size_v2", None) or engine.device_memory_size)

    def final_layers(
        self, log: BuildLog, plan: Any, host_code: bool = False
    ) -> tuple[Literal["log", "inspector"], str]:
        """The builder's description of the engine's final layers, and its form: see deploy/engine_layers.py.

        ``plan`` is the serialized engine. TensorRT-RTX has written the description to ``log``; TensorRT loads the
        engine and inspects it.
        """
        if self.name == "tensorrt-rtx":
            return "log", "\n".join(log.texts("VERBOSE"))
        _runtime, engine = self.load(plan, log, host_code)
        return "inspector", self.inspect(engine)

    def inspect(self, engine: trt.ICudaEngine) -> str:
        """The engine inspector's JSON."""
        inspector = engine.create_engine_inspector()
        return str(inspector.get_engine_information(self.module.LayerInformationFormat.JSON))


def failed_node(error: Any) -> tuple[str, str] | None:
    """Name and operator of the ONNX node that a parser's error is about, or None: 8.6 does not tell."""
    return (error.node_name(), error.node_operator()) if hasattr(error, "node_name") else None
