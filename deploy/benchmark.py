"""How fast a model is in INT8, against its own float engines and against other tools' ONNX files, all in one run.

    python -m export.onnx runs/model.qat --precision float32
    python -m deploy.benchmark runs/model.onnx
    python -m deploy.benchmark runs/model.onnx --peers modelopt=peer.onnx --sweep 256 512 --host-to-host 128

Every engine is built for one fixed batch size with the same settings and equally often, and kept in a folder, so that
a second run only measures. Compared engines take turns (deploy/measure.py). INT8 is called a win only where its slow
runs are faster than the fast runs of FP16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import tyro

from deploy.candidates import Candidate, CandidateEngines
from qat.base.artifact import check_writable, sha256_of, write_json
from qat.base.choices import EnginePrecision
from qat.base.console import Command, run_command, say, table, warn
from qat.base.errors import UserError

if TYPE_CHECKING:
    from deploy.layer_costs import Slower
    from deploy.measure import Latency
    from deploy.trt import Toolkit

MODEL = "INT8 (QAT)"
FP16, IMPLICIT = "FP16", "implicit INT8"
LAYER_RUNS = 50
"""Runs that the times of single layers are averaged over."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(Command):
    """The options of ``python -m deploy.benchmark``."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL.onnx")]
    """The Q/DQ ONNX file."""
    float32: Path | None = None
    """The same model from python -m export.onnx --precision float32; by default MODEL.float32.onnx."""
    float16: Path | None = None
    """The same with --precision float16, for TensorRT versions that know strongly typed networks only; by default
    MODEL.float16.onnx."""
    variants: tuple[str, ...] = ()
    """The model exported otherwise (export.onnx --pad-channels, --merge-shortcuts) as NAME=FILE, compared at all batch
    sizes."""
    ptq: Path | None = None
    """The model quantized without training, as ONNX."""
    precisions: tuple[Literal["fp32", "tf32", "fp16", "implicit"], ...] = ("fp32", "tf32", "fp16", "implicit")
    """Float engines to compare with."""
    batches: tuple[int, ...] = (1, 32, 128)
    """Batch sizes at which the model is compared with FP16 and implicit INT8."""
    full_batches: tuple[int, ...] = (32,)
    """Batch sizes at which FP32, TF32, post-training and --peers are compared too."""
    peers: tuple[str, ...] = ()
    """Further ONNX files as NAME=FILE."""
    inputs: tuple[str, ...] = ()
    """The same model with other input types (export.onnx --input) as NAME=FILE, for --sweep and --host-to-host."""
    sweep: tuple[int, ...] = ()
    """Batch sizes at which throughput is measured."""
    contexts: tuple[int, ...] = (1, 2)
    """Numbers of execution contexts, each with a stream, for --sweep and --host-to-host."""
    host_to_host: tuple[int, ...] = ()
    """Batch sizes at which throughput with copies from and to the host is measured."""
    repeat: int = 1
    """Build every engine so often and keep the fastest: the builder chooses kernels by timing them, and two builds of
    one network differ by 1 to 3 %. Each build times all kernels anew; with 1, the engines share a cache of timings."""
    runs: int = 200
    """Timed inferences of each engine, at least."""
    optimization_level: int = 3
    """As for deploy.build."""
    timing_iterations: int | None = None
    """As for deploy.build."""
    build_only: bool = False
    """Build what is missing and measure nothing. Several such runs, each on a GPU of its own, share the builds."""
    engines: Path | None = None
    """Folder that keeps the engines; by default engines/ beside the model."""
    output: Path | None = None
    """The results as JSON; by default benchmark.json beside the model."""


def main(options: BenchmarkOptions) -> None:
    """Builds what is missing, measures, prints the tables and writes the results."""
    from deploy.trt import find_toolkit

    output = options.output or options.model.with_name("benchmark.json")
    check_writable(output)
    if options.runs < 1:
        raise UserError(f"--runs {options.runs}: needed is 1 at least")
    if options.repeat < 1:
        raise UserError(f"--repeat {options.repeat}: needed is 1 at least")
    if not options.model.is_file():
        raise UserError(f"no file {options.model}: check the path, or make it with python -m export.onnx")
    toolkit = find_toolkit("tensorrt")
    assert toolkit.device is not None
    candidates, ours = _candidates(options, toolkit), _ours(options)
    peers = [Candidate(name, path, "explicit") for name, path in map(_named, options.peers)]
    inputs = [*ours, *(Candidate(name, path, "explicit") for name, path in map(_named, options.inputs))]
    everything = dict.fromkeys((*candidates, *peers, *inputs))
    _check_names(everything)
    bench = Bench(toolkit, options, peers)
    say(f"{toolkit.title} on {toolkit.device.name}, driver {toolkit.device.driver}; batches {options.batches}")

    compared: dict[int, list[Candidate]] = {}
    for batch in dict.fromkeys((*options.full_batches, *options.batches)):
        full = batch in options.full_batches
        chosen = [one for one in candidates if full or one.name in (FP16, IMPLICIT) or one in ours]
        compared[batch] = chosen + (peers if full else [])
    if options.build_only:
        alone = [(candidate, batch) for batch in (*options.host_to_host, *options.sweep) for candidate in inputs]
        bench.build([*((candidate, batch) for batch, chosen in compared.items() for candidate in chosen), *alone])
        return
    files = {candidate.name: candidate.model for candidate in everything}
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": asdict(toolkit.device),
        "tensorrt": toolkit.version,
        "repeat": options.repeat,
        "models": {name: {"file": path.name, "sha256": sha256_of(path)} for name, path in files.items()},
        "builds": bench.engines.builds,
        "left_out": bench.left_out,
    }

    def add(kind: str, entries: list[dict[str, Any]]) -> None:
        """Keeps what has been measured so far, also if the rest fails."""
        results.setdefault(kind, []).extend(entries)
        write_json(output, results)

    for batch, chosen in compared.items():
        for kind, entries in bench.compare(chosen, batch).items():
            add(kind, entries)
    for batch in options.host_to_host:
        for candidate in inputs:
            add("host_to_host", bench.host_to_host(candidate, batch))
    for batch in options.sweep:
        for candidate in inputs:
            add("throughput", bench.throughput(candidate, batch))
    say(f"wrote {output}")


class Bench:
    """Measures engines against each other. One of ``peers`` that TensorRT refuses is left out."""

    def __init__(self, toolkit: Toolkit, options: BenchmarkOptions, peers: Sequence[Candidate] = ()) -> None:
        self.toolkit, self.options, self.peers = toolkit, options, peers
        folder = options.engines or options.model.with_name("engines")
        self.engines = CandidateEngines(
            toolkit, folder, options.repeat, options.optimization_level, options.timing_iterations
        )
        self.left_out: list[dict[str, Any]] = []

    def build(self, wanted: Iterable[tuple[Candidate, int]]) -> None:
        """Builds the engines that are missing and that no other run is building."""
        for candidate, batch in dict.fromkeys(wanted):
            with self._unless_refused(candidate, batch):
                self.engines.build_if_free(candidate, batch)

    @contextmanager
    def _unless_refused(self, candidate: Candidate, batch: int) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if candidate not in self.peers:
                raise
            warn(f"{candidate.name} is left out: {error}")
            self.left_out.append({"name": candidate.name, "batch": batch, "error": str(error)})

    def compare(self, candidates: list[Candidate], batch: int) -> dict[str, list[dict[str, Any]]]:
        """Latencies at one batch size, printed with the verdict, and the layers that FP16 makes faster."""
        from deploy.layer_costs import LayerCosts
        from deploy.measure import latencies, layer_times
        from deploy.runtime import Engine

        plans = {}
        for candidate in candidates:
            with self._unless_refused(candidate, batch):
                plans[candidate.name] = self.engines.engine(candidate, batch)
        with ExitStack() as stack:
            engines = {
                name: stack.enter_context(Engine(plan, self.toolkit, contexts=1)) for name, plan in plans.items()
            }
            found = latencies(engines, batch, self.options.runs)
            slower = []
            if FP16 in engines:
                int8, fp16 = (layer_times(engines[name], batch, LAYER_RUNS) for name in (MODEL, FP16))
                slower = LayerCosts.from_model(self.toolkit, self.options.model).slower_in_int8(int8, fp16)
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
        """Images a second, engine only, by the number of contexts."""
        from deploy.measure import throughput
        from deploy.runtime import Engine

        plan = self.engines.engine(candidate, batch)
        entries = []
        for contexts in self.options.contexts:
            with Engine(plan, self.toolkit, contexts=contexts) as engine:
                images = throughput(engine, batch)
            entries.append(
                {"name": candidate.name, "batch": batch, "contexts": contexts, "images_per_second": round(images)}
            )
            say(f"throughput, {candidate.name}, batch {batch}, {contexts} contexts: {images:,.0f} images/s")
        return entries

    def host_to_host(self, candidate: Candidate, batch: int) -> list[dict[str, Any]]:
        """The same from host to host, beside the engine alone."""
        from deploy.measure import host_to_host, throughput
        from deploy.runtime import Engine

        plan = self.engines.engine(candidate, batch)
        entries = []
        for contexts in self.options.contexts:
            with Engine(plan, self.toolkit, contexts=contexts) as engine:
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


def _candidates(options: BenchmarkOptions, toolkit: Toolkit) -> list[Candidate]:
    """The model's float engines, as far as this version of TensorRT has them, its post-training twin, and ``_ours``."""
    candidates = []
    float32 = options.float32 or options.model.with_suffix(".float32.onnx")
    float16 = options.float16 or options.model.with_suffix(".float16.onnx")
    names = {"fp32": "FP32", "tf32": "TF32", "fp16": FP16, "implicit": IMPLICIT}
    for precision in options.precisions:
        model, built_as = float32, cast(EnginePrecision, precision)
        try:
            toolkit.typing(precision)
        except UserError as error:
            if precision != "fp16" or not float16.is_file():
                remedy = (
                    "; python -m export.onnx CHECKPOINT --precision float16 makes it" if precision == "fp16" else ""
                )
                warn(f"{names[precision]} is left out: {error}{remedy}")
                continue
            model, built_as = float16, "explicit"
        if not model.is_file():
            raise UserError(
                f"no file {model} for {names[precision]}: make it with python -m export.onnx CHECKPOINT "
                "--precision float32, or leave the float engines out with an empty --precisions"
            )
        candidates.append(Candidate(names[precision], model, built_as))
    if options.ptq:
        candidates.append(Candidate("INT8 (post-training)", options.ptq, "explicit"))
    return candidates + _ours(options)


