"""deploy.tune on a small network: TensorRT-RTX builds every engine, and times are made up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from attention_forms import Attention
from qdq_models import classifier, residual

from deploy import builder, cuda, float_twin, tuned_engine, tuning_bench
from deploy.engine_file import build_engine as real_build_engine
from deploy.installed import find_toolkit
from deploy.measure import Latency
from deploy.settings import BuildSettings
from deploy.tune import TuneOptions, main
from deploy.tuned_engine import tune_engine
from deploy.tuning_bench import EngineBench
from export.emit import emit
from export.float_types import store_floats_as
from export.fold import fold
from export.linter import lint_onnx
from export.names import SPLIT
from export.session import session
from export.split_projections import split_projections
from qat.base.artifact import read_sidecar
from qat.base.errors import UserError
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import placement_of, prepare
from qat.rules.tuned import TunedPlacement, tuned_names


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


def test_a_layer_that_export_made_several_is_left_in_float_as_a_whole(gpu: dict[str, float], tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, network = tmp_path / "m.onnx", Attention("unbind").eval()
    prepared = prepare(network, input_shape=(3, 64, 64))
    calibrate_ranges(prepared, [torch.randn(2, 3, 64, 64)], "max")
    folded, _ = fold(prepared)
    split = split_projections(folded, prepared.meta["inputs"])
    ir.save(emit(folded, torch.zeros(2, 3, 64, 64), {SPLIT: json.dumps(split)}), path)
    gpu["qkv.1"] = 5.0
    found = tune_engine(path, minutes=5)
    assert found.placement.keep_float == ("qkv",)
    assert {"qkv", "project", "classify"} <= set(found.placement.layers)
    assert not any(name.startswith("qkv.") for name in found.placement.layers)
    codes = {
        value.name for value in ir.load(found.model).graph.initializers.values() if value.dtype == ir.DataType.INT8
    }
    assert not any((name or "").startswith("qkv.") and (name or "").endswith("weight") for name in codes)
    again = prepare(network, input_shape=(3, 64, 64), keep_float=tuned_names(path.with_suffix(".tuned.json")))
    assert not next(one for one in placement_of(again).weights if one.label == "qkv").quantized


@pytest.mark.parametrize(("milliseconds", "precision"), [(5.0, "fp16"), (0.5, "explicit")])
def test_what_is_left_without_int8_is_built_as_a_float_network(
    milliseconds: float, precision: str, gpu: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu["/conv/Conv"] = milliseconds  # the only layer that is quantized
    asked, build_engine = [], tuned_engine.build_engine

    def recording(model: Path, output: Path, **options: Any) -> Any:
        asked.append(options["settings"].precision)
        return build_engine(model, output, **options)

    monkeypatch.setattr(tuned_engine, "build_engine", recording)
    monkeypatch.setattr(tuned_engine, "float_precision", lambda toolkit: "fp16")
    found = tune_engine(classifier(tmp_path / "m.onnx", quantize_fc=False), minutes=5)
    assert set(found.placement.keep_float) < set(found.placement.layers)  # the other is float by itself
    assert asked == [precision]


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


@pytest.fixture
def costs(tmp_path: Path) -> Path:
    """Accuracy 90 % in float, 88 % in INT8, 89 % and 89.9 % with one and two convolutions in float."""
    path = tmp_path / "costs.json"
    steps = [
        {"op": "x", "label": label, "top1": top1} for label, top1 in (("/conv1/Conv", 89.0), ("/conv2/Conv", 89.9))
    ]
    path.write_text(json.dumps({"float": {"top1": 90.0}, "quantized": {"top1": 88.0}, "keep_float": steps}))
    return path


@pytest.mark.parametrize(
    ("max_drop", "kept"),
    [(None, set()), (2.0, set()), (1.0, {"/conv1/Conv"}), (0.5, {"/conv1/Conv", "/conv2/Conv"})],
)
def test_speed_is_given_up_for_accuracy(
    max_drop: float | None,
    kept: set[str],
    costs: Path,
    gpu: dict[str, float],
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(TuneOptions(model=model, budget=5, costs=costs, max_drop=max_drop)) == 0
    found = TunedPlacement.read(model.with_suffix(".tuned.json"))
    assert set(found.keep_float) == kept
    assert [(round(point.drop, 3), len(point.keep_float)) for point in found.frontier] == [(2.0, 0), (1.0, 1), (0.1, 2)]
    times = [point.milliseconds for point in found.frontier]
    assert times == sorted(times)
    assert len(set(times)) == 3
    said = capsys.readouterr()
    assert "Accuracy against speed" in said.out
    assert "no placement" not in said.err


def test_a_drop_that_is_not_reached_is_said(
    costs: Path, gpu: dict[str, float], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tune_engine(model, minutes=5, costs=costs, max_drop=0.05)
    assert set(found.placement.keep_float) == {"/conv1/Conv", "/conv2/Conv"}
    said = " ".join(capsys.readouterr().err.split())
    assert "no placement is within 0.05 points of the float network; the most accurate is 0.10 below" in said


def test_what_speed_leaves_in_float_stays_there(costs: Path, gpu: dict[str, float], model: Path) -> None:
    gpu["/stem/Conv"] = 5.0
    found = tune_engine(model, minutes=5, costs=costs, max_drop=1.0)
    assert {"/stem/Conv", "/conv1/Conv"} <= set(found.placement.keep_float)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is no file of costs .*python -m qat.sensitivity --json writes one"),
        ('{"float": {"top1": 1}}', "is no file of costs .*python -m qat.sensitivity --json writes one"),
        ('{"float": {"top1": NaN}, "quantized": {"top1": 1}, "keep_float": []}', "NaN is not a JSON number"),
        (
            '{"float": {"top1": 2}, "quantized": {"top1": 1}, "keep_float": [{"label": "elsewhere", "top1": 2}]}',
            "is of another network: this one has no elsewhere",
        ),
    ],
)
def test_other_costs_are_refused(content: str, says: str, gpu: dict[str, float], model: Path) -> None:
    path = model.with_name("costs.json")
    path.write_text(content)
    with pytest.raises(UserError, match=says):
        tune_engine(model, costs=path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_drop": 0.5}, "--max-drop is at least 0 percentage points, and needs --costs"),
        ({"max_drop": -1.0, "costs": Path("c.json")}, "--max-drop is at least 0"),
        ({"costs": Path("missing.json")}, r"cannot read the file of costs missing\.json"),
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
    exported: list[tuple[str, str, bool]] = []

    def export_onnx(checkpoint: Path, output: Path, trust_code: bool) -> None:
        exported.append((checkpoint.name, output.name, trust_code))
        residual(output)

    monkeypatch.setattr("export.from_checkpoint.export_onnx", export_onnx)
    found = tune_engine(tmp_path / "m.qat", minutes=5, trust_code=True)
    assert exported == [("m.qat", "m.onnx", True)]
    assert found.model == tmp_path / "m.tuned.onnx"
    assert TunedPlacement.read(tmp_path / "m.tuned.json") == found.placement
