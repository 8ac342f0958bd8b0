"""A machine on which of TensorRT only the lean runtime is installed. The real one is in tests/gpu/test_commands.py."""

from __future__ import annotations

import _ctypes
import shutil
import sys
from pathlib import Path

import pytest

from deploy import cuda
from deploy.installed import find_runtime, find_toolkit
from deploy.loaded_engine import why_not_here
from qat.base.artifact import Sidecar
from qat.base.errors import UserError


@pytest.fixture(autouse=True)
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders of the lean runtime's two wheels; any library stands for that of TensorRT."""
    contents = {"tensorrt_lean_libs": "", "tensorrt_lean_bindings": "__version__ = '10.16.1.11'\n"}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(content)
    shutil.copy(_ctypes.__file__, tmp_path / "tensorrt_lean_libs" / "libnvinfer_lean.so.10")
    monkeypatch.setattr(cuda, "device", lambda: cuda.Device("NVIDIA H200", "9.0", "580.1", "13.0", 139.8))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt_lean_bindings", raising=False)
    return tmp_path


def engine(version: str = "8.6.0", *, version_compatible: bool) -> Sidecar:
    details = {"builder": {"name": "tensorrt", "version": version}, "version_compatible": version_compatible}
    return Sidecar("engine", details={**details, "gpu": "NVIDIA H200", "settings": {}})


def test_it_runs_engines_and_builds_none() -> None:
    found = find_runtime("tensorrt")
    assert found.lean
    assert found.title == "TensorRT lean runtime 10.16.1.11"
    with pytest.raises(UserError, match="tensorrt \\(the package tensorrt is not installed\\)"):
        find_toolkit("tensorrt")
    assert not find_runtime("tensorrt-rtx").lean


def test_engines_of_other_versions_load_if_they_are_version_compatible(tmp_path: Path) -> None:
    assert why_not_here(tmp_path / "m.engine", engine(version_compatible=True)) == ""


@pytest.mark.parametrize("version", ["8.6.0", "10.16.1.11"])
def test_others_are_refused_and_it_is_said_how_to_build_them(version: str, tmp_path: Path) -> None:
    why = why_not_here(tmp_path / "m.engine", engine(version, version_compatible=False))
    assert "was built without --version-compatible" in why
    assert f"install TensorRT {version}" in why


def test_where_its_libraries_are_missing_tensorrt_is_asked_for(wheels: Path) -> None:
    shutil.rmtree(wheels / "tensorrt_lean_libs")
    with pytest.raises(UserError, match="the package tensorrt is not installed"):
        find_runtime("tensorrt")
