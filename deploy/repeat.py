"""Builds one network several times and keeps the fastest engine (``--repeat``).

The builder chooses kernels by timing them. If two are about equally fast, it may choose another one each time: on an
H200 two builds of one network differ by 1 to 3 %.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.builder import BuiltEngine, Repetition, build

if TYPE_CHECKING:
    from deploy.calibrator import Calibration
    from deploy.dynamic_ranges import RangeTable
    from deploy.settings import BuildSettings
    from deploy.trt import Toolkit


def build_fastest(
    toolkit: Toolkit,
    model: Path,
    settings: BuildSettings,
    repeat: int,
    ranges: RangeTable | None = None,
    calibration: Calibration | None = None,
) -> BuiltEngine:
    """Builds ``repeat`` times and times all kernels again each time. Needs the GPU that the engines are built for.

    Returns the engine that is fastest at the OPT batch of its first profile. Raises UserError as ``build`` does.
    """
    from deploy.measure import latencies
    from deploy.runtime import Engine

    candidates = [build(toolkit, model, settings, ranges=ranges, calibration=calibration)]
    while len(candidates) < repeat:
        candidates.append(
            build(
                toolkit,
                model,
                settings,
                float_weights=candidates[0].float_weights,
                ranges=ranges,
                calibration=calibration,
            )
        )
    with ExitStack() as stack:
        engines = {
            str(index): stack.enter_context(Engine.from_plan(built.plan, toolkit, settings))
            for index, built in enumerate(candidates)
        }
        batch = engines["0"].profiles[0].opt
        medians = [latency.median for latency in latencies(engines, batch).values()]
    fastest = candidates[medians.index(min(medians))]
    return dataclasses.replace(fastest, repetition=Repetition(batch, tuple(medians)))
