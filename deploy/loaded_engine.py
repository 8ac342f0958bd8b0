"""A deserialized engine, and how an engine file is loaded safely.

An engine file can make TensorRT execute anything. So it is loaded only if it is the file that its sidecar was written
for, unless the caller trusts it. Before TensorRT sees it, the sidecar tells whether this machine can run it: the same
version of the builder, and a GPU that it was built for.

Who runs inferences (deploy/executor.py, deploy/runtime.py) works on a ``LoadedEngine``.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import cuda
from deploy.build_log import BuildLog
from deploy.installed import find_runtime
from deploy.settings import Profile
from deploy.tensor_types import numpy_name, sizes
from deploy.trt import Toolkit
from deploy.weak_typing import warn_of_tf32_override
from qat.base.artifact import Sidecar, TensorSpec, parent_paths, read_sidecar, sha256_of, sidecar_path
from qat.base.choices import BuilderName
from qat.base.errors import UserError
from qat.base.trust import UNTRUSTED, NotTrustedError, permit, untrusted_mode

if TYPE_CHECKING:
    import tensorrt as trt


class LoadedEngine:
    """An engine in the GPU's memory, without anything that runs it.

    Attributes:
        toolkit: the TensorRT that loaded it.
        cuda_engine: TensorRT's ICudaEngine.
        inputs, outputs: names, shapes (-1 for a dynamic batch) and NumPy types of its tensors.
        profiles: the batch sizes of each optimization profile. An engine with a fixed batch has one, of that size.
        lock: to be held while an execution context is created, which TensorRT allows in one thread at a time.
        log: what TensorRT said while it loaded and ran the engine.
    """

    def __init__(
        self, plan: bytes, toolkit: Toolkit, *, host_code: bool = False, stripped_of: Path | None = None
    ) -> None:
        """Deserializes an engine.

        Args:
            plan: the serialized engine.
            toolkit: the TensorRT that built it.
            host_code: allows the engine to run code of its own on the CPU, which version-compatible engines need.
            stripped_of: for an engine that was built without weights, the ONNX file that has them.

        Raises UserError when TensorRT does not load the engine or does not take the weights.
        """
        self.toolkit = toolkit
        self.log = BuildLog()
        self.lock = threading.Lock()
        self._runtime, self.cuda_engine = toolkit.load(plan, self.log, host_code)
        if stripped_of is not None:
            toolkit.refit(self.cuda_engine, stripped_of, self.log)
        self.inputs, self.outputs = _tensor_specs(self.cuda_engine, toolkit.module)
        self.profiles = _profiles(self.cuda_engine, self.inputs)

    @classmethod
    def load(cls, path: Path, *, trust: bool = False) -> LoadedEngine:
        """Loads an engine file that python -m deploy.build wrote.

        Args:
            path: the engine; its sidecar is beside it.
            trust: load the file even if it is not the one that the sidecar was written for, or has no sidecar, and let
                a version-compatible one that a stranger made run its code on the CPU.

        Raises UserError when the file is not the sidecar's, was built by another version of TensorRT or for another
        GPU, or is truncated, and when there is no GPU or no driver.
        """
        if untrusted_mode():
            raise NotTrustedError(f"{path} is an engine, which can run anything: refused, because {UNTRUSTED} is set")
        sidecar = _sidecar_of_trusted(path) if trust else read_sidecar(path, "engine")
        toolkit = _toolkit_here(path, sidecar)
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
        if sidecar is None:
            return cls(plan, toolkit)
        settings = sidecar.details.get("settings", {})
        warn_of_tf32_override(settings)
        host_code = bool(settings.get("version_compatible"))
        if host_code:
            wants = "run code of its own on the CPU, as version-compatible engines do"
            permit(path, sidecar.sidecar_sha256, wants, trust_code=trust, remedy="--trust (trust=True)")
        stripped_of = _model_with_weights(path, sidecar) if settings.get("strip_weights") else None
        return cls(plan, toolkit, host_code=host_code, stripped_of=stripped_of)

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
        """Frees the engine. Nothing that runs it may be left."""
        del self.cuda_engine, self._runtime


def why_not_here(path: Path, sidecar: Sidecar | None) -> str:
    """Why an engine cannot run on this machine: no GPU, another GPU, another version. Empty when it can."""
    try:
        _toolkit_here(path, sidecar)
    except UserError as error:
        return str(error)
    return ""


def _toolkit_here(path: Path, sidecar: Sidecar | None) -> Toolkit:
    """The TensorRT that runs an engine on this machine. Raises UserError when there is none."""
    device = cuda.device()
    builder: BuilderName = sidecar.details["builder"]["name"] if sidecar else "tensorrt"
    toolkit = find_runtime(builder)
    if sidecar is not None:
        _check_built_for(path, sidecar, toolkit, device)
    return toolkit


def _check_built_for(path: Path, sidecar: Sidecar, toolkit: Toolkit, device: cuda.Device) -> None:
    """Raises UserError when an engine cannot load here; TensorRT's own message would say less."""
    details = sidecar.details
    built_by = details["builder"]["version"]
    if toolkit.lean and not details.get("version_compatible"):
        raise UserError(
            f"{path} was built without --version-compatible, here is {toolkit.title}, which runs no others: build it "
            f"with that, or install TensorRT {built_by}"
        )
    if built_by != toolkit.version and not details.get("version_compatible"):
        raise UserError(
            f"{path} was built by version {built_by}, here is {toolkit.title}: build it again here, or install "
            f"{built_by}"
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


def _sidecar_of_trusted(path: Path) -> Sidecar | None:
    """The sidecar of a file that is loaded in any case. It only helps to choose the runtime, so it may be missing."""
    if not path.is_file():
        raise UserError(f"no file {path}: check the path, or make it with python -m deploy.build")
    try:
        return read_sidecar(path, "engine", trust=True) if sidecar_path(path).exists() else None
    except UserError:
        return None


def _model_with_weights(path: Path, sidecar: Sidecar) -> Path:
    """The ONNX file that a stripped engine was made from. Raises UserError when it is missing or has changed."""
    places = parent_paths(path, sidecar)
    assert sidecar.parent is not None
    for candidate in places:
        if candidate.is_file() and sha256_of(candidate) == sidecar.parent.sha256:
            return candidate
    raise UserError(
        f"{path} was built without weights and needs those of {places[-1].name} (SHA-256 "
        f"{sidecar.parent.sha256}): put that file beside it"
    )


def _tensor_specs(engine: trt.ICudaEngine, module: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a deserialized engine."""
    found: dict[Any, list[TensorSpec]] = {module.TensorIOMode.INPUT: [], module.TensorIOMode.OUTPUT: []}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        spec = TensorSpec(name, sizes(engine.get_tensor_shape(name)), numpy_name(engine.get_tensor_dtype(name)))
        found[engine.get_tensor_mode(name)].append(spec)
    return tuple(found[module.TensorIOMode.INPUT]), tuple(found[module.TensorIOMode.OUTPUT])


def _profiles(engine: trt.ICudaEngine, inputs: tuple[TensorSpec, ...]) -> tuple[Profile, ...]:
    """The batch sizes of each optimization profile; of a fixed batch, min, opt and max are the same."""
    first = inputs[0].name
    shapes = [engine.get_tensor_profile_shape(first, index) for index in range(engine.num_optimization_profiles)]
    return tuple(Profile(*(int(shape[0]) for shape in three)) for three in shapes)
