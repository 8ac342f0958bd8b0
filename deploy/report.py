"""One page that shows what was trained, exported and built: accuracies, every layer's precision, every Q/DQ's reason.

    python -m deploy.report runs/model.engine
    python -m deploy.report runs/model.engine --evaluation runs/evaluation.json --benchmark runs/benchmark.json

Reads the sidecars of the engine, of its ONNX file and of its checkpoint, and what deploy.evaluate and deploy.benchmark
wrote; refuses files that do not belong together.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from deploy.benchmark import FP16
from qat.base.artifact import Sidecar, atomic_write, check_writable, read_parent, read_sidecar
from qat.base.console import Command, run_command, say, table
from qat.base.errors import UserError
from qat.base.number_format import BITS
from qat.base.text import megabytes

TEMPLATE = Path(__file__).with_name("report.html.j2")
PHASES = (("float", "float"), ("ptq", "INT{bits}, post-training"), ("qat", "INT{bits}, trained (QAT)"))
_COMMANDS = {"evaluation": "evaluate", "benchmark": "benchmark"}


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Command):
    """The options of ``python -m deploy.report``."""

    engine: Annotated[Path, tyro.conf.Positional]
    """The engine that python -m deploy.build wrote."""
    output: Path | None = None
    """The page to write; by default report.html beside the engine."""
    evaluation: Path | None = None
    """What python -m deploy.evaluate --json wrote of this engine."""
    benchmark: Path | None = None
    """What python -m deploy.benchmark wrote of this engine's ONNX file."""


def main(options: ReportOptions) -> None:
    """Writes the page and prints the table of accuracies."""
    output = options.output or options.engine.with_name("report.html")
    check_writable(output)
    page = render(options.engine, options.evaluation, options.benchmark)
    with atomic_write(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    _print_summary(*_family(options.engine))
    say(f"report: {output}")


def render(engine: Path, evaluation: Path | None = None, benchmark: Path | None = None) -> str:
    """The page as HTML, self-contained. Raises UserError when files are missing or do not belong together."""
    import jinja2

    built, onnx, checkpoint = _family(engine)
    evaluated = _results(evaluation, "evaluation")
    measured = _results(benchmark, "benchmark")
    if evaluated and evaluated["engine"] != built.sha256:
        raise UserError(f"{evaluation} is about another engine than {engine}: evaluate this one")
    digests = [model["sha256"] for model in measured["models"].values()] if measured else []
    if measured and built.parent and built.parent.sha256 not in digests:
        raise UserError(f"{benchmark} is about another ONNX file than {engine} was made from: benchmark that one")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["megabytes"] = megabytes
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        engine=built,
        onnx=onnx,
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
    )


def _family(engine: Path) -> tuple[Sidecar, Sidecar | None, Sidecar | None]:
    """The sidecars of an engine, and of its ONNX file and checkpoint where those were trained here."""
    built = read_sidecar(engine, "engine")
    if built.details["provenance"] != "known":
        return built, None, None
    path, onnx = read_parent(engine, built, "onnx")
    if "placement" in onnx.details:  # of export.quantize: nothing was trained
        return built, None, None
    _, checkpoint = read_parent(path, onnx, "checkpoint")
    return built, onnx, checkpoint


def _rounding(checkpoint: Sidecar | None) -> str:
    """How the weights of a network that was not trained became codes."""
    steps = checkpoint.details.get("adaround", 0) if checkpoint else 0
    return f"rounded by AdaRound in {steps} steps a layer" if steps else "without training"


def _results(path: Path | None, kind: str) -> dict[str, Any] | None:
    """The JSON file of another command; None when there is none."""
    if path is None:
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content["engine" if kind == "evaluation" else "models"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of deploy.{_COMMANDS[kind]} ({error}): run that again") from error
    return content


def _speeds(benchmark: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Latencies by batch size, each beside FP16 of the same batch size where that was measured."""
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
        if key in figures  # none without labels, two without training
    ]


def _layers(engine: Sidecar, checkpoint: Sidecar | None) -> list[dict[str, Any]]:
    """Every convolution and matrix product of the engine, with the rule that decided about it."""
    decisions = checkpoint.details["placement"]["decisions"] if checkpoint else []
    rules = {decision["label"]: decision for decision in decisions}
    rows = []
    for finding in engine.details["findings"]:
        decision = rules.get(finding["node"], {})
        why = finding["cause"] or decision.get("reason", "")
        rows.append({**finding, "rule": decision.get("rule", ""), "why": why})
    return rows


def _tensors(checkpoint: Sidecar | None) -> list[dict[str, Any]]:
    """Every quantized activation, its scale, who reads it and why."""
    if checkpoint is None:
        return []
    amax = checkpoint.details["amax"]
    return [
        {
            **tensor,
            "scale": amax[tensor["quantizer"]] / 127,
            "shared": tensor["quantizer"] != tensor["tensor"],
        }
        for tensor in checkpoint.details["placement"]["tensors"]
    ]


def _curve(checkpoint: Sidecar | None) -> dict[str, Any] | None:
    """Validation accuracy by epoch as points of an SVG of 600 x 180, float and QAT, with the ticks of both axes."""
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
        return round(150 - 140 * (value - low) / (high - low), 1)

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
    """Round numbers between two values, two to six of them."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(step for step in (power / 5, power / 2, power, 2 * power, 5 * power) if (high - low) / step < 5.5)
    first = math.ceil(low / step)
    return [round(step * index, 10) for index in range(first, math.floor(high / step) + 1)]


def _print_summary(engine: Sidecar, onnx: Sidecar | None, checkpoint: Sidecar | None) -> None:
    figures = engine.figures
    rows: list[tuple[str, str]] = []
    if checkpoint is not None:
        rows += [
            (f"{row['label']}, top-1 on {row['images']} test images", f"{row['top1']:.2f} %")
            for row in _accuracies(checkpoint)
        ]
        if agreement := checkpoint.figures.get("agreement"):
            rows.append((f"INT8 and float, same class on {agreement['images']} images", f"{agreement['top1']:.2f} %"))
    if onnx is not None:
        parity = onnx.figures["parity"]
        if (top1 := onnx.details["reference"]["top1"]) is not None:
            rows.append((f"this ONNX file, top-1 on {onnx.details['reference']['images']} images", f"{top1:.2f} %"))
        if merging := onnx.figures.get("merging"):
            different = f"{merging['other_top1']} of {merging['images']} images"
            rows.append(("merging the shortcuts changes top-1 of", different))
        rows.append(("ONNX file", f"{megabytes(onnx.figures['bytes'])}, {onnx.figures['nodes']} nodes"))
        rows.append(
            (
                "PyTorch and ONNX Runtime differ in top-1",
                f"{parity['other_top1']} of {parity['images']} images",
            )
        )
    rows += [
        ("convolutions in INT8", f"{figures['convolutions_int8']} of {figures['convolutions']}"),
        ("matrix products in INT8", f"{figures['matrix_products_int8']} of {figures['matrix_products']}"),
        ("engine weights memory", megabytes(figures["weights_bytes"])),
        ("engine built in", f"{figures['build_seconds']:.1f} s by {engine.details['builder']['name']}"),
    ]
    table("Result", ("what", "measured"), rows)


if __name__ == "__main__":
    run_command(main, ReportOptions)
