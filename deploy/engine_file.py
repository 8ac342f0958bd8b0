"""ONNX file -> engine file: deploy/builder.py makes the engine in memory; here it is audited and gets its sidecar."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from deploy.builder import BuiltEngine, build, check_ranges
from deploy.calibration import RangeSources, range_sources
from deploy.compiled_parts import describe
from deploy.float_twin import SpeedCheck, check_comparable, verify
from deploy.installed import find_toolkit
from deploy.layer_types import LayerType, type_rules
from deploy.precision_audit import PrecisionAudit
from deploy.repeat import build_fastest
from deploy.settings import DEFAULT_PROFILES, BuilderOptions, BuildSettings, CalibrationSettings, Profile
from deploy.timing_cache import TimingCacheFile
from deploy.trt import Toolkit
from deploy.weak_typing import warn_of_tf32_override
from qat.base.artifact import Parent, Sidecar, read_sidecar, sha256_of, sidecar_path, write_artifact
from qat.base.choices import BuilderName
from qat.base.console import say, table, warn
from qat.base.errors import UserError
from qat.base.exit_codes import NOT_INT8
from qat.base.number_format import INT8
from qat.base.onnx_structure import check_structure
from qat.base.text import first_of, megabytes
from qat.base.writing import check_writable
from qat.rules.tuned import warn_if_tuned_elsewhere

DEFAULT_CAPABILITIES = ("8.6", "8.9", "12.0")
UNKNOWN_PROVENANCE = "unknown: the ONNX file has no sidecar"
_NO_RANGES = RangeSources()


@dataclass(frozen=True)
class EngineFile:
    """An engine that was built and written.

    Attributes:
        path: the engine; its sidecar is beside it.
        sidecar: inputs, outputs, figures (times, sizes, counts of layers) and details (settings, layers, log).
        audit: the precision of every convolution and matrix product. ``audit.broken`` lists those that the ONNX file
            declares INT8 and that are not INT8 in the engine.
    """

    path: Path
    sidecar: Sidecar
    audit: PrecisionAudit


def build_engine(
    model: str | Path,
    output: str | Path | None = None,
    *,
    builder: Literal["auto"] | BuilderName = "auto",
    profiles: Sequence[Profile] = DEFAULT_PROFILES,
    compute_capabilities: Sequence[str] | None = None,
    repeat: int = 1,
    timing_cache: str | Path | None = None,
    ranges: str | Path | None = None,
    calibration: CalibrationSettings | None = None,
    verify_speed: bool = False,
    fall_back: bool = False,
    settings: BuilderOptions | None = None,
    trust_code: bool = False,
) -> EngineFile:
    """Builds an engine from an ONNX file, audits it, and writes it with its sidecar.

    Progress goes to standard output: a bar on a terminal, else a line every few seconds.

    Args:
        model: the ONNX file, with Q/DQ nodes for the layers that run in INT8. Its sidecar is used if there is one.
        output: the engine to write; by default the model's name with the suffix .engine.
        builder: ``tensorrt`` (needs a GPU), ``tensorrt-rtx`` (builds without one), or ``auto``: TensorRT if it and a
            GPU are usable, else TensorRT-RTX.
        profiles: the batch sizes that a dynamic batch takes, in images. A single fixed one makes the batch static.
        compute_capabilities: the GPUs that TensorRT-RTX builds for; by default 8.6, 8.9 and 12.0.
        repeat: how often to build; the engine that is fastest at the OPT batch is kept. More than 1 needs a GPU.
        timing_cache: a file that keeps measured kernel times, so that later builds are shorter.
        ranges: for the precision int8, the ranges of the tensors: a CSV or JSON file, or a calibration cache of
            TensorRT (deploy/dynamic_ranges.py). They come before those of the calibration.
        calibration: for the precision int8, TensorRT's calibrator, what it is fed, and its cache.
        verify_speed: also build the FP16 engine of the same network, measure both in turns at the OPT batch, and say
            and record which is faster. Needs a GPU.
        fall_back: with ``verify_speed``, write the FP16 engine where INT8 is not faster beyond the spread.
        settings: the options of the builder; by default TensorRT's own, without TF32.
        trust_code: run the code that a stranger's checkpoint, given as ``ranges``, names (docs/trust.md).

    Returns what was written, with the audit: a layer that is declared INT8 and is not is in ``audit.broken``.

    Raises UserError when the model is missing, damaged or refused, when no builder is installed, when the arguments
    contradict each other, and when the engine cannot be written. Its message names them as the command line does.

    Example::

        built = build_engine("model.onnx", profiles=[Profile(1, 8, 32)])
        assert not built.audit.broken
        print(built.path, built.sidecar.figures["engine_bytes"])
    """
    model = Path(model)
    output = model.with_suffix(".engine") if output is None else Path(output)
    cache = None if timing_cache is None else Path(timing_cache)
    options = settings or BuilderOptions()
    BuildSettings.from_options(options, profiles=tuple(profiles))  # wrong settings are the cheapest to find
    source, parent = _read_model(model, output)
    calibration_cache = calibration.calibration_cache if calibration else None
    path_of_ranges = None if ranges is None else Path(ranges)
    written = {"--output": output, "--timing-cache": cache, "--calibration-cache": calibration_cache}
    _check_names(model, path_of_ranges, written)
    if repeat < 1:
        raise UserError(f"--repeat {repeat}: must be at least 1")
    check_ranges(options, given=ranges is not None or (calibration is not None and calibration.asked_for))
    type_rules(options)
    check_writable(output)
    toolkit = find_toolkit(builder)
    if source and toolkit.device:
        warn_if_tuned_elsewhere(source.details, toolkit.device.name, toolkit.version)
    if verify_speed or fall_back:
        check_comparable(toolkit, options, verify=verify_speed)
    toolkit.typing(options.precision)
    warn_of_tf32_override(asdict(options))
    capabilities = tuple(compute_capabilities or (DEFAULT_CAPABILITIES if toolkit.name == "tensorrt-rtx" else ()))
    target = toolkit.device.name if toolkit.device else "compute capabilities " + " ".join(capabilities)
    say(f"{toolkit.title}, {toolkit.typing(options.precision)}ly typed, for {target}")
    build_settings = BuildSettings.from_options(options, profiles=tuple(profiles), capabilities=capabilities)
    sources = range_sources(
        toolkit, model, source, parent.sha256, build_settings, calibration, path_of_ranges, trust_code=trust_code
    )
    with sources.saved():
        built = build_with_cache_or_repeat(toolkit, model, build_settings, repeat, cache, sources)
    _say_ranges(sources, built.without_range, strict=options.strict)
    speed = None
    if verify_speed:
        speed, floats = verify(toolkit, model, built, build_settings)
        if fall_back and not speed.wins:
            say("writing the FP16 engine")
            built, build_settings, speed = floats.built, floats.settings, dataclasses.replace(speed, written="float16")
    sidecar = write_engine(output, built, toolkit, build_settings, source, parent, sources, speed)
    return EngineFile(output, sidecar, built.audit)


def build_with_cache_or_repeat(
    toolkit: Toolkit,
    model: Path,
    settings: BuildSettings,
    repeat: int,
    timing_cache: Path | None,
    sources: RangeSources = _NO_RANGES,
) -> BuiltEngine:
    """Builds ``repeat`` times and keeps the fastest engine, or builds once, with the timing cache if there is one.

    Raises UserError as ``build`` does, and when repetition is not possible.
    """
    if repeat == 1:
        cache = TimingCacheFile(timing_cache, toolkit, settings) if timing_cache else None
        content = cache.content if cache else None
        built = build(toolkit, model, settings, content, ranges=sources.by_hand, calibration=sources.calibration)
        return dataclasses.replace(built, timing_cache=cache.save(built)) if cache else built
    if toolkit.device is None:
        raise UserError("--repeat keeps the fastest engine, but engines cannot be timed without a GPU: leave it out")
    if settings.strip_weights:
        raise UserError("an engine without weights cannot be timed: leave out --strip-weights or --repeat")
    if timing_cache is not None:
        raise UserError("--repeat times kernels again in each build, but --timing-cache avoids that: give one of them")
    built = build_fastest(toolkit, model, settings, repeat, sources.by_hand, sources.calibration)
    say(str(built.repetition))
    return built


def write_engine(
    path: Path,
    built: BuiltEngine,
    toolkit: Toolkit,
    settings: BuildSettings,
    source: Sidecar | None,
    parent: Parent,
    ranges: RangeSources = _NO_RANGES,
    speed: SpeedCheck | None = None,
) -> Sidecar:
    """Writes an engine and its sidecar.

    Args:
        path: the engine file.
        built: the engine.
        toolkit, settings: what it was built with.
        source: the sidecar of its ONNX file, if there is one.
        parent: the ONNX file.
        ranges: where the ranges of implicit INT8 came from.
        speed: how it compares with FP16, if that was measured.

    Returns the sidecar as written. Raises UserError when the disk does not take it.
    """
    sidecar = _engine_sidecar(built, toolkit, settings, source, parent, ranges, speed)
    return write_artifact(path, sidecar, lambda temporary: temporary.write_bytes(memoryview(built.plan)))


def print_engine_file(engine: EngineFile) -> None:
    """Prints the audit and what was written, with warnings about what is not as it should be."""
    sidecar, audit = engine.sidecar, engine.audit
    _print_audit(sidecar, audit)
    if sidecar.details["provenance"] == UNKNOWN_PROVENANCE:
        warn(f"the ONNX file of {engine.path} has no sidecar: provenance, preprocessing and class names are unknown")
    say(f"wrote {engine.path} and {sidecar_path(engine.path).name}")
    if audit.broken:
        names = ", ".join(finding.node for finding in audit.broken[:5]) + (" ..." if len(audit.broken) > 5 else "")
        warn(
            f"{len(audit.broken)} of the layers that the ONNX file declares {INT8.name} are not {INT8.name} in the "
            f"engine ({names}); the engine is written, but exit code {NOT_INT8} says that it is not what was trained"
        )


def _read_model(model: Path, output: Path) -> tuple[Sidecar | None, Parent]:
    """The model's sidecar, if there is one, and its identity. Raises UserError when they do not fit together."""
    if not model.is_file():
        raise UserError(f"no file {model}: check the path, or make it with python -m export.onnx")
    if sidecar_path(model).exists():
        source = read_sidecar(model, "onnx")
        return source, Parent.from_file(output, model, source.sha256)
    check_structure(model)  # before it is read whole, and before TensorRT is loaded
    return None, Parent.from_file(output, model, sha256_of(model))


