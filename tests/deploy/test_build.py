"""The command: engines and sidecars from the real TensorRT-RTX builder, and one line for every mistake."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from qdq_models import (
    bottleneck,
    classifier,
    convolution,
    foreign_operator,
    quantized_bias,
    residual,
    transposed_convolution,
)

from deploy import cuda
from deploy.build import BuildOptions, main
from deploy.builder import Repetition
from deploy.engine_file import build_with_cache_or_repeat
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings, CalibrationSettings
from export.session import session
from qat.base.artifact import Sidecar, TensorSpec, read_sidecar, sha256_of, sidecar_path, write_artifact
from qat.base.errors import UserError
from qat.base.exit_codes import NOT_INT8


def build(model: Path, **options) -> int:
    return main(BuildOptions(model=model, builder="tensorrt-rtx", **options))


def refused(model: Path, **options) -> str:
    """The message of the UserError; nothing may have been written."""
    before = sorted(model.parent.iterdir()) if model.parent.exists() else []
    with pytest.raises(UserError) as error:
        build(model, **options)
    assert "\n" not in str(error.value)
    if model.parent.exists():
        assert sorted(model.parent.iterdir()) == before
    return str(error.value)


@pytest.fixture
def model(tmp_path) -> Path:
    return convolution(tmp_path / "tiny.onnx")


def test_engine_and_sidecar(tmp_path, capsys):
    path = classifier(tmp_path / "tiny.onnx")
    assert build(path) == 0
    engine = tmp_path / "tiny.engine"
    sidecar = read_sidecar(engine, "engine")
    assert sidecar.parent is not None
    assert (sidecar.parent.file, sidecar.parent.sha256) == ("tiny.onnx", sha256_of(path))
    assert sidecar.inputs == (TensorSpec("input", (-1, 8, 16, 16), "float32"),)
    assert sidecar.outputs == (TensorSpec("fc", (-1, 10), "float32"),)
    assert sidecar.figures["engine_bytes"] == engine.stat().st_size
    assert sidecar.figures["weights_bytes"] > 0
    assert sidecar.figures["build_seconds"] > 0
    counts = ("convolutions_int8", "convolutions", "matrix_products_int8", "matrix_products")
    assert [sidecar.figures[name] for name in counts] == [1, 1, 1, 1]
    assert sidecar.details["typing"] == "strong"
    assert sidecar.details["builder"]["name"] == "tensorrt-rtx"
    assert sidecar.details["compute_capabilities"] == ["8.6", "8.9", "12.0"]
    assert sidecar.details["profiles"] == [{"min": 1, "opt": 8, "max": 32}]
    assert sidecar.details["provenance"].startswith("unknown")
    layer = next(found for found in sidecar.details["layers"] if found["kind"] == "correlation")
    assert (layer["inputs"], layer["precision"], layer["onnx_nodes"][0]) == (["INT8"], "INT8", "/conv/Conv")
    output = capsys.readouterr()
    assert "convolutions in INT8" in output.out
    assert "provenance" in output.err


def test_parents_sidecar_is_carried_over(model):
    parent = Sidecar(
        kind="onnx",
        preprocessing={"height": 8, "width": 8, "resize": 8, "mean": [0.5], "std": [0.5], "color": "grey"},
        class_names=("cat", "dog"),
        figures={"nodes": 6},
        details={},
    )
    content = model.read_bytes()
    write_artifact(model, parent, lambda path: path.write_bytes(content) and None)
    assert build(model, compute_capabilities=("8.9",)) == 0
    sidecar = read_sidecar(model.with_suffix(".engine"), "engine")
    assert sidecar.preprocessing["mean"] == [0.5]
    assert sidecar.class_names == ("cat", "dog")
    assert sidecar.details["onnx"]["figures"] == {"nodes": 6}
    assert sidecar.details["provenance"] == "known"


def test_fixed_batch_needs_no_profile(tmp_path):
    path = convolution(tmp_path / "fixed.onnx", batch=2)
    assert build(path, output=tmp_path / "new" / "x.engine", compute_capabilities=("8.9",)) == 0
    sidecar = read_sidecar(tmp_path / "new" / "x.engine", "engine")
    assert sidecar.inputs[0].shape == (2, 8, 16, 16)
    assert sidecar.details["profiles"] == []


@pytest.mark.parametrize(
    ("make", "node", "code"),
    [
        (transposed_convolution, "/up/ConvTranspose", 0),  # TensorRT-RTX has no INT8 kernel for it
        (lambda path: convolution(path, axis=1), "/conv/Conv", NOT_INT8),
    ],
)
def test_declared_int8_that_is_float_exits_3_if_it_could_be_int8(make, node, code, tmp_path, capsys):
    path = make(tmp_path / "m.onnx")
    assert build(path, compute_capabilities=("8.9",)) == code
    sidecar = read_sidecar(tmp_path / "m.engine", "engine")
    assert sidecar.figures["convolutions_int8"] == 0
    output = capsys.readouterr()
    assert f"not INT8: convolution {node} (declared INT8, FP32)" in output.out
    assert ("the engine is written" in output.err) == bool(code)


def test_a_float_network_is_one_line(tmp_path, capsys):
    assert build(residual(tmp_path / "m.onnx", quantize=False), compute_capabilities=("8.9",)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not INT8")]
    assert lines == ["not INT8: all 4 of them, which the ONNX file does not declare INT8"]


@pytest.mark.parametrize("bad", [0.0, -0.01, float("nan")])
def test_dead_channel_names_node_and_scale(bad, tmp_path):
    path = convolution(tmp_path / "m.onnx", weight_scales=[0.01] * 7 + [bad])
    message = refused(path)
    assert "DequantizeLinear node '/w_dq/DequantizeLinear'" in message
    assert "'w_scale' (shape [8])" in message
    assert "dead channel" in message
    assert "floor" in message


def test_zero_activation_scale_names_node_and_scale(tmp_path):
    message = refused(convolution(tmp_path / "m.onnx", input_scale=0.0))
    assert "QuantizeLinear node '/x_q/QuantizeLinear': its scale 'x_scale'" in message


def test_uint8_that_the_parser_would_take_silently(tmp_path):
    message = refused(convolution(tmp_path / "m.onnx", zero_point=np.uint8(0)))
    assert "UINT8 at 2 nodes, the first '/x_q/QuantizeLinear'" in message


@pytest.mark.parametrize("zero_point", [np.uint8(128), np.int8(3)])
def test_zero_point_that_is_not_zero(zero_point, tmp_path):
    message = refused(convolution(tmp_path / "m.onnx", zero_point=zero_point))
    assert "'/x_q/QuantizeLinear': its zero point is not 0" in message


def test_quantized_bias(tmp_path):
    message = refused(quantized_bias(tmp_path / "m.onnx"))
    assert "'/b_dq/DequantizeLinear': it dequantizes INT32, a quantized bias" in message


@pytest.mark.parametrize("op", ["FooBar", "StringNormalizer"])
def test_operator_that_tensorrt_does_not_have(op, tmp_path):
    message = refused(foreign_operator(tmp_path / "m.onnx", op))
    assert f"{op} node '/odd/{op}': TensorRT has no such operator" in message


def test_missing_file(tmp_path):
    assert f"no file {tmp_path / 'no.onnx'}" in refused(tmp_path / "no.onnx")


@pytest.mark.parametrize("kept", [1, 100, 900, -1])
def test_truncated_file(kept, model):
    content = model.read_bytes()[:kept]
    model.write_bytes(content)
    assert f"is truncated: it has {len(content)} bytes, and its fields tell of " in refused(model)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"I am not a model\n" * 50, "is not an ONNX file"),
        (b"<!DOCTYPE html><html></html>", "is not an ONNX file"),
        (bytes(100), "is not an ONNX file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (b"\x08\x0a", "holds no network"),
    ],
)
def test_what_is_no_model(content, says, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    message = refused(path)
    assert says in message
    assert "truncated" not in message


def test_a_damaged_file_is_refused_before_the_parser_sees_it(model):
    content = bytearray(model.read_bytes())
    content[content.index(b"\x04Relu")] = 0x7F  # the length of that text, inside the graph
    model.write_bytes(content)
    message = refused(model)
    assert "is damaged: the field at byte" in message
    assert "truncated" not in message


def with_external_data(model: Path, location: str = "weights.bin", **changed: object) -> Path:
    """``model`` with its initializers in weights.bin; it says that they are in ``location``."""
    onnx.save(onnx.load(model), model, save_as_external_data=True, location="weights.bin", size_threshold=0)
    proto = onnx.load(model, load_external_data=False)
    for entry in (entry for tensor in proto.graph.initializer for entry in tensor.external_data):
        entry.value = str({"location": location, **changed}.get(entry.key, entry.value))
    onnx.save(proto, model)
    return model.with_name("weights.bin")


def test_external_data_that_are_missing(model):
    data = with_external_data(model)
    data.unlink()
    message = refused(model)
    assert f"keeps weights in {data}, which is missing" in message
    assert "truncated" not in message


@pytest.mark.parametrize(
    ("changed", "size", "says"),
    [
        ({}, 2, "which is too short: it has 2"),
        ({"length": 3}, 10_000, "keeps x_scale in 3 bytes of"),
        ({"location": "../weights.bin"}, 10_000, "which is not a path inside the model's folder"),
    ],
)
def test_external_data_that_do_not_fit_are_refused_before_the_parser_sees_them(changed, size, says, model):
    data = with_external_data(model, **changed)
    data.write_bytes(data.read_bytes()[:size])
    message = refused(model)
    assert says in message
    assert "truncated" not in message


def test_external_data_beside_the_model_are_read(model):
    with_external_data(model)
    assert build(model, compute_capabilities=("8.9",)) == 0


def test_sidecar_of_another_file(model):
    content = model.read_bytes()
    write_artifact(model, Sidecar(kind="onnx"), lambda path: path.write_bytes(content) and None)
    found, expected = convolution(model, size=8), json.loads(sidecar_path(model).read_text())["sha256"]
    message = refused(model)
    assert sha256_of(found) in message
    assert expected in message


def test_sidecar_of_another_format_version(model):
    sidecar_path(model).write_text('{"format": 99}')
    assert "format version 99" in refused(model)


def test_dynamic_size_is_refused(tmp_path):
    path = convolution(tmp_path / "m.onnx", size="S")
    assert "input 'input' has shape (-1, 8, -1, -1): only the first dimension" in refused(path)


def test_unsupported_compute_capability(model):
    assert "'9.0': choose from 7.5, 8.0" in refused(model, compute_capabilities=("9.0",))


def test_batch_sizes_that_contradict(model):
    assert "must have 1 <= min <= opt <= max" in refused(model, profiles=("1,64,32",))


def test_several_profiles(model):
    assert build(model, profiles=("1,1,4", "8,32,128"), compute_capabilities=("8.9",)) == 0
    sidecar = read_sidecar(model.with_suffix(".engine"), "engine")
    assert sidecar.details["profiles"] == [{"min": 1, "opt": 1, "max": 4}, {"min": 8, "opt": 32, "max": 128}]
    assert sidecar.inputs[0].shape[0] == -1


def test_a_single_number_makes_the_batch_static(model):
    assert build(model, profiles=("4",), compute_capabilities=("8.9",)) == 0
    sidecar = read_sidecar(model.with_suffix(".engine"), "engine")
    assert sidecar.inputs[0].shape == (4, 8, 16, 16)
    assert sidecar.outputs[0].shape == (4, 8, 16, 16)
    assert sidecar.details["profiles"] == []


def test_settings_and_log_are_recorded(model):
    options = {"optimization_level": 0, "tf32": True, "workspace_gib": 0.25, "timing_iterations": 2, "aux_streams": 1}
    assert build(model, compute_capabilities=("8.9",), **options) == 0
    details = read_sidecar(model.with_suffix(".engine"), "engine").details
    assert {key: details["settings"][key] for key in options} == options
    assert details["precision"] == "explicit"
    assert (details["gpu"], details["device"], details["timing_cache"]) == (None, None, None)
    assert {line.split(":")[0] for line in details["log"]} <= {"INFO", "WARNING", "ERROR"}
    assert any("Total Weights Memory" in line for line in details["log"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profiles": ("1,2",)}, "give MIN,OPT,MAX, such as 1,8,32"),
        ({"profiles": ("4", "1,2,3")}, "a fixed batch allows no other profile"),
        ({"profiles": ()}, "there is no profile"),
        ({"optimization_level": 7}, "must be 0 to 5"),
        ({"repeat": 0}, "--repeat 0"),
        ({"repeat": 2}, "--repeat keeps the fastest engine, but engines cannot be timed without a GPU"),
        ({"timing_cache": Path("timing.cache")}, "does not time kernels when it builds: leave out --timing-cache"),
        ({"hardware_compatible": True}, "list all of them instead"),
        ({"version_compatible": True}, "no version-compatible engines"),
        ({"refit": True}, "cannot make engines refittable"),
        ({"strip_weights": True}, "cannot make engines refittable"),
    ],
)
def test_options_that_cannot_be_met(model, options, message):
    assert message in refused(model, **options)


def test_a_fixed_batch_that_is_not_the_one_asked_for(tmp_path):
    path = convolution(tmp_path / "fixed.onnx", batch=2)
    assert "has a fixed batch of 2, but the profile asks for 4" in refused(path, profiles=("4",))
    assert build(path, profiles=("2",), compute_capabilities=("8.9",)) == 0


def test_a_timing_cache_that_is_the_model_or_the_engine(model):
    for name in (model, model.with_suffix(".engine")):
        assert "give it a name of its own" in refused(model, timing_cache=name)


def test_files_that_would_overwrite_each_other(model, tmp_path):
    def message(cache, **options):
        calibration = CalibrationSettings(data=str(tmp_path), calibration_cache=cache)
        return refused(model, precision="int8", calibration=calibration, **options)

    for name in (model, model.with_suffix(".engine"), tmp_path / "r.csv"):
        assert f"--calibration-cache {name} is the" in message(name, ranges=tmp_path / "r.csv")
    name = tmp_path / "x.bin"
    assert f"--calibration-cache {name} is the file of --timing-cache" in message(name, timing_cache=name)


def test_unknown_tactic_source(model):
    message = refused(model, tactic_sources=("JIT_CONVOLUTIONS", "NONSENSE"))
    assert "has no tactic source NONSENSE: choose from" in message
    assert "JIT_CONVOLUTIONS" in message


@pytest.fixture
def as_on_a_gpu():
    """The builder of this machine taken for one with a GPU."""
    return dataclasses.replace(find_toolkit("tensorrt-rtx"), device=cuda.Device("GPU", "8.9", "1", "13.0", 1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strip_weights": True}, "an engine without weights cannot be timed"),
        ({"timing_cache": Path("timing.cache")}, "--timing-cache avoids that"),
    ],
)
def test_what_excludes_repetition(as_on_a_gpu, model, options, message):
    settings = BuildSettings(capabilities=("8.9",), strip_weights=options.get("strip_weights", False))
    with pytest.raises(UserError, match=message):
        build_with_cache_or_repeat(as_on_a_gpu, model, settings, 2, options.get("timing_cache"))


def test_a_repetition_says_how_far_apart_the_builds_are():
    found = Repetition(32, (0.74, 0.73, 0.75))
    assert found.spread_percent == pytest.approx(100 * 2 / 73)
    assert str(found) == (
        "3 builds, batch 32: 0.7400, 0.7300, 0.7500 ms; kept the fastest, the slowest is 2.7 % slower"
    )


@pytest.mark.parametrize("from_bytes", [False, True])
def test_weights_behind_a_quantize_linear_are_the_same_codes_and_run_in_int8(tmp_path, from_bytes):
    models = [
        residual(tmp_path / f"{name}.onnx", from_bytes=from_bytes, float_weights=name == "float")
        for name in ("int8", "float")
    ]
    x = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    given = x if from_bytes else np.float32(x).transpose(0, 3, 1, 2) / 64 - 2
    answers = [session(model).run(None, {"input": given})[0] for model in models]
    np.testing.assert_array_equal(*answers)
    assert np.abs(answers[0]).max() > 0.1
    for model in models:
        assert build(model, compute_capabilities=("8.9",)) == 0
        figures = read_sidecar(model.with_suffix(".engine"), "engine").figures
        assert (figures["convolutions_int8"], figures["matrix_products_int8"]) == (3, 1)


def test_zero_channels_change_no_answer_and_run_in_int8(tmp_path):
    plain, padded = bottleneck(tmp_path / "plain.onnx"), bottleneck(tmp_path / "padded.onnx", zeros=64)
    x = np.random.default_rng(4).standard_normal((8, 32, 8, 8)).astype(np.float32)
    answers = [session(model).run(None, {"input": x})[0] for model in (plain, padded)]
    np.testing.assert_allclose(*answers, atol=1e-5)
    assert np.abs(answers[0]).max() > 10
    assert build(padded, compute_capabilities=("8.9",)) == 0
    assert read_sidecar(padded.with_suffix(".engine"), "engine").figures["convolutions_int8"] == 2


def test_output_that_is_the_model(model):
    assert "is the model: give it a name" in refused(model, output=model)


def test_output_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    assert "a part of the path is a file" in refused(model, output=tmp_path / "file" / "folder" / "x.engine")


def test_command_line_gives_one_line_and_exit_code_2(tmp_path):
    done = _command("deploy.build", str(tmp_path / "no.onnx"))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: no file {tmp_path / 'no.onnx'}: check the path, or make it with python -m export.onnx"
    ]


def test_help_imports_nothing_heavy():
    done = _command("deploy.build", "--help")
    assert done.returncode == 0
    assert "--compute-capabilities" in done.stdout
    imported = _command("deploy.build", "--help", flags=("-X", "importtime")).stderr
    modules = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in imported.splitlines()}
    assert "tyro" in modules
    assert not modules & {"torch", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "numpy", "onnx"}


def _command(module: str, *arguments: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, *flags, "-m", module, *arguments],
        cwd=root,
        env=os.environ | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
