"""Statistics of measurements and the verdict; the measurements themselves are tests/gpu's."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import numpy as np
import pytest

from deploy.comparison import verdict
from deploy.measure import BLOCK, Latency, latencies


def latency(median: float, spread: float = 0.01, batch: int = 32) -> Latency:
    return Latency(batch, 200, median, median - spread, median + spread, median + 2 * spread)


def test_percentiles_of_single_measurements():
    found = Latency.from_milliseconds(
        32, [float(value) for value in np.random.default_rng(0).permutation(np.arange(1001.0))]
    )
    assert (found.runs, found.median, found.low, found.high, found.p99) == (1001, 500, 50, 950, 990)
    assert found.images_per_second == pytest.approx(64)
    assert found.to_json()["images_per_second"] == 64


def test_int8_wins_only_beyond_the_spread():
    assert verdict(latency(0.7), latency(1.4)) == "batch 32: INT8 wins, 2.00 times as fast as FP16"
    assert "no difference beyond the spread" in verdict(latency(0.99), latency(1.0))
    assert "INT8 loses, it takes 1.50 times as long as FP16: deploy FP16" in verdict(latency(1.5), latency(1.0))
    assert not latency(0.99).beats(latency(1.0))
    assert latency(0.97).beats(latency(1.0))
    assert not latency(1.0).beats(latency(1.0))


def test_every_engine_is_measured_after_every_other_one(monkeypatch):
    """An engine that follows one that takes much power is slower, so the same must not always precede it."""
    launched: list[str] = []

    class Event:
        def __init__(self, timed):
            assert timed

        def record(self, stream):
            pass

        def milliseconds_since(self, start):
            return 1.0

        def close(self):
            pass

    class Fake:
        """Engine, executor and bound context in one."""

        stream, uses_graph = None, True

        def __init__(self, name):
            self.name = name

        @contextmanager
        def all_executors(self):
            yield [self]

        def bind(self, batch):
            return self

        def launch(self):
            launched.append(self.name)

        def synchronize(self):
            pass

    monkeypatch.setattr("deploy.cuda.Event", Event)
    monkeypatch.setattr("deploy.measure.SECONDS_BEFORE", 0)
    monkeypatch.setattr("deploy.measure.SECONDS_BEFORE_BLOCK", 0)
    found = latencies({name: Fake(name) for name in "abc"}, 4, runs=10 * BLOCK)
    assert {name: one.runs for name, one in found.items()} == dict.fromkeys("abc", 10 * BLOCK)
    turns = [name for name, _ in itertools.groupby(launched)]
    assert set(itertools.pairwise(turns)) == set(itertools.permutations("abc", 2))
