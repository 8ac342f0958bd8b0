"""Where an engine goes wrong: its tensors against ONNX Runtime's, all of them or by a binary search for the first.

The tensors inside an engine cannot be read, because layers are fused. So the engine is built again with tensors as
outputs, which are compared on a few images. Many outputs change how layers fuse, so the search adds one at a time: if a
tensor is wrong, all tensors after it are wrong too, and a network with 56 quantized tensors takes 6 builds.
"""

from __future__ import annotations

import dataclasses
import math
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
    """How far a tensor is from ONNX Runtime's: its name, the node that makes it, its signal-to-noise ratio in dB.

    ``sqnr_db`` is None if both are equal.
    """

    tensor: str
    node: str
    sqnr_db: float | None


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
    engines = _OpenedEngines(toolkit, model, reference, inputs, settings)

    def measure(name: str) -> float | None:
        found = engines.measure([name])[name]
        report(name, found)
        return found

    found = first_difference(engines.names, measure, least_db)
    return Difference(found[0], engines.makers[found[0]], found[1]) if found else None


def every_difference(
    toolkit: Toolkit, model: Path, reference: Path, inputs: np.ndarray, settings: BuildSettings
) -> tuple[Difference, ...]:
    """How far each tensor is from ONNX Runtime's, in order, from one engine that has all of them as outputs.

    An error is passed on: a tensor has those of all layers before it. See ``bisect`` for the arguments and errors.
    """
    engines = _OpenedEngines(toolkit, model, reference, inputs, settings)
    found = engines.measure(engines.names)
    return tuple(Difference(name, engines.makers[name], found[name]) for name in engines.names)


class _OpenedEngines:
    """Builds engines with some of ``names`` as outputs; ``makers`` are the nodes that make those."""

    def __init__(
        self, toolkit: Toolkit, model: Path, reference: Path, inputs: np.ndarray, settings: BuildSettings
    ) -> None:
        from export.session import run, session_with_tensors

        self.makers, self._outputs = tensors_to_compare(toolkit, model, settings)
        self._expected = run(session_with_tensors(reference, self.makers), inputs)
        self.names = [name for name in self.makers if name in self._expected]
        fixed = Profile(len(inputs), len(inputs), len(inputs))
        # An engine without weights cannot compute.
        self._settings = dataclasses.replace(settings, profiles=(fixed,), strip_weights=False)
        self._toolkit, self._model, self._inputs = toolkit, model, inputs
        self._timings = b"" if toolkit.times_kernels else None
        self._float_weights = False

    def measure(self, names: Sequence[str]) -> dict[str, float | None]:
        """The signal-to-noise ratio of each of ``names``, in dB, None for equal, from one engine."""
        from deploy.builder import build
        from deploy.runtime import Engine
        from export.session import sqnr_db

        extra = tuple(name for name in names if name not in self._outputs)
        built = build(
            self._toolkit, self._model, self._settings, self._timings, extra, float_weights=self._float_weights
        )
        self._float_weights = built.float_weights
        self._timings = built.timing_cache_content if self._toolkit.times_kernels else None
        with Engine.from_plan(built.plan, self._toolkit, self._settings) as engine:
            answer = engine(self._inputs)
        tensors = answer if isinstance(answer, dict) else dict.fromkeys(names, answer)
        found = {name: sqnr_db(self._expected[name], tensors[name].astype(np.float32)) for name in names}
        # What overflowed in the engine is as wrong as can be.
        return {name: -math.inf if ratio is not None and math.isnan(ratio) else ratio for name, ratio in found.items()}


def tensors_to_compare(toolkit: Toolkit, model: Path, settings: BuildSettings) -> tuple[dict[str, str], list[str]]:
    """The inputs of quantizations and the network's outputs, in order, with the node that makes each of them.

    Also returns the names of the outputs.
    """
    from deploy.builder import open_network

    with open_network(toolkit, model, settings) as network:
        read = [layer.get_input(0).name for layer in network.layers if layer.type.name == "QUANTIZE"]
        makers = {name: network.makers[name] for name in (*read, *network.outputs) if name in network.makers}
        return {name: maker.name for name, maker in makers.items() if maker.type.name != "CONSTANT"}, network.outputs
