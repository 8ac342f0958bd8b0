"""Loading engines on a machine that cannot run them: one line for every reason. With a GPU: tests/gpu."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deploy import cuda
from deploy.runtime import Engine
from qat.artifact import UserError, sidecar_path


@pytest.fixture
def engine(chain: Path, tmp_path: Path) -> Path:
    for name in ("model.engine", "model.engine.json"):
        shutil.copy(chain / name, tmp_path)
    return tmp_path / "model.engine"


def refused(path: Path, **options: bool) -> str:
    with pytest.raises(UserError) as caught:
        Engine.load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def gpu() -> bool:
    try:
        cuda.device()
    except UserError:
        return False
    return True


def test_what_is_no_engine_is_said_before_a_gpu_is_looked_for(engine, chain):
    assert "no file" in refused(engine.with_name("no.engine"))
    assert "no file" in refused(engine.with_name("no.engine"), trust=True)
    assert "is a file of kind 'onnx', needed is 'engine'" in refused(chain / "model.onnx")
    engine.write_bytes(engine.read_bytes()[:-1])
    assert "is truncated or is another one" in refused(engine)
    sidecar_path(engine).unlink()
    assert "has no sidecar" in refused(engine)


@pytest.mark.skipif(gpu(), reason="this machine has a GPU")
def test_no_gpu_is_one_line_with_what_to_do(engine):
    for options in ({}, {"trust": True}):
        assert refused(engine, **options).endswith("run this on a machine with an NVIDIA GPU and its driver")