def _ours(options: BenchmarkOptions) -> list[Candidate]:
    """The model and its variants."""
    variants = [Candidate(f"{MODEL}, {name}", path, "explicit") for name, path in map(_named, options.variants)]
    return [Candidate(MODEL, options.model, "explicit"), *variants]


def _check_names(candidates: Iterable[Candidate]) -> None:
    """Raises UserError when two candidates would be taken for each other."""
    found = [candidate.file_name for candidate in candidates]
    doubled = sorted({name for name in found if found.count(name) > 1})
    if doubled:
        named = "--variants, --peers and --inputs"
        raise UserError(f"several engines would be called {', '.join(doubled)}: give each of {named} a name")


def _named(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise UserError(f"{text!r}: give NAME=FILE")
    if not Path(file).is_file():
        raise UserError(f"no file {file} for {name}: check the path")
    return name, Path(file)


def _print_latencies(found: dict[str, Latency], batch: int) -> None:
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
    table(f"Batch {batch}, {found[MODEL].runs} runs", heads, rows)
    if base:
        say(verdict(found[MODEL], base))


def _print_slower(slower: Sequence[Slower], batch: int) -> None:
    if slower:
        rows = [(one.node, f"{one.int8:.3f}", f"{one.fp16:.3f}") for one in slower]
        table(f"Layers that take longer in INT8, batch {batch}", ("layer", "INT8, ms", "FP16, ms"), rows)
        names = " ".join(one.node for one in slower)
        say(
            f"in float they may be faster, if the conversions that this takes cost less: qat.train and export.quantize "
            f"have --keep-float {names}; at the end of residual blocks export.onnx --merge-shortcuts --pad-channels "
            "may do more"
        )


def verdict(model: Latency, base: Latency) -> str:
    """Whether INT8 is worth it: a win only where it is faster than FP16 beyond the spread."""
    factor = base.median / model.median
    if model.beats(base):
        return f"batch {model.batch}: INT8 wins, {factor:.2f} times as fast as FP16"
    if base.beats(model):
        return f"batch {model.batch}: INT8 loses, it takes {1 / factor:.2f} times as long as FP16: deploy FP16"
    return f"batch {model.batch}: no difference beyond the spread between INT8 and FP16 ({factor:.2f} times as fast)"


if __name__ == "__main__":
    run_command(main, BenchmarkOptions)
