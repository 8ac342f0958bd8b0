"""Builds a TensorRT engine from a Q/DQ ONNX file and audits it: is INT8 what the ONNX declares INT8?

With a GPU and TensorRT the engine is built for that GPU; without, TensorRT-RTX builds it ahead of time
for the compute capabilities asked for. Exit code 3 says that a layer which the ONNX declares INT8 runs in
another precision.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qat.artifact import (
    Parent,
    Sidecar,
    TensorSpec,
    UserError,
    check_writable,
    read_sidecar,
    sha256_of,
    sidecar_path,
    write_artifact,
)
from qat.console import Command, progress, run_command, say, table, warn

if TYPE_CHECKING:
    from deploy.audit import Audit
    from deploy.trt import BuildLog, Toolkit

DEFAULT_CAPABILITIES = ("8.6", "8.9", "12.0")
EXIT_NOT_INT8 = 3
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Options(Command):
    """What to build, and for which GPUs."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL.onnx")]
    """The ONNX file."""
    output: Path | None = None
    """The engine to write; by default the model's name with the suffix .engine."""
    builder: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    """auto: TensorRT where a GPU is, else TensorRT-RTX."""
    compute_capabilities: tuple[str, ...] | None = None
    """For TensorRT-RTX, the GPUs to build for; by default 8.6 8.9 12.0."""
    opt_batch: int = 8
    """Batch size that a dynamic batch is optimized for."""
    max_batch: int = 32
    """Largest batch size that a dynamic batch allows."""


@dataclass(frozen=True)
class Built:
    """A built engine, still in memory."""

    plan: Any
    seconds: float
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    audit: Audit
    log: BuildLog


def main(options: Options) -> int:
    """Builds, audits and writes the engine. Returns 0, or 3 when a declared INT8 layer is not INT8."""
    from deploy.trt import find_toolkit

    output = options.output or options.model.with_suffix(".engine")
    source, parent = _read_model(options.model, output)
    if output.resolve() == options.model.resolve():
        raise UserError(f"{output} is the model itself: give --output another name")
    if not 1 <= options.opt_batch <= options.max_batch:
        raise UserError(
            f"--opt-batch {options.opt_batch} and --max-batch {options.max_batch}: needed is 1 <= opt <= max"
        )
    check_writable(output)
    toolkit = find_toolkit(options.builder)
    capabilities = options.compute_capabilities or (DEFAULT_CAPABILITIES if toolkit.name == "tensorrt-rtx" else ())
    target = toolkit.gpu or "compute capabilities " + " ".join(capabilities)
    say(f"{toolkit.title}, {toolkit.typing}ly typed, for {target}")

    built = build(toolkit, options.model, capabilities, options.opt_batch, options.max_batch)
    _print_audit(built)
    if source is None:
        warn(f"{options.model} has no sidecar: its provenance, preprocessing and class names are unknown")
    sidecar = _sidecar(built, toolkit, capabilities, source, parent, options)
    write_artifact(output, sidecar, lambda path: _write_plan(path, built.plan))
    say(f"wrote {output} and {sidecar_path(output).name}")
    if broken := built.audit.broken:
        names = ", ".join(finding.node for finding in broken[:5]) + (" ..." if len(broken) > 5 else "")
        warn(
            f"{len(broken)} of the layers that the ONNX declares INT8 are not INT8 in the engine ({names}); "
            f"the engine is written, but exit code {EXIT_NOT_INT8} says that it is not what was trained"
        )
        return EXIT_NOT_INT8
    return 0


def build(toolkit: Toolkit, model: Path, capabilities: tuple[str, ...], opt_batch: int, max_batch: int) -> Built:
    """Parses ``model``, builds its engine and audits it; nothing is written.

    A dynamic batch gets an optimization profile from 1 to ``max_batch``. Raises UserError when the parser or
    the builder refuses the model, naming the node, or when a compute capability is not supported.
    """
    from deploy import audit, diagnose
    from deploy.trt import BuildLog

    log = BuildLog()
    builder = toolkit.module.Builder(toolkit.logger(log))
    config = toolkit.create_config(builder, capabilities)
    network = _parse(toolkit, builder, model, log)
    declared = audit.declared_layers(network, toolkit.module)
    _add_profile(builder, config, network, opt_batch, max_batch)

    start = time.perf_counter()
    with _build_progress(toolkit, config):
        plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if plan is None:
        raise UserError(
            f"{toolkit.title} could not build {model}: {diagnose.build_failure(log)}; "
            "change the model there, or try the other --builder"
        )
    form, text = toolkit.final_layers(log, plan)
    layers = audit.layers_from_log(text) if form == "log" else audit.layers_from_inspector(text)
    if not layers:
        raise UserError(
            f"{toolkit.title} did not list the engine's layers: nothing proves their precision; report this"
        )
    inputs = _specs([network.get_input(i) for i in range(network.num_inputs)])
    outputs = _specs([network.get_output(i) for i in range(network.num_outputs)])
    return Built(plan, seconds, inputs, outputs, audit.audit(declared, layers), log)


def _read_model(model: Path, output: Path) -> tuple[Sidecar | None, Parent]:
    """The model's sidecar, where there is one, and its identity; UserError when they do not fit together."""
    if not model.is_file():
        raise UserError(f"no file {model}: check the path, or make it with python -m export.onnx")
    if sidecar_path(model).exists():
        source = read_sidecar(model, "onnx")
        return source, Parent.of(output, model, source.sha256)
    return None, Parent.of(output, model, sha256_of(model))


