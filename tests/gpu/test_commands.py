"""The commands on a GPU: build with its options, audit, benchmark, evaluate and the search for a differing layer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import qdq_models

from deploy import audit, benchmark, build, evaluate
from deploy.runtime import Engine
from qat.base.artifact import read_sidecar, sidecar_path
from qat.base.errors import UserError
from qat.base.exit_codes import DISAGREES, NOT_INT8


def built(model: Path, name: str, **options) -> Path:
    path = model.with_name(name)
    assert build.main(build.BuildOptions(model=model, output=path, builder="tensorrt", **options)) == 0
    return path


def test_every_declared_layer_is_int8(engine_path):
    figures = read_sidecar(engine_path, "engine").figures
    assert (figures["convolutions_int8"], figures["convolutions"]) == (3, 3)
    assert (figures["matrix_products_int8"], figures["matrix_products"]) == (1, 1)


def test_a_fixed_batch_tells_all_types(model, images, expected):
    path = built(model, "fixed.engine", profiles=("16",))
    sidecar = read_sidecar(path, "engine")
    assert sidecar.inputs[0].shape == (16, 3, 32, 32)
    assert sidecar.details["profiles"] == []
    assert "unknown" not in {layer["precision"] for layer in sidecar.details["layers"]}
    with Engine.load(path) as engine:
        found = engine(images[:16])
        assert np.abs(found - expected[:16]).max() < 0.05 * np.abs(expected).max()
        with pytest.raises(UserError, match=r"batch of 4 is outside what the engine takes \(16\)"):
            engine(images[:4])


def test_float_weights_answer_as_int8_weights_do(model, images, expected):
    path = built(qdq_models.residual(model.with_name("float.onnx"), float_weights=True), "f.engine", profiles=("8",))
    figures = read_sidecar(path, "engine").figures
    assert (figures["convolutions_int8"], figures["matrix_products_int8"]) == (3, 1)
    with Engine.load(path) as engine:
        assert np.abs(engine(images[:8]) - expected[:8]).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("float_weights", [True, False])
def test_uint8_input_builds_and_answers(tmp_path, float_weights):
    """TensorRT 8.6 wants float weights in such a network, and hands the last layer to what computes in float."""
    from export.session import session

    model = qdq_models.residual(tmp_path / "bytes.onnx", from_bytes=True, float_weights=float_weights)
    images = np.random.default_rng(3).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    expected = session(model).run(None, {"input": images})[0]
    path = tmp_path / "bytes.engine"
    code = build.main(build.BuildOptions(model=model, output=path, builder="tensorrt", profiles=("8",)))
    sidecar = read_sidecar(path, "engine")
    assert sidecar.figures["convolutions_int8"] == 3
    last = sidecar.details["findings"][-1]
    assert code == (0 if last["precision"] == "INT8" else NOT_INT8)
    assert last["precision"] == "INT8" or "another compiler handles as a whole" in last["cause"]
    with Engine.load(path) as engine:
        assert engine.inputs[0].dtype == "uint8"
        assert np.abs(engine(images) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(("model", "convolutions"), [(qdq_models.siblings, 4), (qdq_models.merged_shortcut, 2)])
def test_branches_that_are_concatenated(tmp_path, model, convolutions):
    """TensorRT merges convolutions of one input, for which 8.6 gets float weights; the parts of a sum may be merged."""
    from export.session import session

    path = model(tmp_path / "m.onnx")
    reference = session(path)
    images = np.random.default_rng(3).standard_normal((8, *reference.get_inputs()[0].shape[1:])).astype(np.float32)
    expected = reference.run(None, {"input": images})[0]
    engine_path = built(path, "branches.engine", profiles=("8",))
    sidecar = read_sidecar(engine_path, "engine")
    assert sidecar.figures["convolutions_int8"] == sidecar.figures["convolutions"] == convolutions
    with Engine.load(engine_path) as engine:
        assert np.abs(engine(images) - expected).max() < 0.05 * np.abs(expected).max()


def test_timing_cache_is_created_reused_and_replaced(model, tmp_path, capfd):
    cache = tmp_path / "timing.cache"
    first = read_sidecar(built(model, "a.engine", timing_cache=cache), "engine")
    assert first.details["timing_cache"] == "created"
    again = read_sidecar(built(model, "b.engine", timing_cache=cache), "engine")
    assert again.details["timing_cache"] == "reused"
    cache.write_bytes(cache.read_bytes()[:-10])
    capfd.readouterr()
    third = read_sidecar(built(model, "c.engine", timing_cache=cache), "engine")
    assert third.details["timing_cache"] == "replaced"
    said = capfd.readouterr()
    assert "is damaged" in said.err
    assert "replaced" in said.out
    assert read_sidecar(cache, "timing-cache").details["gpu"] == third.details["gpu"]


def test_an_artifact_of_another_kind_is_not_taken_for_a_timing_cache(model, engine_path):
    before = engine_path.read_bytes()
    with pytest.raises(UserError, match="is a file of kind 'engine', but must be of kind 'timing-cache'"):
        build.main(build.BuildOptions(model=model, output=model.with_name("y.engine"), timing_cache=engine_path))
    assert engine_path.read_bytes() == before


def test_a_file_that_is_not_a_timing_cache_is_not_overwritten(model, tmp_path):
    cache = tmp_path / "notes.txt"
    cache.write_text("mine")
    with pytest.raises(UserError, match="is not a timing cache of this program"):
        build.main(build.BuildOptions(model=model, output=tmp_path / "x.engine", timing_cache=cache))
    assert cache.read_text() == "mine"


def test_repeat_keeps_the_fastest_and_prints_the_spread(model, capfd):
    sidecar = read_sidecar(built(model, "repeat.engine", profiles=("8",), repeat=2), "engine")
    assert "2 builds, batch 8: " in capfd.readouterr().out
    assert sidecar.details["repetition"]["batch"] == 8
    assert len(sidecar.details["repetition"]["milliseconds"]) == 2


def test_zero_channels_change_no_answer(tmp_path):
    from export.session import session

    images = np.random.default_rng(4).standard_normal((8, 32, 8, 8)).astype(np.float32)
    expected = session(qdq_models.bottleneck(tmp_path / "0.onnx")).run(None, {"input": images})[0]
    for zeros in (0, 64):
        model = qdq_models.bottleneck(tmp_path / f"{zeros}.onnx", zeros=zeros)
        (reference,) = session(model).run(None, {"input": images})
        assert np.abs(reference - expected).max() < 1e-4 * np.abs(expected).max()
        with Engine.load(built(model, f"{zeros}.engine", profiles=("8",))) as engine:
            assert np.abs(engine(images) - expected).max() < 1e-2 * np.abs(expected).max()


def test_options_of_the_builder(model, images, expected):
    options = {"optimization_level": 1, "workspace_gib": 0.5, "timing_iterations": 1, "tf32": True, "refit": True}
    path = built(model, "options.engine", profiles=("8",), **options)
    assert read_sidecar(path, "engine").details["settings"]["optimization_level"] == 1
    with Engine.load(path) as engine:
        assert engine.loaded.cuda_engine.refittable
        assert np.abs(engine(images[:8]) - expected[:8]).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("option", ["hardware_compatible", "version_compatible"])
def test_compatible_engines_load_or_are_refused_in_one_line(model, images, expected, option, tmp_path):
    path = tmp_path / "compatible.engine"
    options = build.BuildOptions(model=model, output=path, builder="tensorrt", profiles=("8",), **{option: True})
    try:
        assert build.main(options) == 0
    except UserError as error:  # the lean runtime that version-compatible engines bring along may not be installed
        assert option == "version_compatible"
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert read_sidecar(path, "engine").details[option]
    with Engine.load(path) as engine:
        assert np.abs(engine(images[:8]) - expected[:8]).max() < 0.05 * np.abs(expected).max()


def test_a_workspace_that_is_too_small_or_an_unknown_option_is_one_line(model, tmp_path, toolkit):
    if hasattr(toolkit.module.BuilderFlag, "STRIP_PLAN"):
        pytest.skip(f"{toolkit.title} has stripped plans")
    with pytest.raises(UserError, match="does not have the option STRIP_PLAN"):
        build.main(build.BuildOptions(model=model, output=tmp_path / "x.engine", strip_weights=True))


def test_audit_measures_every_layer(engine_path, tmp_path, capfd):
    output = tmp_path / "audit.json"
    audit.main(audit.AuditOptions(engine=engine_path, json=output, runs=10))
    found = json.loads(output.read_text())
    assert found["batch"] == 4
    times = [layer["milliseconds"] for layer in found["layers"]]
    assert sum(time > 0 for time in times) > len(times) / 2
    assert found["totals"]["INT8"]["layers"] >= 3
    assert sum(entry["milliseconds"] for entry in found["totals"].values()) == pytest.approx(sum(times))
    assert all(finding["precision"] == "INT8" for finding in found["findings"])
    assert "4 of 4 layers that the ONNX file declares INT8 are INT8" in capfd.readouterr().out


def test_benchmark_compares_and_builds_once(model, tmp_path, capfd):
    qdq_models.residual(tmp_path / "float.onnx", quantize=False)
    options = benchmark.BenchmarkOptions(
        model=model,
        float32=tmp_path / "float.onnx",
        batches=(1,),
        full_batches=(4,),
        variants=(f"zero channels={qdq_models.residual(tmp_path / 'padded.onnx')}",),
        peers=(f"twin={model}",),
        sweep=(4,),
        host_to_host=(4,),
        contexts=(2,),
        engines=tmp_path / "engines",
        output=tmp_path / "benchmark.json",
    )
    benchmark.main(options)
    found = json.loads((tmp_path / "benchmark.json").read_text())
    zeros = "INT8 (QAT), zero channels"
    assert [(entry["name"], entry["batch"]) for entry in found["latency"]] == [
        *((name, 4) for name in ("FP32", "TF32", "FP16", "implicit INT8", "INT8 (QAT)", zeros, "twin")),
        *((name, 1) for name in ("FP16", "implicit INT8", "INT8 (QAT)", zeros)),
    ]
    assert all(
        entry["runs"] >= 200 and 0 < entry["low"] <= entry["median"] <= entry["p99"] for entry in found["latency"]
    )
    assert [entry["contexts"] for entry in found["throughput"]] == [2, 2]
    assert found["host_to_host"][0]["pinned"] > 0
    assert len(found["builds"]) == 11
    assert all(entry["built_in_this_run"] for entry in found["builds"])
    assert all(entry["graph"] for entry in found["latency"])
    precisions = {entry["name"]: entry["convolutions_int8"] for entry in found["builds"] if entry["batch"] == 4}
    assert precisions["FP32"] == precisions["TF32"] == precisions["FP16"] == 0
    assert precisions["INT8 (QAT)"] == precisions["twin"] == 3
    assert all(entry["batch"] in (1, 4) and entry["int8"] > entry["fp16"] for entry in found["slower_in_int8"])
    printed = capfd.readouterr().out
    assert "batch 4: " in printed
    assert ("--keep-float" in printed) is bool(found["slower_in_int8"])
    benchmark.main(options)
    again = json.loads((tmp_path / "benchmark.json").read_text())["builds"]
    assert len(again) == 11
    assert not any(entry["built_in_this_run"] for entry in again)
    assert not any(entry["repetition"] for entry in again)


def test_benchmark_repeats_every_build_and_keeps_engines_of_the_same_repetition(model, tmp_path, capfd):
    options = benchmark.BenchmarkOptions(
        model=model,
        precisions=(),
        batches=(1,),
        full_batches=(),
        host_to_host=(1,),
        contexts=(1,),
        repeat=2,
        engines=tmp_path / "engines",
        output=tmp_path / "benchmark.json",
    )
    for repeat, built_anew in ((2, True), (2, False), (1, True), (2, True)):
        benchmark.main(dataclasses.replace(options, repeat=repeat))
        found = json.loads((tmp_path / "benchmark.json").read_text())
        assert found["repeat"] == repeat
        (entry,) = found["builds"]
        assert entry["built_in_this_run"] == built_anew
        if repeat == 1:
            assert entry["repetition"] is None
            continue
        assert entry["repetition"]["batch"] == 1
        assert len(entry["repetition"]["milliseconds"]) == 2
        assert entry["repetition"]["spread_percent"] >= 0
        assert "2 builds, batch 1: " in capfd.readouterr().out


def test_evaluate_agrees_with_onnx_runtime(family, tmp_path):
    output = tmp_path / "evaluation.json"
    assert evaluate.main(evaluate.EvaluateOptions(engine=family / "model.engine", json=output)) == 0
    found = json.loads(output.read_text())
    assert found["images"] == 300
    assert found["agreement"]["engine, ONNX Runtime"] >= 99
    assert found["top1"]["engine"] == found["agreement"]["engine, PyTorch"]
    assert evaluate.main(evaluate.EvaluateOptions(engine=family / "model.engine", images=70, json=output)) == 0
    assert json.loads(output.read_text())["images"] == 70


def test_every_quantized_tensor_is_compared(family, tmp_path):
    output = tmp_path / "evaluation.json"
    assert evaluate.main(evaluate.EvaluateOptions(engine=family / "model.engine", layers=True, json=output)) == 0
    found = json.loads(output.read_text())
    assert [layer["tensor"] for layer in found["layers"]][:2] == ["stem_relu", "relu1"]
    assert all(layer["sqnr_db"] is None or layer["sqnr_db"] > 20 for layer in found["layers"])


def test_the_first_layer_that_differs_is_named(family, tmp_path):
    planted = qdq_models.residual(tmp_path / "planted.onnx", weights_of={"conv1": 99})
    output = tmp_path / "evaluation.json"
    options = evaluate.EvaluateOptions(engine=family / "model.engine", onnx=planted, json=output)
    assert evaluate.main(options) == DISAGREES
    assert json.loads(output.read_text())["first_difference"] | {"sqnr_db": 0} == {
        "node": "/relu1/Relu",
        "tensor": "relu1",
        "sqnr_db": 0,
    }


def test_an_engine_away_from_its_onnx_file(family, tmp_path):
    for name in ("model.engine", "model.engine.json"):
        shutil.copy(family / name, tmp_path)
    with pytest.raises(UserError, match=r"no file .*model\.onnx"):
        evaluate.main(evaluate.EvaluateOptions(engine=tmp_path / "model.engine"))
    assert sidecar_path(tmp_path / "model.engine").exists()
