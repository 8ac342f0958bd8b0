"""How fast engines are: latency, throughput, and host to host.

Latency is measured on the GPU, by CUDA events around one launch of a CUDA graph. Engines that are compared take turns
in short blocks, so that a drifting clock or a neighbour on the machine meets all of them alike. What ran before lowers
the clock by the power that it took, so each round has another order, and each block begins with launches that do not
count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deploy import cuda
from deploy.executor import BoundContext
from deploy.layers import EngineLayer, layers_from_inspector
from deploy.runtime import Engine

BLOCK = 20
WARM_UP = 5
SECONDS_BEFORE = 0.3
"""How long each engine runs before anything counts: the GPU leaves its idle clocks."""
SECONDS_BEFORE_BLOCK = 0.02
"""How long it runs before each block: the clocks leave what the engine before it made of them."""


@dataclass(frozen=True)
class Latency:
    """Time of one inference in milliseconds. ``low`` and ``high`` are the 5th and 95th percentile: the spread."""

    batch: int
    runs: int
    median: float
    low: float
    high: float
    p99: float
    graph: bool = True
    """Whether a CUDA graph was launched; some networks cannot be captured."""

    @classmethod
    def from_milliseconds(cls, batch: int, milliseconds: Sequence[float], graph: bool = True) -> Latency:
        """From single measurements."""
        low, median, high, p99 = np.percentile(milliseconds, (5, 50, 95, 99))
        return cls(batch, len(milliseconds), float(median), float(low), float(high), float(p99), graph)

    @property
    def images_per_second(self) -> float:
        """At the median."""
        return 1000 * self.batch / self.median

    def beats(self, other: Latency) -> bool:
        """Whether this one is faster beyond the spread: its slow runs are faster than the other's fast ones."""
        return self.high < other.low

    def to_json(self) -> dict[str, Any]:
        """For a file of results."""
        return {key: value if isinstance(value, bool) else round(value, 5) for key, value in asdict(self).items()} | {
            "images_per_second": round(self.images_per_second, 1)
        }


def latencies(engines: Mapping[str, Engine], batch: int, runs: int = 200) -> dict[str, Latency]:
    """Latency of several engines at one batch size, taken in turns. The engines must not be in use meanwhile."""
    with ExitStack() as stack:
        bounds = {
            name: (stack.enter_context(engine.all_executors())[0].bind(batch)) for name, engine in engines.items()
        }
        events = [cuda.Event(timed=True) for _ in range(2 * BLOCK)]
        for event in events:
            stack.callback(event.close)
        for bound in bounds.values():
            _warm_up(bound, SECONDS_BEFORE)
        found: dict[str, list[float]] = {name: [] for name in engines}
        orders = np.random.default_rng(0)
        while min(map(len, found.values())) < runs:
            for name in orders.permutation(list(bounds)):
                _warm_up(bounds[name], SECONDS_BEFORE_BLOCK)
                found[name] += _block(bounds[name], events)
        graphs = {name: bound.uses_graph for name, bound in bounds.items()}
    return {name: Latency.from_milliseconds(batch, milliseconds, graphs[name]) for name, milliseconds in found.items()}


def layer_times(engine: Engine, batch: int, runs: int) -> list[tuple[EngineLayer, float]]:
    """The engine's layers at one batch size, each with its mean milliseconds over ``runs`` by TensorRT's profiler."""
    profile = engine.profile_for(batch)
    layers = [one for one in layers_from_inspector(engine.toolkit.inspect(engine.plan)) if one.profile == profile]
    with engine.all_executors() as executors:
        times = executors[0].bind(batch).layer_milliseconds(runs)
    return [(layer, times.get(layer.name, 0.0)) for layer in layers]


def throughput(engine: Engine, batch: int, seconds: float = 1.0) -> float:
    """Images a second, engine only, with all of the engine's executors at work at the same time."""
    with engine.all_executors() as executors:
        bounds = [executor.bind(batch) for executor in executors]
        for bound in bounds:
            _warm_up(bound, SECONDS_BEFORE)
        start = time.perf_counter()
        rounds = 0
        while time.perf_counter() - start < seconds:
            for _ in range(BLOCK):
                for bound in bounds:
                    bound.launch()
            rounds += BLOCK
            executors[0].stream.synchronize()  # keeps the queue short; the others go on meanwhile
        for executor in executors:
            executor.stream.synchronize()
        return rounds * len(bounds) * batch / (time.perf_counter() - start)


def host_to_host(engine: Engine, batch: int, *, pinned: bool = True, seconds: float = 1.0) -> float:
    """Images a second from host memory to host memory through ``Engine.map``, on random images.

    ``pinned``: whether the images lie in pinned memory, from where the GPU copies by itself.
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
    arrays = engine.pinned(batch)
    named = arrays if isinstance(arrays, dict) else {engine.inputs[0].name: arrays}
    for name, array in named.items():
        values = generator.integers(0, 256, array.shape) if array.dtype.kind in "iu" else generator.random(array.shape)
        array[...] = values.astype(array.dtype)
        if not pinned:
            named[name] = array.copy()
    return named


def _warm_up(bound: BoundContext, seconds: float) -> None:
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(WARM_UP):
            bound.launch()
        bound.synchronize()


def _block(bound: BoundContext, events: Sequence[cuda.Event]) -> list[float]:
    """Milliseconds of each of BLOCK launches."""
    for _ in range(WARM_UP):
        bound.launch()
    pairs = list(zip(events[::2], events[1::2], strict=True))
    for start, end in pairs:
        start.record(bound.stream)
        bound.launch()
        end.record(bound.stream)
    bound.synchronize()
    return [end.milliseconds_since(start) for start, end in pairs]
