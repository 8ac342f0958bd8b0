"""How fast engines are: latency, throughput, and throughput from host to host.

Latency is measured on the GPU, by CUDA events around one launch of a CUDA graph. Compared engines take turns in short
blocks, so that a changing clock or another program on the machine affects all of them equally. An engine that takes
much power lowers the clock for the next one. Therefore each round has another order, and each block begins with
launches that are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy import cuda
from deploy.engine_layers import EngineLayer, layers_from_inspector
from deploy.executor import BoundContext
from deploy.runtime import Engine

if TYPE_CHECKING:
    from deploy.builder import BuiltEngine
    from deploy.trt import Toolkit

BLOCK = 20
WARM_UP = 5
SECONDS_BEFORE = 0.3
"""How long each engine runs before anything is measured, so that the GPU leaves its idle clocks."""
SECONDS_BEFORE_BLOCK = 0.02
"""How long it runs before each block, so that the clocks adapt to it."""


@dataclass(frozen=True)
class Latency:
    """Time of one inference in milliseconds. The spread is ``low`` to ``high``, the 5th and the 95th percentile."""

    batch: int
    runs: int
    median: float
    low: float
    high: float
    p99: float
    graph: bool = True
    """Whether a CUDA graph was launched. Some networks cannot be captured."""

    @classmethod
    def from_milliseconds(cls, batch: int, milliseconds: Sequence[float], graph: bool = True) -> Latency:
        """From the measured milliseconds of each run."""
        low, median, high, p99 = np.percentile(milliseconds, (5, 50, 95, 99))
        return cls(batch, len(milliseconds), float(median), float(low), float(high), float(p99), graph)

    @property
    def images_per_second(self) -> float:
        """Images a second at the median latency."""
        return 1000 * self.batch / self.median

    def beats(self, other: Latency) -> bool:
        """Whether it is faster beyond the spread: its slow runs are faster than the other's fast runs."""
        return self.high < other.low

    def to_json(self) -> dict[str, Any]:
        """As the file of results has it."""
        return {key: value if isinstance(value, bool) else round(value, 5) for key, value in asdict(self).items()} | {
            "images_per_second": round(self.images_per_second, 1)
        }


def latencies(engines: Mapping[str, Engine], batch: int, runs: int = 200) -> dict[str, Latency]:
    """Latency of several engines, which take turns. They must not be used elsewhere meanwhile.

    Args:
        engines: the engines by name.
        batch: the batch size.
        runs: each engine has at least this many timed inferences.
    """
    with ExitStack() as stack:
        contexts = {
            name: stack.enter_context(engine.all_executors())[0].bind(batch) for name, engine in engines.items()
        }
        events = [cuda.Event(timed=True) for _ in range(2 * BLOCK)]
        for event in events:
            stack.callback(event.close)
        for context in contexts.values():
            _warm_up(context, SECONDS_BEFORE)
        found: dict[str, list[float]] = {name: [] for name in engines}
        orders = np.random.default_rng(0)
        while min(map(len, found.values())) < runs:
            for name in orders.permutation(list(contexts)):
                _warm_up(contexts[name], SECONDS_BEFORE_BLOCK)
                found[name] += _block(contexts[name], events)
        graphs = {name: context.uses_graph for name, context in contexts.items()}
    return {name: Latency.from_milliseconds(batch, milliseconds, graphs[name]) for name, milliseconds in found.items()}


def latencies_of_built(
    toolkit: Toolkit, built: Mapping[str, BuiltEngine], batch: int, runs: int = 200
) -> dict[str, Latency]:
    """``latencies`` of engines in memory, which are loaded meanwhile. Needs the GPU that they were built for."""
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(Engine.from_plan(one.plan, toolkit, contexts=1)) for name, one in built.items()
        }
        return latencies(engines, batch, runs)


def layer_times(engine: Engine, batch: int, runs: int) -> list[tuple[EngineLayer, float]]:
    """The layers of an engine and their mean milliseconds over ``runs`` inferences, from TensorRT's profiler."""
    profile = engine.loaded.profile_for(batch)
    layers = [
        one
        for one in layers_from_inspector(engine.toolkit.inspect(engine.loaded.cuda_engine))
        if one.profile == profile
    ]
    with engine.all_executors() as executors:
        times = executors[0].bind(batch).layer_milliseconds(runs)
    return [(layer, times.get(layer.name, 0.0)) for layer in layers]


def throughput(engine: Engine, batch: int, seconds: float = 1.0) -> float:
    """Images a second without copies, with all executors of the engine at work at the same time."""
    with engine.all_executors() as executors:
        contexts = [executor.bind(batch) for executor in executors]
        for context in contexts:
            _warm_up(context, SECONDS_BEFORE)
        start = time.perf_counter()
        rounds = 0
        while time.perf_counter() - start < seconds:
            for _ in range(BLOCK):
                for context in contexts:
                    context.launch()
            rounds += BLOCK
            executors[0].stream.synchronize()  # keeps the queue short; the other executors continue meanwhile
        for executor in executors:
            executor.stream.synchronize()
        return rounds * len(contexts) * batch / (time.perf_counter() - start)


def host_to_host(engine: Engine, batch: int, *, pinned: bool = True, seconds: float = 1.0) -> float:
    """Images a second from host memory to host memory through ``Engine.map``, on random images.

    ``pinned``: whether the images are in pinned memory, which the GPU copies without the CPU.
    """
    given = [_random_input(engine, batch, pinned, seed) for seed in range(2 * engine.contexts)]
    for _ in engine.map(given):
        pass
    start = time.perf_counter()
    images = 0

    def batches() -> Any:
        while time.perf_counter() - start < seconds:
            yield from given

    for _ in engine.map(batches()):
        images += batch
    return images / (time.perf_counter() - start)


def _random_input(engine: Engine, batch: int, pinned: bool, seed: int) -> Any:
    generator = np.random.default_rng(seed)
    arrays = engine.pinned_input(batch)
    named = arrays if isinstance(arrays, dict) else {engine.inputs[0].name: arrays}
    for name, array in named.items():
        values = generator.integers(0, 256, array.shape) if array.dtype.kind in "iu" else generator.random(array.shape)
        array[...] = values.astype(array.dtype)
        if not pinned:
            named[name] = array.copy()
    return named


def _warm_up(context: BoundContext, seconds: float) -> None:
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(WARM_UP):
            context.launch()
        context.synchronize()


def _block(context: BoundContext, events: Sequence[cuda.Event]) -> list[float]:
    """Milliseconds of each of ``BLOCK`` launches."""
    for _ in range(WARM_UP):
        context.launch()
    pairs = list(zip(events[::2], events[1::2], strict=True))
    for start, end in pairs:
        start.record(context.stream)
        context.launch()
        end.record(context.stream)
    context.synchronize()
    return [end.milliseconds_since(start) for start, end in pairs]
