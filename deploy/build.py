"""Builds a TensorRT engine from a Q/DQ ONNX file and audits it: is INT8 what the ONNX declares INT8?

    python -m deploy.build runs/model.onnx
    python -m deploy.build runs/model.onnx --profiles 1,1,8 32,128,256 --timing-cache runs/timing.cache

With a GPU and TensorRT the engine is built for that GPU; without, TensorRT-RTX builds it ahead of time
for the compute capabilities asked for. Exit code 3 says that a layer which the ONNX declares INT8 runs in
another precision.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from deploy.settings import BuilderOptions, BuildSettings, Profile
from deploy.timing_cache import TimingCacheFile
from qat.base.artifact import Parent, Sidecar, check_writable, read_sidecar, sha256_of, sidecar_path, write_artifact
from qat.base.console import Command, run_command, say, table, warn
from qat.base.errors import UserError
from qat.base.exit_codes import NOT_INT8
from qat.base.text import megabytes

if TYPE_CHECKING:
    from deploy.builder import Built
    from deploy.trt import Toolkit

DEFAULT_CAPABILITIES = ("8.6", "8.9", "12.0")


@dataclass(frozen=True, kw_only=True)
class Options(Command, BuilderOptions):
    """What to build, and for which GPUs."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL.onnx")]
    """The ONNX file."""
    output: Path | None = None
    """The engine to write; by default the model's name with the suffix .engine."""
    builder: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    """auto: TensorRT where a GPU is, else TensorRT-RTX."""
    compute_capabilities: tuple[str, ...] | None = None
    """For TensorRT-RTX, the GPUs to build for; by default 8.6 8.9 12.0."""
    profiles: tuple[str, ...] = ("1,8,32",)
    """Batch sizes MIN,OPT,MAX that a dynamic batch takes and is tuned for; several make several profiles. A single
    number, such as 128, is a fixed batch, which is the fastest."""
    repeat: int = 1
    """Build so often and keep the engine that is fastest at the OPT batch: the choice of kernels varies from build to
    build. Needs a GPU."""
    timing_cache: Path | None = None
    """File that keeps the timings of kernels: made by the first build, it shortens the next ones."""

    def settings(self, capabilities: tuple[str, ...]) -> BuildSettings:
        """As the builder takes them. Raises UserError."""
        profiles = tuple(Profile.parse(text) for text in self.profiles)
        return BuildSettings.from_options(self, profiles=profiles, capabilities=capabilities)


def main(options: Options) -> int:
    """Builds, audits and writes the engine. Returns 0, or 3 when a declared INT8 layer is not INT8."""
    from deploy.trt import find_toolkit

    output = options.output or options.model.with_suffix(".engine")
    options.settings(())  # its mistakes are the cheapest to find
    source, parent = _read_model(options.model, output)
    if output.resolve() == options.model.resolve():
        raise UserError(f"{output} is the model itself: give --output another name")
    if options.timing_cache and options.timing_cache.resolve() in (output.resolve(), options.model.resolve()):
        raise UserError(f"--timing-cache {options.timing_cache} is the model or the engine: give it a name of its own")
    if options.repeat < 1:
        raise UserError(f"--repeat {options.repeat}: needed is 1 at least")
    check_writable(output)
    toolkit = find_toolkit(options.builder)
    capabilities = options.compute_capabilities or (DEFAULT_CAPABILITIES if toolkit.name == "tensorrt-rtx" else ())
    target = toolkit.device.name if toolkit.device else "compute capabilities " + " ".join(capabilities)
    say(f"{toolkit.title}, {toolkit.typing()}ly typed, for {target}")

    settings = options.settings(capabilities)
    built = _build(toolkit, options, settings)
    _print_audit(built)
    if source is None:
        warn(f"{options.model} has no sidecar: its provenance, preprocessing and class names are unknown")
    sidecar = engine_sidecar(built, toolkit, settings, source, parent)
    write_artifact(output, sidecar, lambda path: write_plan(path, built.plan))
    say(f"wrote {output} and {sidecar_path(output).name}")
    if broken := built.audit.broken:
        names = ", ".join(finding.node for finding in broken[:5]) + (" ..." if len(broken) > 5 else "")
        warn(
            f"{len(broken)} of the layers that the ONNX declares INT8 are not INT8 in the engine ({names}); "
            f"the engine is written, but exit code {NOT_INT8} says that it is not what was trained"
        )
        return NOT_INT8
    return 0


