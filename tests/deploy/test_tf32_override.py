"""A variable that switches TF32 off is said where an engine is loaded; a fake runtime stands for the GPU's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy import loaded_engine
from deploy.loaded_engine import LoadedEngine
from deploy.settings import BuilderOptions, Profile
from qat.base.artifact import Sidecar, sidecar_path, write_artifact

MODULE = SimpleNamespace(TensorIOMode=SimpleNamespace(INPUT=0, OUTPUT=1))
ENGINE = SimpleNamespace(
    num_io_tensors=2,
    num_optimization_profiles=1,
    get_tensor_name=("input", "logits").__getitem__,
    get_tensor_shape={"input": (-1, 3, 8, 8), "logits": (-1, 10)}.__getitem__,
    get_tensor_dtype=lambda name: SimpleNamespace(name="FLOAT"),
    get_tensor_mode={"input": 0, "logits": 1}.__getitem__,
    get_tensor_profile_shape=lambda name, index: [(1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8)],
)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    toolkit = SimpleNamespace(module=MODULE, load=lambda plan, log, host_code: (object(), ENGINE))
    monkeypatch.setattr(loaded_engine, "_toolkit_here", lambda path, sidecar: toolkit)
    return tmp_path / "m.engine"


def written(path: Path, **settings: Any) -> Path:
    write_artifact(path, Sidecar("engine", details={"settings": settings}), lambda file: file.write_bytes(b"plan"))
    return path


def warned(path: Path, capsys: pytest.CaptureFixture[str], *, trust: bool = False) -> bool:
    loaded = LoadedEngine.load(path, trust=trust)
    assert loaded.profiles == (Profile(1, 4, 8),)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 1
    return bool(lines) and lines[0].startswith("warning: NVIDIA_TF32_OVERRIDE=0 is set in the environment")


@pytest.mark.parametrize(
    ("settings", "uses"),
    [
        ({"tf32": True, "precision": "fp32"}, True),
        ({"tf32": False, "precision": "tf32"}, True),
        ({"tf32": True}, True),  # of before there was a precision
        ({"tf32": False, "precision": "fp32"}, False),
        ({"tf32": False, "precision": BuilderOptions().precision}, False),
        ({}, False),
    ],
)
def test_an_engine_for_tf32_is_warned_of_where_it_is_switched_off(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    uses: bool,
) -> None:
    written(path, **settings)
    for value, off in (("0", True), ("1", False), ("", False), (None, False)):
        if value is None:
            monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
        else:
            monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", value)
        assert warned(path, capsys) is (uses and off)


def test_an_engine_without_a_sidecar_is_not_warned_of(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    written(path, tf32=True)
    assert warned(path, capsys, trust=True)
    sidecar_path(path).unlink()
    assert not warned(path, capsys, trust=True)
