"""Writes a model repository for NVIDIA's Triton Inference Server from an engine of python -m deploy.build.

    python -m deploy.triton runs/model.engine --out runs/repository

The repository holds the engine, its config.pbtxt, the names of its classes, and a page (README.md) that says how to
start the server, what to send to it and how to measure it. No GPU and no server are needed to write it.
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
from typing import Annotated, Any

import tyro

from deploy.settings import Profile
from qat.base.artifact import Sidecar, TensorSpec, atomic_write, disk_errors, read_sidecar
from qat.base.console import Command, run_command, say, warn
from qat.base.errors import UserError

TEMPLATE = Path(__file__).with_name("triton.md.j2")
PAGE, LABELS, CONFIG, PLAN = "README.md", "labels.txt", "config.pbtxt", Path("1", "model.plan")
PAGE_MARK = "<!-- Written by python -m deploy.triton, which replaces this page when it runs again. -->"
INSTALL = "pip install -e '.[triton]'"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# NumPy's names of data types, as sidecars have them -> Triton's.
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


@dataclass(frozen=True, kw_only=True)
class TritonOptions(Command):
    """The options of ``python -m deploy.triton``."""

    engine: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL.engine")]
    """The engine that python -m deploy.build wrote with TensorRT."""
    out: Path
    """The model repository: a folder, which may hold other models."""
    name: str | None = None
    """Name of the model on the server; by default the engine's name without its suffix."""
    instances: int = 1
    """Copies of the model that run at the same time on each GPU."""
    max_queue_delay_us: int = 100
    """Microseconds that a request waits at most for others to share its batch."""
    overwrite: bool = False
    """Replace a model of the same name."""


@dataclass(frozen=True)
class Model:
    """A model as Triton is to serve it; without ``profiles`` its batch is fixed and part of every shape."""

    name: str
    sidecar: Sidecar
    profiles: tuple[Profile, ...]
    instances: int
    max_queue_delay_us: int

    @property
    def max_batch(self) -> int:
        """Largest batch of any profile; 0, as Triton has it, for a fixed batch."""
        return max((profile.max for profile in self.profiles), default=0)

    @property
    def opt_batches(self) -> list[int]:
        """The batch sizes that the profiles are optimized for, ascending; empty for a fixed batch."""
        return sorted({profile.opt for profile in self.profiles})

    @property
    def graph_batches(self) -> list[int]:
        """The batch sizes that get a CUDA graph: all that the profiles name; 0, as Triton has it, for a fixed batch."""
        return sorted({size for profile in self.profiles for size in (profile.min, profile.opt, profile.max)}) or [0]

    @property
    def label_outputs(self) -> list[str]:
        """Names of the outputs that have one value for each class."""
        classes = len(self.sidecar.class_names)
        return [spec.name for spec in self.sidecar.outputs if classes and self.dims(spec)[-1:] == [classes]]

    def dims(self, spec: TensorSpec) -> list[int]:
        """The shape of a tensor as Triton counts it: without the batch, unless that is fixed."""
        return list(spec.shape[1:] if self.profiles else spec.shape)


def main(options: TritonOptions) -> None:
    """Writes the model repository. Raises UserError, and leaves no half of a new model, when it cannot."""
    model = _model(options)
    folder = options.out / model.name
    _check_free(options, folder)
    config = model_config(model, load_schema())
    page = render(model, options.engine.name)
    with _whole_or_nothing(folder):
        with atomic_write(folder / PLAN) as temporary:
            shutil.copyfile(options.engine, temporary)
        _write_labels(folder / LABELS, model)
        _write_config(folder / CONFIG, config)
        with atomic_write(options.out / PAGE) as temporary:
            temporary.write_text(page, encoding="utf-8")
    if model.sidecar.class_names and not model.label_outputs:
        warn(f"no output of {options.engine} has {len(model.sidecar.class_names)} values: {LABELS} names none of them")
    say(f"wrote {folder}\nnext: {options.out / PAGE} says how to start Triton and how to measure it")


