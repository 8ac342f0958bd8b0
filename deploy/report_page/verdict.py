"""Whether to ship it, in one sentence, and what that rests on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deploy.candidates import FP16, MODEL
from deploy.report_page.agreements import outputs_against_float
from deploy.report_page.artifacts import Artifacts
from deploy.report_page.layers import Layer
from deploy.report_page.task_scores import KEPT, task_scores_of
from qat.base.interval import interval_of_share, is_near_chance
from qat.base.number_format import BITS, INT8

Answer = Literal["ship", "do not ship", "not known yet"]
_AGREES, _TELLS = 99.0, 5.0
"""Percent of the images on which forms of a network must agree; points of accuracy that a test set must be able to
tell."""


@dataclass(frozen=True)
class Stage:
    """An accuracy of one form of the network, in percent, with its interval of 95 % confidence."""

    label: str
    top1: float
    low: float
    high: float
    images: int
    change: float | None
    """Against the float network on the same images, in points; None for the float network, or where that is unknown."""
    loss: float | None = None

    @classmethod
    def of(cls, label: str, top1: float, images: int, base: float | None, loss: float | None = None) -> Stage:
        """From a share in percent that was counted on ``images``."""
        low, high = interval_of_share(round(top1 * images / 100), images)
        return cls(label, top1, 100 * low, 100 * high, images, None if base is None else top1 - base, loss)

    @property
    def half(self) -> float:
        """Half the width of its interval, in points."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Speed:
    """Median latency at one batch size in milliseconds, INT8 against FP16.

    ``wins``, ``loses``: whether INT8 is faster, or slower, beyond the spread of both.
    """

    batch: int
    int8: float
    fp16: float
    gpu: str
    wins: bool
    loses: bool

    @property
    def factor(self) -> float:
        """How many times as fast as FP16 it is."""
        return self.fp16 / self.int8

    def __str__(self) -> str:
        if self.loses:
            return f"{self.int8 / self.fp16:.2f} times as long as FP16 at batch {self.batch}"
        known = "" if self.wins else ", within the spread"
        return f"{self.factor:.2f} times as fast as FP16 at batch {self.batch}{known}"


@dataclass(frozen=True)
class Verdict:
    """The answer, the sentence for it, and what speaks against shipping."""

    answer: Answer
    sentence: str
    against: tuple[str, ...]


def stages_of(artifacts: Artifacts) -> tuple[Stage, ...]:
    """The accuracies that were measured: float, after calibration, after training, and the engine's own."""
    return tuple(_stages(artifacts))


def _stages(artifacts: Artifacts) -> Iterator[Stage]:
    checkpoint = artifacts.checkpoint
    figures: Mapping[str, Any] = checkpoint.figures if checkpoint else {}
    bits = checkpoint.details.get("bits", BITS) if checkpoint else BITS
    labels = {"float": "float", "ptq": f"INT{bits}, calibrated", "qat": f"INT{bits}, trained"}
    base, images, source = None, None, ""
    for key, label in labels.items():
        if key in figures and "test_top1" in figures[key]:
            found = figures[key]
            yield Stage.of(label, found["test_top1"], found["test_images"], base, found["test_loss"])
            if key == "float" and checkpoint is not None:
                base, images = found["test_top1"], found["test_images"]
                source = f"the test split of {artifacts.data_source}"
    evaluation = artifacts.results.get("evaluation", {})
    top1 = evaluation.get("top1", {}).get("engine")
    if top1 is not None:
        same = (evaluation["images"], evaluation["source"]) == (images, source)
        yield Stage.of("engine", top1, evaluation["images"], base if same else None)


def speeds_of(artifacts: Artifacts) -> tuple[Speed, ...]:
    """INT8 against FP16 at each batch size that was measured, by deploy.benchmark or deploy.build --verify-speed."""
    benchmark = artifacts.results.get("benchmark", {})
    by_batch: dict[int, dict[str, Mapping[str, Any]]] = {}
    for entry in benchmark.get("latency", []):
        by_batch.setdefault(entry["batch"], {})[entry["name"]] = entry
    gpu = (benchmark.get("device") or {}).get("name", "")
    found = [
        _speed_of(batch, of[MODEL], of[FP16], gpu)
        for batch, of in sorted(by_batch.items())
        if MODEL in of and FP16 in of
    ]
    engine = artifacts.engine
    built = engine.details.get("speed") if engine else None
    if engine and built and not found:
        int8, half = built["int8"], built["float16"]
        found.append(_speed_of(int8["batch"], int8, half, engine.details["gpu"] or ""))
    return tuple(found)


def _speed_of(batch: int, int8: Mapping[str, Any], fp16: Mapping[str, Any], gpu: str) -> Speed:
    wins, loses = int8["high"] < fp16["low"], fp16["high"] < int8["low"]
    return Speed(batch, int8["median"], fp16["median"], gpu, wins, loses)


def latencies_of(artifacts: Artifacts) -> list[dict[str, Any]]:
    """All latencies that were measured, each with its factor over FP16 at the same batch size, None where unknown."""
    entries = artifacts.results.get("benchmark", {}).get("latency", [])
    fp16 = {entry["batch"]: entry["median"] for entry in entries if entry["name"] == FP16}
    return [
        {**entry, "factor": fp16[entry["batch"]] / entry["median"] if entry["batch"] in fp16 else None}
        for entry in entries
    ]


def is_fp16(artifacts: Artifacts) -> bool:
    """Whether the engine is FP16, because INT8 was not faster when it was built."""
    speed = artifacts.engine.details.get("speed") if artifacts.engine else None
    return speed is not None and speed["written"] != "int8"


def final_stage(stages: Sequence[Stage]) -> Stage | None:
    """The accuracy of what would be shipped: the engine's own, or else the last quantized one."""
    return stages[-1] if len(stages) > 1 else None


