"""A model repository for NVIDIA's Triton Inference Server, made from an engine file.

It has the engine, its config.pbtxt, the names of its classes, and a page (README.md) that says how to start the server,
what to send to it and how to measure it. No GPU and no server are needed to write it.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.settings import Profile
from qat.base.artifact import Sidecar, TensorSpec, atomic_write, disk_errors, read_sidecar
from qat.base.console import say, warn
from qat.base.errors import UserError
from qat.base.number_format import INT8

TEMPLATE = Path(__file__).with_name("triton_repository.md.j2")
PAGE, LABELS, CONFIG, PLAN = "README.md", "labels.txt", "config.pbtxt", Path("1", "model.plan")
PAGE_MARK = "<!-- Written by python -m deploy.triton, which replaces this page when it runs again. -->"
INSTALL = "pip install -e '.[triton]'"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# NumPy's names of data types, which sidecars use -> Triton's.
_DATA_TYPES = {
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
        sidecar: that of the engine.
        profiles: the batch sizes that it takes. Without profiles its batch is fixed and part of every shape.
        instances: how many copies run at the same time on each GPU.
        max_queue_delay_us: how many microseconds a request waits at most for others that share its batch.
    """

    name: str
    sidecar: Sidecar
    profiles: tuple[Profile, ...]
    instances: int
    max_queue_delay_us: int

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


def write_repository(
    engine: Path,
    repository: Path,
    *,
    name: str | None = None,
    instances: int = 1,
    max_queue_delay_us: int = 100,
    overwrite: bool = False,
) -> None:
    """Adds an engine to a model repository.

    Args:
        engine: the engine file, built by TensorRT; its sidecar is beside it.
        repository: the model repository, a folder that may have other models.
        name: the model's name on the server; by default the engine's name without its suffix.
        instances: how many copies of the model run at the same time on each GPU.
        max_queue_delay_us: how many microseconds a request waits at most for others that share its batch.
        overwrite: replace a model of the same name.

    Raises UserError when Triton could not serve the engine, or when a file is in the way. A new model is then removed.
    """
    model = _read_model(engine, engine.stem if name is None else name, instances, max_queue_delay_us)
    folder = repository / model.name
    _check_free(repository, folder, overwrite)
    config = model_config(model, load_schema())
    page = render_page(model, engine.name)
    with _remove_on_failure(folder):
        with atomic_write(folder / PLAN) as temporary:
            shutil.copyfile(engine, temporary)
        _write_labels(folder / LABELS, model)
        _write_config(folder / CONFIG, config)
        with atomic_write(repository / PAGE) as temporary:
            temporary.write_text(page, encoding="utf-8")
    if model.sidecar.class_names and not model.label_outputs:
        warn(f"no output of {engine} has {len(model.sidecar.class_names)} values: {LABELS} is used for none of them")
    say(f"wrote {folder}\nnext: {repository / PAGE} says how to start Triton and how to measure it")


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
    config = schema.ModelConfig(name=model.name, backend="tensorrt", platform="tensorrt_plan")
    config.max_batch_size = model.max_batch
    for spec in model.sidecar.inputs:
        _describe(config.input.add(), spec, model, schema)
    for spec in model.sidecar.outputs:
        output = config.output.add()
        _describe(output, spec, model, schema)
        if spec.name in model.label_outputs:
            output.label_filename = LABELS
    group = config.instance_group.add(count=model.instances, kind=schema.ModelInstanceGroup.KIND_GPU)
    if len(model.profiles) > 1:  # without names, Triton uses only the first profile
        group.profile.extend(map(str, range(len(model.profiles))))
    if model.profiles:
        config.dynamic_batching.preferred_batch_size.extend(model.opt_batches)
        config.dynamic_batching.max_queue_delay_microseconds = model.max_queue_delay_us
    config.optimization.cuda.graphs = True
    for batch in model.graph_batches:
        graph = config.optimization.cuda.graph_spec.add(batch_size=batch)
        for spec in model.sidecar.inputs:
            graph.input[spec.name].dim.extend(model.dims(spec))
    for batch in model.opt_batches or [1]:  # Triton expects 1 if the batch is part of the shape
        sample = config.model_warmup.add(name=f"batch_{batch}", batch_size=batch)
        for spec in model.sidecar.inputs:
            tensor = sample.inputs[spec.name]
            tensor.data_type = _data_type(spec, schema)
            tensor.dims.extend(model.dims(spec))
            tensor.zero_data = True
    return config


def render_page(model: TritonModel, engine: str) -> str:
    """The page about the repository, in Markdown; ``engine`` is the name of the engine file."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    sidecar = model.sidecar
    shapes = (f"{spec.name}:{','.join(map(str, model.dims(spec)))}" for spec in sidecar.inputs)
    busy = 2 * (model.max_batch or 4) * model.instances  # this many requests at a time keep every instance busy
    step = max(1, busy // 8)
    return template.render(
        mark=PAGE_MARK,
        model=model,
        engine=engine,
        version=sidecar.details["builder"]["version"],
        gpu=sidecar.details.get("gpu"),
        hardware_compatible=sidecar.details.get("hardware_compatible", False),
        inputs=[_tensor_row(spec, model) for spec in sidecar.inputs],
        outputs=[_tensor_row(spec, model) for spec in sidecar.outputs],
        preprocessing=sidecar.preprocessing,
        classes=len(sidecar.class_names),
        fixed_batch=sidecar.inputs[0].shape[0],
        shapes="".join(f" --shape {shlex.quote(shape)}" for shape in shapes),
        sweep=f"{step}:{busy}:{step}",
        int8=INT8,
    )


def _read_model(engine: Path, name: str, instances: int, max_queue_delay_us: int) -> TritonModel:
    """The model that is asked for. Raises UserError when Triton could not serve it."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot be the name of a model: give --name, with letters, digits, '_', '-' and '.', not "
            "starting with '-' or '.'"
        )
    if instances < 1:
        raise UserError(f"--instances {instances}: must be at least 1")
    if max_queue_delay_us < 0:
        raise UserError(f"--max-queue-delay-us {max_queue_delay_us}: must be at least 0")
    sidecar = read_sidecar(engine, "engine")
    builder = sidecar.details.get("builder", {})
    if sidecar.details.get("settings", {}).get("strip_weights"):
        raise UserError(f"{engine} was built without weights, which Triton cannot add: build it with weights")
    if builder.get("name") != "tensorrt":
        raise UserError(
            f"{engine} was built by {builder.get('name')} {builder.get('version')}, but Triton serves only TensorRT's "
            "engines: build it with --builder tensorrt on a machine with an NVIDIA GPU"
        )
    model = TritonModel(name, sidecar, _profiles(engine, sidecar), instances, max_queue_delay_us)
    _check_tensors(engine, model)
    return model


