"""Which layers to leave in float, by the time of the whole engine: tries regions, and keeps only what is faster.

The search starts from the placement of the rules. The times of the layers say where INT8 loses; they only propose. What
decides is the latency of the whole engine against the best so far, both in turns in one measurement.
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
from qat.rules.regions import changes, grown, losing_regions
from qat.rules.tuned import FrontierPoint, Trial

Kept = frozenset[str]
"""Labels of the operations that stay in float."""
_CLOSE = 1.05
"""A region that costs less than this is tried once more with what is next to it: its ends may be the cost."""


class Bench(Protocol):
    """Builds and times engines."""

    def losses(self, kept: Kept) -> Mapping[str, float]:
        """Milliseconds that each layer takes longer than in the float engine, conversions included, by label."""

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
        self._tried: set[Kept] = {self._best}
        self._trials: list[Trial] = []
        self._ended = False

    def run(self) -> Search:
        """First whole regions, then small changes to what was found."""
        while self._try_regions():
            pass
        while self._try_changes():
            pass
        return Search(self._best, tuple(self._trials), complete=not self._ended)

    def _try_regions(self) -> bool:
        """Tries regions until one is kept; False if none is."""
        losses = self._bench.losses(self._best)
        waiting = losing_regions(self._network, losses, self._best)
        while waiting:
            region = waiting.pop(0)
            ratio = self._try(f"{region} in float", self._best | region.labels)
            if ratio is not None and ratio < 1:
                return True
            if ratio is not None and ratio < _CLOSE and "grown" not in region.kind:
                waiting.insert(0, grown(self._network, region, losses))
        return False

    def _try_changes(self) -> bool:
        """Tries small changes until one is kept; False if none is."""
        ratios = (self._try(change, kept) for change, kept in changes(self._network, self._best))
        return any(ratio is not None and ratio < 1 for ratio in ratios)

    def _try(self, what: str, kept: Kept) -> float | None:
        """Tries a placement unless it was tried or time is over. Its time against the best's, below 1 if it is kept."""
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
        if faster:
            self._best = kept
        ratio = found[1].median / found[0].median
        return ratio if faster else max(ratio, 1.0)


def _say(trial: Trial, found: tuple[Latency, Latency] | None) -> None:
    outcome = "refused" if found is None else f"{found[1].median:.4f} ms against {found[0].median:.4f}"
    say(f"{trial.what}: {outcome}{', kept' if trial.kept else ''}")
