"""Which builder is installed: TensorRT if it and a GPU are usable, else TensorRT-RTX, which needs no GPU to build.

And what runs an engine: its builder, or TensorRT's lean runtime, which is 46 MB instead of gigabytes and runs engines
that were built with --version-compatible.

What the two builders and their versions can do is in deploy/trt.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

from deploy import cuda
from deploy.trt import Toolkit
from qat.base.choices import BuilderName
from qat.base.errors import UserError
from qat.base.streams import interrupts_held_back


@dataclass(frozen=True)
class _Wheels:
    """How a library is packaged: one package that loads its libraries itself, or bindings and libraries apart.

    Attributes:
        package: loads its own libraries.
        bindings: without it, the Python module, for which the libraries must be loaded first.
        libraries_in: the package that has them.
        libraries: their names, in the order in which they must be loaded.
    """

    package: str
    bindings: str
    libraries_in: str
    libraries: tuple[str, ...]

    def load(self) -> ModuleType:
        """Raises ImportError that names what is missing."""
        if _is_package(self.package):
            return importlib.import_module(self.package)
        if not _is_package(self.bindings):
            raise ImportError(f"the package {self.bindings} is not installed")
        spec = importlib.util.find_spec(self.libraries_in)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"the package {self.libraries_in}, which contains the libraries, is not installed")
        folder = Path(spec.submodule_search_locations[0])
        for pattern in self.libraries:
            library = next(iter(sorted(folder.glob(pattern))), None)
            if library is None:
                raise ImportError(f"no {pattern} in {folder}")
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module(self.bindings)


RTX = _Wheels(
    "tensorrt_rtx",
    "tensorrt_rtx_bindings",
    "onnxruntime_ep_nv_tensorrt_rtx",  # ONNX Runtime's provider contains them
    ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*"),
)
LEAN = _Wheels("tensorrt_lean", "tensorrt_lean_bindings", "tensorrt_lean_libs", ("libnvinfer_lean.so.*",))
RTX_INSTALL = "pip install tensorrt-rtx-cu13-bindings onnxruntime-ep-nv-tensorrt-rtx-cu13"
TENSORRT_INSTALL = "a machine with an NVIDIA GPU and its driver, and there pip install tensorrt"


def find_toolkit(choice: Literal["auto"] | BuilderName = "auto") -> Toolkit:
    """Finds and imports a builder.

    Args:
        choice: ``tensorrt``, ``tensorrt-rtx``, or ``auto``: TensorRT if it and a GPU are usable, else TensorRT-RTX.

    Raises UserError that names every builder tried, why it failed and what to install.
    """
    finders: dict[str, Callable[[], Toolkit]] = {"tensorrt": _find_tensorrt, "tensorrt-rtx": _find_rtx}
    if choice not in ("auto", *get_args(BuilderName)):
        raise UserError(f"there is no builder {choice!r}: choose auto, tensorrt or tensorrt-rtx")
    failures = []
    for name, find in finders.items():
        if choice not in ("auto", name):
            continue
        try:
            with interrupts_held_back():  # one that comes while a library is loaded looks as if that had failed
                return find()
        except (ImportError, OSError, UserError) as error:
            failures.append(f"{name} ({' '.join(str(error).split())})")
    remedy = {"tensorrt": TENSORRT_INSTALL, "tensorrt-rtx": RTX_INSTALL}.get(
        choice, f"{RTX_INSTALL} (needs no GPU), or use {TENSORRT_INSTALL}"
    )
    raise UserError(f"no TensorRT builder is usable. Tried: {'; '.join(failures)}. To install: {remedy}")


def find_runtime(builder: BuilderName) -> Toolkit:
    """What runs the engines of ``builder`` here: itself, or TensorRT's lean runtime where that alone is installed.

    Raises UserError as find_toolkit does.
    """
    if builder == "tensorrt" and not _is_package("tensorrt"):
        with contextlib.suppress(ImportError, OSError), interrupts_held_back():
            return Toolkit("tensorrt", LEAN.load(), cuda.device(), lean=True)
    return find_toolkit(builder)


def _find_tensorrt() -> Toolkit:
    if not _is_package("tensorrt"):
        raise ImportError("the package tensorrt is not installed")
    device = cuda.device()
    return Toolkit("tensorrt", importlib.import_module("tensorrt"), device)


def _find_rtx() -> Toolkit:
    return Toolkit("tensorrt-rtx", RTX.load())


def _is_package(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a folder of type stubs has no origin
