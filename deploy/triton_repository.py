"""A model repository for NVIDIA's Triton Inference Server, from an engine or, for its Python backend, an ONNX file.

It has the file, its config.pbtxt, the names of its classes, and a page (README.md) that says how to start the server,
what to send to it and how to measure it. For the Python backend it has a model.py too, which runs the file with this
package (deploy/triton_backend.py). No GPU and no server are needed to write it.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.settings import Profile
from deploy.triton_config import (
    CODE,
    DATA_TYPES,
    ENGINE,
    LABELS,
    ONNX,
    PLAN,
    Backend,
    TritonModel,
    load_schema,
    model_config,
    write_config,
)
from qat.base.artifact import Sidecar, TensorSpec, read_sidecar, sidecar_path
from qat.base.console import say, warn
from qat.base.errors import UserError
from qat.base.number_format import INT8
from qat.base.onnx_structure import check_structure
from qat.base.writing import atomic_write, disk_errors

TEMPLATE = Path(__file__).with_name("triton_repository.md.j2")
PAGE, CONFIG, VERSION = "README.md", "config.pbtxt", "1"
PAGE_MARK = "<!-- Written by python -m deploy.triton, which replaces this page when it runs again. -->"
LARGEST_BATCH = 32
"""Of an ONNX file with a dynamic batch, unless the user says another."""
MODEL_CODE = '''"""Written by python -m deploy.triton: serves the file beside it with the package int8-qat-pipeline."""

from deploy.triton_backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FILES = {PLAN, CODE, ENGINE, ONNX, *(sidecar_path(Path(name)).name for name in (ENGINE, ONNX))}


def write_repository(
    path: Path,
    repository: Path,
    *,
    backend: Backend = "tensorrt",
    name: str | None = None,
    instances: int = 1,
    max_batch: int | None = None,
    max_queue_delay_us: int = 100,
    overwrite: bool = False,
) -> None:
    """Adds an engine or an ONNX file to a model repository.

    Args:
        path: the engine file, or for Python's backend an ONNX file; its sidecar is beside it.
        repository: the model repository, a folder that may have other models.
        backend: ``tensorrt`` serves engines of TensorRT by themselves; ``python`` serves every engine with
            ``deploy.Engine``, and ONNX files with ONNX Runtime, as ``deploy.evaluate`` runs them.
        name: the model's name on the server; by default the file's name without its suffix.
        instances: how many copies of the model run at the same time, on each GPU or on the processor.
        max_batch: the largest batch of an ONNX file with a dynamic batch; by default ``LARGEST_BATCH``.
        max_queue_delay_us: how many microseconds a request waits at most for others that share its batch.
        overwrite: replace a model of the same name.

    Raises UserError when Triton could not serve the file, or when a file is in the way. A new model is then removed.
    """
    if not _NAME.fullmatch(path.stem if name is None else name):
        raise UserError(
            f"{path.stem if name is None else name!r} cannot be the name of a model: give --name, with letters, "
            "digits, '_', '-' and '.', not starting with '-' or '.'"
        )
    for option, given, least in (
        ("--instances", instances, 1),
        ("--max-batch", max_batch, 1),
        ("--max-queue-delay-us", max_queue_delay_us, 0),
    ):
        if given is not None and given < least:
            raise UserError(f"{option} {given}: must be at least {least}")
    sidecar = _read_servable(path, backend)
    profiles = _profiles(path, sidecar, max_batch)
    model = TritonModel(name or path.stem, sidecar, profiles, backend, instances, max_queue_delay_us)
    _check_tensors(path, model)
    folder = repository / model.name
    _check_free(repository, folder, overwrite)
    config = model_config(model, load_schema())
    page = render_page(model, path.name)
    with _remove_on_failure(folder):
        written = _write_version(folder / VERSION, path, model)
        _write_labels(folder / LABELS, model)
        write_config(folder / CONFIG, config)
        with atomic_write(repository / PAGE) as temporary:
            temporary.write_text(page, encoding="utf-8")
        for other in _FILES - written:  # of a model of the same name that another backend served
            (folder / VERSION / other).unlink(missing_ok=True)
    if model.sidecar.class_names and not model.label_outputs:
        warn(f"no output of {path} has {len(model.sidecar.class_names)} values: {LABELS} is used for none of them")
    say(f"wrote {folder}\nnext: {repository / PAGE} says how to start Triton and how to measure it")


def files_of_model(repository: Path, name: str) -> tuple[Path, ...]:
    """What ``write_repository`` may write for a model."""
    folder = repository / name
    return (*(folder / VERSION / file for file in sorted(_FILES)), folder / LABELS, folder / CONFIG, repository / PAGE)


def render_page(model: TritonModel, source: str) -> str:
    """The page about the repository, in Markdown; ``source`` is the name of the engine or ONNX file."""
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
        source=source,
        builder=sidecar.details.get("builder", {}),
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


def _read_servable(path: Path, backend: Backend) -> Sidecar:
    """The sidecar of a file that ``backend`` can serve. Raises UserError for any other."""
    if path.suffix == ".onnx":
        if backend == "tensorrt":
            raise UserError(f"Triton's TensorRT backend serves engines, not {path}: give --backend python")
        return read_sidecar(path, "onnx")
    sidecar = read_sidecar(path, "engine")
    builder = sidecar.details.get("builder", {})
    if sidecar.details.get("settings", {}).get("strip_weights"):
        raise UserError(f"{path} was built without weights, which Triton cannot add: build it with weights")
    if backend == "tensorrt" and builder.get("name") != "tensorrt":
        raise UserError(
            f"{path} was built by {builder.get('name')} {builder.get('version')}, but Triton's TensorRT backend serves "
            "only TensorRT's engines: give --backend python, or build it with --builder tensorrt on a machine with an "
            "NVIDIA GPU"
        )
    return sidecar


def _profiles(path: Path, sidecar: Sidecar, max_batch: int | None) -> tuple[Profile, ...]:
    """The batch sizes that a file takes; none if its batch is fixed."""
    if sidecar.kind == "onnx" and any(spec.shape[:1] == (-1,) for spec in sidecar.inputs):
        largest = max_batch or LARGEST_BATCH
        return (Profile(1, largest, largest),)
    if max_batch is not None:
        raise UserError(f"--max-batch is for ONNX files with a dynamic batch, and {path} has its own: leave it out")
    if sidecar.kind == "onnx":
        return ()
    try:
        return tuple(Profile(**profile) for profile in sidecar.details["profiles"])
    except (KeyError, TypeError, UserError) as error:
        raise UserError(
            f"the sidecar of {path} has missing or wrong optimization profiles ({type(error).__name__}: {error}): "
            "build the engine again with python -m deploy.build"
        ) from error


def _check_tensors(path: Path, model: TritonModel) -> None:
    """Raises UserError for a tensor whose type or shape Triton's configuration cannot express, or NumPy has not."""
    types = [name for name in DATA_TYPES if model.backend == "tensorrt" or name != "bfloat16"]
    for kind, specs in (("inputs", model.sidecar.inputs), ("outputs", model.sidecar.outputs)):
        if not specs:
            raise UserError(f"the sidecar of {path} names no {kind}: make it again")
        for spec in specs:
            if spec.dtype not in types:
                raise UserError(
                    f"{path}: tensor {spec.name!r} has type {spec.dtype}, but Triton takes {', '.join(types)}: "
                    "change it in the ONNX file"
                )
            dims = model.dims(spec)
            if -1 in dims or (model.profiles and spec.shape[:1] != (-1,)):
                rule = "start with a dynamic batch and have no other -1"
                if not model.profiles:
                    rule = "have no -1, because it has no profile"
                raise UserError(
                    f"{path}: tensor {spec.name!r} has shape {list(spec.shape)}, which must {rule}: export it again"
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


def _write_version(folder: Path, source: Path, model: TritonModel) -> set[str]:
    """Writes the file that is served and, for Python's backend, its sidecar and model.py. Returns their names."""
    target = folder / model.file
    written = {target.name}
    if model.backend == "tensorrt":
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)
    else:
        with atomic_write(sidecar_path(target)) as temporary_sidecar, atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)
            shutil.copyfile(sidecar_path(source), temporary_sidecar)
            if model.in_onnx_runtime:
                _check_runs(source, temporary)
        with atomic_write(folder / CODE) as temporary:
            temporary.write_text(MODEL_CODE, encoding="utf-8")
        written |= {sidecar_path(target).name, CODE}
    return written


def _check_runs(source: Path, copy: Path) -> None:
    """Raises UserError, which names ``source``, when ONNX Runtime does not run it, or ``copy`` has not all weights."""
    from export.session import runs_in_onnx_runtime, session

    with runs_in_onnx_runtime(source):
        session(source)
    try:
        check_structure(copy)
    except UserError as error:  # the source is whole, so it is the place
        raise UserError(
            f"{source} keeps weights in another file, which the repository does not get: save it again with all "
            "weights inside"
        ) from error


def _write_labels(path: Path, model: TritonModel) -> None:
    """One line for each class. Without classes, the labels of a model that is replaced are removed."""
    if not model.sidecar.class_names:
        path.unlink(missing_ok=True)
        return
    lines = (" ".join(name.splitlines()) for name in model.sidecar.class_names)
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


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
