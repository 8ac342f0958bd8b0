"""Whether to ship it, in one sentence, and what that rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deploy.candidates import FP16, MODEL
from deploy.report_page.artifacts import Artifacts
from deploy.report_page.layers import Layer
from qat.base.interval import interval_of_share
from qat.base.number_format import BITS, INT8

Answer = Literal["ship", "do not ship", "not known yet"]


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


@dataclass(frozen=True)
class Speed:
    """Latency at one batch size in milliseconds, INT8 against FP16, and the lows and highs of both."""

    batch: int
    int8: float
    fp16: float
    gpu: str
    is_faster: bool
    """Whether INT8 is faster beyond the spread."""

    @property
    def factor(self) -> float:
        """How many times as fast as FP16 it is."""
        return self.fp16 / self.int8


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
    figures = artifacts.checkpoint.figures if artifacts.checkpoint else {}
    bits = artifacts.checkpoint.details.get("bits", BITS) if artifacts.checkpoint else BITS
    labels = {"float": "float", "ptq": f"INT{bits}, calibrated", "qat": f"INT{bits}, trained"}
    base = None
    for key, label in labels.items():
        if key in figures and "test_top1" in figures[key]:
            found = figures[key]
            yield Stage.of(label, found["test_top1"], found["test_images"], base, found["test_loss"])
            base = found["test_top1"] if key == "float" else base
    evaluation: Mapping[str, Any] = artifacts.results.get("evaluation", {})
    top1 = evaluation.get("top1", {}).get("engine")
    if top1 is not None:
        yield Stage.of("engine", top1, evaluation["images"], base if evaluation["images"] == _images(figures) else None)


def _images(figures: Mapping[str, Any]) -> int | None:
    return figures["float"].get("test_images") if "float" in figures else None


def speeds_of(artifacts: Artifacts) -> tuple[Speed, ...]:
    """INT8 against FP16 at each batch size that was measured, by deploy.benchmark or deploy.build --verify-speed."""
    benchmark = artifacts.results.get("benchmark", {})
    by_batch: dict[int, dict[str, Mapping[str, Any]]] = {}
    for entry in benchmark.get("latency", []):
        by_batch.setdefault(entry["batch"], {})[entry["name"]] = entry
    gpu = (benchmark.get("device") or {}).get("name", "")
    found = [
        Speed(batch, of[MODEL]["median"], of[FP16]["median"], gpu, of[MODEL]["high"] < of[FP16]["low"])
        for batch, of in sorted(by_batch.items())
        if MODEL in of and FP16 in of
    ]
    engine = artifacts.engine
    built = engine.details.get("speed") if engine else None
    if engine and built and not found:
        int8, half = built["int8"], built["float16"]
        gpu = engine.details["gpu"] or ""
        found.append(Speed(int8["batch"], int8["median"], half["median"], gpu, built["int8_wins"]))
    return tuple(found)


def latencies_of(artifacts: Artifacts) -> list[dict[str, Any]]:
    """All latencies that were measured, each with its factor over FP16 at the same batch size, None where unknown."""
    entries = artifacts.results.get("benchmark", {}).get("latency", [])
    fp16 = {entry["batch"]: entry["median"] for entry in entries if entry["name"] == FP16}
    return [
        {**entry, "factor": fp16[entry["batch"]] / entry["median"] if entry["batch"] in fp16 else None}
        for entry in entries
    ]


def judge(artifacts: Artifacts, stages: Sequence[Stage], speeds: Sequence[Speed], layers: Sequence[Layer]) -> Verdict:
    """Whether to ship it.

    Against it speak: an accuracy that is below the float network's by more than its interval; an engine that is not
    faster than FP16; layers that are declared INT8 and are not. Where accuracy or speed is not known, neither is the
    answer.
    """
    against = [*_accuracy_against(stages), *_speed_against(speeds), *_layers_against(layers)]
    accuracy, speed = _accuracy(artifacts, stages), _speed(artifacts, speeds)
    if against:
        return Verdict("do not ship", f"Do not ship it: {against[0]}.", tuple(against))
    unknown = [what for what, known in (("accuracy", len(stages) > 1), ("speed", bool(speeds))) if not known]
    if artifacts.engine is None:
        return Verdict("not known yet", f"There is no engine yet; {accuracy}.", ())
    if unknown:
        return Verdict("not known yet", f"Not known yet: {accuracy}, and {speed}.", ())
    return Verdict("ship", f"Ship it: {accuracy}, and {speed}.", ())


def _final(stages: Sequence[Stage]) -> Stage | None:
    """The accuracy of what would be shipped: the last quantized one that is comparable with the float network's."""
    return next((stage for stage in reversed(stages) if stage.change is not None), None)


def _accuracy_against(stages: Sequence[Stage]) -> Iterator[str]:
    final = _final(stages)
    if final is not None and final.change is not None and final.top1 - final.change > final.high:
        yield (
            f"{final.top1:.2f} % of the test images are right, {-final.change:.2f} points less than in float, which "
            f"chance on {final.images} images does not explain"
        )


def _speed_against(speeds: Sequence[Speed]) -> Iterator[str]:
    slow = [speed for speed in speeds if not speed.is_faster]
    if slow:
        worst = min(slow, key=lambda speed: speed.factor)
        yield f"it takes {1 / worst.factor:.2f} times as long as FP16 at batch {worst.batch}: deploy FP16"


def _layers_against(layers: Sequence[Layer]) -> Iterator[str]:
    broken = [layer for layer in layers if layer.state == "broken"]
    if broken:
        count = "1 layer is" if len(broken) == 1 else f"{len(broken)} layers are"
        where = f"in the engine, first {broken[0].label}"
        yield f"{count} declared {INT8.name} and not {INT8.name} {where}"


def _accuracy(artifacts: Artifacts, stages: Sequence[Stage]) -> str:
    final = _final(stages)
    if final is not None and final.change is not None:
        base, half = final.top1 - final.change, (final.high - final.low) / 2
        compared = "as the float network" if abs(final.change) < 0.005 else f"against {base:.2f} % in float"
        return (
            f"{final.top1:.2f} % of {final.images} test images are right, {compared} (one such figure is known to "
            f"{half:.1f} points)"
        )
    agreement = artifacts.checkpoint.figures.get("agreement") if artifacts.checkpoint else None
    if agreement:
        kept = f"{agreement['top1']:.2f} % of {agreement['images']} images keep the float network's class"
        return f"{kept}; no accuracy was measured"
    return "no accuracy was measured"


def _speed(artifacts: Artifacts, speeds: Sequence[Speed]) -> str:
    if speeds:
        best = max(speeds, key=lambda speed: speed.batch)
        return f"it is {best.factor:.2f} times as fast as FP16 at batch {best.batch} on {best.gpu}"
    return "its speed was not measured, which needs the GPU that it is for"
