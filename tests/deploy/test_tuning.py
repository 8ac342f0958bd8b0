"""The search for layers to leave in float, with a bench that computes times instead of measuring them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest

from deploy.measure import Latency
from deploy.tuning import Kept, search
from qat.graph.network import ConstantWeight, Network, Op

LAYERS = "abcdef"
NOISE = 0.001


def chain() -> Network:
    ops = {"x": Op("x", "input", (), "x")}
    before = "x"
    for name in LAYERS:
        weight = ConstantWeight(f"{name}.w", 32, 32, 1, (3, 3))
        ops[name] = Op(name, "convolution", (before,), name, weight, (1, 32, 125, 250))  # a million values
        before = name
    return Network(ops)


class FakeBench:
    """A chain: each layer has a time in INT8 and one in float, and each change of type costs ``conversion``."""

    def __init__(self, int8: Mapping[str, float], floats: Mapping[str, float], conversion: float) -> None:
        self.int8, self.floats, self.conversion = int8, floats, conversion
        self.refused: set[Kept] = set()
        self.compared: list[Kept] = []

    def time(self, kept: Kept) -> float:
        changes = sum((a in kept) != (b in kept) for a, b in itertools.pairwise(LAYERS))
        return sum((self.floats if name in kept else self.int8)[name] for name in LAYERS) + changes * self.conversion

    def losses(self, kept: Kept) -> Mapping[str, float]:
        return {name: self.int8[name] - self.floats[name] for name in LAYERS if name not in kept}

    def compare(self, best: Kept, other: Kept) -> tuple[Latency, Latency] | None:
        self.compared.append(other)
        if other in self.refused:
            return None
        first, second = (
            Latency(32, 200, ms, ms - NOISE, ms + NOISE, ms + NOISE) for ms in map(self.time, (best, other))
        )
        return first, second

    @property
    def best(self) -> float:
        """The least time of all placements."""
        sets = (frozenset(chosen) for n in range(len(LAYERS) + 1) for chosen in itertools.combinations(LAYERS, n))
        return min(map(self.time, sets))


def bench(int8: str, floats: str, conversion: float = 0.0) -> FakeBench:
    return FakeBench(*(dict(zip(LAYERS, map(float, one.split()), strict=True)) for one in (int8, floats)), conversion)


def test_single_layers_that_lose_are_left_in_float() -> None:
    one = bench("1 9 1 1 9 1", "2 1 2 2 1 2", conversion=0.5)
    found = search(chain(), one, 10)
    assert (found.kept, found.complete) == ({"b", "e"}, True)
    assert one.time(found.kept) == one.best
    assert all(trial.milliseconds is not None for trial in found.trials)


def test_a_layer_that_loses_less_than_its_conversions_stays_int8() -> None:
    one = bench("1 2 1 1 1 1", "2 1.5 2 2 2 2", conversion=0.5)
    found = search(chain(), one, 10)
    assert found.kept == frozenset()
    assert not any(trial.kept for trial in found.trials)
    assert found.trials


def test_the_price_of_conversions_is_found_by_trying() -> None:
    # c alone gains 1 and costs 2 conversions; with d and e, up to the end, it costs one.
    one = bench("1 1 2 1 1 1", "9 9 1 0.9 1.05 1.05", conversion=0.6)
    found = search(chain(), one, 10)
    assert one.time(found.kept) == one.best < one.time(frozenset())
    assert "a million converted values take 0 ms" in found.trials[0].what
    assert "take 0.6 ms" in found.trials[1].what


@pytest.mark.parametrize("seed", range(30))
def test_the_search_comes_close_to_trying_everything(seed: int) -> None:
    import random

    chance = random.Random(seed)
    int8 = " ".join(f"{chance.choice((0.5, 0.6, 0.7, 3.0)):.2f}" for _ in LAYERS)
    floats = " ".join(f"{chance.uniform(0.8, 1.2):.2f}" for _ in LAYERS)
    one = bench(int8, floats, conversion=chance.choice((0.0, 0.1, 0.3)))
    found = search(chain(), one, 10)
    assert one.time(found.kept) <= 1.01 * one.best
    assert one.time(found.kept) <= one.time(frozenset())


def test_what_is_within_the_spread_is_not_kept() -> None:
    one = bench("1 1.001 1 1 1 1", "2 1 2 2 2 2")
    found = search(chain(), one, 10)
    assert found.kept == frozenset()
    assert [trial.kept for trial in found.trials] == [False] * len(found.trials)


def test_a_refused_placement_is_noted_and_the_search_goes_on() -> None:
    one = bench("1 9 1 1 8 1", "2 1 2 2 1 2")
    one.refused = {frozenset("be")}
    found = search(chain(), one, 10)
    assert found.trials[0].milliseconds is None
    assert found.kept
    assert found.kept not in one.refused


def test_nothing_is_begun_after_the_budget() -> None:
    one, seconds = bench("1 9 1 1 9 1", "2 1 2 2 1 2", conversion=5.0), iter(range(0, 10_000, 50))
    found = search(chain(), one, 1, clock=lambda: next(seconds))
    assert not found.complete
    assert len(one.compared) == 1  # at 50 s


def test_no_placement_is_built_twice() -> None:
    one = bench("1 2 1 2 1 2", "1.5 1 1.5 1 1.5 1", conversion=0.4)
    search(chain(), one, 10)
    assert len(one.compared) == len(set(one.compared))
