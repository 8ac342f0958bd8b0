"""Files of ranges for implicit INT8: what is read, what is refused, and where it is refused whole."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from qdq_models import residual

from deploy import build_engine
from deploy.dynamic_ranges import RangeTable
from deploy.settings import BuilderOptions
from qat.base.errors import UserError


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "tensor,min,max\ninput,-2.5,2.5\nconv1,0,6\ndead,0,0\n",
        "max, tensor, min\n2.5, input, -2.5\n6, conv1, 0\n0, dead, 0\n",
        json.dumps({"input": [-2.5, 2.5], "conv1": [0, 6], "dead": [0, 0]}),
        json.dumps(
            [{"tensor": n, "min": a, "max": b} for n, a, b in (("input", -2, 2.5), ("conv1", -6, 6), ("dead", 0, 0))]
        ),
    ],
)
def test_a_table_is_read_and_the_larger_magnitude_counts(text: str, tmp_path: Path) -> None:
    table = RangeTable.read(written(tmp_path / "ranges", text))
    assert table.amax == {"input": 2.5, "conv1": 6.0}
    assert table.zero == ("dead",)
    assert table.lopsided == 1


def test_a_calibration_cache_of_tensorrt_is_read(tmp_path: Path) -> None:
    bits = struct.pack("!f", 0.5).hex()
    table = RangeTable.read(
        written(tmp_path / "cache", f"TRT-8600-EntropyCalibration2\ninput: {bits}\nzero: 00000000\n")
    )
    assert (table.amax, table.zero, table.lopsided) == ({"input": 63.5}, ("zero",), 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no column max, min, tensor"),
        ("tensor,low,high\na,1,2\n", "has no column max, min"),
        ("tensor,min,max\n", "holds no range"),
        ("{}", "holds no range"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": 3}', "the entry a is no range"),
        ('{"a": [1, 2, 3]}', "the entry a is no range"),
        ("[3]", "the entry 0 is no range"),
        ('{"a": [1, "x"]}', "the range of a is 1 to 'x', and must be two numbers"),
        ("tensor,min,max\na,1\n", "the range of a is '1' to None, and must be two numbers"),
        ("tensor,min,max\na,nan,1\n", "the range of a is nan to 1, and must be finite"),
        ("tensor,min,max\na,-1,inf\n", "the range of a is -1 to inf, and must be finite"),
        ("tensor,min,max\na,1,-1\n", "the range of a is 1 to -1: min must be at most max"),
        ("tensor,min,max\nb,0,1\na,0,1\na,0,2\n", "has 2 ranges for a: leave one"),
        ('[{"tensor": "a", "min": 0, "max": 1}, {"tensor": "a", "min": 0, "max": 1}]', "has 2 ranges for a"),
        ('{"a": [0, 1], "a": [0, 2]}', "is not JSON .'a' is there twice"),
        ("TRT-8600-EntropyCalibration2\na: zz\n", "line 2"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as caught:
        RangeTable.read(written(tmp_path / "ranges", text))
    assert "\n" not in str(caught.value)


def test_a_version_without_implicit_int8_names_the_explicit_way(tmp_path: Path) -> None:
    model, ranges = residual(tmp_path / "m.onnx", quantize=False), written(tmp_path / "r.json", '{"input": [-1, 1]}')
    for precision, says in (
        ("int8", r"python -m export\.quantize"),
        ("fp16", "--precision float16"),
        ("bf16", "BF16 flag"),
    ):
        with pytest.raises(UserError, match=says):
            build_engine(
                model,
                builder="tensorrt-rtx",
                ranges=ranges if precision == "int8" else None,
                settings=BuilderOptions(precision=precision),
            )


@pytest.mark.parametrize(
    ("precision", "ranges", "strict", "says"),
    [
        ("int8", False, False, "--precision int8 needs ranges of the tensors: give --data, "),
        ("fp32", True, False, "--ranges are for --precision int8, not fp32"),
        ("explicit", True, False, "--ranges are for --precision int8, not explicit"),
        ("fp32", False, True, "--strict is for --precision int8, not fp32"),
    ],
)
def test_options_that_do_not_go_together(precision: str, ranges: bool, strict: bool, says: str, tmp_path: Path) -> None:
    model, file = residual(tmp_path / "m.onnx", quantize=False), written(tmp_path / "r.json", '{"input": [-1, 1]}')
    with pytest.raises(UserError, match=says):
        build_engine(
            model,
            builder="tensorrt-rtx",
            ranges=file if ranges else None,
            settings=BuilderOptions(precision=precision, strict=strict),
        )


def test_a_precision_for_a_file_with_qdq_nodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has Q/DQ nodes, which say its precision: leave out --precision tf32"):
        build_engine(residual(tmp_path / "m.onnx"), builder="tensorrt-rtx", settings=BuilderOptions(precision="tf32"))


def test_a_variable_that_switches_tf32_off_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = residual(tmp_path / "m.onnx", quantize=False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    for precision in ("fp32", "tf32"):
        build_engine(model, builder="tensorrt-rtx", settings=BuilderOptions(precision=precision))
        assert ("NVIDIA_TF32_OVERRIDE=0 is set" in capsys.readouterr().err) is (precision == "tf32")
