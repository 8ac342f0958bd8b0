"""Where an engine leaves the path: the first tensor that differs from ONNX Runtime's.

An engine hides what is inside: layers are fused, tensors never exist. So it is built again with one tensor more as an
output, which is compared on a few images. Once something is wrong everything behind it is wrong too, which makes a
binary search possible: a network with 56 quantized tensors takes 6 builds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploy.settings import BuildSettings, Profile

if TYPE_CHECKING:
    from deploy.trt import Toolkit


@dataclass(frozen=True)
class Difference:
    """The first tensor that differs: its name, the node that makes it, and signal to noise in dB of it."""

    tensor: str
    node: str
    sqnr_db: float


def first_difference(
    names: Sequence[str], sqnr_db: Callable[[str], float | None], least_db: float
) -> tuple[str, float] | None:
    """The first of ``names``, in the network's order, whose ``sqnr_db`` is below ``least_db``.

    ``sqnr_db`` is asked for few of them: behind a tensor that differs all others are taken to differ. None is equality.
    Returns the name and its value, or None when the last one does not differ.
    """
    known: dict[int, float] = {}

    def differs(index: int) -> bool:
        found = sqnr_db(names[index])
        if found is not None and found < least_db:
            known[index] = found
            return True
        return False

    if not names or not differs(len(names) - 1):
        return None
    low, high = 0, len(names) - 1  # the first that differs is in low..high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if differs(middle) else (middle + 1, high)
    return names[high], known[high]


def bisect(
    toolkit: Toolkit,
    model: Path,
    reference: Path,
    inputs: np.ndarray,
    settings: BuildSettings,
    least_db: float,
    report: Callable[[str, float | None], None],
) -> Difference | None:
    """The first tensor in which an engine of ``model`` differs from ``reference`` in ONNX Runtime.

    Args:
        toolkit: builds and runs the engine.
        model: the ONNX file that the engine is built from.
        reference: the ONNX file that is the truth; usually the same.
        inputs: a few images as the network takes them.
        settings: how the engine was built.
        least_db: what agrees at least so well does not differ.
        report: is told each tensor and its signal to noise ratio.
    """
    from deploy.builder import build
    from deploy.runtime import Engine
    from export.session import run, session_with_tensors, sqnr_db

    makers, outputs = telling_tensors(toolkit, model, settings)
    expected = run(session_with_tensors(reference, makers), inputs)
    names = [name for name in makers if name in expected]
    fixed = Profile(len(inputs), len(inputs), len(inputs))
    # An engine without weights computes nothing.
    settings = dataclasses.replace(settings, profiles=(fixed,), strip_weights=False)
    timings = b"" if toolkit.times_kernels else None
    float_weights = False

    def measure(name: str) -> float | None:
        nonlocal timings, float_weights
        extra = (name,) if name not in outputs else ()
        built = build(toolkit, model, settings, timings, extra, float_weights=float_weights)
        float_weights = built.float_weights
        timings = built.timing_cache_content if toolkit.times_kernels else None
        with Engine.from_plan(built.plan, toolkit, settings) as engine:
            answer = engine(inputs)
        tensor = answer[name] if isinstance(answer, dict) else answer
        found = sqnr_db(expected[name], tensor.astype(np.float32))
        report(name, found)
        return found

    found = first_difference(names, measure, least_db)
    return Difference(found[0], makers[found[0]], found[1]) if found else None


def telling_tensors(toolkit: Toolkit, model: Path, settings: BuildSettings) -> tuple[dict[str, str], list[str]]:
    """Tensors that are about to be quantized and the network's outputs, in order, with the node that makes each.

    Also returns the names of the outputs.
    """
    from deploy.builder import parsed

    with parsed(toolkit, model, settings) as graph:
        read = [layer.get_input(0).name for layer in graph.layers if layer.type.name == "QUANTIZE"]
        makers = {name: graph.makers[name] for name in (*read, *graph.outputs) if name in graph.makers}
        return {name: maker.name for name, maker in makers.items() if maker.type.name != "CONSTANT"}, graph.outputs
