"""ONNX file -> TensorRT engine, and what is measured on it. Needs TensorRT and numpy, but neither torch nor onnx.

The library interface::

    from deploy import Engine, Profile, audit_engine, build_engine

    built = build_engine("model.onnx", profiles=[Profile(1, 8, 32)])    # writes model.engine and its sidecar
    assert not built.audit.broken                                       # INT8 wherever the ONNX file declares it
    with Engine.load(built.path) as engine:
        logits = engine(images)                                         # float32 [N, 3, H, W] -> float32 [N, classes]

The commands are ``python -m deploy.build``, ``audit``, ``benchmark``, ``evaluate``, ``kernels``, ``migrate``,
``report``, ``triton`` and ``tune``. Every name is imported when it is used, so ``import deploy`` needs only the
standard library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.engine_audit import EngineAudit, audit_engine
    from deploy.engine_file import EngineFile, build_engine
    from deploy.migration import Migration, migrate_engine
    from deploy.runtime import Engine
    from deploy.served_engine import ServedEngine
    from deploy.settings import BuilderOptions, CalibrationSettings, Profile
    from deploy.tuned_engine import TunedEngine, tune_engine
    from qat.base.errors import UserError

__all__ = [
    "BuilderOptions",
    "CalibrationSettings",
    "Engine",
    "EngineAudit",
    "EngineFile",
    "Migration",
    "Profile",
    "ServedEngine",
    "TunedEngine",
    "UserError",
    "audit_engine",
    "build_engine",
    "migrate_engine",
    "tune_engine",
]

_MODULES = {
    "BuilderOptions": "deploy.settings",
    "CalibrationSettings": "deploy.settings",
    "Engine": "deploy.runtime",
    "EngineAudit": "deploy.engine_audit",
    "EngineFile": "deploy.engine_file",
    "Migration": "deploy.migration",
    "Profile": "deploy.settings",
    "ServedEngine": "deploy.served_engine",
    "TunedEngine": "deploy.tuned_engine",
    "UserError": "qat.base.errors",
    "audit_engine": "deploy.engine_audit",
    "build_engine": "deploy.engine_file",
    "migrate_engine": "deploy.migration",
    "tune_engine": "deploy.tuned_engine",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
