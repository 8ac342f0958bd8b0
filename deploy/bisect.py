"""Where an engine goes wrong: a binary search for the first tensor that differs from ONNX Runtime's.

The tensors inside an engine cannot be read, because layers are fused. So the engine is built again with one more tensor
as an output, which is compared on a few images. If a tensor is wrong, all tensors after it are wrong too, so a binary
search finds the first one: a network with 56 quantized tensors takes 6 builds.
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
    """The first tensor that differs: its name, the node that makes it, and its signal-to-noise ratio in dB."""

    tensor: str
    node: str
    sqnr_db: float


def first_difference(
    names: Sequence[str], sqnr_db: Callable[[str], float | None], least_db: float
) -> tuple[str, float] | None:
    """The first tensor whose signal-to-noise ratio is below ``least_db``.

    Args:
        names: the tensors in the network's order. If one differs, all after it are assumed to differ.
        sqnr_db: measures a tensor, in dB; None means that it is equal. It is called for only a few tensors.
        least_db: a tensor with less differs.

    Returns the name and its ratio, or None if the last tensor does not differ.
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
    low, high = 0, len(names) - 1  # the first one that differs is in low..high
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
        reference: the ONNX file with the right answers; usually the same.
        inputs: a few images [N, ...] as the network takes them.
        settings: how the engine was built.
        least_db: a tensor differs if its signal-to-noise ratio is below this.
        report: is called with each measured tensor and its ratio in dB, or None if it is equal.

    Raises UserError when the engine cannot be built or run.
    """
    from deploy.builder import build
    from deploy.runtime import Engine
    from export.session import run, session_with_tensors, sqnr_db

    makers, outputs = tensors_to_compare(toolkit, model, settings)
    expected = run(session_with_tensors(reference, makers), inputs)
    names = [name for name in makers if name in expected]
    fixed = Profile(len(inputs), len(inputs), len(inputs))
    # An engine without weights cannot compute.
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


def tensors_to_compare(toolkit: Toolkit, model: Path, settings: BuildSettings) -> tuple[dict[str, str], list[str]]:
    """The inputs of quantizations and the network's outputs, in order, with the node that makes each of them.

    Also returns the names of the outputs.
    """
    from deploy.builder import open_network

    with open_network(toolkit, model, settings) as network:
        read = [layer.get_input(0).name for layer in network.layers if layer.type.name == "QUANTIZE"]
        makers = {name: network.makers[name] for name in (*read, *network.outputs) if name in network.makers}
        return {name: maker.name for name, maker in makers.items() if maker.type.name != "CONSTANT"}, network.outputs