def load_schema() -> Any:
    """Triton's own protobuf schema of config.pbtxt: the module ``model_config_pb2`` of the package tritonclient.

    It is loaded from its file, because its package would import grpc, which it does not need. Raises UserError when
    it is not installed.
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


def model_config(model: Model, schema: Any) -> Any:
    """The ``ModelConfig`` message of a model; ``schema`` is that of ``load_schema``."""
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
    if len(model.profiles) > 1:  # without names, Triton takes the first profile only
        group.profile.extend(map(str, range(len(model.profiles))))
    if model.profiles:
        config.dynamic_batching.preferred_batch_size.extend(model.opt_batches)
        config.dynamic_batching.max_queue_delay_microseconds = model.max_queue_delay_us
    config.optimization.cuda.graphs = True
    for batch in model.graph_batches:
        graph = config.optimization.cuda.graph_spec.add(batch_size=batch)
        for spec in model.sidecar.inputs:
            graph.input[spec.name].dim.extend(model.dims(spec))
    for batch in model.opt_batches or [1]:  # 1 is what Triton asks for where the batch is part of the shape
        sample = config.model_warmup.add(name=f"batch_{batch}", batch_size=batch)
        for spec in model.sidecar.inputs:
            tensor = sample.inputs[spec.name]
            tensor.data_type = _data_type(spec, schema)
            tensor.dims.extend(model.dims(spec))
            tensor.zero_data = True
    return config


def render(model: Model, engine: str) -> str:
    """The page about the repository, in Markdown; ``engine`` is the name of the file that it was made from."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    sidecar = model.sidecar
    shapes = (f"{spec.name}:{','.join(map(str, model.dims(spec)))}" for spec in sidecar.inputs)
    busy = 2 * (model.max_batch or 4) * model.instances  # requests on their way that keep every instance at work
    step = max(1, busy // 8)
    return template.render(
        mark=PAGE_MARK,
        model=model,
        engine=engine,
        version=sidecar.details["builder"]["version"],
        gpu=sidecar.details.get("gpu"),
        hardware_compatible=sidecar.details.get("hardware_compatible", False),
        inputs=[_row(spec, model) for spec in sidecar.inputs],
        outputs=[_row(spec, model) for spec in sidecar.outputs],
        preprocessing=sidecar.preprocessing,
        classes=len(sidecar.class_names),
        fixed_batch=sidecar.inputs[0].shape[0],
        shapes="".join(f" --shape {shlex.quote(shape)}" for shape in shapes),
        sweep=f"{step}:{busy}:{step}",
    )


def _model(options: TritonOptions) -> Model:
    """The model that the options ask for; UserError for what Triton could not serve."""
    name = options.engine.stem if options.name is None else options.name
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no name for a model: give --name, of letters, digits, '_', '-' and '.', not first '-' or '.'"
        )
    if options.instances < 1:
        raise UserError(f"--instances {options.instances}: at least 1 is needed")
    if options.max_queue_delay_us < 0:
        raise UserError(f"--max-queue-delay-us {options.max_queue_delay_us}: 0 or more is needed")
    sidecar = read_sidecar(options.engine, "engine")
    builder = sidecar.details.get("builder", {})
    if sidecar.details.get("settings", {}).get("strip_weights"):
        raise UserError(f"{options.engine} was built without weights, which Triton would miss: build it with them")
    if builder.get("name") != "tensorrt":
        raise UserError(
            f"{options.engine} was built by {builder.get('name')} {builder.get('version')}, Triton serves TensorRT's "
            "engines only: build it with --builder tensorrt on a machine with an NVIDIA GPU"
        )
    model = Model(name, sidecar, _profiles(options.engine, sidecar), options.instances, options.max_queue_delay_us)
    _check_tensors(options.engine, model)
    return model


