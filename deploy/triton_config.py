"""config.pbtxt: what Triton must know about a model, as a message of Triton's own schema."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.settings import Profile
from qat.base.artifact import Sidecar, TensorSpec
from qat.base.errors import UserError
from qat.base.writing import atomic_write

LABELS, CODE = "labels.txt", "model.py"
PLAN, ENGINE, ONNX = "model.plan", "model.engine", "model.onnx"
"""What a model is called on the server: for TensorRT's backend, and for Python's (deploy/triton_backend.py)."""
INSTALL = "pip install -e '.[triton]'"
Backend = Literal["tensorrt", "python"]
"""Which of Triton's backends runs a model: TensorRT's, or Python's with this package."""

# NumPy's names of data types, which sidecars use -> Triton's.
DATA_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "bool": "TYPE_BOOL",
}


@dataclass(frozen=True)
class TritonModel:
    """A model as Triton serves it.

    Attributes:
        name: its name on the server.
        sidecar: that of the engine or of the ONNX file.
        profiles: the batch sizes that it takes. Without profiles its batch is fixed and part of every shape.
        backend: which of Triton's backends runs it.
        instances: how many copies run at the same time, on each GPU or on the processor.
        max_queue_delay_us: how many microseconds a request waits at most for others that share its batch.
    """

    name: str
    sidecar: Sidecar
    profiles: tuple[Profile, ...]
    backend: Backend
    instances: int
    max_queue_delay_us: int

    @property
    def in_onnx_runtime(self) -> bool:
        """Whether it is an ONNX file, which ONNX Runtime runs on the processor; if not, it is an engine."""
        return self.sidecar.kind == "onnx"

    @property
    def file(self) -> str:
        """Name of its file on the server."""
        return PLAN if self.backend == "tensorrt" else ONNX if self.in_onnx_runtime else ENGINE

    @property
    def max_batch(self) -> int:
        """The largest batch of any profile; 0, as Triton expects, for a fixed batch."""
        return max((profile.max for profile in self.profiles), default=0)

    @property
    def opt_batches(self) -> list[int]:
        """The batch sizes that the profiles are tuned for, ascending; empty for a fixed batch."""
        return sorted({profile.opt for profile in self.profiles})

    @property
    def graph_batches(self) -> list[int]:
        """The batch sizes that get a CUDA graph: all in the profiles, or 0, as Triton expects, for a fixed batch."""
        return sorted({size for profile in self.profiles for size in (profile.min, profile.opt, profile.max)}) or [0]

    @property
    def label_outputs(self) -> list[str]:
        """Names of the outputs that have one value for each class."""
        classes = len(self.sidecar.class_names)
        return [spec.name for spec in self.sidecar.outputs if classes and self.dims(spec)[-1:] == [classes]]

    def dims(self, spec: TensorSpec) -> list[int]:
        """The shape of a tensor as Triton counts it: without the batch, unless the batch is fixed."""
        return list(spec.shape[1:] if self.profiles else spec.shape)


def load_schema() -> Any:
    """Triton's own protobuf schema of config.pbtxt: the module ``model_config_pb2`` of the package tritonclient.

    It is loaded from its file, because importing its package would import grpc, which it does not need. Raises
    UserError when it is not installed.
    """
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        raise UserError(f"the package tritonclient, which has Triton's schema, is not installed: {INSTALL}")
    path = Path(package.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("triton_model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    schema = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(schema)
    except Exception as error:  # no file, no protobuf, or a protobuf that is too old for the file
        raise UserError(f"cannot load Triton's schema {path} ({type(error).__name__}: {error}): {INSTALL}") from error
    return schema


def model_config(model: TritonModel, schema: Any) -> Any:
    """The ``ModelConfig`` message of a model; ``schema`` comes from ``load_schema``."""
    config = schema.ModelConfig(name=model.name, backend=model.backend)
    config.max_batch_size = model.max_batch
    for spec in model.sidecar.inputs:
        _describe(config.input.add(), spec, model, schema)
    for spec in model.sidecar.outputs:
        output = config.output.add()
        _describe(output, spec, model, schema)
        if spec.name in model.label_outputs:
            output.label_filename = LABELS
    kind = schema.ModelInstanceGroup.KIND_CPU if model.in_onnx_runtime else schema.ModelInstanceGroup.KIND_GPU
    config.instance_group.add(count=model.instances, kind=kind)
    if model.profiles:
        config.dynamic_batching.preferred_batch_size.extend(model.opt_batches)
        config.dynamic_batching.max_queue_delay_microseconds = model.max_queue_delay_us
    if model.backend == "tensorrt":
        _describe_plan(config, model)
    for batch in model.opt_batches or [1]:  # Triton expects 1 if the batch is part of the shape
        sample = config.model_warmup.add(name=f"batch_{batch}", batch_size=batch)
        for spec in model.sidecar.inputs:
            tensor = sample.inputs[spec.name]
            tensor.data_type = _data_type(spec, schema)
            tensor.dims.extend(model.dims(spec))
            tensor.zero_data = True
    return config


def write_config(path: Path, config: Any) -> None:
    """Writes a message as text, and reads it back before the file gets its name."""
    from google.protobuf import text_format

    with atomic_write(path) as temporary:
        temporary.write_text(text_format.MessageToString(config), encoding="utf-8")
        found = text_format.Parse(temporary.read_text(encoding="utf-8"), type(config)())
        if found != config:
            raise RuntimeError(f"{path} is read back as another configuration than the one that was written")


def _describe_plan(config: Any, model: TritonModel) -> None:
    """What TensorRT's backend must be told; in Python's, the engine knows it."""
    config.platform = "tensorrt_plan"
    if len(model.profiles) > 1:  # without names, Triton uses only the first profile
        config.instance_group[0].profile.extend(map(str, range(len(model.profiles))))
    config.optimization.cuda.graphs = True
    for batch in model.graph_batches:
        graph = config.optimization.cuda.graph_spec.add(batch_size=batch)
        for spec in model.sidecar.inputs:
            graph.input[spec.name].dim.extend(model.dims(spec))


def _describe(message: Any, spec: TensorSpec, model: TritonModel, schema: Any) -> None:
    """Fills in name, type and shape of an input or output."""
    message.name = spec.name
    message.data_type = _data_type(spec, schema)
    dims = model.dims(spec)
    message.dims.extend(dims or [1])
    if not dims:  # one number for each image: Triton has no empty dims and uses [1] instead
        message.reshape.SetInParent()


def _data_type(spec: TensorSpec, schema: Any) -> int:
    return int(schema.DataType.Value(DATA_TYPES[spec.dtype]))
