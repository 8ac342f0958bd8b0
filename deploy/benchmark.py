"""How fast a model is in INT8, against its own float engines and against other tools' ONNX files, all in one run.

    python -m export.onnx runs/model.qat --precision float32
    python -m deploy.benchmark runs/model.onnx
    python -m deploy.benchmark runs/model.onnx --peers modelopt=peer.onnx --sweep 256 512 --host-to-host 128

Every engine is built for one fixed batch size with the same settings and equally often, and kept in a folder, so that
a second run only measures. Compared engines take turns (deploy/measure.py). INT8 is called a win only where its slow
runs are faster than the fast runs of FP16.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import tyro

from deploy.layers import EngineLayer
from deploy.settings import BuildSettings, Precision, Profile
from qat.artifact import (
    Parent,
    Sidecar,
    UserError,
    check_writable,
    read_sidecar,
    sha256_of,
    write_artifact,
    write_json,
)
from qat.console import Command, run_command, say, table, warn

if TYPE_CHECKING:
    from deploy.layer_costs import Slower
    from deploy.measure import Latency
    from deploy.trt import Toolkit

MODEL, PADDED = "INT8 (QAT)", "INT8 (QAT), zero channels"
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
    padded: Path | None = None
    """The model with zero channels (export.onnx --pad-channels), as ONNX."""
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
    engines: Path | None = None
    """Folder that keeps the engines; by default engines/ beside the model."""
    output: Path | None = None
    """The results as JSON; by default benchmark.json beside the model."""


@dataclass(frozen=True)
class Column:
    """One engine for each batch size: a name, the ONNX file and the precision that it is built with."""

    name: str
    model: Path
    precision: Precision


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
    columns = _columns(options, toolkit)
    peers = [Column(name, path, "explicit") for name, path in map(_named, options.peers)]
    inputs = [column for column in columns if column.name in (MODEL, PADDED)]
    inputs += [Column(name, path, "explicit") for name, path in map(_named, options.inputs)]
    _check_names([column.name for column in {*columns, *peers, *inputs}])
    bench = Bench(toolkit, options)
    say(f"{toolkit.title} on {toolkit.device.name}, driver {toolkit.device.driver}; batches {options.batches}")

    models = {column.name: column.model for column in (*columns, *peers, *inputs)}
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": asdict(toolkit.device),
        "tensorrt": toolkit.version,
        "repeat": options.repeat,
        "models": {name: {"file": path.name, "sha256": sha256_of(path)} for name, path in models.items()},
        "builds": bench.builds,
    }

    def add(kind: str, entries: list[dict[str, Any]]) -> None:
        """Keeps what has been measured so far, also if the rest fails."""
        results.setdefault(kind, []).extend(entries)
        write_json(output, results)

    for batch in dict.fromkeys((*options.full_batches, *options.batches)):
        full = batch in options.full_batches
        chosen = [column for column in columns if full or column.name in (FP16, IMPLICIT, MODEL, PADDED)]
        for kind, entries in bench.compare(chosen + (peers if full else []), batch).items():
            add(kind, entries)
    for batch in options.host_to_host:
        for column in inputs:
            add("host_to_host", bench.host_to_host(column, batch))
    for batch in options.sweep:
        for column in inputs:
            add("throughput", bench.throughput(column, batch))
    say(f"wrote {output}")


class Bench:
    """Builds engines, or takes those of an earlier run, and measures them."""

    def __init__(self, toolkit: Toolkit, options: BenchmarkOptions) -> None:
        self.toolkit, self.options = toolkit, options
        self.folder = options.engines or options.model.with_name("engines")
        self.builds: list[dict[str, Any]] = []
        self._timings = b""

    def compare(self, columns: list[Column], batch: int) -> dict[str, list[dict[str, Any]]]:
        """Latencies of all columns at one batch size, printed with the verdict, and layers that FP16 makes faster."""
        from deploy.layer_costs import LayerCosts
        from deploy.measure import latencies, layer_times
        from deploy.runtime import Engine

        plans = {column.name: self.engine(column, batch) for column in columns}
        with ExitStack() as stack:
            engines = {
                name: stack.enter_context(Engine(plan, self.toolkit, contexts=1)) for name, plan in plans.items()
            }
            found = latencies(engines, batch, self.options.runs)
            slower = []
            if FP16 in engines:
                int8, fp16 = (layer_times(engines[name], batch, LAYER_RUNS) for name in (MODEL, FP16))
                slower = LayerCosts.of(self.toolkit, self.options.model).slower_in_int8(int8, fp16)
        for name, latency in found.items():
            if not latency.graph:
                warn(f"{name} cannot be captured as a CUDA graph: its time includes launching every kernel")
        _print_latencies(found, batch)
        _print_slower(slower, batch)
        return {
            "latency": [{"name": name, **latency.to_json()} for name, latency in found.items()],
            "slower_in_int8": [{"batch": batch, **asdict(one)} for one in slower],
        }

    def throughput(self, column: Column, batch: int) -> list[dict[str, Any]]:
        """Images a second, engine only, by the number of contexts."""
        from deploy.measure import throughput
        from deploy.runtime import Engine

        plan = self.engine(column, batch)
        entries = []
        for contexts in self.options.contexts:
            with Engine(plan, self.toolkit, contexts=contexts) as engine:
                images = throughput(engine, batch)
            entries.append(
                {"name": column.name, "batch": batch, "contexts": contexts, "images_per_second": round(images)}
            )
            say(f"throughput, {column.name}, batch {batch}, {contexts} contexts: {images:,.0f} images/s")
        return entries

    def host_to_host(self, column: Column, batch: int) -> list[dict[str, Any]]:
        """The same from host to host, beside the engine alone."""
        from deploy.measure import host_to_host, throughput
        from deploy.runtime import Engine

        plan = self.engine(column, batch)
        entries = []
        for contexts in self.options.contexts:
            with Engine(plan, self.toolkit, contexts=contexts) as engine:
                alone = throughput(engine, batch)
                pinned, pageable = host_to_host(engine, batch), host_to_host(engine, batch, pinned=False)
            entries.append(
                {"name": column.name, "batch": batch, "contexts": contexts, "engine_only": round(alone)}
                | {"pinned": round(pinned), "pageable": round(pageable)}
            )
            say(
                f"host to host, {column.name}, batch {batch}, {contexts} contexts: {pinned:,.0f} images/s from pinned "
                f"memory ({100 * pinned / alone:.0f} % of the engine alone), {pageable:,.0f} from pageable"
            )
        return entries

    def engine(self, column: Column, batch: int) -> bytes:
        """The engine of a column for a fixed batch: built, or taken from the folder where it is just that one."""
        from deploy.build import engine_sidecar, write_plan
        from deploy.builder import build
        from deploy.repeat import build_fastest

        settings = BuildSettings(
            precision=column.precision,
            profiles=(Profile(batch, batch, batch),),
            optimization_level=self.options.optimization_level,
            timing_iterations=self.options.timing_iterations,
        )
        path = self.folder / f"{_file_name(column.name)}-{batch}.engine"
        digest = sha256_of(column.model)
        if (kept := self._kept(path, settings, digest)) is not None:
            self._note_build(column, batch, kept, again=False)
            return path.read_bytes()
        say(f"building {column.name} for batch {batch}")
        if self.options.repeat == 1:
            built = build(self.toolkit, column.model, settings, self._timings)
            self._timings = built.timing_cache_content
        else:
            built = build_fastest(self.toolkit, column.model, settings, self.options.repeat)
        parent = Parent.of(path, column.model, digest)
        sidecar = engine_sidecar(built, self.toolkit, settings, None, parent)
        sidecar = write_artifact(path, sidecar, lambda temporary: write_plan(temporary, built.plan))
        self._note_build(column, batch, sidecar, again=True)
        return bytes(built.plan)

    def _note_build(self, column: Column, batch: int, sidecar: Sidecar, again: bool) -> None:
        """Keeps what the build said of the engine; ``again``: whether it was built in this run."""
        from deploy.builder import Repetition

        layers = [EngineLayer.from_json(layer) for layer in sidecar.details["layers"]]
        figures, found = sidecar.figures, sidecar.details["repetition"]
        repetition = Repetition(**found) if found else None
        entry = {
            "name": column.name,
            "batch": batch,
            "seconds": figures["build_seconds"],
            "bytes": figures["engine_bytes"],
            "layers": len(layers),
            "reformats": sum(layer.is_reformat for layer in layers),
            "convolutions": figures["convolutions"],
            "convolutions_int8": figures["convolutions_int8"],
            "built_in_this_run": again,
            "repetition": {**found, "spread_percent": round(repetition.spread_percent, 2)} if repetition else None,
        }
        if not any((known["name"], known["batch"]) == (column.name, batch) for known in self.builds):
            self.builds.append(entry)
        when = "" if again else " in an earlier run"
        say(
            f"  {column.name}, batch {batch}: built in {entry['seconds']:.1f} s{when}, "
            f"{entry['layers']} layers, {entry['reformats']} reformats, "
            f"{entry['convolutions_int8']} of {entry['convolutions']} convolutions INT8"
        )
        if repetition:
            say(f"  {repetition}")

    def _kept(self, path: Path, settings: BuildSettings, digest: str) -> Sidecar | None:
        """The sidecar of an engine of an earlier run, where it is just the one that would be built."""
        try:
            sidecar = read_sidecar(path, "engine")
        except UserError:
            return None
        same_builder = sidecar.details["builder"]["version"] == self.toolkit.version
        same_gpu = self.toolkit.device is not None and sidecar.details["gpu"] == self.toolkit.device.name
        same_settings = sidecar.details["settings"] == json.loads(json.dumps(asdict(settings)))
        same_model = sidecar.parent is not None and sidecar.parent.sha256 == digest
        if not (same_builder and same_gpu and same_model and same_settings):
            return None
        repetition = sidecar.details["repetition"]
        built = len(repetition["milliseconds"]) if repetition else 1
        return sidecar if built == self.options.repeat else None


def _columns(options: BenchmarkOptions, toolkit: Toolkit) -> list[Column]:
    """The model, its post-training twin and its float engines, as far as this version of TensorRT has them."""
    columns = []
    float32 = options.float32 or options.model.with_suffix(".float32.onnx")
    float16 = options.float16 or options.model.with_suffix(".float16.onnx")
    names = {"fp32": "FP32", "tf32": "TF32", "fp16": FP16, "implicit": IMPLICIT}
    for precision in options.precisions:
        model, built_as = float32, cast(Precision, precision)
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
        columns.append(Column(names[precision], model, built_as))
    if options.ptq:
        columns.append(Column("INT8 (post-training)", options.ptq, "explicit"))
    columns.append(Column(MODEL, options.model, "explicit"))
    if options.padded:
        columns.append(Column(PADDED, options.padded, "explicit"))
    return columns


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _check_names(names: list[str]) -> None:
    """Raises UserError when two columns would be taken for each other."""
    found = [_file_name(name) for name in names]
    doubled = sorted({name for name in found if found.count(name) > 1})
    if doubled:
        raise UserError(
            f"several engines would be called {', '.join(doubled)}: give each of --peers and --inputs a name"
        )


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
            f"have --keep-float {names}"
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