def judge(artifacts: Artifacts, stages: Sequence[Stage], speeds: Sequence[Speed], layers: Sequence[Layer]) -> Verdict:
    """Whether to ship it.

    Against it speak: an accuracy that is below the float network's by more than the intervals of both allow, or a mAP
    or mIoU of which less than 99 % is left; a network that is hardly better than chance; answers that differ between
    PyTorch, ONNX Runtime and the engine; an engine that is not faster than FP16; layers that are declared INT8 and are
    not. Where accuracy or speed is not known, or too few images were tested to tell a loss, neither is the answer.
    """
    against = [
        *_accuracy_against(artifacts, stages),
        *_agreement_against(artifacts),
        *_speed_against(artifacts, speeds),
        *_layers_against(layers),
    ]
    if against:
        return Verdict("do not ship", f"Do not ship it: {against[0]}.", tuple(against))
    accuracy, told = _accuracy(artifacts, stages)
    speed = _speed(artifacts, speeds)
    if artifacts.engine is None:
        return Verdict("not known yet", f"There is no engine yet; {accuracy}.", ())
    if not told or not (speeds or is_fp16(artifacts)):
        return Verdict("not known yet", f"Not known yet: {accuracy}, and {speed}.", ())
    return Verdict("ship", f"Ship it: {accuracy}, and {speed}.", ())


def loss_that_counts(stages: Sequence[Stage]) -> bool:
    """Whether the accuracy is below the float network's by more than the intervals of both allow."""
    final = final_stage(stages)
    if final is None or final.change is None:
        return False
    return -final.change > math.hypot(final.half, stages[0].half)


def _accuracy_against(artifacts: Artifacts, stages: Sequence[Stage]) -> Iterator[str]:
    final = final_stage(stages)
    if final is not None and final.change is not None and loss_that_counts(stages):
        yield (
            f"{final.top1:.2f} % of the test images are right, {-final.change:.2f} points less than in float, which "
            f"chance on {final.images} images does not explain"
        )
    scores = task_scores_of(artifacts)
    if scores is not None and scores.loses:
        yield f"{scores}: less than {100 * KEPT:.0f} % of it is left"
    classes = len(artifacts.checkpoint.class_names) if artifacts.checkpoint else 0
    if stages and is_near_chance(stages[0].top1, classes):
        yield f"the float network itself is hardly better than chance, {stages[0].top1:.2f} % with {classes} classes"


def _agreement_against(artifacts: Artifacts) -> Iterator[str]:
    evaluation = artifacts.evaluation
    for pair, share in evaluation.get("agreement", {}).items():
        if _differ(round((100 - share) * evaluation["images"] / 100), evaluation["images"]):
            yield f"{pair}: the same class on only {share:.2f} % of {evaluation['images']} images"
    parity = artifacts.onnx.figures.get("parity", {}) if artifacts.onnx else {}
    other = parity.get("other_top1")
    if other and _differ(other, parity["images"]):
        yield f"PyTorch and ONNX Runtime give another class on {other} of {parity['images']} images"


def _differ(other: int, images: int) -> bool:
    """Whether so many other answers are more than chance makes of the share that is tolerated."""
    return 100 * interval_of_share(other, images)[0] > 100 - _AGREES


def _speed_against(artifacts: Artifacts, speeds: Sequence[Speed]) -> Iterator[str]:
    if is_fp16(artifacts):
        return
    losing = [speed for speed in speeds if speed.loses]
    if losing:
        yield f"it takes {min(losing, key=lambda speed: speed.factor)}: deploy FP16"
    elif speeds and not any(speed.wins for speed in speeds):
        yield "it is not faster than FP16 beyond the spread: deploy FP16"


def _layers_against(layers: Sequence[Layer]) -> Iterator[str]:
    broken = [layer for layer in layers if layer.state == "broken"]
    if broken:
        count = "1 layer is" if len(broken) == 1 else f"{len(broken)} layers are"
        where = f"in the engine, first {broken[0].label}"
        yield f"{count} declared {INT8.name} and not {INT8.name} {where}"


def _accuracy(artifacts: Artifacts, stages: Sequence[Stage]) -> tuple[str, bool]:
    """What is known of the accuracy, and whether that suffices."""
    final = final_stage(stages)
    if final is not None:
        right = f"{final.top1:.2f} % of {final.images} test images are right"
        if final.change is None:
            return f"{right} by the engine, on other images than the float network's", False
        half = math.hypot(final.half, stages[0].half)
        if half > _TELLS:
            return f"{right}, and so few cannot tell a loss of less than {half:.0f} points", False
        compared = "as the float network" if abs(final.change) < 0.005 else f"against {stages[0].top1:.2f} % in float"
        return f"{right}, {compared} (each figure is known to {final.half:.1f} points)", True
    scores = task_scores_of(artifacts)
    if scores is not None:
        return str(scores), scores.in_float is not None and scores.in_float > 0
    agreement = artifacts.checkpoint.figures.get("agreement") if artifacts.checkpoint else None
    if agreement and agreement["top1"] is None:
        return f"{outputs_against_float(agreement)}; no accuracy was measured", False
    if agreement:
        kept = f"{agreement['top1']:.2f} % of {agreement['images']} images keep the float network's class"
        return f"{kept}; no accuracy was measured", False
    return "no accuracy was measured", False


def _speed(artifacts: Artifacts, speeds: Sequence[Speed]) -> str:
    if is_fp16(artifacts):
        return "this engine is FP16, because INT8 was not faster"
    if speeds:
        return f"it is {', '.join(map(str, speeds))} on {speeds[0].gpu}"
    return "its speed was not measured, which needs the GPU that it is for"
