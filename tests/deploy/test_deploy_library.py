"""The library interface of deploy: everything here comes from ``from deploy import ...``. Runs: tests/gpu."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from qdq_models import classifier, convolution

import deploy
from deploy import BuilderOptions, Engine, EngineFile, Profile, UserError, audit_engine, build_engine


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return classifier(tmp_path / "model.onnx")


def build(model: Path, **arguments) -> EngineFile:
    return build_engine(model, builder="tensorrt-rtx", compute_capabilities=("8.9",), **arguments)


def test_an_engine_is_built_and_audited(model):
    built = build_engine(str(model), builder="tensorrt-rtx")
    assert built.path == model.with_suffix(".engine")
    assert built.path.stat().st_size == built.sidecar.figures["engine_bytes"]
    assert built.sidecar.details["compute_capabilities"] == ["8.6", "8.9", "12.0"]
    assert built.sidecar.details["profiles"] == [{"min": 1, "opt": 8, "max": 32}]
    assert [(finding.node, finding.precision) for finding in built.audit.findings] == [
        ("/conv/Conv", "INT8"),
        ("/fc/Gemm", "INT8"),
    ]
    assert built.audit.broken == ()


def test_all_arguments(model, tmp_path):
    built = build(
        model,
        output=str(tmp_path / "new" / "other.engine"),
        profiles=[Profile(1, 1, 4), Profile(8, 16, 32)],
        settings=BuilderOptions(optimization_level=1, tf32=True),
    )
    assert built.path == tmp_path / "new" / "other.engine"
    details = built.sidecar.details
    assert details["profiles"] == [{"min": 1, "opt": 1, "max": 4}, {"min": 8, "opt": 16, "max": 32}]
    assert (details["settings"]["optimization_level"], details["settings"]["tf32"]) == (1, True)
    assert details["compute_capabilities"] == ["8.9"]


def test_a_layer_that_is_not_int8_is_in_the_audit_and_raises_nothing(tmp_path):
    built = build(convolution(tmp_path / "m.onnx", axis=1))
    (finding,) = built.audit.broken
    assert (finding.node, finding.precision) == ("/conv/Conv", "FP32")
    assert "axis 1" in finding.cause
    assert built.path.exists()


def test_nothing_but_lines_is_printed_without_a_terminal(model, capsys):
    build(model)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("TensorRT-RTX ")
    assert lines[0].endswith(", strongly typed, for compute capabilities 8.9")
    assert all(line.startswith("building the engine, percent: ") for line in lines[1:])


def test_a_build_in_another_thread(model):
    results: list[object] = []

    def work() -> None:
        try:
            results.append(build(model))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (result,) = results
    assert isinstance(result, EngineFile)


def test_layers_that_cannot_be_measured_here_are_those_of_the_build(model):
    built = build(model)
    audit = audit_engine(str(built.path))
    assert audit.findings == built.audit.findings
    assert audit.layers == built.audit.layers
    assert audit.milliseconds == ()
    assert audit.why_not_measured
    assert sum(entry["layers"] for entry in audit.totals().values()) == len(audit.layers)


def test_one_line_for_every_mistake(model, tmp_path):
    def refused(call, *arguments, **options) -> str:
        with pytest.raises(UserError) as caught:
            call(*arguments, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no file" in refused(build, tmp_path / "none.onnx")
    assert "there is no builder 'cuda'" in refused(build_engine, model, builder="cuda")
    assert "--repeat 0: must be at least 1" in refused(build, model, repeat=0)
    assert "there is no profile" in refused(build, model, profiles=())
    assert "must have 1 <= min <= opt <= max" in refused(Profile, 4, 2, 8)
    assert "is the model: give it a name" in refused(build, model, output=model)
    assert "does not time kernels" in refused(build, model, timing_cache=tmp_path / "timing.cache")
    assert "is not 0" in refused(build, convolution(tmp_path / "zero.onnx", zero_point=np.int8(3)))
    assert "no file" in refused(Engine.load, tmp_path / "none.engine")
    assert "must be at least 1" in refused(Engine.load, tmp_path / "none.engine", contexts=0)
    assert "no file" in refused(audit_engine, tmp_path / "none.engine")
    assert not list(tmp_path.glob("*.engine"))


# --- the names


def test_every_name_is_there_and_none_is_that_of_a_command():
    commands = {"build", "audit", "benchmark", "evaluate", "report", "triton"}
    assert all((ROOT / "deploy" / f"{command}.py").exists() for command in commands)
    modules = {path.stem for path in (ROOT / "deploy").glob("*.py")}
    assert not modules & set(deploy.__all__)
    assert sorted(deploy.__all__) == list(deploy.__all__)
    for name in deploy.__all__:
        assert getattr(deploy, name).__doc__, name
        assert name in dir(deploy)
    with pytest.raises(AttributeError, match="no attribute 'compile_engine'"):
        deploy.compile_engine  # noqa: B018


def test_names_are_imported_when_they_are_used():
    heavy = ("numpy", "rich", "tyro", "torch", "onnx", "tensorrt", "tensorrt_rtx_bindings", "deploy.runtime")
    code = (
        "import sys, deploy\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
        "from deploy import BuilderOptions, Profile, UserError\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
        "from deploy import Engine, audit_engine, build_engine\n"
        f"print([name for name in {heavy[3:7]!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]", "[]"]
