"""The five questions that a reader has, answered before any table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.engine_layers import EngineLayer
from deploy.report_page.artifacts import Artifacts
from deploy.report_page.layers import Layer
from deploy.report_page.verdict import Speed, Stage
from qat.base.number_format import INT8

_SHOWN = 5


@dataclass(frozen=True)
class Answer:
    """A question, the answer in a few letters and in a sentence, layers that it names, and a command for more."""

    question: str
    short: str
    long: str
    colour: str = ""
    layers: tuple[Layer, ...] = ()
    command: str = ""


@dataclass(frozen=True)
class Note:
    """Layers that a reader should look at first."""

    what: str
    colour: str
    layers: tuple[Layer, ...]
    more: str


def answers_of(
    run: Artifacts, stages: Sequence[Stage], speeds: Sequence[Speed], layers: Sequence[Layer], change: Any
) -> list[Answer]:
    """The answers, in the order in which they are asked."""
    return [
        _accuracy(stages),
        _speed(run, speeds),
        _float_layers(run, layers),
        _costliest(run, layers),
        _splits(run),
        _changed(change),
    ]


def attention(layers: Sequence[Layer]) -> list[Note]:
    """What differs from the file, what is slower in INT8, what is FP32."""
    groups = (
        (
            f"Declared {INT8.name}, and not {INT8.name} in the engine",
            "red",
            [one for one in layers if one.state == "broken"],
        ),
        ("Slower than in FP16", "red", [one for one in layers if one.slower_ms is not None]),
        ("In FP32", "orange", [one for one in layers if one.state == "fp32"]),
    )
    return [
        Note(what, colour, tuple(found[:_SHOWN]), f" and {len(found) - _SHOWN} others" if len(found) > _SHOWN else "")
        for what, colour, found in groups
        if found
    ]


def _accuracy(stages: Sequence[Stage]) -> Answer:
    question = "Is it as accurate as in float?"
    final = next((stage for stage in reversed(stages) if stage.change is not None), None)
    if final is None or final.change is None:
        return Answer(
            question, "not measured", "No accuracy of the float and the quantized network on the same images is known."
        )
    base = final.top1 - final.change
    lost = base > final.high
    return Answer(
        question,
        f"{final.top1:.2f} %",
        f"{final.label}; {base:.2f} % in float, {final.change:+.2f} points on {final.images} test images. One such "
        f"figure is known from {final.low:.1f} to {final.high:.1f} %.",
        "red" if lost else "green",
    )


def _speed(run: Artifacts, speeds: Sequence[Speed]) -> Answer:
    question = "Is it faster than FP16?"
    if not speeds:
        command = next((one.command for one in run.missing() if one.stage == "benchmark"), "")
        return Answer(question, "not measured", "On the GPU that it is for:", command=command)
    best = max(speeds, key=lambda speed: speed.batch)
    return Answer(
        question,
        f"{best.factor:.2f} times",
        f"{best.int8:.4f} against {best.fp16:.4f} ms at batch {best.batch} on {best.gpu}.",
        "green" if best.is_faster else "red",
    )


def _float_layers(run: Artifacts, layers: Sequence[Layer]) -> Answer:
    question = "Which layers run in FP32, and why?"
    if run.engine is None:
        return Answer(question, "no engine yet", "")
    listed = map(EngineLayer.from_json, run.engine.details["layers"])
    nodes = [node for layer in listed if layer.writes_fp32 for node in layer.onnx_nodes[:1]]
    known = {layer.label: layer for layer in layers}
    named = tuple(known[node] for node in nodes if node in known)
    if not nodes:
        return Answer(question, "none", "No layer that computes in float writes FP32.", "green")
    kept = {one["node"]: one["reason"] for one in (run.onnx.details.get("kept_float32", []) if run.onnx else [])}
    reasons = Counter(kept[node] for node in nodes if node in kept)
    why = "because " + reasons.most_common(1)[0][0] if reasons else _why_float(run)
    return Answer(question, f"{len(nodes)} of {run.engine.figures['layers']}", why, "orange", named[:_SHOWN])


def _why_float(run: Artifacts) -> str:
    strongly = run.engine is not None and run.engine.details["typing"] == "strong"
    if strongly and run.onnx is not None and run.onnx.details.get("float_type", "float32") == "float32":
        return f"because the ONNX file stores what is not {INT8.name} in float32 (--float-type float16 does not):"
    return "as the builder chose:"


def _costliest(run: Artifacts, layers: Sequence[Layer]) -> Answer:
    question = "Which layer costs most accuracy?"
    known = [layer for layer in layers if layer.loss_saved is not None]
    if not known:
        command = next((one.command for one in run.missing() if one.stage == "sensitivity"), "")
        return Answer(question, "not measured", "", command=command)
    worst = max(known, key=lambda layer: layer.loss_saved or 0.0)
    return Answer(question, f"{worst.loss_saved:+.5f} loss", "is saved if this one is in float:", layers=(worst,))


def _splits(run: Artifacts) -> Answer:
    question = "Was it trained on what it was tested on?"
    if run.checkpoint is None:
        return Answer(question, "not known", "The ONNX file is not from a checkpoint of this program.")
    splits = run.checkpoint.details["splits"]
    sizes = ", ".join(f"{name} {size}" for name, size in splits.items())
    return Answer(
        question,
        "no",
        f"The splits of {run.checkpoint.details['data']['source']} are disjoint: {sizes} images.",
        "green",
    )


def _changed(change: Any) -> Answer:
    question = "What changed against the last run?"
    if change is None:
        return Answer(question, "not compared", "Name both:", command="python -m deploy.report RUN LAST_RUN")
    count = len(change["rows"])
    return Answer(
        question,
        f"{count} things" if count != 1 else "1 thing",
        f"against {change['other']}: see Changes." if count else "",
    )
