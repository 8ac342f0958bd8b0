"""Measures how fast a model is in INT8, against its own float engines and other tools' ONNX files, all in one run.

    python -m export.onnx runs/model.qat --precision float32
    python -m deploy.benchmark runs/model.onnx
    python -m deploy.benchmark runs/model.onnx --peers modelopt=peer.onnx --sweep 256 512 --host-to-host 128

Every engine is built for one fixed batch size, with the same settings and equally often, and kept in a folder, so that
a second run only measures. Compared engines take turns. INT8 is called a win only if its slow runs are faster than the
fast runs of FP16.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deploy.settings import ENGINES
from qat.base.console import Command, run_command, say
from qat.base.errors import UserError
from qat.base.outputs import READS, Reads, Writes
from qat.base.writing import check_writable

_OUTPUT = Writes(
    default=lambda options: options.model.with_name("benchmark.json"), when=lambda options: not options.build_only
)


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(Command):
    """The options of ``python -m deploy.benchmark``."""

    model: Annotated[Path, tyro.conf.Positional, READS, tyro.conf.arg(metavar="MODEL.onnx")]
    """The Q/DQ ONNX file."""
    float32: Annotated[Path | None, Reads(default=lambda options: options.model.with_suffix(".float32.onnx"))] = None
    """The same model from python -m export.onnx --precision float32; by default MODEL.float32.onnx."""
    float16: Annotated[Path | None, Reads(default=lambda options: options.model.with_suffix(".float16.onnx"))] = None
    """The same model with --precision float16, for TensorRT versions that have only strongly typed networks; by default
    MODEL.float16.onnx."""
    variants: Annotated[tuple[str, ...], READS] = ()
    """The model exported in other ways (export.onnx --pad-channels, --merge-shortcuts) as NAME=FILE, compared at all
    batch sizes."""
    ptq: Annotated[Path | None, READS] = None
    """The model quantized without training, as ONNX."""
    precisions: tuple[Literal["fp32", "tf32", "fp16", "int8"], ...] = ("fp32", "tf32", "fp16", "int8")
    """Float engines to compare with."""
    batches: tuple[int, ...] = (1, 32, 128)
    """Batch sizes at which the model is compared with FP16 and implicit INT8."""
    full_batches: tuple[int, ...] = (32,)
    """Batch sizes at which FP32, TF32, post-training and --peers are compared too."""
    peers: Annotated[tuple[str, ...], READS] = ()
    """ONNX files of other tools as NAME=FILE."""
    inputs: Annotated[tuple[str, ...], READS] = ()
    """The same model with other input types (export.onnx --input) as NAME=FILE, for --sweep and --host-to-host."""
    sweep: tuple[int, ...] = ()
    """Batch sizes at which throughput is measured."""
    contexts: tuple[int, ...] = (1, 2)
    """Numbers of execution contexts, each with its own stream, for --sweep and --host-to-host."""
    host_to_host: tuple[int, ...] = ()
    """Batch sizes at which throughput with copies from and to the host is measured."""
    repeat: int = 1
    """Build every engine this often and keep the fastest: the builder chooses kernels by timing them, and two builds of
    one network differ by 1 to 3 %. Each build times all kernels again; with 1, the engines share a timing cache."""
    runs: int = 200
    """Each engine has at least this many timed inferences."""
    optimization_level: int = 3
    """As for deploy.build."""
    timing_iterations: int | None = None
    """As for deploy.build."""
    build_only: bool = False
    """Build the missing engines and measure nothing. Several such runs, each on its own GPU, share the builds."""
    engines: Annotated[Path | None, ENGINES] = None
    """Folder that keeps the engines; by default engines/ beside the model."""
    output: Annotated[Path | None, _OUTPUT] = None
    """The results as JSON; by default benchmark.json beside the model."""


def main(options: BenchmarkOptions) -> None:
    """Builds what is missing, measures, prints the tables and writes the results."""
    from deploy.candidate_engines import CandidateEngines
    from deploy.candidates import CandidateSet, parse_named_file
    from deploy.comparison import Comparison, Workload
    from deploy.installed import find_toolkit

    model, output = options.model, options.output or options.model.with_name("benchmark.json")
    check_writable(output)
    if options.repeat < 1:
        raise UserError(f"--repeat {options.repeat}: must be at least 1")
    if not model.is_file():
        raise UserError(f"no file {model}: check the path, or make it with python -m export.onnx")
    workload = Workload(
        batches=options.batches,
        full_batches=options.full_batches,
        sweep=options.sweep,
        host_to_host=options.host_to_host,
        contexts=options.contexts,
        runs=options.runs,
    )
    toolkit = find_toolkit("tensorrt")
    assert toolkit.device is not None
    say(f"{toolkit.title} on {toolkit.device.name}, driver {toolkit.device.driver}; batches {options.batches}")
    candidates = CandidateSet.from_files(
        toolkit,
        model,
        float32=options.float32,
        float16=options.float16,
        precisions=options.precisions,
        post_training=options.ptq,
        variants=[parse_named_file(text) for text in options.variants],
        peers=[parse_named_file(text) for text in options.peers],
        inputs=[parse_named_file(text) for text in options.inputs],
    )
    folder = options.engines or model.with_name("engines")
    engines = CandidateEngines(toolkit, folder, options.repeat, options.optimization_level, options.timing_iterations)
    comparison = Comparison(engines, candidates, workload)
    if options.build_only:
        comparison.build()
    else:
        comparison.measure(output)
        say(f"wrote {output}")


def cli() -> None:
    """The console script ``deploy-benchmark``."""
    run_command(main, BenchmarkOptions, supervised=True)


if __name__ == "__main__":
    cli()