def _profiles(engine: Path, sidecar: Sidecar) -> tuple[Profile, ...]:
    try:
        return tuple(Profile(**profile) for profile in sidecar.details["profiles"])
    except (KeyError, TypeError, UserError) as error:
        raise UserError(
            f"the sidecar of {engine} lacks or misstates its optimization profiles ({type(error).__name__}: {error}): "
            "build the engine again with python -m deploy.build"
        ) from error


def _check_tensors(engine: Path, model: Model) -> None:
    """UserError for a tensor whose type or shape has no place in Triton's configuration."""
    for kind, specs in (("inputs", model.sidecar.inputs), ("outputs", model.sidecar.outputs)):
        if not specs:
            raise UserError(f"the sidecar of {engine} names no {kind}: build the engine again")
        for spec in specs:
            if spec.dtype not in _DATA_TYPES:
                raise UserError(
                    f"{engine}: tensor {spec.name!r} has type {spec.dtype}, Triton takes {', '.join(_DATA_TYPES)}: "
                    "change it in the ONNX file"
                )
            dims = model.dims(spec)
            if -1 in dims or (model.profiles and spec.shape[:1] != (-1,)):
                wanted = "a dynamic batch first and no other -1" if model.profiles else "no -1, for it has no profile"
                raise UserError(
                    f"{engine}: tensor {spec.name!r} has shape {list(spec.shape)}, needed is {wanted}: export it again"
                )


def _check_free(options: TritonOptions, folder: Path) -> None:
    """UserError when something is in the way that this command did not write or may not replace."""
    if folder.exists() and not options.overwrite:
        raise UserError(f"{folder} exists: give --overwrite to replace it, or another --name or --out")
    with disk_errors(folder):
        entries = sorted(folder.iterdir()) if folder.exists() else []
    others = [path.name for path in entries if path.is_dir() and path.name.isdecimal() and int(path.name) > 1]
    if others:
        raise UserError(
            f"{folder} has version {others[-1]}, which Triton would serve rather than this one, version 1: "
            "remove it, or give another --name"
        )
    page = options.out / PAGE
    if page.is_file() and not page.read_text(encoding="utf-8", errors="replace").startswith(PAGE_MARK):
        raise UserError(f"{page} is not a page of this command, which would replace it: give another --out")


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[None]:
    """Removes ``folder`` when the block fails, unless it was there before."""
    before = folder.exists()
    try:
        yield
    except BaseException:
        if not before:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_labels(path: Path, model: Model) -> None:
    """One line for each class; without classes, none are left from a model that was replaced."""
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
            raise RuntimeError(f"{path} does not say what was to be written")


def _describe(message: Any, spec: TensorSpec, model: Model, schema: Any) -> None:
    """Fills in name, type and shape of an input or output."""
    message.name = spec.name
    message.data_type = _data_type(spec, schema)
    dims = model.dims(spec)
    message.dims.extend(dims or [1])
    if not dims:  # one number for each image: Triton has no empty dims, it takes [1] for them
        message.reshape.SetInParent()


def _data_type(spec: TensorSpec, schema: Any) -> int:
    return int(schema.DataType.Value(_DATA_TYPES[spec.dtype]))


def _row(spec: TensorSpec, model: Model) -> dict[str, Any]:
    """A tensor as the page shows it; ``layout`` only where its shape is that of the preprocessing."""
    size = [model.sidecar.preprocessing.get(side) for side in ("height", "width")]
    layouts = {(3, *size): "NCHW", (*size, 3): "NHWC"}
    return {
        "name": spec.name,
        "shape": " x ".join(map(str, [*(["batch"] if model.profiles else []), *model.dims(spec)])),
        "dtype": spec.dtype,
        "layout": layouts.get(spec.shape[1:], ""),
        "raw": spec.dtype == "uint8",
    }


if __name__ == "__main__":
    run_command(main, TritonOptions)