def _parse(toolkit: Toolkit, builder: Any, model: Path, log: BuildLog) -> Any:
    from deploy import diagnose

    network = toolkit.create_network(builder)
    parser = toolkit.module.OnnxParser(network, toolkit.logger(log))
    if not parser.parse_from_file(str(model)):
        failures = diagnose.parser_failures(parser, log)
        raise UserError(f"{toolkit.title} cannot parse {model}: {diagnose.explain(failures, log)}")
    if nodes := diagnose.uint8_nodes(log):
        raise UserError(
            f"{model} quantizes to UINT8 at {len(nodes)} nodes, the first {nodes[0]!r}, which TensorRT would "
            "take as INT8, so that codes above 127 saturate: quantize again with INT8 and zero point 0"
        )
    if network.num_outputs == 0:  # the parser takes an empty file, and text too, for a network without nodes
        raise UserError(f"{model} holds no network: it is empty or not an ONNX file; make or copy it again")
    return network


def _add_profile(builder: Any, config: Any, network: Any, opt_batch: int, max_batch: int) -> None:
    dynamic = [network.get_input(i) for i in range(network.num_inputs) if -1 in tuple(network.get_input(i).shape)]
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for tensor in dynamic:
        batch, *rest = tensor.shape
        if -1 in rest:
            raise UserError(
                f"input {tensor.name!r} has shape {(batch, *rest)}: only the first dimension, the batch, may "
                "be dynamic; export it with fixed sizes"
            )
        profile.set_shape(tensor.name, (1, *rest), (opt_batch, *rest), (max_batch, *rest))
    config.add_optimization_profile(profile)


@contextmanager
def _build_progress(toolkit: Toolkit, config: Any) -> Iterator[None]:
    """Shows how far the build is; where the builder does not tell, the seconds that it has taken."""
    start = time.monotonic()
    ended = threading.Event()
    with progress("building the engine, percent", 100) as task:

        def report(fraction: float, phase: str) -> None:
            task.advance(max(0, int(100 * fraction) - task.done), phase)

        def tick() -> None:
            while not ended.wait(1.0):
                task.advance(0, f"{time.monotonic() - start:.0f} s")

        clock = threading.Thread(target=tick, daemon=True)
        if not toolkit.reports_progress:
            clock.start()
        try:
            with toolkit.report_progress(config, report):
                yield
        finally:
            ended.set()


def _specs(tensors: list[Any]) -> tuple[TensorSpec, ...]:
    from deploy.trt import numpy_name

    return tuple(TensorSpec(tensor.name, tuple(tensor.shape), numpy_name(tensor.dtype)) for tensor in tensors)


def _write_plan(path: Path, plan: Any) -> None:
    path.write_bytes(memoryview(plan))


def _megabytes(count: int | None) -> str:
    return "not logged" if count is None else f"{count / MB:.2f} MB"


def _print_audit(built: Built) -> None:
    convolutions, products = built.audit.count("convolution"), built.audit.count("matrix product")
    rows = [
        ("convolutions in INT8", f"{convolutions[0]} of {convolutions[1]}"),
        ("matrix products in INT8", f"{products[0]} of {products[1]}"),
        ("weights memory", _megabytes(built.log.weights_bytes())),
        ("engine", _megabytes(built.plan.nbytes)),
        ("build", f"{built.seconds:.1f} s"),
    ]
    table("Audit", ("what", "found"), rows)
    for finding in built.audit.findings:
        if finding.precision != "INT8":
            found = ("declared INT8, " if finding.declared_int8 else "") + finding.precision
            say(f"not INT8: {finding.operation} {finding.node} ({found}): {finding.cause}")


def _sidecar(
    built: Built,
    toolkit: Toolkit,
    capabilities: tuple[str, ...],
    source: Sidecar | None,
    parent: Parent,
    options: Options,
) -> Sidecar:
    convolutions, products = built.audit.count("convolution"), built.audit.count("matrix product")
    figures = {
        "build_seconds": round(built.seconds, 3),
        "engine_bytes": built.plan.nbytes,
        "weights_bytes": built.log.weights_bytes(),
        "convolutions_int8": convolutions[0],
        "convolutions": convolutions[1],
        "matrix_products_int8": products[0],
        "matrix_products": products[1],
    }
    details = {
        "builder": {"name": toolkit.name, "version": toolkit.version},
        "typing": toolkit.typing,
        "compute_capabilities": list(capabilities),
        "gpu": toolkit.gpu,
        "batch": {"min": 1, "opt": options.opt_batch, "max": options.max_batch} if _is_dynamic(built) else None,
        "provenance": "known" if source else "unknown: the ONNX file has no sidecar",
        "onnx": {"figures": dict(source.figures), "made_by": dict(source.made_by)} if source else None,
        "findings": [asdict(finding) for finding in built.audit.findings],
        "layers": [asdict(layer) | {"precision": layer.precision} for layer in built.audit.layers],
        "warnings": built.log.texts("WARNING"),
    }
    return Sidecar(
        kind="engine",
        parent=parent,
        inputs=built.inputs,
        outputs=built.outputs,
        preprocessing=source.preprocessing if source else {},
        class_names=source.class_names if source else (),
        figures=figures,
        details=details,
    )


def _is_dynamic(built: Built) -> bool:
    return any(-1 in spec.shape for spec in built.inputs)


if __name__ == "__main__":
    run_command(main, Options)
