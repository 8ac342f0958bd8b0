"""The report: one page with the accuracies, the precision of every layer and the reason of every Q/DQ node.

It is made from the sidecars of the engine, of its ONNX file and of its checkpoint, and from the results of
deploy.evaluate and deploy.benchmark. Files that do not belong together are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.candidates import FP16
from qat.base.artifact import Sidecar, atomic_write, check_writable, read_parent, read_sidecar
from qat.base.console import say, table
from qat.base.errors import UserError
from qat.base.number_format import BITS, INT8
from qat.base.text import megabytes

TEMPLATE = Path(__file__).with_name("report_page.html.j2")
PHASES = (("float", "float"), ("ptq", "INT{bits}, post-training"), ("qat", "INT{bits}, trained (QAT)"))


@dataclass(frozen=True)
class Lineage:
    """The sidecars of an engine, its ONNX file and its checkpoint. The last two are None if nothing was trained."""

    engine: Sidecar
    onnx: Sidecar | None = None
    checkpoint: Sidecar | None = None

    @classmethod
    def read(cls, engine: Path) -> Lineage:
        """From the engine's path. Raises UserError when a file is missing or does not belong to the others."""
        sidecar = read_sidecar(engine, "engine")
        if sidecar.details["provenance"] != "known":
            return cls(sidecar)
        path, onnx = read_parent(engine, sidecar, "onnx")
        if "placement" in onnx.details:  # written by export.quantize: nothing was trained
            return cls(sidecar)
        _, checkpoint = read_parent(path, onnx, "checkpoint")
        return cls(sidecar, onnx, checkpoint)


def write_report(engine: Path, output: Path, evaluation: Path | None = None, benchmark: Path | None = None) -> None:
    """Writes the page and prints the table of results.

    Args:
        engine: the engine file.
        output: the page.
        evaluation: what python -m deploy.evaluate --json wrote about this engine.
        benchmark: what python -m deploy.benchmark wrote about the engine's ONNX file.

    Raises UserError when files are missing or do not belong together, and when the page cannot be written.
    """
    check_writable(output)
    page = render_page(engine, evaluation, benchmark)
    with atomic_write(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    table("Result", ("what", "measured"), _result_rows(Lineage.read(engine)))
    say(f"report: {output}")


def render_page(engine: Path, evaluation: Path | None = None, benchmark: Path | None = None) -> str:
    """The page as HTML that needs no other file. Raises UserError when files are missing or do not belong together."""
    import jinja2

    lineage = Lineage.read(engine)
    built, checkpoint = lineage.engine, lineage.checkpoint
    evaluated = _read_results(evaluation, "evaluate", "engine")
    measured = _read_results(benchmark, "benchmark", "models")
    if evaluated and evaluated["engine"] != built.sha256:
        raise UserError(f"{evaluation} is about another engine than {engine}: evaluate this one")
    digests = [model["sha256"] for model in measured["models"].values()] if measured else []
    if measured and built.parent and built.parent.sha256 not in digests:
        raise UserError(
            f"{benchmark} is about another ONNX file than the one that {engine} was made from: benchmark that one"
        )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["megabytes"] = megabytes
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        engine=built,
        speed=_speed_rows(built.details.get("speed")),
        onnx=lineage.onnx,
        checkpoint=checkpoint,
        name=engine.name,
        accuracies=_accuracies(checkpoint),
        agreement=checkpoint.figures.get("agreement") if checkpoint else None,
        rounding=_rounding(checkpoint),
        curve=_curve(checkpoint),
        layers=_layers(built, checkpoint),
        evaluation=evaluated,
        speeds=_speeds(measured),
        measured=measured,
        tensors=_tensors(checkpoint),
        rules=checkpoint.details["rules"] if checkpoint else {},
        number_format=INT8,
    )


def _rounding(checkpoint: Sidecar | None) -> str:
    """How the weights of a network that was not trained were rounded to codes."""
    steps = checkpoint.details.get("adaround", 0) if checkpoint else 0
    return f"rounded by AdaRound in {steps} steps a layer" if steps else "without training"


def _read_results(path: Path | None, command: str, key: str) -> dict[str, Any] | None:
    """The JSON file of another command, which must have ``key``; None without a file."""
    if path is None:
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result of deploy.{command} ({error}): run that again") from error
    return content


