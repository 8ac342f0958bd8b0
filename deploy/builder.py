"""ONNX file -> engine in memory: parses, configures and builds, and audits the engine's precision."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import builder_errors
from deploy.build_log import BuildLog
from deploy.build_progress import build_progress
from deploy.calibrator import Calibration
from deploy.compiled_parts import look_into_parts
from deploy.dynamic_ranges import RangeTable
from deploy.engine_layers import layers_from_inspector, layers_from_log
from deploy.layer_types import LayerType, layers_as_built, set_types, type_rules
from deploy.parsed_network import ParsedNetwork
from deploy.precision_audit import PrecisionAudit, audit_precision, declared_layers
from deploy.settings import BuilderOptions, BuildSettings, Profile
from deploy.tensor_types import numpy_name, sizes
from deploy.transposed_scales import state_transposed_scales
from deploy.trt import TimingCache, Toolkit
from qat.base.artifact import TensorSpec
from qat.base.console import say
from qat.base.errors import UserError
from qat.base.number_format import INT8
from qat.base.onnx_file import flaw
from qat.base.onnx_structure import check_structure
from qat.base.supervised import native

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass(frozen=True)
class Repetition:
    """Several builds of one network: the median latency of each in milliseconds, measured at one batch size."""

    batch: int
    milliseconds: Sequence[float]

    @property
    def spread_percent(self) -> float:
        """How much longer the slowest takes than the fastest, in percent."""
        return 100 * (max(self.milliseconds) / min(self.milliseconds) - 1)

    def __str__(self) -> str:
        listed = ", ".join(f"{median:.4f}" for median in self.milliseconds)
        return (
            f"{len(self.milliseconds)} builds, batch {self.batch}: {listed} ms; "
            f"kept the fastest, the slowest is {self.spread_percent:.1f} % slower"
        )


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in memory that has just been built, serialized in ``plan``."""

    plan: Any
    seconds: float
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    """Empty for an engine with a fixed batch."""
    audit: PrecisionAudit
    log: BuildLog
    timing_cache: TimingCache | None
    timing_cache_content: bytes
    float_weights: bool = False
    """Whether the builder got float weights, because it refused the INT8 weights of the file."""
    repetition: Repetition | None = None
    """All builds, if this is the fastest of several."""
    without_range: tuple[str, ...] = ()
    """Of ranges by hand alone: tensors that have none, so that no layer reads or writes them in INT8."""
    typed_layers: tuple[LayerType, ...] = ()
    """What single layers were asked to compute in and to write, and what they do."""
    units: Mapping[str, bool] = field(default_factory=dict)
    """Whether the GPU has units for FP16, INT8 and TF32, as far as the builder says it."""

    @property
    def bytes(self) -> int:
        """Size of the serialized engine."""
        return memoryview(self.plan).nbytes


def build(
    toolkit: Toolkit,
    model: Path,
    settings: BuildSettings,
    timing_cache: bytes | None = None,
    extra_outputs: tuple[str, ...] = (),
    *,
    float_weights: bool = False,
    ranges: RangeTable | None = None,
    calibration: Calibration | None = None,
) -> BuiltEngine:
    """Parses an ONNX file, builds its engine and audits it. Nothing is written.

    If the builder refuses the network only because its weights are INT8, it gets the same codes as float weights.

    Args:
        toolkit: the builder.
        model: the ONNX file.
        settings: how to build.
        timing_cache: what an earlier build left (``BuiltEngine.timing_cache_content``), b"" for a new cache, None for
            no cache.
        extra_outputs: names of tensors inside the network that become outputs.
        float_weights: gives the builder float weights at once.
        ranges: of the tensors, for the precision int8. They come before those of the calibrator.
        calibration: what a calibrator finds the ranges with. It is done once: further builds take its cache.

    Raises UserError when the parser or the builder refuses the model, naming the node, and when this version of
    TensorRT does not have something that ``settings`` ask for.
    """
    check_ranges(settings, given=ranges is not None or calibration is not None)
    built = _try_build(toolkit, model, settings, timing_cache, extra_outputs, float_weights, ranges, calibration)
    if built is None:
        say(f"{toolkit.title} refuses {INT8.name} weights in this network: it gets the same codes as float weights")
        built = _try_build(toolkit, model, settings, timing_cache, extra_outputs, True, ranges, calibration)
    assert built is not None
    return replace(built, audit=look_into_parts(built.audit, built.plan, toolkit, settings))