def _profiles(engine: Path, sidecar: Sidecar) -> tuple[Profile, ...]:
    try:
        return tuple(Profile(**profile) for profile in sidecar.details["profiles"])
    except (KeyError, TypeError, UserError) as error:
        raise UserError(
            f"the sidecar of {engine} has missing or wrong optimization profiles ({type(error).__name__}: {error}): "
            "build the engine again with python -m deploy.build"
        ) from error


def _check_tensors(engine: Path, model: TritonModel) -> None:
    """Raises UserError for a tensor whose type or shape Triton's configuration cannot express."""
    for kind, specs in (("inputs", model.sidecar.inputs), ("outputs", model.sidecar.outputs)):
        if not specs:
            raise UserError(f"the sidecar of {engine} names no {kind}: build the engine again")
        for spec in specs:
            if spec.dtype not in _DATA_TYPES:
                raise UserError(
                    f"{engine}: tensor {spec.name!r} has type {spec.dtype}, but Triton takes {', '.join(_DATA_TYPES)}: "
                    "change it in the ONNX file"
                )
            dims = model.dims(spec)
            if -1 in dims or (model.profiles and spec.shape[:1] != (-1,)):
                rule = "start with a dynamic batch and have no other -1"
                if not model.profiles:
                    rule = "have no -1, because the engine has no profile"
                raise UserError(
                    f"{engine}: tensor {spec.name!r} has shape {list(spec.shape)}, which must {rule}: export it again"
                )


def _check_free(repository: Path, folder: Path, overwrite: bool) -> None:
    """Raises UserError when a file is in the way that this command did not write or may not replace."""
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} exists: give --overwrite to replace it, or another --name or --out")
    with disk_errors(folder):
        entries = sorted(folder.iterdir()) if folder.exists() else []
    others = [path.name for path in entries if path.is_dir() and path.name.isdecimal() and int(path.name) > 1]
    if others:
        raise UserError(
            f"{folder} has version {others[-1]}, which Triton would serve instead of this one, version 1: "
            "remove it, or give another --name"
        )
    page = repository / PAGE
    if page.is_file() and not page.read_text(encoding="utf-8", errors="replace").startswith(PAGE_MARK):
        raise UserError(f"{page} was not written by this command, which would replace it: give another --out")


@contextmanager
def _remove_on_failure(folder: Path) -> Iterator[None]:
    """Removes ``folder`` when the block fails, unless it existed before."""
    before = folder.exists()
    try:
        yield
    except BaseException:
        if not before:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_labels(path: Path, model: TritonModel) -> None:
    """One line for each class. Without classes, the labels of a model that is replaced are removed."""
    if not model.sidecar.class_names:
        path.unlink(missing_ok=True)
        return
    lines = (" ".join(name.splitlines()) for name in model.sidecar.class_names)
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_config(path: Path, config: Any) -> None:
    """Writes a message as text, and reads it back before the file gets its name."""
    from google.protobuf import text_format

    with atomic_write(path) as temporary:
        temporary.write_text(text_format.MessageToString(config), encoding="utf-8")
        found = text_format.Parse(temporary.read_text(encoding="utf-8"), type(config)())
        if found != config:
            raise RuntimeError(f"{path} is read back as another configuration than the one that was written")


def _describe(message: Any, spec: TensorSpec, model: TritonModel, schema: Any) -> None:
    """Fills in name, type and shape of an input or output."""
    message.name = spec.name
    message.data_type = _data_type(spec, schema)
    dims = model.dims(spec)
    message.dims.extend(dims or [1])
    if not dims:  # one number for each image: Triton has no empty dims and uses [1] instead
        message.reshape.SetInParent()


def _data_type(spec: TensorSpec, schema: Any) -> int:
    return int(schema.DataType.Value(_DATA_TYPES[spec.dtype]))


def _tensor_row(spec: TensorSpec, model: TritonModel) -> dict[str, Any]:
    """A tensor as the page shows it. It has a ``layout`` if its shape is that of the preprocessing."""
    stated = model.sidecar.preprocessing
    size = stated.get("source_size") or [stated.get(side) for side in ("height", "width")]
    channels = len(stated.get("mean", ()))
    layouts = {(channels, *size): "NCHW", (*size, channels): "NHWC"}
    return {
        "name": spec.name,
        "shape": " x ".join(map(str, [*(["batch"] if model.profiles else []), *model.dims(spec)])),
        "dtype": spec.dtype,
        "layout": layouts.get(spec.shape[1:], ""),
        "raw": spec.dtype == "uint8",
    }
