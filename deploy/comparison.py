"""Measures the engines of a benchmark against each other: latency, throughput, and throughput from host to host.

INT8 is called a win only if its slow runs are faster than the fast runs of FP16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from deploy.candidate_engines import CandidateEngines
from deploy.candidates import FP16, MODEL, Candidate, CandidateSet
from deploy.layer_costs import LayerCosts, SlowerInInt8
from deploy.measure import Latency, host_to_host, latencies, layer_times, throughput
from deploy.runtime import Engine
from qat.base.artifact import sha256_of, write_result
from qat.base.console import say, table, warn
from qat.base.errors import UserError
from qat.base.number_format import INT8

LAYER_RUNS = 50
"""Number of inferences that the times of single layers are averaged over."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is measured.

    Attributes:
        batches: batch sizes at which the model and its variants are compared with FP16 and implicit INT8.
        full_batches: batch sizes at which all candidates are compared.
        sweep: batch sizes at which throughput is measured.
        host_to_host: batch sizes at which throughput with copies from and to the host is measured.
        contexts: numbers of execution contexts for ``sweep`` and ``host_to_host``.
        runs: each compared engine has at least this many timed inferences.
    """

    batches: tuple[int, ...] = ()
    full_batches: tuple[int, ...] = ()
    sweep: tuple[int, ...] = ()
    host_to_host: tuple[int, ...] = ()
    contexts: tuple[int, ...] = (1, 2)
    runs: int = 200

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise UserError(f"--runs {self.runs}: must be at least 1")


class Comparison:
    """Builds and measures the engines of all candidates. A peer that TensorRT refuses is left out."""

    def __init__(self, engines: CandidateEngines, candidates: CandidateSet, workload: Workload) -> None:
        self.engines, self.candidates, self.workload = engines, candidates, workload
        self.left_out: list[dict[str, Any]] = []
        """Name, batch size and error of each peer that was refused."""

    def build(self) -> None:
        """Builds the engines that are missing and that no other run is building, and measures nothing."""
        compared = [(candidate, batch) for batch, chosen in self._by_batch().items() for candidate in chosen]
        batches = (*self.workload.host_to_host, *self.workload.sweep)
        alone = [(candidate, batch) for batch in batches for candidate in self.candidates.to_measure_alone()]
        self.build_engines([*compared, *alone])

    def build_engines(self, wanted: Iterable[tuple[Candidate, int]]) -> None:
        """Builds the engine of each candidate and batch size, unless another run is building it."""
        for candidate, batch in dict.fromkeys(wanted):
            with self._leave_out_refused_peer(candidate, batch):
                self.engines.build_if_free(candidate, batch)

    def measure(self, output: Path) -> dict[str, Any]:
        """Measures all, prints the tables, and returns the results. ``output`` always has what was measured so far."""
        toolkit = self.engines.toolkit
        files = {candidate.name: candidate.model for candidate in self.candidates.all()}
        results: dict[str, Any] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": asdict(toolkit.device) if toolkit.device else None,
            "tensorrt": toolkit.version,
            "repeat": self.engines.repeat,
            "models": {name: {"file": path.name, "sha256": sha256_of(path)} for name, path in files.items()},
            "builds": self.engines.builds,
            "left_out": self.left_out,
        }

        def add(kind: str, entries: list[dict[str, Any]]) -> None:
            results.setdefault(kind, []).extend(entries)
            write_result(output, results)

        for batch, chosen in self._by_batch().items():
            for kind, entries in self.compare(chosen, batch).items():
                add(kind, entries)
        for batch in self.workload.host_to_host:
            for candidate in self.candidates.to_measure_alone():
                add("host_to_host", self.host_to_host(candidate, batch))
        for batch in self.workload.sweep:
            for candidate in self.candidates.to_measure_alone():
                add("throughput", self.throughput(candidate, batch))
        return results

    def compare(self, candidates: Sequence[Candidate], batch: int) -> dict[str, list[dict[str, Any]]]:
        """Latencies at one batch size, printed with the verdict, and the layers that are slower in INT8."""
        plans = {}
        for candidate in candidates:
            with self._leave_out_refused_peer(candidate, batch):
                plans[candidate.name] = self.engines.engine(candidate, batch)
        toolkit = self.engines.toolkit
        with ExitStack() as stack:
            engines = {name: stack.enter_context(Engine.from_plan(plan, toolkit)) for name, plan in plans.items()}
            found = latencies(engines, batch, self.workload.runs)
            slower = []
            if FP16 in engines:
                int8, fp16 = (layer_times(engines[name], batch, LAYER_RUNS) for name in (MODEL, FP16))
                slower = LayerCosts.from_model(toolkit, self.candidates.model.model).slower_in_int8(int8, fp16)
        for name, latency in found.items():
            if not latency.graph:
                warn(f"{name} cannot be captured as a CUDA graph: its time includes launching every kernel")
        _print_latencies(found, batch)
        _print_slower(slower, batch)
        return {
            "latency": [{"name": name, **latency.to_json()} for name, latency in found.items()],
            "slower_in_int8": [{"batch": batch, **asdict(one)} for one in slower],
        }

    def throughput(self, candidate: Candidate, batch: int) -> list[dict[str, Any]]:
        """Images a second without copies, for each number of contexts."""
        plan = self.engines.engine(candidate, batch)
        entries = []
        for contexts in self.workload.contexts:
            with Engine.from_plan(plan, self.engines.toolkit, contexts=contexts) as engine:
                images = throughput(engine, batch)
            entries.append(
                {"name": candidate.name, "batch": batch, "contexts": contexts, "images_per_second": round(images)}
            )
            say(f"throughput, {candidate.name}, batch {batch}, {contexts} contexts: {images:,.0f} images/s")
        return entries

    def host_to_host(self, candidate: Candidate, batch: int) -> list[dict[str, Any]]:
        """Images a second from host to host, and without copies, for each number of contexts."""
        plan = self.engines.engine(candidate, batch)
        entries = []
        for contexts in self.workload.contexts:
            with Engine.from_plan(plan, self.engines.toolkit, contexts=contexts) as engine:
                alone = throughput(engine, batch)
                pinned, pageable = host_to_host(engine, batch), host_to_host(engine, batch, pinned=False)
            entries.append(
                {"name": candidate.name, "batch": batch, "contexts": contexts, "engine_only": round(alone)}
                | {"pinned": round(pinned), "pageable": round(pageable)}
            )
            say(
                f"host to host, {candidate.name}, batch {batch}, {contexts} contexts: {pinned:,.0f} images/s from "
                f"pinned memory ({100 * pinned / alone:.0f} % of the engine alone), {pageable:,.0f} from pageable"
            )
        return entries

    def _by_batch(self) -> dict[int, list[Candidate]]:
        """The candidates that are compared at each batch size."""
        full = self.workload.full_batches
        return {
            batch: self.candidates.to_compare(full=batch in full)
            for batch in dict.fromkeys((*full, *self.workload.batches))
        }

    @contextmanager
    def _leave_out_refused_peer(self, candidate: Candidate, batch: int) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if candidate not in self.candidates.peers:
                raise
            warn(f"{candidate.name} is left out: {error}")
            self.left_out.append({"name": candidate.name, "batch": batch, "error": str(error)})


def verdict(model: Latency, base: Latency) -> str:
    """Whether INT8 is worth it. It wins only if it is faster than FP16 beyond the spread of the measurements."""
    factor = base.median / model.median
    if model.beats(base):
        return f"batch {model.batch}: {INT8.name} wins, {factor:.2f} times as fast as FP16"
    if base.beats(model):
        return f"batch {model.batch}: {INT8.name} loses, it takes {1 / factor:.2f} times as long as FP16: deploy FP16"
    return (
        f"batch {model.batch}: no difference beyond the spread between {INT8.name} and FP16 "
        f"({factor:.2f} times as fast)"
    )


def _print_latencies(found: Mapping[str, Latency], batch: int) -> None:
    base = found.get(FP16)
    rows = [
        (
            name,
            f"{latency.median:.3f}",
            f"{latency.low:.3f} to {latency.high:.3f}",
            f"{latency.p99:.3f}",
            f"{latency.images_per_second:,.0f}",
            f"{base.median / latency.median:.2f}" if base else "-",
            f"{latency.median / found[MODEL].median:.3f}",
        )
        for name, latency in found.items()
    ]
    heads = ("engine", "median, ms", "5 to 95 %", "p99", "images/s", "times FP16", f"time / {MODEL}")
    table(f"Batch {batch}, {found[MODEL].runs} runs", heads, rows, details=(heads[-1], "p99", "images/s"))
    if base:
        say(verdict(found[MODEL], base))


def _print_slower(slower: Sequence[SlowerInInt8], batch: int) -> None:
    if not slower:
        return
    rows = [(one.node, f"{one.int8:.3f}", f"{one.fp16:.3f}") for one in slower]
    title = f"Layers that take longer in {INT8.name}, batch {batch}"
    table(title, ("layer", f"{INT8.name}, ms", "FP16, ms"), rows)
    names = " ".join(one.node for one in slower)
    say(
        f"in float they may be faster, if the conversions that this needs cost less: qat.train and export.quantize "
        f"have --keep-float {names}; at the end of residual blocks export.onnx --merge-shortcuts --pad-channels may do "
        "more"
    )