def _say_ranges(sources: RangeSources, missing: Sequence[str], *, strict: bool) -> None:
    """What was done with ranges by hand, and what follows for tensors that have none."""
    table = sources.by_hand
    if table is None:
        return
    say(f"ranges from {table.source}: {len(table.amax)} tensors")
    if table.lopsided:
        say(f"  {table.lopsided} have a min and a max of different size: TensorRT's are symmetric, the larger counts")
    if table.zero:
        say(f"  {len(table.zero)} are 0, which tells nothing: {first_of(table.zero)}")
    if missing:
        say(
            f"  {len(missing)} tensors have none: those that fused layers keep inside need none, but what reads or "
            f"writes the others runs in {'FP32' if strict else 'FP16'}: {first_of(missing)}"
        )


def _say_layer_types(layers: Sequence[LayerType]) -> None:
    """Which single layers have the types that were asked for, and which have not."""
    if not layers:
        return
    say(f"types of single layers: {sum(layer.obeyed is True for layer in layers)} of {len(layers)} are as asked")
    for layer in layers:
        if not layer.obeyed:
            say(f"  {layer}")


def _check_names(model: Path, ranges: Path | None, written: Mapping[str, Path | None]) -> None:
    """Raises UserError when a file to be ``written``, by its option, would overwrite another one."""
    known = {model.resolve(): "the model"} | ({ranges.resolve(): "the file of --ranges"} if ranges else {})
    for option, path in written.items():
        if path and path.resolve() in known:
            raise UserError(f"{option} {path} is {known[path.resolve()]}: give it a name of its own")
        if path:
            known[path.resolve()] = f"the file of {option}"


