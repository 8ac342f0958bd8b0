"""Which layers to leave in float, by the time of the whole engine: tries placements, and keeps only what is faster.

The search starts from the placement of the rules. The times of its layers and a price of conversions between types say
which placement would take the least time (qat/rules/regions.py). Each trial tells the price better. The times only
propose: what decides is the latency of the whole engine against the best so far, both in turns in one measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from deploy.measure import Latency
from qat.base.console import say
from qat.graph.network import Network
from qat.rules.float_steps import FloatStep
from qat.rules.regions import Kept, TypeCosts, changes
from qat.rules.tuned import FrontierPoint, Trial

_OTHER_PRICES = (2.0, 0.5, 4.0, 0.25)  # times what conversions seem to cost, which the model of their cost may miss
_MOST_PRICES = 8


class Bench(Protocol):
    """Builds and times engines."""

    def losses(self, kept: Kept) -> Mapping[str, float]:
        """Milliseconds that each layer takes longer than in the float engine, by label; only those that are in INT8."""

    def compare(self, best: Kept, other: Kept) -> tuple[Latency, Latency] | None:
        """The latencies of two engines, in turns; None if the other one cannot be built."""


@dataclass(frozen=True)
class Search:
    """What was found: the operations to leave in float, what was tried, and whether time ran out."""

    kept: Kept
    trials: tuple[Trial, ...]
    complete: bool


def search(network: Network, bench: Bench, minutes: float, clock: Callable[[], float] = time.monotonic) -> Search:
    """Looks for the fastest placement.

    Args:
        network: the neutral view of the network.
        bench: builds and times.
        minutes: nothing is begun after these.
        clock: seconds.
    """
    return _Searching(network, bench, clock, clock() + 60 * minutes).run()


def frontier(
    bench: Bench, kept: Kept, steps: Sequence[FloatStep], minutes: float, clock: Callable[[], float] = time.monotonic
) -> list[FrontierPoint]:
    """Times placements that leave more in float for the sake of accuracy.

    Args:
        bench: builds and times.
        kept: what speed leaves in float, which all of them do too.
        steps: what else to leave in float, and the accuracy then.
        minutes: nothing is begun after these.
        clock: seconds.

    Those that TensorRT refuses are left out.
    """
    end = clock() + 60 * minutes
    points = []
    for step in steps:
        if clock() >= end:
            break
        both = kept | step.kept
        if (found := bench.compare(kept, both)) is not None:
            points.append(FrontierPoint(step.drop, tuple(sorted(both)), round(found[1].median, 5)))
            say(f"{len(both)} in float: {step.drop:.2f} points below float, {points[-1].milliseconds:.4f} ms")
    return points


class _Searching:
    def __init__(self, network: Network, bench: Bench, clock: Callable[[], float], end: float) -> None:
        self._network, self._bench, self._clock, self._end = network, bench, clock, end
        self._best: Kept = frozenset()
        self._ratio = 1.0  # of the best's time to that of the rules' placement
        self._tried: set[Kept] = {self._best}
        self._trials: list[Trial] = []
        self._ended = False

    def run(self) -> Search:
        """First the cheapest placements, then small changes to what was found."""
        self._try_cheapest()
        while self._try_changes():
            pass
        return Search(self._best, tuple(self._trials), complete=not self._ended)

    def _try_cheapest(self) -> None:
        """The cheapest placement if conversions cost nothing; then at the price that the last trial showed, and others.

        It ends when that price leads to a placement that was tried.
        """
        costs = TypeCosts(self._network, self._bench.losses(self._best))
        if not costs.can_gain:
            return
        price = 0.0
        for _ in range(_MOST_PRICES):
            kept = costs.cheapest(price)
            if (found := self._try(_cheapest_at(price, kept), kept)) is None:
                break
            converted = costs.converted(kept)
            if not converted:
                break
            gained = found.rules_ms * (1 - found.ratio)
            price = max(0.0, costs.loss(kept) - gained) / converted
        for factor in _OTHER_PRICES:
            other = factor * (price or costs.dearest / 8)
            kept = costs.cheapest(other)
            self._try(_cheapest_at(other, kept), kept)

    def _try_changes(self) -> bool:
        """Tries small changes until one is kept; False if none is."""
        return any(self._is_kept(self._try(change, kept)) for change, kept in changes(self._network, self._best))

    @staticmethod
    def _is_kept(outcome: _Outcome | None) -> bool:
        return outcome is not None and outcome.kept

    def _try(self, what: str, kept: Kept) -> _Outcome | None:
        """Tries a placement. None if it was tried before, time is over, or TensorRT refuses it."""
        self._ended = self._ended or (kept not in self._tried and self._clock() >= self._end)
        if self._ended or kept in self._tried:
            return None
        self._tried.add(kept)
        found = self._bench.compare(self._best, kept)
        faster = found is not None and found[1].beats(found[0])
        self._trials.append(Trial(what, None if found is None else round(found[1].median, 5), faster))
        _say(self._trials[-1], found)
        if found is None:
            return None
        rules_ms = found[0].median / self._ratio
        ratio = found[1].median / rules_ms
        if faster:
            self._best, self._ratio = kept, ratio
        return _Outcome(faster, ratio, rules_ms)


@dataclass(frozen=True)
class _Outcome:
    """Of a trial: whether it was kept, its time as a ratio to that of the rules' placement, and the latter."""

    kept: bool
    ratio: float
    rules_ms: float


def _cheapest_at(price: float, kept: Kept) -> str:
    return f"{len(kept)} in float, the least time where a million converted values take {price:.3g} ms"


def _say(trial: Trial, found: tuple[Latency, Latency] | None) -> None:
    outcome = "refused" if found is None else f"{found[1].median:.4f} ms against {found[0].median:.4f}"
    say(f"{trial.what}: {outcome}{', kept' if trial.kept else ''}")
