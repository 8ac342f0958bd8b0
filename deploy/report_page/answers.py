"""The five questions that a reader has, answered before any table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.engine_layers import EngineLayer
from deploy.report_page.agreements import outputs_against_float
from deploy.report_page.artifacts import Artifacts
from deploy.report_page.layers import Layer
from deploy.report_page.task_scores import task_scores_of
from deploy.report_page.verdict import Speed, Stage, final_stage, is_fp16, loss_that_counts
from qat.base.number_format import INT8

_SHOWN, _CHANGES_SHOWN = 5, 3


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
        _accuracy(run, stages),
        _speed(run, speeds),
        _float_layers(run, layers),
        _costliest(run, layers),
        _splits(run),
        _changed(change),
    ]


def attention(run: Artifacts, layers: Sequence[Layer]) -> list[Note]:
    """What differs from the file, what is slower in INT8, what writes FP32."""
    groups = (
        (
            f"Declared {INT8.name}, and not {INT8.name} in the engine",
            "red",
            [one for one in layers if one.state == "broken"],
        ),
        ("Slower than in FP16", "red", [one for one in layers if one.slower is not None]),
        ("Writes FP32", "orange", writing_fp32(run, layers)[0]),
    )
    return [
        Note(what, colour, tuple(found[:_SHOWN]), f" and {len(found) - _SHOWN} others" if len(found) > _SHOWN else "")
        for what, colour, found in groups
        if found
    ]


def writing_fp32(run: Artifacts, layers: Sequence[Layer]) -> tuple[list[Layer], int]:
    """The layers of the network whose engine layers compute in float and write FP32, and the number of those.

    Of several in one engine layer it is the first that is not INT8: pointwise kernels also list the products before
    them, whose codes they rescale.
    """
    listed = map(EngineLayer.from_json, run.engine.details["layers"]) if run.engine else ()
    wide = [layer for layer in listed if layer.writes_fp32]
    known = {node: layer for layer in layers for node in layer.parts or (layer.node,)}
    named: dict[str, Layer] = {}
    for one in wide:
        inside = [known[node] for node in one.onnx_nodes if node in known]
        if inside:
            first = min(inside, key=lambda layer: layer.state == "int8")
            named[first.node] = first
    return list(named.values()), len(wide)


def _accuracy(run: Artifacts, stages: Sequence[Stage]) -> Answer:
    question = "Is it as accurate as in float?"
    final = final_stage(stages)
    agreement = run.checkpoint.figures.get("agreement", {}) if run.checkpoint else {}
    scores = task_scores_of(run)
    if final is None and scores is not None:
        colour = "" if scores.in_float is None else "red" if scores.loses else "green"
        return Answer(question, f"{scores.judged:.2f} %", f"{scores.who[0]}: {scores}.", colour)
    if final is None and agreement.get("outputs"):
        return Answer(question, "not measured", f"{outputs_against_float(agreement)}.")
    if final is None:
        return Answer(question, "not measured", "No accuracy of the float and the quantized network is known.")
    if final.change is None:
        return Answer(question, f"{final.top1:.2f} %", f"{final.label}, on other images than the float network's.")
    known = f"One such figure is known from {final.low:.1f} to {final.high:.1f} %."
    against = f"{stages[0].top1:.2f} % in float, {final.change:+.2f} points on {final.images} test images"
    found = f"{final.label}; {against}. {known}"
    return Answer(question, f"{final.top1:.2f} %", found, "red" if loss_that_counts(stages) else "green")


def _speed(run: Artifacts, speeds: Sequence[Speed]) -> Answer:
    question = "Is it faster than FP16?"
    if is_fp16(run):
        return Answer(question, "it is FP16", f"{INT8.name} was not faster when it was built.")
    if not speeds:
        command = next((one.command for one in run.missing() if one.stage == "benchmark"), "")
        return Answer(question, "not measured", "On the GPU that it is for:", command=command)
    shown = min((one for one in speeds if one.loses), key=lambda one: one.factor, default=speeds[-1])
    first = f"{shown.int8:.4f} against {shown.fp16:.4f} ms at batch {shown.batch} on {shown.gpu}"
    found = "; ".join([first, *(str(one) for one in speeds if one is not shown)])
    colour = "green" if shown.wins else "red" if shown.loses else "orange"
    return Answer(question, f"{shown.factor:.2f} times", f"{found}.", colour)


def _float_layers(run: Artifacts, layers: Sequence[Layer]) -> Answer:
    question = "Which layers write FP32, and why?"
    if run.engine is None:
        return Answer(question, "no engine yet", "")
    named, count = writing_fp32(run, layers)
    listed = list(map(EngineLayer.from_json, run.engine.details["layers"]))
    inside = sum("FP32" in (*layer.inputs, *layer.outputs) and layer.product_precision != INT8.name for layer in listed)
    between = f"{inside - count} others compute in FP32 between {INT8.name} layers." if inside > count else ""
    if not count:
        return Answer(question, "none", between or "No layer computes in FP32.", "green")
    kept = {one["node"]: one["reason"] for one in (run.onnx.details.get("kept_float32", []) if run.onnx else [])}
    reasons = Counter(kept[layer.node] for layer in named if layer.node in kept)
    why = "These do, because " + reasons.most_common(1)[0][0] + ":" if reasons else _why_float(run)
    short = f"{count} of {run.engine.figures['layers']}"
    return Answer(question, short, f"{between} {why}".strip(), "orange", tuple(named[:_SHOWN]))


def _why_float(run: Artifacts) -> str:
    strongly = run.engine is not None and run.engine.details["typing"] == "strong"
    if strongly and run.onnx is not None and run.onnx.details.get("float_type", "float32") == "float32":
        return f"These do, because the file stores what is not {INT8.name} in float32 (--float-type float16 does not):"
    return "These do, as the builder chose:"


def _costliest(run: Artifacts, layers: Sequence[Layer]) -> Answer:
    question = "Which layer costs most accuracy?"
    known = [layer for layer in layers if layer.loss_saved is not None]
    if not known:
        command = next((one.command for one in run.missing() if one.stage == "sensitivity"), "")
        return Answer(question, "not measured", "" if command else "It needs labels.", command=command)
    worst = max(known, key=lambda layer: layer.loss_saved or 0.0)
    images = f"on {run.results['sensitivity'].get('images', 'some')} images"
    if not (worst.loss_saved or 0.0) > 0:
        return Answer(question, "none", f"No layer alone lowers the loss {images} when it is in float.", "green")
    return Answer(
        question, f"{worst.loss_saved:.5f}", f"of the loss {images} is saved if this one is in float:", "", (worst,)
    )


def _splits(run: Artifacts) -> Answer:
    question = "Was it trained on what it was tested on?"
    if run.checkpoint is None:
        return Answer(question, "not known", "The ONNX file is not from a checkpoint of this program.")
    if not (source := run.data_source):
        return Answer(question, "not known", "The checkpoint was saved from Python, and does not record its images.")
    splits = run.checkpoint.details["splits"]
    sizes = ", ".join(f"{name} {size}" for name, size in splits.items())
    if not run.is_trained:
        return Answer(
            question, "not known", f"The weights were given. Calibrated and tested on parts of {source}: {sizes}."
        )
    return Answer(
        question, "no", f"{source} was split into {sizes} images; copies of one image are not looked for.", "green"
    )


def _changed(change: Any) -> Answer:
    question = "What changed against the last run?"
    if change is None:
        return Answer(question, "not compared", "Name both:", command="python -m deploy.report RUN LAST_RUN")
    rows = change["rows"]
    if not rows:
        return Answer(question, "nothing", f"that this page shows, against {change['other']}.")
    first = "; ".join(f"{row['what']}: {row['before']}, now {row['after']}" for row in rows[:_CHANGES_SHOWN])
    more = f"; and {len(rows) - _CHANGES_SHOWN} more" if len(rows) > _CHANGES_SHOWN else ""
    return Answer(question, "1 thing" if len(rows) == 1 else f"{len(rows)} things", f"{first}{more}.")