def check_ranges(settings: BuilderOptions, *, given: bool) -> None:
    """Raises UserError when implicit INT8 has no ranges, or another precision has some."""
    if settings.precision == "int8" and not given:
        raise UserError("--precision int8 needs ranges of the tensors: give --data, --calibration-cache or --ranges")
    if settings.precision != "int8" and given:
        refused = "--data, --calibration-cache and --ranges are for --precision int8"
        raise UserError(f"{refused}, not {settings.precision}: leave them out")


def _try_build(
    toolkit: Toolkit,
    model: Path,
    settings: BuildSettings,
    timing_cache: bytes | None,
    extra_outputs: tuple[str, ...],
    float_weights: bool,
    ranges: RangeTable | None,
    calibration: Calibration | None,
) -> BuiltEngine | None:
    """Does what ``build`` does, but returns None if the builder refuses the INT8 weights."""
    log = BuildLog()
    builder: trt.Builder = toolkit.module.Builder(toolkit.logger(log))
    network = parse_onnx(toolkit, builder, model, log, settings, float_weights=float_weights)
    quantized = any(network.get_layer(index).type.name == "QUANTIZE" for index in range(network.num_layers))
    if quantized and settings.precision != "explicit":
        raise UserError(
            f"{model} has Q/DQ nodes, which say its precision: leave out --precision {settings.precision}, or give the "
            "float file (python -m export.onnx --precision float32 makes it)"
        )
    config = toolkit.create_config(builder, settings, quantized=quantized)
    outcome = None if timing_cache is None else toolkit.use_timing_cache(config, timing_cache)
    for name in extra_outputs:
        network.mark_output(_find_tensor(network, name))
    without_range = ranges.apply(network, toolkit.module) if ranges is not None else []
    asked = set_types(type_rules(settings), network, toolkit.module)
    declared = declared_layers(network, toolkit.module)
    profiles = _set_batch(toolkit, builder, config, network, settings.profiles)

    start = time.perf_counter()
    with native(f"{toolkit.title} building {model}"), build_progress(toolkit, config) as note:
        batch = sizes(network.get_input(0).shape)[0] if calibration else 0
        if calibration and batch < 0:
            batch = calibration.batch
            config.set_calibration_profile(_profile(toolkit, builder, network, Profile(batch, batch, batch)))
        with calibration.during_build(toolkit, config, batch, note) if calibration else nullcontext():
            plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if plan is None:
        if not float_weights and toolkit.refuses_int8_weights(log):
            return None
        raise UserError(
            f"{toolkit.title} could not build {model}: {builder_errors.build_failure(log)}; {_remedy(settings)}"
        )
    form, text = toolkit.final_layers(log, plan, host_code=settings.version_compatible)
    layers = layers_from_log(text) if form == "log" else layers_from_inspector(text)
    if not layers:
        raise UserError(
            f"{toolkit.title} did not list the engine's layers, so their precision cannot be checked; report this"
        )
    return BuiltEngine(
        plan=plan,
        seconds=seconds,
        inputs=_tensor_specs([network.get_input(i) for i in range(network.num_inputs)]),
        outputs=_tensor_specs([network.get_output(i) for i in range(network.num_outputs)]),
        profiles=profiles,
        audit=audit_precision(declared, layers, toolkit.without_int8_kernels),
        log=log,
        timing_cache=outcome,
        timing_cache_content=bytes(config.get_timing_cache().serialize()) if outcome else b"",
        float_weights=float_weights,
        without_range=() if calibration else tuple(without_range),
        typed_layers=layers_as_built(asked, layers),
        units=toolkit.units(builder),
    )


def _remedy(settings: BuildSettings) -> str:
    """What to do about a network that is not built."""
    if settings.constraints == "obey" and (settings.layer or settings.output_type):
        return "if no kernel has the types of --layer and --output-type, change them, or give --constraints prefer"
    return "change the model there, or try the other --builder"


