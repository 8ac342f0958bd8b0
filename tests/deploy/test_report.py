"""The page about a real chain of checkpoint, ONNX file and engine, and what is refused to be shown together."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from qdq_models import classifier, residual

from deploy import build_engine
from deploy.report import ReportOptions, main
from deploy.report_page.artifacts import gather
from deploy.report_page.layers import layers_of
from deploy.report_page.render import render
from export import quantize_onnx
from qat.base.artifact import read_sidecar, sidecar_path, write_artifact
from qat.base.errors import UserError
from qat.base.ranges_file import ranges_path
from qat.base.text import megabytes

NAMES = ("model.qat", "model.onnx", "model.engine")
SLOW = "conv1"


def page_of(*runs: Path, named: Sequence[Path] = ()) -> str:
    return html.unescape(render([gather(run, named if index == 0 else ()) for index, run in enumerate(runs)]))


@pytest.fixture(scope="module")
def page(chain: Path) -> str:
    return page_of(chain)


@pytest.fixture
def family(chain: Path, tmp_path: Path) -> Path:
    """A copy of the chain, to be changed."""
    for name in NAMES:
        shutil.copy(chain / name, tmp_path)
        shutil.copy(sidecar_path(chain / name), tmp_path)
    return tmp_path


def rows(page: str) -> list[str]:
    """The rows of all tables as text, their cells separated by |."""
    found = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)
    return [re.sub(r"<[^>]+>", "", re.sub(r"</t[dh]>\s*<t[dh]", "|<td", row)).strip() for row in found]


def text(page: str) -> str:
    """What a reader sees, without styles and scripts."""
    visible = re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", visible).split())


def test_the_verdict_says_what_is_known_and_what_is_not(page: str) -> None:
    assert 'class="verdict "' in page
    said = text(page)
    assert re.search(r"Not known yet: \d+\.\d\d % of 60 test images are right", said)
    assert "its speed was not measured, which needs the GPU that it is for" in said


def test_every_accuracy_is_a_row_with_its_interval(chain: Path, page: str) -> None:
    figures = read_sidecar(chain / "model.qat", "checkpoint").figures
    for key, label in (("float", "float"), ("ptq", "INT8, calibrated"), ("qat", "INT8, trained")):
        (row,) = (row for row in rows(page) if row.startswith(f"{label}|{figures[key]['test_top1']:.2f} %|"))
        assert row.endswith(f"{figures[key]['test_loss']:.4f}|60")
        assert re.search(r"\d to \d+\.\d %", row)


def test_every_layer_is_a_row_in_its_block_with_what_it_computes_in_and_its_rule(chain: Path, page: str) -> None:
    details = read_sidecar(chain / "model.qat", "checkpoint").details
    decisions = details["placement"]["decisions"]
    assert decisions
    for decision in decisions:
        state = "INT8" if decision["quantized"] else "float"
        assert any(
            row.startswith(f"{decision['label']}|") and f"|{state}" in row and row.endswith(f"|{decision['rule']}")
            for row in rows(page)
        ), decision
    for rule in {decision["rule"] for decision in decisions}:
        assert details["rules"][rule] in page


def test_every_quantized_input_is_in_the_detail_of_its_layer_with_its_scale(chain: Path, page: str) -> None:
    details = read_sidecar(chain / "model.qat", "checkpoint").details
    labels = {decision["op"]: decision["label"] for decision in details["placement"]["decisions"]}
    templates = dict(re.findall(r'<template id="d-(l\d+)">(.*?)</template>', page, re.DOTALL))
    ids = {label: key for key, label in re.findall(r'<tr class="layer" id="(l\d+)"[^>]* data-label="([^"]*)"', page)}
    reads = 0
    for tensor in details["placement"]["tensors"]:
        scale = f"scale {details['amax'][tensor['quantizer']] / 127:.4g}"
        for read in tensor["reads"]:
            detail = templates[ids[labels.get(read["reader"], read["reader"])]]
            assert f"Q/DQ of <code>{tensor['tensor']}</code>" in detail
            assert scale in detail
            reads += 1
    assert reads > 4


def test_a_layer_has_the_distribution_of_its_input_and_the_ranges_of_its_weights(trained: Path, page: str) -> None:
    assert ranges_path(trained / "model.qat").is_file()
    found = gather(trained)
    assert found.distributions is not None
    drawn = html.unescape(render([found]))
    for one in found.distributions.activations:
        assert f"Distribution of |{one.quantizer}| on the calibration images" in drawn
        for choice in one.choices:
            assert f"{choice.clipped:.4f} % clipped" in drawn
    assert "Largest weight of each output channel" in drawn
    assert 'aria-label="The network, a box for each block"' in drawn
    assert "Distribution of" not in page  # the chain has no such file
    assert "distributions of activations" in text(page)


def test_distributions_of_another_checkpoint_are_left_out(trained: Path, family: Path) -> None:
    path = ranges_path(family / "model.qat")
    shutil.copy(ranges_path(trained / "model.qat"), path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"checkpoint": "0" * 64}))
    said = text(page_of(family))
    assert "Left out: " in said
    assert "belongs to a checkpoint with SHA-256 000" in said
    path.write_text("{")
    assert "cannot be read as a file of ranges" in text(page_of(family))


def test_stages_that_are_missing_are_named_with_their_command(chain: Path, page: str) -> None:
    said = text(page)
    for command in (
        f"python -m deploy.evaluate {chain / 'model.engine'} --layers --json {chain / 'evaluation.json'}",
        f"python -m deploy.benchmark {chain / 'model.onnx'} --output {chain / 'benchmark.json'}",
        f"python -m qat.sensitivity {chain / 'model.qat'} --json {chain / 'sensitivity.json'}",
    ):
        assert command in said


def test_of_a_checkpoint_alone_the_next_stages_are_missing(family: Path) -> None:
    for name in ("model.onnx", "model.engine"):
        (family / name).unlink()
    said = text(page_of(family))
    assert "There is no engine yet" in said
    assert f"python -m export.onnx {family / 'model.qat'}" in said
    assert "python -m deploy.build" not in said  # of a file that is not there yet


def test_an_empty_folder_and_a_missing_file_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no engine, ONNX file or checkpoint with its sidecar: give another folder"):
        gather(tmp_path)
    with pytest.raises(UserError, match=r"no file .*gone\.engine"):
        gather(tmp_path / "gone.engine")


def test_the_training_is_drawn_with_titles_and_units(page: str) -> None:
    for title, unit in (
        ("Validation accuracy", "top-1, %"),
        ("Validation loss", "loss"),
        ("Learning rate", "learning rate (log)"),
    ):
        assert f"<figcaption>{title}</figcaption>" in page
        assert f">{unit}</text>" in page
        assert f'aria-label="{title}: ' in page
    assert ">epoch</text>" in page


def test_the_page_needs_no_other_file_and_no_network(page: str) -> None:
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page) == []
    assert "@import" not in page
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+", "", page)


def test_commands_and_hashes_are_there_to_be_copied(chain: Path, page: str) -> None:
    for name, kind in (("model.qat", "checkpoint"), ("model.onnx", "onnx"), ("model.engine", "engine")):
        sidecar = read_sidecar(chain / name, kind)  # type: ignore[arg-type]
        assert any(row.startswith(f"{name}|") and row.endswith(sidecar.sha256) for row in rows(page))


def test_sizes_and_the_seed_are_there(chain: Path, page: str) -> None:
    engine = read_sidecar(chain / "model.engine", "engine").figures["engine_bytes"]
    assert re.search(rf"Sizes: weights in float32 .*, ONNX file .*, engine {megabytes(engine)}\.", text(page))
    assert "; seed 0" in text(page)


def test_reformats_are_counted_at_their_layers(family: Path) -> None:
    path = family / "model.engine"
    sidecar, content = read_sidecar(path, "engine"), path.read_bytes()
    node = sidecar.details["findings"][0]["node"]
    name = f"Reformatting CopyNode for Input Tensor 0 to {node} + relu"
    extra = {**sidecar.details["layers"][0], "name": name, "kind": "Reformat", "onnx_nodes": []}
    details = {**sidecar.details, "layers": [*sidecar.details["layers"], extra]}
    write_artifact(path, dataclasses.replace(sidecar, details=details), lambda file: file.write_bytes(content) and None)
    assert {layer.label: layer.reformats for layer in layers_of(gather(family)) if layer.reformats} == {node: 1}
    assert "Reformats at it: 1." in page_of(family)


def test_two_runs_are_compared(family: Path, chain: Path) -> None:
    same = text(page_of(family, chain))
    assert "Nothing that this page shows." in same
    path = family / "model.engine"
    sidecar, content = read_sidecar(path, "engine"), path.read_bytes()
    findings = [dict(finding) for finding in sidecar.details["findings"]]
    findings[0] |= {"precision": "FP32", "cause": "another builder"}
    changed = dataclasses.replace(sidecar, details={**sidecar.details, "findings": findings})
    write_artifact(path, changed, lambda file: file.write_bytes(content) and None)
    page = page_of(family, chain)
    assert f"{findings[0]['node']}|INT8 INT8|declared INT8, is not FP32" in rows(page)
    first = findings[0]["node"]
    assert f"Do not ship it: 1 layer is declared INT8 and not INT8 in the engine, first {first}." in text(page)
    assert 'class="verdict stop"' in page


def test_the_command_writes_the_page_and_prints_the_result(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(ReportOptions(runs=(family / "model.engine",)))
    assert (family / "report.html").read_text() == render([gather(family)])
    printed = capsys.readouterr().out
    for words in ("top-1 on 60 test images", "convolutions in INT8", "2 of 2", "Not known yet: ", "report: "):
        assert words in printed


def test_an_onnx_file_written_again_after_the_build_is_refused_with_both_hashes(family: Path) -> None:
    path = family / "model.onnx"
    before = read_sidecar(path, "onnx")
    model = onnx.load(path)
    model.doc_string = "exported again"
    now = write_artifact(path, before, lambda file: onnx.save(model, file))
    assert now.sha256 != before.sha256
    with pytest.raises(UserError) as caught:
        main(ReportOptions(runs=(family / "model.engine",), output=family / "page.html"))
    assert before.sha256 in str(caught.value)
    assert now.sha256 in str(caught.value)
    assert not (family / "page.html").exists()


def test_an_onnx_file_changed_under_its_sidecar_is_refused(family: Path) -> None:
    with (family / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match="its sidecar was written for"):
        page_of(family / "model.engine")


def test_a_checkpoint_trained_again_after_the_export_is_refused(family: Path) -> None:
    path = family / "model.qat"
    before = read_sidecar(path, "checkpoint")
    now = write_artifact(path, before, lambda file: file.write_bytes(b"other weights") and None)
    with pytest.raises(UserError, match=f"{before.sha256}.*{now.sha256}"):
        page_of(family / "model.engine")


@pytest.mark.parametrize("gone", ["model.qat", "model.onnx", "model.onnx.json", "model.engine", "model.engine.json"])
def test_a_file_that_is_gone_is_named(family: Path, gone: str) -> None:
    (family / gone).unlink()
    with pytest.raises(UserError, match=re.escape(gone)):
        main(ReportOptions(runs=(family / "model.engine",)))
    assert not (family / "report.html").exists()


def test_names_with_markup_are_shown_as_text(family: Path) -> None:
    evil = "</template><script>alert(1)</script>\"'"
    for name, kind in (("model.qat", "checkpoint"), ("model.onnx", "onnx"), ("model.engine", "engine")):
        path = family / name
        sidecar, content = read_sidecar(path, kind), path.read_bytes()  # type: ignore[arg-type]
        details = {**sidecar.details}
        if kind == "engine":
            details["findings"] = [{**finding, "node": evil, "cause": evil} for finding in details["findings"]]
        if kind == "checkpoint":
            placement = details["placement"]
            details["placement"] = {
                **placement,
                "decisions": [{**one, "label": evil} for one in placement["decisions"]],
            }
            details["data"] = {**details["data"], "source": evil}
        names = (evil,) * len(sidecar.class_names)
        changed = dataclasses.replace(sidecar, details=details, class_names=names)
        write_artifact(path, changed, lambda file, content=content: file.write_bytes(content) and None)
        if kind != "engine":  # the next was made of this one
            child = family / NAMES[NAMES.index(name) + 1]
            _repoint(child, path)
    found = render([gather(family)])
    assert evil not in found
    assert found.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in found


def _repoint(child: Path, parent: Path) -> None:
    """Lets the sidecar of ``child`` name the present hash of ``parent``."""
    content = json.loads(sidecar_path(child).read_text())
    content["parent"]["sha256"] = json.loads(sidecar_path(parent).read_text())["sha256"]
    sidecar_path(child).write_text(json.dumps(content))


def test_what_the_export_has_rewritten_is_said(family: Path, page: str) -> None:
    path = family / "model.onnx"
    sidecar, content = read_sidecar(path, "onnx"), path.read_bytes()
    details = {**sidecar.details, "merged": ["layer1.last", "layer2.last"], "padded": ["up"]}
    figures = {**sidecar.figures, "merging": {"images": 60, "other_top1": 1, "sqnr_db": 33.56}}
    changed = dataclasses.replace(sidecar, details=details, figures=figures)
    write_artifact(path, changed, lambda file: file.write_bytes(content) and None)
    merged = text(page_of(family))
    assert "Shortcuts merged into layer1.last, layer2.last: 1 of 60 images with another top-1 than as trained" in merged
    assert "as trained, logits at 33.6 dB. Q/DQ and rules are as trained. Zero channels before up." in merged
    assert "merged" not in text(page)
    assert "Zero channels" not in text(page)


def test_an_engine_of_an_onnx_file_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = classifier(tmp_path / "foreign.onnx")
    build_engine(model, builder="tensorrt-rtx", compute_capabilities=("8.9",))
    model.unlink()  # an engine without provenance is shown by itself
    capsys.readouterr()
    main(ReportOptions(runs=(tmp_path / "foreign.engine",)))
    page = (tmp_path / "report.html").read_text()
    findings = read_sidecar(tmp_path / "foreign.engine", "engine").details["findings"]
    assert len(findings) == 2
    for finding in findings:
        assert any(row.startswith(f"{finding['node']}|{finding['operation']}|INT8") for row in rows(page))
    assert "No accuracy was measured." in page
    assert "Q/DQ of" not in page
    printed = capsys.readouterr().out
    assert "convolutions in INT8" in printed
    assert "top-1" not in printed


def test_an_engine_of_a_file_that_export_quantize_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = residual(tmp_path / "float.onnx", quantize=False)
    np.save(tmp_path / "inputs.npy", np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32))
    quantize_onnx(model, tmp_path / "m.onnx", data=str(tmp_path / "inputs.npy"))
    build_engine(tmp_path / "m.onnx", builder="tensorrt-rtx", compute_capabilities=("8.9",))
    main(ReportOptions(runs=(tmp_path / "m.engine",)))
    found = rows((tmp_path / "report.html").read_text())
    assert sum("|INT8|" in row for row in found) >= 4
    assert any("residual_add" in row for row in found)  # rules of a file that was not trained are there too
    assert "convolutions in INT8" in capsys.readouterr().out


# --- what other commands measured


def latency(name: str, median: float, batch: int = 32) -> dict[str, object]:
    spread = {"low": 0.98 * median, "high": 1.02 * median, "p99": 1.05 * median}
    return {"name": name, "batch": batch, "median": median, **spread, "images_per_second": 1000 * batch / median}


def benchmark(family: Path, int8: float, fp16: float) -> Path:
    parent = read_sidecar(family / "model.engine", "engine").parent
    assert parent is not None
    content = {
        "date": "2026-01-01",
        "device": {"name": "NVIDIA Test", "driver": "1.2"},
        "tensorrt": "8.6.0",
        "builds": [],
        "models": {"INT8 (QAT)": {"sha256": parent.sha256}},
        "latency": [latency("FP16", fp16), latency("INT8 (QAT)", int8), latency("INT8 (QAT)", 0.25, batch=1)],
        "slower_in_int8": [{"batch": 32, "node": SLOW, "int8": 0.03, "fp16": 0.01}],
    }
    path = family / "benchmark.json"
    path.write_text(json.dumps(content))
    return path


def evaluation(family: Path, **changes: object) -> Path:
    content = {
        "engine": read_sidecar(family / "model.engine", "engine").sha256,
        "images": 60,
        "source": "the test split of squares",
        "top1": {"engine": 91.67, "PyTorch": 90.0},
        "agreement": {"engine, PyTorch": 98.33},
        "first_difference": {"node": "layer1.conv2", "tensor": "t", "sqnr_db": 7.25},
        **changes,
    }
    path = family / "evaluation.json"
    path.write_text(json.dumps(content))
    return path


def test_results_beside_the_artifacts_are_taken(family: Path) -> None:
    benchmark(family, 0.75, 1.5)
    evaluation(family)
    page = page_of(family)
    said = text(page)
    assert "engine|91.67 %" in " ".join(rows(page))
    assert "The same class, engine, PyTorch: 98.33 % of 60 images." in said
    assert "The first layer that differs from ONNX Runtime is layer1.conv2: 7.2 dB." in said
    assert "NVIDIA Test, driver 1.2, TensorRT 8.6.0, 2026-01-01" in said
    assert "INT8 (QAT)|32|0.7500|0.7350 to 0.7650|0.7875|42,667|2.00" in rows(page)
    assert "INT8 (QAT)|1|0.2500|0.2450 to 0.2550|0.2625|4,000|–" in rows(page)
    assert "Is it faster than FP16? 2.00 times" in said
    assert f"Slower than in FP16: {SLOW}" in said
    assert "20.0 us slower than in FP16 at batch 32." in said


def test_the_engines_tensors_are_listed_worst_first_with_the_command(family: Path) -> None:
    layers = [{"tensor": f"t{n}", "node": "n", "sqnr_db": None if n == 3 else 40.0 - n} for n in range(13)]
    command = ["python", "-m", "deploy.evaluate", "a b.engine"]
    made_by = {"command": command, "date": "2026-01-02T03:04:05+00:00", "versions": {"onnx": "1.2"}}
    evaluation(family, layers=layers, made_by=made_by)
    page = page_of(family)
    listed = [name for name in (row.partition("|")[0] for row in rows(page)) if re.fullmatch(r"t\d+", name)]
    assert listed == [*(f"t{n}" for n in range(12, 3, -1)), "t2", "t1", "t0", "t3"]
    assert "t3|bitwise equal" in rows(page)
    assert "3 others" in text(page)
    assert "evaluation.json|2026-01-02 03:04|onnx 1.2|" in rows(page)
    assert "python -m deploy.evaluate 'a b.engine'" in text(page)


@pytest.mark.parametrize(
    ("int8", "verdict"), [(0.75, "Ship it: "), (1.6, "Do not ship it: it takes 1.07 times as long as FP16 at batch 32")]
)
def test_speed_decides_too(int8: float, verdict: str, family: Path) -> None:
    benchmark(family, int8, 1.5)
    found = page_of(family)
    assert verdict in text(found)
    assert f'class="verdict {"ship" if int8 < 1 else "stop"}"' in found


def test_without_differences_and_without_classes(family: Path) -> None:
    evaluation(family, first_difference=None)
    assert "first layer that differs" not in page_of(family)
    outputs = {"engine, PyTorch": {"sqnr_db": 31.25, "equal_percent": None}}
    evaluation(family, top1={"engine": None, "PyTorch": None}, agreement={}, outputs=outputs, first_difference=None)
    assert "Outputs, engine, PyTorch: SQNR 31.2 dB on 60 inputs." in text(page_of(family))


def test_results_of_other_files_are_left_out_and_refused_when_named(
    family: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = evaluation(family, engine="0" * 64)
    said = text(page_of(family))
    assert "Left out: evaluation.json is about another engine: run deploy.evaluate again." in said
    with pytest.raises(UserError, match=r"evaluation\.json is about another engine: run deploy\.evaluate again"):
        main(ReportOptions(runs=(family,), evaluation=other))
    path = benchmark(family, 0.75, 1.5)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"models": {"INT8 (QAT)": {"sha256": "1"}}}))
    with pytest.raises(UserError, match=r"benchmark\.json is about another ONNX file: run deploy\.benchmark again"):
        main(ReportOptions(runs=(family,), benchmark=family / "benchmark.json"))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"models": 1, "builds": 2}', '{"engine": 1}', "[" * 100_000])
def test_files_that_are_no_results(content: str, family: Path) -> None:
    path = family / "result.json"
    path.write_text(content)
    page_of(family)  # in the folder it does no harm
    with pytest.raises(UserError, match=r"result\.json is not"):
        gather(family, [path])


def test_costs_show_the_layer_that_costs_most(family: Path) -> None:
    labels = [layer.label for layer in layers_of(gather(family)) if layer.state == "int8"]
    operations = [
        {"label": label, "loss_without": 0.5 - 0.01 * index, "sqnr_db": 20.0} for index, label in enumerate(labels[:3])
    ]
    content = {
        "checkpoint": read_sidecar(family / "model.qat", "checkpoint").sha256,
        "operations": operations,
        "target_drop": 0.1,
        "quantized": {"loss": 0.5, "top1": 90.0},
    }
    (family / "sensitivity.json").write_text(json.dumps(content))
    said = text(page_of(family))
    saved = "Which layer costs most accuracy? 0.02000 of the loss on some images is saved if this one is in float"
    assert f"{saved}: {labels[2]}" in said
    for operation in operations:
        operation["loss_without"] = 0.6
    (family / "sensitivity.json").write_text(json.dumps(content))
    assert "none No layer alone lowers the loss on some images when it is in float." in text(page_of(family))


def test_the_result_in_short(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark(family, 0.75, 1.5)
    main(ReportOptions(runs=(family,), json=family / "result.json", markdown=Path("-")))
    printed = capsys.readouterr().out
    assert "| what | measured |\n| --- | --- |\n| float | " in printed
    assert "| INT8, batch 32 | 0.7500 ms, FP16 1.5000 ms: 2.00 times as fast on NVIDIA Test |" in printed
    assert "**: Ship it: " in printed
    found = json.loads((family / "result.json").read_text())
    assert found["verdict"]["answer"] == "ship"
    assert found["speed"][0]["factor"] == 2.0
    assert [layer["label"] for layer in found["layers"]] == [layer.label for layer in layers_of(gather(family))]
    assert found["sha256"]["engine"] == read_sidecar(family / "model.engine", "engine").sha256
    assert {one["stage"] for one in found["missing"]} >= {"evaluation", "audit", "sensitivity"}


# --- what speaks against shipping


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"agreement": {"engine, PyTorch": 50.0}}, "engine, PyTorch: the same class on only 50.00 % of 60 images"),
        ({"top1": {"engine": 10.0}, "agreement": {}}, "by the engine, on other images than the float network's"),
    ],
)
def test_an_engine_that_answers_otherwise_is_not_shipped(changes: dict[str, object], says: str, family: Path) -> None:
    benchmark(family, 0.75, 1.5)
    evaluation(family, **changes)
    said = text(page_of(family))
    assert says in said
    assert "Ship it: " not in said


def test_an_onnx_file_that_answers_otherwise_is_not_shipped(family: Path) -> None:
    benchmark(family, 0.75, 1.5)
    path = family / "model.onnx"
    sidecar, content = read_sidecar(path, "onnx"), path.read_bytes()
    parity = {**sidecar.figures["parity"], "other_top1": 30}
    changed = dataclasses.replace(sidecar, figures={**sidecar.figures, "parity": parity})
    write_artifact(path, changed, lambda file: file.write_bytes(content) and None)
    assert "Do not ship it: PyTorch and ONNX Runtime give another class on 30 of 60 images." in text(page_of(family))


def test_of_weights_that_were_given_nothing_is_said_about_their_training(family: Path) -> None:
    path = family / "model.qat"
    sidecar, content = read_sidecar(path, "checkpoint"), path.read_bytes()
    figures = {key: value for key, value in sidecar.figures.items() if not key.startswith("qat")}
    write_artifact(path, dataclasses.replace(sidecar, figures=figures), lambda file: file.write_bytes(content) and None)
    _repoint(family / "model.onnx", path)
    assert "Was it trained on what it was tested on? not known The weights were given." in text(page_of(family))


def test_an_engine_that_became_fp16_says_so(family: Path) -> None:
    path = family / "model.engine"
    sidecar, content = read_sidecar(path, "engine"), path.read_bytes()
    both = {"int8": latency("INT8", 1.2) | {"runs": 200}, "float16": latency("FP16", 1.0) | {"runs": 200}}
    speed = {**both, "int8_wins": False, "written": "float16"}
    changed = dataclasses.replace(sidecar, details={**sidecar.details, "speed": speed})
    write_artifact(path, changed, lambda file: file.write_bytes(content) and None)
    said = text(page_of(family))
    assert "Ship it: " in said
    assert "this engine is FP16, because INT8 was not faster" in said


def test_times_are_charged_once_and_kernels_are_those_of_the_products(family: Path) -> None:
    details = read_sidecar(family / "model.engine", "engine").details
    layers = [{**layer, "milliseconds": 0.01} for layer in details["layers"]]
    audit = {
        "engine": read_sidecar(family / "model.engine", "engine").sha256,
        "batch": 32,
        "runs": 50,
        "totals": {},
        "layers": layers,
        "findings": details["findings"],
    }
    (family / "audit.json").write_text(json.dumps(audit))
    found = layers_of(gather(family))
    known = {layer.label for layer in found}
    charged = [layer for layer in layers if known & set(layer["onnx_nodes"])]
    assert sum(layer.milliseconds or 0.0 for layer in found) == pytest.approx(0.01 * len(charged))
    for finding in details["findings"]:
        (layer,) = (one for one in found if one.label == finding["node"])
        of_product = [one["tactic"] for one in layers if layer.label in one["onnx_nodes"] and one["kind"] != "kgen"]
        assert layer.kernel == of_product[0]
    assert "mean of 50 runs, layer by layer" in page_of(family)


# --- files


def test_outputs_never_overwrite_what_is_read_or_each_other(family: Path) -> None:
    named = evaluation(family)
    before = {path: path.read_bytes() for path in family.iterdir()}
    for path in [*before, family / "." / "model.onnx"]:
        with pytest.raises(UserError, match="would overwrite"):
            main(ReportOptions(runs=(family,), output=path, evaluation=named))
    with pytest.raises(UserError, match="would overwrite another output"):
        main(ReportOptions(runs=(family,), output=family / "x", json=family / "x"))
    assert {path: path.read_bytes() for path in family.iterdir()} == before


def test_standard_output_is_for_one_result_alone(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(ReportOptions(runs=(family,), json=Path("-")))
    assert json.loads(capsys.readouterr().out)["verdict"]["answer"] == "not known yet"
    for options in ({"json": Path("-"), "markdown": Path("-")}, {"output": Path("-")}):
        with pytest.raises(UserError, match="only one of --json and --markdown can be -"):
            main(ReportOptions(runs=(family,), **options))
    with pytest.raises(UserError, match="name a run: a folder, an engine, an ONNX file or a checkpoint"):
        main(ReportOptions(runs=()))


def test_the_newest_int8_file_is_shown_and_others_are_named(family: Path) -> None:
    (family / "model.engine").unlink()
    sidecar = read_sidecar(family / "model.onnx", "onnx")
    baseline = dataclasses.replace(sidecar, details={**sidecar.details, "precision": "float32"})
    content = (family / "model.onnx").read_bytes()
    write_artifact(family / "model.float32.onnx", baseline, lambda file: file.write_bytes(content) and None)
    found = gather(family)
    assert found.paths["onnx"].name == "model.onnx"
    assert "model.float32.onnx is there too: name it to see it" in found.left_out
    assert gather(family / "model.float32.onnx").paths["onnx"].name == "model.float32.onnx"


def test_of_two_results_the_newer_is_taken(family: Path) -> None:
    old = evaluation(family).rename(family / "a.json")
    os.utime(old, (1, 1))
    evaluation(family, top1={"engine": 95.0})
    found = gather(family)
    assert found.results["evaluation"]["top1"] == {"engine": 95.0}
    assert "a.json is older than evaluation.json, or that was named" in found.left_out


def test_commands_can_be_copied(family: Path) -> None:
    folder = family / "a folder"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(family / name, folder)
        shutil.copy(sidecar_path(family / name), folder)
    commands = [one.command for one in gather(folder).missing()]
    assert (
        f"python -m deploy.evaluate '{folder / 'model.engine'}' --layers --json '{folder / 'evaluation.json'}'"
        in commands
    )


def test_settings_of_all_stages_are_compared(family: Path, chain: Path) -> None:
    path = family / "model.qat"
    sidecar, content = read_sidecar(path, "checkpoint"), path.read_bytes()
    recipes = json.loads(json.dumps(sidecar.details["recipes"]))
    recipes["qat"]["lr"] = 0.125
    changed = dataclasses.replace(sidecar, details={**sidecar.details, "recipes": recipes})
    write_artifact(path, changed, lambda file: file.write_bytes(content) and None)
    _repoint(family / "model.onnx", path)
    said = text(page_of(family, chain))
    assert "What changed against the last run? 1 thing recipes qat lr: " in said
    assert "now 0.125." in said


def test_ranges_that_training_moved_are_those_in_use(trained: Path, family: Path) -> None:
    found = gather(trained)
    assert found.distributions is not None
    one = next(one for one in found.distributions.activations if one.kl is not None)
    path = family / "model.qat"
    sidecar, content = read_sidecar(path, "checkpoint"), path.read_bytes()
    amax = {**sidecar.details["amax"], one.quantizer: 0.5 * (one.amax or 0.0)}
    details = {**sidecar.details, "amax": amax, "bits": 4}
    write_artifact(path, dataclasses.replace(sidecar, details=details), lambda file: file.write_bytes(content) and None)
    content_of_ranges = json.loads(ranges_path(trained / "model.qat").read_text())
    content_of_ranges["checkpoint"] = read_sidecar(path, "checkpoint").sha256
    ranges_path(path).write_text(json.dumps(content_of_ranges))
    moved = gather(path)
    (read, *_) = (read for layer in layers_of(moved) for read in layer.reads if read.quantizer == one.quantizer)
    assert read.scale == pytest.approx(0.5 * (one.amax or 0.0) / 7)
    width = one.limit / len(one.counts)
    above = sum(count for index, count in enumerate(one.counts) if index * width >= 0.5 * (one.amax or 0.0) - width / 2)
    assert read.clipped == pytest.approx(100 * above / sum(one.counts), rel=0.5)
    assert "<b>trained (in use)</b>" in render([moved])
