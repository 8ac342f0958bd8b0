"""The page about a real chain of checkpoint, ONNX file and engine, and what is refused to be shown together."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from qdq_models import classifier, residual

from deploy import build_engine
from deploy.report import ReportOptions, main
from deploy.report_page import _layers, _ticks, render_page
from export import quantize_onnx
from qat.base.artifact import Sidecar, read_sidecar, sidecar_path, write_artifact
from qat.base.errors import UserError

NAMES = ("model.qat", "model.onnx", "model.engine")


@pytest.fixture(scope="module")
def page(chain: Path) -> str:
    return html.unescape(render_page(chain / "model.engine"))


@pytest.fixture
def family(chain: Path, tmp_path: Path) -> Path:
    """A copy of the chain, to be changed."""
    for name in NAMES:
        shutil.copy(chain / name, tmp_path)
        shutil.copy(sidecar_path(chain / name), tmp_path)
    return tmp_path


def rows(page: str) -> list[str]:
    """The rows of all tables as text, their cells separated by |."""
    found = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.sub(r"<[^>]+>", "", re.sub(r"</td>\s*<td", "|<td", row)).strip() for row in found]


def test_a_layer_in_float_shows_the_figure_that_decided() -> None:
    def finding(node: str, declared: bool) -> dict[str, object]:
        return {"node": node, "declared_int8": declared, "cause": "the builder's cause"}

    nodes = {"decided": False, "broken": True, "unknown": False}
    engine = Sidecar(kind="engine", details={"findings": [finding(*one) for one in nodes.items()]})
    decisions = [
        {"label": name, "rule": "measured_loss", "reason": "0.57 times as fast in INT8"}
        for name in ("decided", "broken")
    ]
    checkpoint = Sidecar(kind="checkpoint", details={"placement": {"decisions": decisions}})
    assert [row["why"] for row in _layers(engine, checkpoint)] == [
        "0.57 times as fast in INT8",
        "the builder's cause",
        "the builder's cause",
    ]


def test_every_accuracy_is_on_the_page(chain: Path, page: str) -> None:
    figures = read_sidecar(chain / "model.qat", "checkpoint").figures
    for name, label in (("float", "float"), ("ptq", "INT8, post-training"), ("qat", "INT8, trained (QAT)")):
        assert f"{label}<b>{figures[name]['test_top1']:.2f} %</b>" in page
        assert f"loss {figures[name]['test_loss']:.4f}" in page
    assert "Accuracy on 60 test images" in page
    assert "27 calibration images (mse)" in page
    assert "81 training images" in page


def test_every_layer_is_a_row_with_its_precision_and_rule(chain: Path, page: str) -> None:
    findings = read_sidecar(chain / "model.engine", "engine").details["findings"]
    decisions = read_sidecar(chain / "model.qat", "checkpoint").details["placement"]["decisions"]
    rules = {d["label"]: d["rule"] for d in decisions if d["kind"] in ("convolution", "linear")}
    assert {finding["node"] for finding in findings} == rules.keys() == {"conv1", "conv2", "fc"}
    for finding in findings:
        name, operation, precision, rule, _ = next(r for r in rows(page) if r.startswith(finding["node"])).split("|")
        assert (name, operation, precision.strip()) == (finding["node"], finding["operation"], "INT8")
        assert rule == rules[name]


def test_every_quantized_activation_is_a_row_with_its_scale_readers_and_rules(chain: Path, page: str) -> None:
    details = read_sidecar(chain / "model.qat", "checkpoint").details
    quantizers = [node for node in onnx.load(chain / "model.onnx").graph.node if node.op_type == "QuantizeLinear"]
    tensors = details["placement"]["tensors"]
    assert len(tensors) == len(quantizers) > 0
    table = page.partition("<h2>Q/DQ nodes</h2>")[2]
    for tensor in tensors:
        row = next(r for r in rows(table) if r.split("|")[0].split()[0] == tensor["tensor"])
        assert f"{details['amax'][tensor['quantizer']] / 127:.4g}" in row
        for read in tensor["reads"]:
            assert f"{read['reader']} {read['rule']}" in row


def test_every_rule_is_explained(chain: Path, page: str) -> None:
    details = read_sidecar(chain / "model.qat", "checkpoint").details
    used = {decision["rule"] for decision in details["placement"]["decisions"]}
    used |= {read["rule"] for tensor in details["placement"]["tensors"] for read in tensor["reads"]}
    for rule in used | details["rules"].keys():
        assert f"<dt><code>{rule}</code></dt><dd>{details['rules'][rule]}</dd>" in page


def test_the_engine_and_the_onnx_file_are_described(chain: Path, page: str) -> None:
    onnx_sidecar = read_sidecar(chain / "model.onnx", "onnx")
    assert f"{onnx_sidecar.figures['nodes']} nodes, opset 20, input float32-nchw" in page
    assert "0 of\n60 images with another top-1" in page
    assert f"top-1 {onnx_sidecar.details['reference']['top1']:.2f} % of 60 images" in page
    assert "built by tensorrt-rtx" in page
    assert "convolutions in INT8<b>2 of 2</b>" in page
    assert "matrix products in INT8<b>1 of 1</b>" in page
    assert "without a GPU" in page


def test_the_curve_has_a_point_for_every_epoch(page: str) -> None:
    float_points, qat_points = (line.split() for line in re.findall(r'<polyline points="([^"]*)"', page))
    assert len(float_points) == 2
    assert len(qat_points) == 3  # the QAT curve begins where the float one ends
    assert qat_points[0] == float_points[-1]
    for point in float_points + qat_points:
        x, y = map(float, point.split(","))
        assert 0 <= x <= 600
        assert 0 <= y <= 160
    assert re.findall(r'<text x="[0-9.]+" y="172" text-anchor="middle">(\d+)</text>', page) == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (44.7, 98.9, [50, 60, 70, 80, 90]),
        (97.0, 98.0, [97.0, 97.2, 97.4, 97.6, 97.8, 98.0]),
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (91.2, 91.9, [91.2, 91.4, 91.6, 91.8]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert _ticks(low, high) == expected


def test_the_page_needs_no_other_file_and_no_network(page: str) -> None:
    assert page.startswith("<!doctype html>")
    assert not re.search(r"https?://|<script|<link|src=|@import", page)


def test_the_command_writes_the_page_and_prints_the_result(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(ReportOptions(engine=family / "model.engine"))
    assert (family / "report.html").read_text() == render_page(family / "model.engine")
    printed = capsys.readouterr().out
    for words in ("top-1 on 60 test images", "convolutions in INT8", "2 of 2", "0 of 60 images", "report: "):
        assert words in printed


def test_an_onnx_file_written_again_after_the_build_is_refused_with_both_hashes(family: Path) -> None:
    path = family / "model.onnx"
    before = read_sidecar(path, "onnx")
    model = onnx.load(path)
    model.doc_string = "exported again"
    now = write_artifact(path, before, lambda file: onnx.save(model, file))
    assert now.sha256 != before.sha256
    with pytest.raises(UserError) as caught:
        main(ReportOptions(engine=family / "model.engine", output=family / "page.html"))
    assert before.sha256 in str(caught.value)
    assert now.sha256 in str(caught.value)
    assert not (family / "page.html").exists()


def test_an_onnx_file_changed_under_its_sidecar_is_refused(family: Path) -> None:
    with (family / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match="its sidecar was written for"):
        render_page(family / "model.engine")


def test_a_checkpoint_trained_again_after_the_export_is_refused(family: Path) -> None:
    path = family / "model.qat"
    before = read_sidecar(path, "checkpoint")
    now = write_artifact(path, before, lambda file: file.write_bytes(b"other weights") and None)
    with pytest.raises(UserError, match=f"{before.sha256}.*{now.sha256}"):
        render_page(family / "model.engine")


@pytest.mark.parametrize("gone", ["model.qat", "model.onnx", "model.onnx.json", "model.engine", "model.engine.json"])
def test_a_file_that_is_gone_is_named(family: Path, gone: str) -> None:
    (family / gone).unlink()
    with pytest.raises(UserError, match=re.escape(gone)):
        main(ReportOptions(engine=family / "model.engine"))
    assert not (family / "report.html").exists()


def test_names_with_markup_are_shown_as_text(family: Path) -> None:
    engine = family / "model.engine"
    sidecar = read_sidecar(engine, "engine")
    content = engine.read_bytes()
    findings = [{**finding, "cause": "<script>alert(1)</script>"} for finding in sidecar.details["findings"]]
    changed = Sidecar(
        "engine", sidecar.parent, figures=sidecar.figures, details={**sidecar.details, "findings": findings}
    )
    write_artifact(engine, changed, lambda file: file.write_bytes(content) and None)
    page = render_page(engine)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_what_the_export_has_rewritten_is_said(family: Path, page: str) -> None:
    for name, rewrite in (("model.onnx", True), ("model.engine", False)):
        path = family / name
        sidecar, content = read_sidecar(path, "onnx" if rewrite else "engine"), path.read_bytes()
        if rewrite:
            details = {**sidecar.details, "merged": ["layer1.last", "layer2.last"], "padded": ["up"]}
            figures = {**sidecar.figures, "merging": {"images": 60, "other_top1": 1, "sqnr_db": 33.56}}
            sidecar = dataclasses.replace(sidecar, details=details, figures=figures)
        write_artifact(path, sidecar, lambda file, content=content: file.write_bytes(content) and None)
    merged = " ".join(re.sub("<[^>]+>", "", render_page(family / "model.engine")).split())
    assert "Shortcuts merged into layer1.last, layer2.last: 1 of 60 images with another top-1 than as trained" in merged
    assert "as trained, logits at 33.6 dB. Zero channels before up." in merged
    assert "with the rule for each (as trained: the shortcuts were merged afterwards)." in merged
    assert "merged" not in page
    assert "Zero channels" not in page


def test_an_engine_of_an_onnx_file_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = classifier(tmp_path / "foreign.onnx")
    build_engine(model, builder="tensorrt-rtx", compute_capabilities=("8.9",))
    model.unlink()  # an engine without provenance is shown by itself
    capsys.readouterr()
    main(ReportOptions(engine=tmp_path / "foreign.engine"))
    page = (tmp_path / "report.html").read_text()
    findings = read_sidecar(tmp_path / "foreign.engine", "engine").details["findings"]
    assert len(findings) == 2
    for finding in findings:
        assert any(row.startswith(f"{finding['node']}|{finding['operation']}|INT8") for row in rows(page))
    assert "Accuracy on" not in page
    assert "Q/DQ nodes" not in page
    printed = capsys.readouterr().out
    assert "convolutions in INT8" in printed
    assert "top-1" not in printed


def test_an_engine_of_a_file_that_export_quantize_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = residual(tmp_path / "float.onnx", quantize=False)
    np.save(tmp_path / "inputs.npy", np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32))
    quantize_onnx(model, tmp_path / "m.onnx", data=str(tmp_path / "inputs.npy"))
    build_engine(tmp_path / "m.onnx", builder="tensorrt-rtx", compute_capabilities=("8.9",))
    main(ReportOptions(engine=tmp_path / "m.engine"))
    found = rows((tmp_path / "report.html").read_text())
    assert sum("|INT8|" in row for row in found) == 4
    assert "convolutions in INT8" in capsys.readouterr().out


# --- what other commands measured


def test_evaluation_and_speed_are_on_the_page(family: Path) -> None:
    built = read_sidecar(family / "model.engine", "engine")
    evaluation, benchmark = family / "evaluation.json", family / "benchmark.json"
    evaluated = {
        "engine": built.sha256,
        "images": 60,
        "source": "the test split of squares",
        "top1": {"engine": 91.67, "PyTorch": 90.0},
        "agreement": {"engine, PyTorch": 98.33},
        "first_difference": {"node": "layer1.conv2", "tensor": "t", "sqnr_db": 7.25},
    }
    evaluation.write_text(json.dumps(evaluated))
    latency = {"batch": 32, "low": 0.7, "high": 0.8, "p99": 0.9, "images_per_second": 44000.0}
    measured = {
        "date": "2026-01-01",
        "device": {"name": "NVIDIA Test", "driver": "1.2"},
        "tensorrt": "8.6.0",
        "models": {"INT8 (QAT)": {"sha256": built.parent.sha256 if built.parent else ""}},
        "latency": [
            {"name": "FP16", "median": 1.5, **latency},
            {"name": "INT8 (QAT)", "median": 0.75, **latency},
            {"name": "INT8 (QAT)", "median": 0.25, **latency, "batch": 1},
        ],
    }
    benchmark.write_text(json.dumps(measured))
    page = html.unescape(render_page(family / "model.engine", evaluation, benchmark))
    assert "engine<b>91.67 %</b>" in page
    assert "PyTorch<b>90.00 %</b>" in page
    assert "98.33 %" in page
    assert "<code>layer1.conv2</code>: 7.2 dB" in page
    assert "NVIDIA Test, driver 1.2, TensorRT 8.6.0" in page
    found = rows(page)
    assert "INT8 (QAT)|32|0.750|0.700 to 0.800|0.900|44,000|2.00" in [row.replace("\n", "") for row in found]
    assert any(row.replace("\n", "").startswith("INT8 (QAT)|1|0.250") and row.endswith("|") for row in found)

    del evaluated["first_difference"]  # where nothing differs
    evaluation.write_text(json.dumps(evaluated))
    assert "first layer that differs" not in render_page(family / "model.engine", evaluation)

    outputs = {"engine, PyTorch": {"sqnr_db": 31.25, "equal_percent": None}}
    unknown = {**evaluated, "top1": {"engine": None, "PyTorch": None}, "agreement": {}, "outputs": outputs}
    evaluation.write_text(json.dumps(unknown))  # a network without classes
    page = html.unescape(render_page(family / "model.engine", evaluation))
    assert "PyTorch<b>31.2 dB</b>" in page
    assert "no labels" not in page

    evaluation.write_text(json.dumps({**evaluated, "engine": "0"}))
    with pytest.raises(UserError, match="is about another engine"):
        render_page(family / "model.engine", evaluation)
    measured["models"] |= {"INT8 (QAT)": {"sha256": "0"}, "INT8 (QAT), merged": measured["models"]["INT8 (QAT)"]}
    benchmark.write_text(json.dumps(measured))
    assert render_page(family / "model.engine", None, benchmark)  # the engine is of a variant
    del measured["models"]["INT8 (QAT), merged"]
    benchmark.write_text(json.dumps(measured))
    with pytest.raises(UserError, match="is about another ONNX file"):
        render_page(family / "model.engine", None, benchmark)
    for content in ("", "[]", "{}"):
        evaluation.write_text(content)
        with pytest.raises(UserError, match=r"is not a result of deploy\.evaluate"):
            render_page(family / "model.engine", evaluation)
