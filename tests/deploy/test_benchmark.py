"""What the benchmark compares, by version of TensorRT; the measurements are tests/gpu's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from qdq_models import residual

from deploy import cuda
from deploy.benchmark import Bench, BenchmarkOptions, _candidates, _check_names, _named, main
from deploy.builder import Repetition, build
from deploy.candidates import Candidate, CandidateEngines
from deploy.trt import Toolkit, find_toolkit
from qat.base.errors import UserError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    residual(tmp_path / "m.float32.onnx", quantize=False)
    return residual(tmp_path / "m.onnx")


def test_a_strongly_typed_version_leaves_out_what_it_does_not_have(model, capfd):
    toolkit = find_toolkit("tensorrt-rtx")
    candidates = _candidates(BenchmarkOptions(model=model, ptq=model), toolkit)
    floats = model.with_name("m.float32.onnx")
    assert candidates == [
        Candidate("FP32", floats, "fp32"),
        Candidate("TF32", floats, "tf32"),
        Candidate("INT8 (post-training)", model, "explicit"),
        Candidate("INT8 (QAT)", model, "explicit"),
    ]
    warnings = " ".join(capfd.readouterr().err.split())
    assert "warning: FP16 is left out: TensorRT-RTX" in warnings
    assert "warning: implicit INT8 is left out" in warnings


def test_a_float16_file_stands_for_the_flag(model):
    half = residual(model.with_name("m.float16.onnx"), quantize=False)
    toolkit = find_toolkit("tensorrt-rtx")
    candidates = _candidates(BenchmarkOptions(model=model, precisions=("fp16",)), toolkit)
    assert candidates[0] == Candidate("FP16", half, "explicit")


def test_a_missing_float_file_says_how_to_make_it(tmp_path):
    model = residual(tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"m\.float32\.onnx for FP32: make it with python -m export\.onnx"):
        _candidates(BenchmarkOptions(model=model), find_toolkit("tensorrt-rtx"))


def test_named_files(model):
    assert _named(f"other tool={model}") == ("other tool", model)
    for text in ("x", "=x", "x="):
        with pytest.raises(UserError, match="give NAME=FILE"):
            _named(text)
    with pytest.raises(UserError, match="no file /no/such for peer"):
        _named("peer=/no/such")


def test_options_that_measure_nothing(model):
    with pytest.raises(UserError, match="--runs 0"):
        main(BenchmarkOptions(model=model, runs=0))
    with pytest.raises(UserError, match="--repeat 0"):
        main(BenchmarkOptions(model=model, repeat=0))
    with pytest.raises(UserError, match=r"no file .*none\.onnx"):
        main(BenchmarkOptions(model=model.with_name("none.onnx")))


def test_names_that_would_be_taken_for_each_other(model):
    def check(*names: str) -> None:
        _check_names([Candidate(name, model, "explicit") for name in names])

    check("FP16", "INT8 (QAT)", "INT8 (QAT), zero channels", "peer", "uint8 input")
    for names in (["FP16", "FP16"], ["a b", "a-b"], ["INT8--QAT-"]):
        with pytest.raises(UserError, match="several engines would be called"):
            check("INT8 (QAT)", *names)


@pytest.fixture
def claims() -> list[int]:
    """How many engines are claimed while one is built, for each build."""
    return []


@pytest.fixture
def toolkit(model, claims, monkeypatch) -> Toolkit:
    """TensorRT-RTX, as if there were a GPU, on which nothing can be timed."""

    def build_fastest(toolkit, path, settings, repeat):
        claims.append(len(list(model.parent.glob("engines/*.claim"))))
        built = build(toolkit, path, dataclasses.replace(settings, capabilities=("8.9",)))
        return dataclasses.replace(built, repetition=Repetition(4, [0.5 + 0.01 * index for index in range(repeat)]))

    monkeypatch.setattr("deploy.repeat.build_fastest", build_fastest)
    return dataclasses.replace(find_toolkit("tensorrt-rtx"), device=cuda.Device("GPU", "8.9", "1", "13.0", 1.0))


def test_an_engine_is_kept_for_runs_of_the_same_repetition(model, toolkit, capfd):
    candidate = Candidate("INT8 (QAT)", model, "explicit")
    for repeat, built_anew in ((2, True), (2, False), (3, True), (2, True)):
        engines = CandidateEngines(toolkit, model.parent / "engines", repeat, 3, None)
        plan = engines.engine(candidate, 4)
        assert plan == (model.parent / "engines" / "INT8--QAT--4.engine").read_bytes()
        (entry,) = engines.builds
        assert entry["built_in_this_run"] == built_anew
        assert len(entry["repetition"]["milliseconds"]) == repeat
        assert entry["repetition"]["spread_percent"] == 2 * (repeat - 1)
        assert f"{repeat} builds, batch 4: 0.5000, 0.5100" in capfd.readouterr().out


def test_timings_of_kernels_outlive_the_engine(model, toolkit, monkeypatch, capfd):
    """A changed model is built with the timings that its last engine left, another candidate with those of this run."""
    given = []

    def timed(toolkit, path, settings, timing_cache):
        given.append(timing_cache)
        built = build(toolkit, path, dataclasses.replace(settings, capabilities=("8.9",)))
        outcome = "reused" if timing_cache else "created"
        return dataclasses.replace(built, timing_cache=outcome, timing_cache_content=timing_cache + b"+")

    monkeypatch.setattr("deploy.builder.build", timed)

    def builds(*names: str) -> list[dict[str, Any]]:
        engines = CandidateEngines(toolkit, model.parent / "engines", 1, 3, None)
        for name in names:
            engines.engine(Candidate(name, model, "explicit"), 4)
        return engines.builds

    assert [entry["timing_cache"] for entry in builds("a", "b")] == ["created", "reused"]
    capfd.readouterr()
    (model.parent / "engines" / "a-4.engine").unlink()
    builds("a")
    assert given == [b"", b"+", b"+"]
    assert ", kernels timed before, " in capfd.readouterr().out
    (model.parent / "engines" / "a-4.engine").unlink()
    (model.parent / "engines" / "a-4.timings").write_bytes(b"damaged")
    builds("a")
    assert given[-1] == b""


def test_runs_share_the_builds(model, toolkit, claims, capfd):
    """What another run has claimed is left to it; a claim ends with the build, also where that fails."""
    engines = CandidateEngines(toolkit, model.parent / "engines", 2, 3, None)
    engine = engines.folder / "a-4.engine"
    claim = engines.folder / "a-4.engine.claim"
    claim.parent.mkdir()
    claim.touch()
    engines.build_if_free(Candidate("a", model, "explicit"), 4)
    assert not engine.exists()
    assert claim.exists()
    assert f"a for batch 4 is left to the run that made {claim}" in " ".join(capfd.readouterr().out.split())
    claim.unlink()
    engines.build_if_free(Candidate("a", model, "explicit"), 4)
    assert engine.exists()
    assert not claim.exists()
    assert claims == [1]
    with pytest.raises(UserError, match="cannot parse"):
        engines.build_if_free(Candidate("b", model.parent / "engines" / "a-4.engine", "explicit"), 4)
    assert not list(engines.folder.glob("*.claim"))


def test_a_peer_that_is_refused_is_left_out(model, toolkit, tmp_path, capfd):
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    broken, ours = Candidate("peer", tmp_path / "broken.onnx", "explicit"), Candidate("INT8 (QAT)", model, "explicit")
    bench = Bench(toolkit, BenchmarkOptions(model=model, repeat=2), [broken])
    bench.build([(broken, 4), (ours, 4), (ours, 4)])
    assert [entry["name"] for entry in bench.engines.builds] == ["INT8 (QAT)"]
    ((name, batch, error),) = [tuple(entry.values()) for entry in bench.left_out]
    assert (name, batch) == ("peer", 4)
    assert "broken.onnx" in error
    assert "warning: peer is left out: " in capfd.readouterr().err
    with pytest.raises(UserError, match="broken"):
        Bench(toolkit, BenchmarkOptions(model=model, repeat=2)).build([(broken, 4)])


def test_variants_are_columns_of_their_own(model):
    padded = residual(model.with_name("m.padded.onnx"))
    options = BenchmarkOptions(model=model, precisions=(), variants=(f"zero channels={padded}",))
    candidates = _candidates(options, find_toolkit("tensorrt-rtx"))
    assert candidates == [
        Candidate("INT8 (QAT)", model, "explicit"),
        Candidate("INT8 (QAT), zero channels", padded, "explicit"),
    ]
