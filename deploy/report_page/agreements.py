"""How far a network's own code, PyTorch, ONNX Runtime and the engine agree, and what the export has rewritten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deploy.report_page.artifacts import Artifacts
from qat.base.number_format import INT8
from qat.base.sqnr import worst_first
from qat.base.text import decibels, megabytes

_WORST_SHOWN = 10


def parity(run: Artifacts) -> dict[str, Any] | None:
    """Sentences about agreement, and tables of layers, the worst first; None without any."""
    sentences = [*_of_onnx(run), *_of_engine(run)]
    if not sentences:
        return None
    exported = run.onnx.figures.get("parity", {}).get("layers", []) if run.onnx else []
    built = run.results.get("evaluation", {}).get("layers", [])
    tables = [
        _worst_first("PyTorch against ONNX Runtime, each stretch between quantizers on the same inputs", exported),
        _worst_first("The engine against ONNX Runtime, with the error of all layers before", built),
    ]
    return {"sentences": sentences, "tables": [table for table in tables if table["worst"]]}


def _worst_first(title: str, layers: list[dict[str, Any]]) -> dict[str, Any]:
    worst = sorted(layers, key=lambda layer: worst_first(layer["sqnr_db"]))
    return {"title": title, "worst": worst[:_WORST_SHOWN], "rest": worst[_WORST_SHOWN:]}


def outputs_against_float(agreement: Mapping[str, Any]) -> str:
    """What a checkpoint records about a network that answers no classes, the output that is farthest first."""
    outputs = sorted(agreement["outputs"], key=lambda one: worst_first(one["sqnr_db"]))
    listed = ", ".join(f"{one['tensor'] or 'its output'} {distance(one)}" for one in outputs)
    return f"{INT8.name} against float on {agreement['images']} images: {listed}"


def rewritten(run: Artifacts) -> list[str]:
    """What the ONNX file is, and what the export did to the network."""
    if run.onnx is None:
        return []
    figures, details = run.onnx.figures, run.onnx.details
    found = []
    if "bytes" in figures:
        form = f"opset {details['opset']}, input {details['input']}" if "opset" in details else ""
        found.append(f"ONNX: {megabytes(figures['bytes'])}, {figures['nodes']} nodes{', ' if form else ''}{form}.")
    if details.get("merged"):
        merging = figures["merging"]
        loss = "" if merging["sqnr_db"] is None else f", logits at {merging['sqnr_db']:.1f} dB"
        other = f"{merging['other_top1']} of {merging['images']} images with another top-1 than as trained{loss}"
        found.append(f"Shortcuts merged into {', '.join(details['merged'])}: {other}. Q/DQ and rules are as trained.")
    if details.get("padded"):
        found.append(f"Zero channels before {', '.join(details['padded'])}.")
    return found


def _of_onnx(run: Artifacts) -> Iterator[str]:
    figures = run.onnx.figures if run.onnx else {}
    found = figures.get("parity", {})
    if "same_top1" in found or "inputs" in found:  # of a file that export.quantize made
        parts = [f"{found['same_top1']:.2f} % get the same class"] if "same_top1" in found else []
        parts += [f"{output['tensor']} {distance(output)}" for output in found["outputs"]]
        yield f"The float file against this one in ONNX Runtime on {found['inputs']} inputs: {'; '.join(parts)}."
    elif found:
        other = found["other_top1"]
        classes = "" if other is None else f"{other} of {found['images']} images get another class"
        worst = found.get("worst_layer")
        layer = f"the layer that differs most is {worst['tensor']}: {decibels(worst['sqnr_db'])}" if worst else ""
        yield f"PyTorch against ONNX Runtime on {found['source']}: {'; '.join(filter(None, (classes, layer)))}."
    if found := figures.get("against_float"):
        other = found["other_top1"]
        parts = [] if other is None else [f"{other} of {found['images']} images get another class"]
        parts += [f"{output['tensor']} {distance(output)}" for output in found["outputs"]]
        yield f"{found['name']} in float, by its own code, against ONNX Runtime: {'; '.join(parts)}."


def _of_engine(run: Artifacts) -> Iterator[str]:
    found = run.evaluation
    if not found:
        return
    shares = [f"{who} {top1:.2f} %" for who, top1 in found["top1"].items() if top1 is not None]
    if shares:
        yield f"Top-1 of {found['images']} images ({found['source']}): {', '.join(shares)}."
    for pair, share in found["agreement"].items():
        yield f"The same class, {pair}: {share:.2f} % of {found['images']} images."
    for pair, output in found.get("outputs", {}).items():
        yield f"Outputs, {pair}: {distance(output)} on {found['images']} inputs."
    if difference := found.get("first_difference"):
        yield f"The first layer that differs from ONNX Runtime is {difference['node']}: {difference['sqnr_db']:.1f} dB."


def distance(output: Mapping[str, Any]) -> str:
    """How far an output is from another network's, in words."""
    if output["equal_percent"] is not None:
        return f"{output['equal_percent']:.2f} % of the values equal"
    return "bitwise equal" if output["sqnr_db"] is None else f"SQNR {output['sqnr_db']:.1f} dB"
