"""Which builder is installed: TensorRT if it and a GPU are usable, else TensorRT-RTX, which needs no GPU to build.

What the two builders and their versions can do is in deploy/trt.py.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from deploy import cuda
from deploy.trt import Toolkit
from qat.base.choices import BuilderName
from qat.base.errors import UserError
from qat.base.streams import interrupts_held_back

# The wheel of ONNX Runtime's TensorRT-RTX provider contains the libraries. They must be loaded in this order.
RTX_LIBRARY_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
RTX_LIBRARIES = ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")
RTX_BINDINGS = "tensorrt_rtx_bindings"
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


def _find_tensorrt() -> Toolkit:
    spec = importlib.util.find_spec("tensorrt")
    if spec is None or spec.origin is None:  # a folder of type stubs has no origin
        raise ImportError("the package tensorrt is not installed")
    device = cuda.device()
    return Toolkit("tensorrt", importlib.import_module("tensorrt"), device)


def _find_rtx() -> Toolkit:
    # The meta package loads its own libraries; without it they must be loaded before the bindings.
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        return Toolkit("tensorrt-rtx", importlib.import_module("tensorrt_rtx"))
    if importlib.util.find_spec(RTX_BINDINGS) is None:
        raise ImportError(f"the package {RTX_BINDINGS} is not installed")
    spec = importlib.util.find_spec(RTX_LIBRARY_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the package {RTX_LIBRARY_PACKAGE}, which contains the libraries, is not installed")
    folder = Path(spec.submodule_search_locations[0])
    for pattern in RTX_LIBRARIES:
        library = next(iter(sorted(folder.glob(pattern))), None)
        if library is None:
            raise ImportError(f"no {pattern} in {folder}")
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return Toolkit("tensorrt-rtx", importlib.import_module(RTX_BINDINGS))
