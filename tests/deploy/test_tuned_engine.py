"""deploy.tune on a small network: TensorRT-RTX builds every engine, and times are made up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from qdq_models import residual

from deploy import builder, cuda, float_twin, tuned_engine, tuning_bench
from deploy.engine_file import build_engine as real_build_engine
from deploy.installed import find_toolkit
from deploy.measure import Latency
from deploy.settings import BuildSettings
from deploy.tune import TuneOptions, main
from deploy.tuned_engine import tune_engine
from deploy.tuning_bench import EngineBench
from export.float_types import store_floats_as
from export.linter import lint_onnx
from export.session import session
from qat.base.artifact import read_sidecar
from qat.base.errors import UserError
from qat.rules.tuned import TunedPlacement


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A GPU on which a layer costs what this says in INT8, and 1 ms in float; changes may be made."""
    costs: dict[str, float] = {}
    toolkit = dataclasses.replace(find_toolkit("tensorrt-rtx"), device=cuda.Device("A GPU", "8.9", "1", "1", 1.0))
    settings = BuildSettings(capabilities=("8.9",))
    monkeypatch.setattr(tuned_engine, "find_toolkit", lambda name: toolkit)
    for module in (tuning_bench, float_twin):
        monkeypatch.setattr(module, "build", lambda _, path, *others: builder.build(toolkit, path, settings))

    def milliseconds(built: builder.BuiltEngine) -> float:
        return sum(costs.get(one.node, 0.5) if one.precision == "INT8" else 1.0 for one in built.audit.findings)

    def latencies(self: EngineBench, built: Mapping[str, builder.BuiltEngine]) -> dict[str, Latency]:
        found = {}
        for name, one in built.items():
            ms = milliseconds(one)
            found[name] = Latency(32, 200, ms, ms - 0.01, ms + 0.01, ms + 0.02)
        return found

    def losses(self: EngineBench, kept: frozenset[str]) -> dict[str, float]:
        findings = self.engine(kept).audit.findings
        return {one.node: costs.get(one.node, 0.5) - 1 for one in findings if one.precision == "INT8"}

    def build_engine(model: Path, output: Path, **options: Any) -> Any:
        return real_build_engine(model, output, builder="tensorrt-rtx", compute_capabilities=("8.9",))

    monkeypatch.setattr(EngineBench, "_latencies", latencies)
    monkeypatch.setattr(EngineBench, "losses", losses)
    monkeypatch.setattr(tuned_engine, "build_engine", build_engine)
    return costs


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return residual(tmp_path / "m.onnx")


def test_a_layer_that_loses_is_left_in_float(
    gpu: dict[str, float], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu["/conv1/Conv"] = 5.0
    assert main(TuneOptions(model=model, budget=5)) == 0
    placement = TunedPlacement.read(model.with_suffix(".tuned.json"))
    assert placement.keep_float == ("/conv1/Conv",)
    assert "/conv1/Conv" in placement.layers
    assert (placement.gpu, placement.batch) == ("A GPU", 32)
    assert placement.tuned_ms < placement.float_ms < placement.int8_ms
    assert [trial.kept for trial in placement.trials].count(True) == 1
    said = capsys.readouterr().out
    assert "INT8 tuned" in said
    assert "What was tried" in said
    tuned = model.with_suffix(".tuned.onnx")
    assert all(finding.severity != "error" for finding in lint_onnx(tuned))
    assert session(tuned).get_outputs()[0].name == session(model).get_outputs()[0].name
    assert read_sidecar(tuned, "onnx").details["tuned"]["keep_float"] == ["/conv1/Conv"]
    assert model.with_suffix(".tuned.engine").is_file()


def test_where_nothing_loses_the_rules_stay(gpu: dict[str, float], model: Path) -> None:
    found = tune_engine(model, minutes=5)
    assert found.placement.keep_float == ()
    assert found.placement.tuned_ms == found.placement.int8_ms
    assert found.beats_float


def test_a_network_that_loses_everywhere_is_said(
    gpu: dict[str, float], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("stem", "conv1", "conv2", "logits"):
        gpu[f"/{name}/Conv"] = gpu[f"/{name}/Gemm"] = 3.0
    found = tune_engine(model, minutes=5)
    assert set(found.placement.keep_float) == set(found.placement.layers)
    assert not found.beats_float
    assert "deploy FP16" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": 0.0}, "--budget must be above 0"),
        ({"batch": 0}, "--batch and --runs at least 1"),
        ({"runs": 0}, "--batch and --runs at least 1"),
        ({"model": Path("missing.onnx")}, r"no file missing\.onnx"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], says: str, model: Path) -> None:
    with pytest.raises(UserError, match=says):
        main(TuneOptions(**{"model": model, **options}))


def test_a_float_network_has_nothing_to_tune(gpu: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantizes no activation"):
        tune_engine(residual(tmp_path / "f.onnx", quantize=False))


def test_a_file_of_half_floats_is_refused_in_one_line(gpu: dict[str, float], model: Path) -> None:
    half = ir.load(model)
    store_floats_as(half, "float16", [])
    ir.save(half, model)
    with pytest.raises(UserError, match="stores floats in half precision: give the file without --float-type"):
        tune_engine(model)


def test_without_a_gpu_it_is_one_line(model: Path) -> None:
    with pytest.raises(UserError, match="no TensorRT builder is usable"):
        tune_engine(model)


def test_the_model_is_never_overwritten(gpu: dict[str, float], model: Path) -> None:
    with pytest.raises(UserError, match="is the model itself"):
        tune_engine(model, model.with_suffix(".json"))


def test_a_checkpoint_is_exported_first(gpu: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.qat").write_bytes(b"a checkpoint")
    exported: list[tuple[str, str]] = []

    def export_onnx(checkpoint: Path, output: Path) -> None:
        exported.append((checkpoint.name, output.name))
        residual(output)

    monkeypatch.setattr("export.from_checkpoint.export_onnx", export_onnx)
    found = tune_engine(tmp_path / "m.qat", minutes=5)
    assert exported == [("m.qat", "m.onnx")]
    assert found.model == tmp_path / "m.tuned.onnx"
    assert TunedPlacement.read(tmp_path / "m.tuned.json") == found.placement