def parse_onnx(
    toolkit: Toolkit,
    builder: trt.Builder,
    model: Path,
    log: BuildLog,
    settings: BuildSettings,
    *,
    float_weights: bool = False,
) -> trt.INetworkDefinition:
    """The network of an ONNX file, with its own weights or with float weights.

    Raises UserError that names the node when the parser refuses it, or scales that this version does not take.
    """
    check_structure(model)
    content = _model_with_float_weights(model) if float_weights else None
    network = toolkit.create_network(builder, settings.precision)
    parser = toolkit.module.OnnxParser(network, toolkit.logger(log))
    with native(f"{toolkit.title} parsing {model}"):
        parsed = parser.parse_from_file(str(model)) if content is None else parser.parse(content)
    if not parsed:
        failures = builder_errors.parser_failures(parser, log)
        raise UserError(f"{toolkit.title} cannot parse {model}: {builder_errors.explain(model, failures, log)}")
    if nodes := builder_errors.uint8_nodes(log):
        raise UserError(
            f"{model} quantizes to UINT8 at {len(nodes)} nodes, the first {nodes[0]!r}. TensorRT would read them as "
            f"{INT8.name}, so that codes above {INT8.high} saturate: quantize again with {INT8.name} and zero point 0"
        )
    if network.num_outputs == 0:  # the parser reads an empty file, or text, as a network without nodes
        raise UserError(f"{model} {flaw(model) or 'holds a network without outputs'}: make or copy it again")
    if (axis := toolkit.transposed_scale_axis) is not None:
        state_transposed_scales(network, toolkit, model, axis)
    return network


def _model_with_float_weights(model: Path) -> bytes:
    try:
        from export.float_weights import with_float_weights
    except ImportError as error:
        raise UserError(f"writing float weights needs another package: pip install {error.name}") from error
    return with_float_weights(model)


@contextmanager
def open_network(toolkit: Toolkit, model: Path, settings: BuildSettings) -> Iterator[ParsedNetwork]:
    """The parsed network of an ONNX file while the block runs. Raises UserError as ``parse_onnx`` does."""
    log = BuildLog()
    builder: trt.Builder = toolkit.module.Builder(toolkit.logger(log))
    network = parse_onnx(toolkit, builder, model, log, settings)
    yield ParsedNetwork(network)


def _set_batch(
    toolkit: Toolkit,
    builder: trt.Builder,
    config: trt.IBuilderConfig,
    network: trt.INetworkDefinition,
    profiles: tuple[Profile, ...],
) -> tuple[Profile, ...]:
    """Makes a dynamic batch static, or gives it the profiles. Returns the profiles that the engine will have."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    dynamic = {tensor.name: (tensor, sizes(tensor.shape)[1:]) for tensor in inputs if -1 in sizes(tensor.shape)}
    for name, (tensor, image) in dynamic.items():
        if -1 in image:
            raise UserError(
                f"input {name!r} has shape {sizes(tensor.shape)}: only the first dimension, the batch, may "
                "be dynamic; export it with fixed sizes"
            )
    if not dynamic:
        own = sizes(inputs[0].shape)[:1]
        if profiles[0].fixed and own != (profiles[0].opt,):
            raise UserError(
                f"the ONNX file has a fixed batch of {', '.join(map(str, own))}, but the profile asks for "
                f"{profiles[0].opt}: export it with a dynamic batch"
            )
        return ()
    if profiles[0].fixed:
        for tensor, image in dynamic.values():
            tensor.shape = toolkit.module.Dims((profiles[0].opt, *image))
        return ()
    for profile in profiles:
        config.add_optimization_profile(_profile(toolkit, builder, network, profile))
    return profiles


def _profile(
    toolkit: Toolkit, builder: trt.Builder, network: trt.INetworkDefinition, profile: Profile
) -> trt.IOptimizationProfile:
    """TensorRT's form of a profile: the shapes of all inputs with a dynamic batch."""
    shapes = builder.create_optimization_profile()
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        if -1 in sizes(tensor.shape):
            image = sizes(tensor.shape)[1:]
            dims = (toolkit.module.Dims((batch, *image)) for batch in (profile.min, profile.opt, profile.max))
            shapes.set_shape(tensor.name, *dims)
    return shapes


def _find_tensor(network: trt.INetworkDefinition, name: str) -> trt.ITensor:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output in map(layer.get_output, range(layer.num_outputs)):
            if output.name == name:
                return output
    raise UserError(f"the network has no tensor {name!r}")


def _tensor_specs(tensors: list[trt.ITensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(tensor.name, sizes(tensor.shape), numpy_name(tensor.dtype)) for tensor in tensors)