def _speeds(benchmark: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Latencies by batch size, each with its factor over FP16 at the same batch size, if that was measured."""
    entries = (benchmark or {}).get("latency", [])
    fp16 = {entry["batch"]: entry["median"] for entry in entries if entry["name"] == FP16}
    return [
        {**entry, "factor": fp16[entry["batch"]] / entry["median"] if entry["batch"] in fp16 else None}
        for entry in entries
    ]


def _accuracies(checkpoint: Sidecar | None) -> list[dict[str, Any]]:
    if checkpoint is None:
        return []
    figures, bits = checkpoint.figures, checkpoint.details.get("bits", BITS)
    return [
        {
            "label": label.format(bits=bits),
            "top1": figures[key]["test_top1"],
            "loss": figures[key]["test_loss"],
            "images": figures[key]["test_images"],
            "change": figures[key]["test_top1"] - figures["float"]["test_top1"],
        }
        for key, label in PHASES
        if key in figures  # without labels there is none, without training there are two
    ]


def _layers(engine: Sidecar, checkpoint: Sidecar | None) -> list[dict[str, Any]]:
    """Every convolution and matrix product of the engine, with the rule that decided whether it is quantized."""
    decisions = checkpoint.details["placement"]["decisions"] if checkpoint else []
    rules = {decision["label"]: decision for decision in decisions}
    rows = []
    for finding in engine.details["findings"]:
        decision = rules.get(finding["node"], {})
        reason = decision.get("reason", "")
        why = finding["cause"] if finding["declared_int8"] or not reason else reason
        rows.append({**finding, "rule": decision.get("rule", ""), "why": why})
    return rows


def _tensors(checkpoint: Sidecar | None) -> list[dict[str, Any]]:
    """Every quantized activation, with its scale, its readers and their rules."""
    if checkpoint is None:
        return []
    amax = checkpoint.details["amax"]
    return [
        {
            **tensor,
            "scale": amax[tensor["quantizer"]] / INT8.high,
            "shared": tensor["quantizer"] != tensor["tensor"],
        }
        for tensor in checkpoint.details["placement"]["tensors"]
    ]


def _curve(checkpoint: Sidecar | None) -> dict[str, Any] | None:
    """Validation accuracy by epoch as points of an SVG of 600 x 180, for float and QAT, and the ticks of both axes."""
    if checkpoint is None:
        return None
    histories = {phase: checkpoint.figures.get(f"{phase}_history", []) for phase in ("float", "qat")}
    values = [epoch["validation_top1"] for history in histories.values() for epoch in history]
    if len(values) < 2:
        return None
    low, high = min(values), max(max(values), min(values) + 1)

    def x(index: int) -> float:
        return round(50 + 530 * index / (len(values) - 1), 1)

    def y(value: float) -> float:
        return float(round(150 - 140 * (value - low) / (high - low), 1))

    points = [f"{x(index)},{y(value)}" for index, value in enumerate(values)]
    border = len(histories["float"])
    every = math.ceil(len(values) / 12)
    return {
        "float": points[:border],
        "qat": points[max(border - 1, 0) :],
        "percents": [(y(value), f"{value:g}") for value in _ticks(low, high)],
        "epochs": [(x(index), index + 1) for index in range(0, len(values), every)],
    }


def _ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers between two values."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(step for step in (power / 5, power / 2, power, 2 * power, 5 * power) if (high - low) / step < 5.5)
    first = math.ceil(low / step)
    return [round(step * index, 10) for index in range(first, math.floor(high / step) + 1)]


def _result_rows(lineage: Lineage) -> list[tuple[str, str]]:
    """The results in short, as the command prints them."""
    onnx, checkpoint, figures = lineage.onnx, lineage.checkpoint, lineage.engine.figures
    rows: list[tuple[str, str]] = []
    if checkpoint is not None:
        rows += [
            (f"{row['label']}, top-1 on {row['images']} test images", f"{row['top1']:.2f} %")
            for row in _accuracies(checkpoint)
        ]
        if agreement := checkpoint.figures.get("agreement"):
            what = f"{INT8.name} and float, same class on {agreement['images']} images"
            rows.append((what, f"{agreement['top1']:.2f} %"))
    if onnx is not None:
        parity = onnx.figures["parity"]
        reference = onnx.details["reference"] or {"top1": None}
        if (top1 := reference["top1"]) is not None:
            rows.append((f"this ONNX file, top-1 on {reference['images']} images", f"{top1:.2f} %"))
        if merging := onnx.figures.get("merging"):
            different = f"{merging['other_top1']} of {merging['images']} images"
            rows.append(("merging the shortcuts changes top-1 of", different))
        rows.append(("ONNX file", f"{megabytes(onnx.figures['bytes'])}, {onnx.figures['nodes']} nodes"))
        if parity["other_top1"] is not None:
            different = f"{parity['other_top1']} of {parity['images']} images"
            rows.append(("PyTorch and ONNX Runtime differ in top-1", different))
        if (given := onnx.figures.get("against_float")) and given["other_top1"] is not None:
            different = f"{given['other_top1']} of {given['images']} images"
            rows.append(("the float network's own code and ONNX Runtime differ in top-1", different))
    return [
        *rows,
        (f"convolutions in {INT8.name}", f"{figures['convolutions_int8']} of {figures['convolutions']}"),
        (f"matrix products in {INT8.name}", f"{figures['matrix_products_int8']} of {figures['matrix_products']}"),
        *_speed_rows(lineage.engine.details.get("speed")),
        ("engine weights memory", megabytes(figures["weights_bytes"])),
        ("engine built in", f"{figures['build_seconds']:.1f} s by {lineage.engine.details['builder']['name']}"),
    ]


def _speed_rows(speed: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What deploy.build --verify-speed measured."""
    if speed is None:
        return []
    int8, half = (speed[name]["median"] for name in ("int8", "float16"))
    verdict = "faster" if speed["int8_wins"] else "not faster beyond the spread"
    written = "" if speed["written"] == "int8" else "; this engine is FP16"
    what = f"{INT8.name} against FP16, batch {speed['int8']['batch']}"
    return [(what, f"{int8:.4f} against {half:.4f} ms: {verdict}{written}")]
