"""What the benchmark compares, by version of TensorRT; the measurements are tests/gpu's."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from qdq_models import residual

from deploy import cuda
from deploy.benchmark import BenchmarkOptions, main
from deploy.builder import Repetition, build
from deploy.candidate_engines import CandidateEngines
from deploy.candidates import FP16, MODEL, Candidate, CandidateSet, parse_named_file
from deploy.comparison import Comparison, Workload
from deploy.installed import find_toolkit
from deploy.trt import Toolkit
from qat.base.errors import UserError
from qat.base.lock import lock_path, locked


@pytest.fixture
def model(tmp_path: Path) -> Path:
    residual(tmp_path / "m.float32.onnx", quantize=False)
    return residual(tmp_path / "m.onnx")


def test_a_strongly_typed_version_leaves_out_what_it_does_not_have(model, capfd):
    toolkit = find_toolkit("tensorrt-rtx")
    candidates = CandidateSet.from_files(toolkit, model, post_training=model).to_compare(full=True)
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
    candidates = CandidateSet.from_files(toolkit, model, precisions=("fp16",))
    assert candidates.to_compare(full=False)[0] == Candidate("FP16", half, "explicit")


def test_a_missing_float_file_says_how_to_make_it(tmp_path):
    model = residual(tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"m\.float32\.onnx for FP32: make it with python -m export\.onnx"):
        CandidateSet.from_files(find_toolkit("tensorrt-rtx"), model)


def test_named_files(model):
    assert parse_named_file(f"other tool={model}") == ("other tool", model)
    for text in ("x", "=x", "x="):
        with pytest.raises(UserError, match="give NAME=FILE"):
            parse_named_file(text)
    with pytest.raises(UserError, match="no file /no/such for peer"):
        parse_named_file("peer=/no/such")


def test_options_that_measure_nothing(model):
    with pytest.raises(UserError, match="--runs 0"):
        main(BenchmarkOptions(model=model, runs=0))
    with pytest.raises(UserError, match="--repeat 0"):
        main(BenchmarkOptions(model=model, repeat=0))
    with pytest.raises(UserError, match=r"no file .*none\.onnx"):
        main(BenchmarkOptions(model=model.with_name("none.onnx")))


def test_names_that_would_be_taken_for_each_other(model):
    def check(*names: str) -> None:
        first, *others = (Candidate(name, Path(f"{index}.onnx")) for index, name in enumerate(names))
        CandidateSet(first, peers=tuple(others))

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

    def build_fastest(toolkit, path, settings, repeat, ranges, calibration):
        claims.append(len(list(model.parent.glob("engines/.*.lock"))))
        built = build(toolkit, path, dataclasses.replace(settings, capabilities=("8.9",)))
        return dataclasses.replace(built, repetition=Repetition(4, [0.5 + 0.01 * index for index in range(repeat)]))

    monkeypatch.setattr("deploy.candidate_engines.build_fastest", build_fastest)
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

    def timed(toolkit, path, settings, timing_cache, ranges, calibration):
        given.append(timing_cache)
        built = build(toolkit, path, dataclasses.replace(settings, capabilities=("8.9",)))
        outcome = "reused" if timing_cache else "created"
        return dataclasses.replace(built, timing_cache=outcome, timing_cache_content=timing_cache + b"+")

    monkeypatch.setattr("deploy.candidate_engines.build", timed)

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
    claim = lock_path(engine)
    claim.parent.mkdir()
    with locked(engine, "python -m deploy.benchmark other.onnx"):
        engines.build_if_free(Candidate("a", model, "explicit"), 4)
        assert claim.exists()
    assert not engine.exists()
    said = " ".join(capfd.readouterr().out.split())
    assert f"a for batch 4 is left to process {os.getpid()} since" in said
    assert ": python -m deploy.benchmark other.onnx" in said
    claim.touch()  # of a run that was killed
    engines.build_if_free(Candidate("a", model, "explicit"), 4)
    assert engine.exists()
    assert not claim.exists()
    assert claims == [1]
    with pytest.raises(UserError, match="is not an ONNX file"):
        engines.build_if_free(Candidate("b", model.parent / "engines" / "a-4.engine", "explicit"), 4)
    assert not list(engines.folder.glob(".*"))


def test_a_peer_that_is_refused_is_left_out(model, toolkit, tmp_path, capfd):
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    broken, ours = Candidate("peer", tmp_path / "broken.onnx", "explicit"), Candidate("INT8 (QAT)", model, "explicit")

    def comparison(*peers: Candidate) -> Comparison:
        engines = CandidateEngines(toolkit, model.with_name("engines"), repeat=2)
        return Comparison(engines, CandidateSet(ours, peers=peers), Workload())

    found = comparison(broken)
    found.build_engines([(broken, 4), (ours, 4), (ours, 4)])
    assert [entry["name"] for entry in found.engines.builds] == ["INT8 (QAT)"]
    ((name, batch, error),) = [tuple(entry.values()) for entry in found.left_out]
    assert (name, batch) == ("peer", 4)
    assert "broken.onnx" in error
    assert "warning: peer is left out: " in capfd.readouterr().err
    with pytest.raises(UserError, match="broken"):
        comparison().build_engines([(broken, 4)])


def test_a_run_that_only_builds_makes_the_engines_of_all_measurements(model, toolkit):
    candidates = CandidateSet(
        Candidate("model", model),
        baselines=(Candidate("FP32", model), Candidate(FP16, model)),
        inputs=(Candidate("bytes", model),),
    )
    engines = CandidateEngines(toolkit, model.with_name("engines"), repeat=2)
    workload = Workload(full_batches=(4,), batches=(1, 4), sweep=(2,), host_to_host=(4,))
    Comparison(engines, candidates, workload).build()
    assert [(entry["name"], entry["batch"]) for entry in engines.builds] == [
        *((name, 4) for name in ("FP32", FP16, "model")),
        *((name, 1) for name in (FP16, "model")),
        ("bytes", 4),
        *((name, 2) for name in ("model", "bytes")),
    ]


def test_variants_are_candidates_of_their_own(model):
    padded = residual(model.with_name("m.padded.onnx"))
    toolkit = find_toolkit("tensorrt-rtx")
    candidates = CandidateSet.from_files(toolkit, model, precisions=(), variants=[("zero channels", padded)])
    assert candidates.to_compare(full=False) == [
        Candidate("INT8 (QAT)", model, "explicit"),
        Candidate("INT8 (QAT), zero channels", padded, "explicit"),
    ]


def test_what_is_compared_and_what_is_measured_alone(model):
    one = {name: Candidate(name, model) for name in ("FP32", FP16, MODEL, "variant", "peer", "bytes")}
    candidates = CandidateSet(
        one[MODEL],
        baselines=(one["FP32"], one[FP16]),
        variants=(one["variant"],),
        peers=(one["peer"],),
        inputs=(one["bytes"],),
    )
    assert [each.name for each in candidates.to_compare(full=True)] == ["FP32", FP16, MODEL, "variant", "peer"]
    assert [each.name for each in candidates.to_compare(full=False)] == [FP16, MODEL, "variant"]
    assert [each.name for each in candidates.to_measure_alone()] == [MODEL, "variant", "bytes"]
    assert {each.name for each in candidates.all()} == set(one)
