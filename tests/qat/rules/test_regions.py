"""Regions that may be left in float together, on networks that are written down by hand."""

from __future__ import annotations

import pytest

from qat.graph.network import ConstantWeight, Network, Op
from qat.graph.operations import OpKind
from qat.rules.regions import grown, losing_regions, segments


def network(*lines: str) -> Network:
    """``conv a: x`` is a convolution a that reads x."""
    ops: dict[str, Op] = {}
    for line in lines:
        head, _, inputs = line.partition(":")
        kind, name = head.split()
        kinds: dict[str, OpKind] = {"conv": "convolution", "in": "input", "relu": "activation", "add": "add"}
        weight = ConstantWeight(f"{name}.w", 16, 16, 1, (3, 3)) if kind == "conv" else None
        ops[name] = Op(name, kinds[kind], tuple(inputs.split()), name, weight)
    return Network(ops)


CHAIN = network("in x", "conv a: x", "relu b: a", "conv c: b", "conv d: c", "conv e: d")
# Two residual blocks.
BLOCKS = network(
    *("in x", "conv a: x", "conv b: a", "conv c: b", "add d: a c"),
    *("conv e: d", "conv f: e", "add g: d f", "conv h: g"),
)


def found(net: Network, loss: dict[str, float], kept: set[str] | None = None) -> list[tuple[set[str], str]]:
    return [(set(region.labels), region.kind) for region in losing_regions(net, loss, kept or set())]


def test_segments_end_where_one_tensor_passes() -> None:
    assert segments(CHAIN) == [["x"], ["a"], ["b"], ["c"], ["d"], ["e"]]
    assert segments(BLOCKS) == [["x"], ["a"], ["b", "c", "d"], ["e", "f", "g"], ["h"]]
    assert [name for part in segments(BLOCKS) for name in part] == list(BLOCKS.ops)


def test_neighbours_that_lose_are_one_region_and_others_another() -> None:
    regions = found(CHAIN, {"a": 1.0, "c": 2.0, "d": -5.0, "e": 1.5})
    assert regions[0] == ({"a", "c", "e"}, "all layers that lose")  # 4.5
    assert ({"a", "c"}, "neighbours") in regions
    assert ({"e"}, "neighbours") in regions
    assert all("d" not in labels for labels, _ in regions)


def test_a_run_of_segments_may_hold_a_layer_that_gains() -> None:
    regions = found(CHAIN, {"a": 3.0, "c": -1.0, "d": 2.0, "e": -1.0})
    assert ({"a", "c", "d"}, "run of segments") in regions
    losses = [region.loss for region in losing_regions(CHAIN, {"a": 3.0, "c": -1.0, "d": 2.0, "e": -1.0})]
    assert losses == sorted(losses, reverse=True)


def test_a_segment_takes_its_sums_along() -> None:
    assert ({"b", "c", "d"}, "segment") in found(BLOCKS, {"b": 1.0, "c": 1.0})


def test_what_is_kept_already_is_left_out() -> None:
    assert found(CHAIN, {"a": 1.0}, {"a"}) == []
    regions = found(CHAIN, {"a": 1.0, "c": 1.0}, {"a"})
    assert regions[0] == ({"c"}, "neighbours")
    assert all("a" not in labels for labels, _ in regions)


@pytest.mark.parametrize("loss", [{}, {"a": -1.0}, {"nothing": 3.0}])
def test_where_nothing_loses_there_is_no_region(loss: dict[str, float]) -> None:
    assert found(CHAIN, loss) == []


def test_a_grown_region_takes_the_layers_on_all_sides() -> None:
    loss = {"c": 2.0, "a": -0.5}
    (region, *_) = losing_regions(CHAIN, loss)
    assert region.labels == {"c"}
    larger = grown(CHAIN, region, loss)
    assert larger.labels == {"a", "c", "d"}
    assert larger.loss == 1.5
    assert "grown" in larger.kind
    assert grown(BLOCKS, losing_regions(BLOCKS, {"f": 1.0})[0], {}).labels >= {"e", "f", "h"}