def _engine_sidecar(
    built: BuiltEngine,
    toolkit: Toolkit,
    settings: BuildSettings,
    source: Sidecar | None,
    parent: Parent,
    ranges: RangeSources,
    speed: SpeedCheck | None,
) -> Sidecar:
    convolutions, products = built.audit.count("convolution"), built.audit.count("matrix product")
    figures = {
        "build_seconds": round(built.seconds, 3),
        "engine_bytes": built.bytes,
        "weights_bytes": built.log.weights_bytes(),
        "layers": len(built.audit.layers),
        "layers_writing_fp32": sum(layer.writes_fp32 for layer in built.audit.layers),
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
        "without_range": list(built.without_range),
        "ranges": ranges.to_json(),
        "speed": speed.to_json() if speed else None,
        "layer_types": [asdict(layer) for layer in built.typed_layers],
        "units": dict(built.units),
        "repetition": asdict(built.repetition) if built.repetition else None,
        "hardware_compatible": settings.hardware_compatible,
        "version_compatible": settings.version_compatible,
        "provenance": "known" if source else UNKNOWN_PROVENANCE,
        "onnx": {"figures": dict(source.figures), "made_by": dict(source.made_by)} if source else None,
        "findings": [asdict(finding) for finding in built.audit.findings],
        "kernels": [asdict(kernel) for kernel in built.audit.kernels],
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


def _print_audit(sidecar: Sidecar, audit: PrecisionAudit) -> None:
    figures = sidecar.figures
    rows = [
        (f"convolutions in {INT8.name}", f"{figures['convolutions_int8']} of {figures['convolutions']}"),
        (f"matrix products in {INT8.name}", f"{figures['matrix_products_int8']} of {figures['matrix_products']}"),
        ("layers", str(figures["layers"])),
        ("float layers that write FP32", str(figures["layers_writing_fp32"])),
        ("weights memory", megabytes(figures["weights_bytes"], absent="not logged")),
        ("engine", megabytes(figures["engine_bytes"])),
        ("build", f"{figures['build_seconds']:.1f} s"),
    ]
    if sidecar.details["units"]:
        units = [name for name, has in sidecar.details["units"].items() if has]
        rows.append(("units of this GPU", ", ".join(units) or "none of FP16, INT8 and TF32"))
    table("Audit", ("what", "found"), rows)
    if audit.kernels:
        say(describe(audit))
    _say_layer_types([LayerType(**layer) for layer in sidecar.details["layer_types"]])
    others = [finding for finding in audit.findings if finding.precision != INT8.name]
    if len(others) > 1 and not any(finding.declared_int8 for finding in audit.findings):
        say(f"not {INT8.name}: all {len(others)} of them, which the ONNX file does not declare {INT8.name}")
        return
    alike: dict[tuple[str, ...], list[str]] = {}  # a part may hold a hundred of one cause
    for finding in others:
        found = (f"declared {INT8.name}, " if finding.declared_int8 else "") + finding.precision
        alike.setdefault((finding.operation, found, finding.cause), []).append(finding.node)
    for (operation, found, cause), nodes in alike.items():
        say(f"not {INT8.name}: {operation} {first_of(nodes)} ({found}): {cause}")