def _read_model(model: Path, output: Path) -> tuple[Sidecar | None, Parent]:
    """The model's sidecar, where there is one, and its identity; UserError when they do not fit together."""
    if not model.is_file():
        raise UserError(f"no file {model}: check the path, or make it with python -m export.onnx")
    if sidecar_path(model).exists():
        source = read_sidecar(model, "onnx")
        return source, Parent.from_file(output, model, source.sha256)
    return None, Parent.from_file(output, model, sha256_of(model))


def _build(toolkit: Toolkit, options: Options, settings: BuildSettings) -> Built:
    """Builds as often as asked, or with the timing cache."""
    from deploy.builder import build
    from deploy.repeat import build_fastest

    if options.repeat == 1:
        cache = TimingCacheFile(options.timing_cache, toolkit, settings) if options.timing_cache else None
        built = build(toolkit, options.model, settings, cache.content if cache else None)
        return dataclasses.replace(built, timing_cache=cache.save(built)) if cache else built
    if toolkit.device is None:
        raise UserError("--repeat keeps the fastest engine, and without a GPU none can be timed: leave it out")
    if options.strip_weights:
        raise UserError("an engine without weights cannot be timed: leave out --strip-weights or --repeat")
    if options.timing_cache is not None:
        raise UserError("--repeat times kernels anew in each build, --timing-cache avoids just that: give one of them")
    built = build_fastest(toolkit, options.model, settings, options.repeat)
    say(str(built.repetition))
    return built


def write_plan(path: Path, plan: object) -> None:
    """Writes a serialized engine."""
    path.write_bytes(memoryview(plan))  # type: ignore[arg-type]


def _print_audit(built: Built) -> None:
    convolutions, products = built.audit.count("convolution"), built.audit.count("matrix product")
    rows = [
        ("convolutions in INT8", f"{convolutions[0]} of {convolutions[1]}"),
        ("matrix products in INT8", f"{products[0]} of {products[1]}"),
        ("layers", str(len(built.audit.layers))),
        ("weights memory", megabytes(built.log.weights_bytes(), absent="not logged")),
        ("engine", megabytes(built.bytes)),
        ("build", f"{built.seconds:.1f} s"),
    ]
    table("Audit", ("what", "found"), rows)
    others = [finding for finding in built.audit.findings if finding.precision != "INT8"]
    if len(others) > 1 and not any(finding.declared_int8 for finding in built.audit.findings):
        say(f"not INT8: all {len(others)} of them, which the ONNX file does not declare INT8")
        return
    for finding in others:
        found = ("declared INT8, " if finding.declared_int8 else "") + finding.precision
        say(f"not INT8: {finding.operation} {finding.node} ({found}): {finding.cause}")


def engine_sidecar(
    built: Built, toolkit: Toolkit, settings: BuildSettings, source: Sidecar | None, parent: Parent
) -> Sidecar:
    """What is recorded of an engine; ``source`` is the sidecar of its ONNX file, where there is one."""
    convolutions, products = built.audit.count("convolution"), built.audit.count("matrix product")
    figures = {
        "build_seconds": round(built.seconds, 3),
        "engine_bytes": built.bytes,
        "weights_bytes": built.log.weights_bytes(),
        "layers": len(built.audit.layers),
        "convolutions_int8": convolutions[0],
        "convolutions": convolutions[1],
        "matrix_products_int8": products[0],
        "matrix_products": products[1],
    }
    details = {
        "builder": {"name": toolkit.name, "version": toolkit.version},
        "typing": toolkit.typing(settings.precision),
        "precision": settings.precision,
        "compute_capabilities": list(settings.capabilities),
        "gpu": toolkit.device.name if toolkit.device else None,
        "device": asdict(toolkit.device) if toolkit.device else None,
        "profiles": [asdict(profile) for profile in built.profiles],
        "settings": asdict(settings),
        "timing_cache": built.timing_cache,
        "float_weights": built.float_weights,
        "repetition": asdict(built.repetition) if built.repetition else None,
        "hardware_compatible": settings.hardware_compatible,
        "version_compatible": settings.version_compatible,
        "provenance": "known" if source else "unknown: the ONNX file has no sidecar",
        "onnx": {"figures": dict(source.figures), "made_by": dict(source.made_by)} if source else None,
        "findings": [asdict(finding) for finding in built.audit.findings],
        "layers": [asdict(layer) | {"precision": layer.precision} for layer in built.audit.layers],
        "log": [f"{severity}: {text}" for severity, text in built.log.messages if severity != "VERBOSE"],
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


if __name__ == "__main__":
    run_command(main, Options)
