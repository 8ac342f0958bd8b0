"""Placements of the least time, on networks that are written down by hand, against trying all of them."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from qat.graph.network import ConstantWeight, Network, Op
from qat.graph.operations import OpKind
from qat.rules.regions import TypeCosts, changes

KINDS: dict[str, OpKind] = {
    "conv": "convolution",
    "in": "input",
    "out": "output",
    "relu": "activation",
    "add": "add",
    "cat": "concat",
    "pool": "max_pool",
    "other": "other",
}


def network(*lines: str, sizes: dict[str, int] | None = None) -> Network:
    """``conv a: x`` is a convolution a that reads x; all tensors have 32 channels, and as many pixels as ``sizes``."""
    ops: dict[str, Op] = {}
    for line in lines:
        head, _, inputs = line.partition(":")
        kind, name = head.split()
        weight = ConstantWeight(f"{name}.w", 32, 32, 1, (3, 3)) if kind == "conv" else None
        shape = (1, 32, 1, (sizes or {}).get(name, 1_000_000 // 32))
        ops[name] = Op(name, KINDS[kind], tuple(inputs.split()), name, weight, shape)
    return Network(ops)


CHAIN = network("in x", "conv a: x", "relu b: a", "conv c: b", "conv d: c", "conv e: d", "out y: e")
# A level of a U-Net: what goes around the pool and the deeper layers is concatenated with what comes back.
SKIP = network(
    *("in x", "conv a: x", "pool p: a", "conv b: p", "conv c: b", "cat d: a c", "conv e: d", "conv f: e", "out y: f")
)


def cheapest(net: Network, loss: dict[str, float], price: float) -> set[str]:
    return set(TypeCosts(net, loss).cheapest(price))


def test_without_a_price_all_layers_that_lose_are_float() -> None:
    assert cheapest(CHAIN, {"a": 1.0, "c": -2.0, "d": 0.5, "e": -1.0}, 0.0) == {"a", "d"}
    assert cheapest(CHAIN, {"a": -1.0, "c": -2.0, "d": -0.5, "e": -1.0}, 0.0) == set()


def test_a_layer_that_loses_less_than_its_conversions_stays_int8() -> None:
    loss = {"a": -1.0, "c": 1.0, "d": -1.0, "e": -1.0}
    assert cheapest(CHAIN, loss, 0.4) == {"c"}
    assert cheapest(CHAIN, loss, 0.6) == set()


def test_a_layer_that_gains_is_float_between_two_that_lose() -> None:
    loss = {"a": 2.0, "c": -0.5, "d": 2.0, "e": -2.0}
    assert cheapest(CHAIN, loss, 0.1) == {"a", "d"}
    assert cheapest(CHAIN, loss, 0.3) == {"a", "c", "d"}


def test_the_networks_ends_are_not_converted() -> None:
    loss = {"a": 0.5, "c": -1.0, "d": -1.0, "e": 0.5}
    assert cheapest(CHAIN, loss, 0.4) == {"a", "e"}
    assert TypeCosts(CHAIN, loss).converted(frozenset("ae")) == pytest.approx(2.0, rel=1e-3)
    assert TypeCosts(CHAIN, loss).converted(frozenset("acde")) == 0


def test_a_tensor_with_several_readers_is_converted_once() -> None:
    net = network("in x", "conv a: x", "conv b: a", "conv c: a", "conv d: a", "out y: b c d")
    loss = {"a": -1.0, "b": 0.2, "c": 0.2, "d": 0.2}
    assert TypeCosts(net, loss).converted(frozenset("bcd")) == pytest.approx(1.0, rel=1e-3)
    assert cheapest(net, loss, 0.5) == {"b", "c", "d"}
    assert cheapest(net, loss, 0.7) == set()


def test_codes_are_made_before_a_pool_and_not_behind_it() -> None:
    sizes = {"a": 4_000_000 // 32, "p": 1_000_000 // 32}
    net = network("in x", "conv a: x", "pool p: a", "conv b: p", "conv c: b", "out y: c", sizes=sizes)
    costs = TypeCosts(net, {"a": 1.0, "b": -1.0, "c": -1.0})
    assert costs.converted(frozenset("a")) == pytest.approx(4.0, rel=1e-3)
    assert costs.converted(frozenset("bc")) == pytest.approx(1.0, rel=1e-3)  # codes are pooled, then converted
    assert set(TypeCosts(net, {"a": 1.0, "b": -0.1, "c": -1.0}).cheapest(0.2)) == {"a", "b"}


def test_concatenations_go_along() -> None:
    loss = {"a": 1.0, "b": -0.1, "c": -2.0, "e": 1.0, "f": 1.0}
    assert cheapest(SKIP, loss, 0.3) == {"a", "e", "f"}
    assert cheapest(SKIP, loss, 10.0) == {"a", "b", "c", "d", "e", "f"}
    large = Network(SKIP.ops | {"a": replace(SKIP["a"], shape=(1, 32, 1, 125_000))})
    assert cheapest(large, loss, 0.3) == {"a", "b", "d", "e", "f"}


def test_a_layer_without_a_kernel_is_float_and_not_named() -> None:
    loss = {"a": -1.0, "d": -1.0, "e": -1.0}  # c has none
    assert cheapest(CHAIN, loss, 0.1) == set()
    assert TypeCosts(CHAIN, loss).converted(frozenset()) == pytest.approx(2.0, rel=1e-3)
    assert cheapest(CHAIN, {"a": -0.2, "d": -0.2, "e": -1.0}, 0.3) == {"a"}


def test_few_channels_are_converted_as_a_whole_vector() -> None:
    net = Network({name: replace(op, shape=(1, 8, 10, 10)) for name, op in CHAIN.ops.items()})
    assert TypeCosts(net, dict.fromkeys("acde", -1.0)).converted(frozenset("a")) == pytest.approx(32 * 100 / 1e6)


def brute_force(net: Network, loss: dict[str, float], price: float) -> float:
    costs = TypeCosts(net, loss)
    sets = (frozenset(chosen) for n in range(len(loss) + 1) for chosen in itertools.combinations(sorted(loss), n))
    return min(price * costs.converted(kept) - costs.loss(kept) for kept in sets)


@pytest.mark.parametrize("net", [CHAIN, SKIP], ids=["chain", "skip"])
@pytest.mark.parametrize("seed", range(12))
def test_no_other_placement_takes_less(net: Network, seed: int) -> None:
    chance = random.Random(seed)
    loss = {op.label: chance.uniform(-1, 1) for op in net if op.kind == "convolution"}
    price, costs = chance.uniform(0, 0.6), TypeCosts(net, loss)
    kept = frozenset(costs.cheapest(price) & loss.keys())
    found = price * costs.converted(kept) - costs.loss(kept)
    assert found == pytest.approx(brute_force(net, loss, price), abs=1e-6)


def test_changes_are_at_the_ends_and_between_parts() -> None:
    found = dict(changes(CHAIN, {"c"}))
    assert found["c back to INT8"] == frozenset()
    assert found["a in float too"] == {"a", "c"}
    assert found["d in float too"] == {"c", "d"}
    assert dict(changes(CHAIN, {"a", "d"}))["a to d in float too"] == {"a", "c", "d"}
