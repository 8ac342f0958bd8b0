"""Float ONNX file -> INT8 ONNX file without training: prepare the graph, place, find ranges, write, compare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from onnxscript.rewriter.rules import common as rewrites

from export.calibration_cache import read_calibration_cache
from export.float_weights import save
from export.hard_rules import hard_findings
from export.insert import insert
from export.onnx_network import OnnxNetwork, network_from_onnx
from export.read import is_quantized, read_onnx
from export.reference import Sample, first_images, reference_path, write_reference
from export.reuse_concats import take_earlier_concats
from export.session import run, session, session_with_tensors, sqnr_db
from qat.base.artifact import (
    Parent,
    Sidecar,
    TensorSpec,
    check_writable,
    read_sidecar,
    sha256_of,
    sidecar_path,
    write_artifact,
)
from qat.base.console import progress, say, warn
from qat.base.errors import UserError
from qat.base.text import decibels, megabytes
from qat.calibration.activation_ranges import choose_ranges
from qat.calibration.histogram import HistogramObserver, check_finite
from qat.data.batches import batches
from qat.data.preprocessing import Preprocessing
from qat.data.splits import Data, load_data
from qat.rules.describe import say_placement
from qat.rules.place import place
from qat.rules.placement import Placement

if TYPE_CHECKING:
    from export.options import QuantizeOptions

OPSET = 17
"""Models of an older operator set are converted to this one: Q/DQ of single channels exist from 13 on."""
_FIRST_PER_CHANNEL = 13
_BATCH = 8
_MOST_FOLDED = 1 << 30  # elements of a constant that is computed now instead of in the engine


def quantize_file(options: QuantizeOptions) -> Sidecar:
    """Quantizes a file and returns the sidecar of the new one. Raises UserError for what the user can mend."""
    source = options.model
    output = options.output or source.with_name(source.name.removesuffix(".onnx") + ".int8.onnx")
    reference = reference_path(output)
    if options.data is None and options.calibration_cache is None:
        raise UserError("nothing tells the activation ranges: give --data, or --calibration-cache, or both")
    if output.resolve() == source.resolve():
        raise UserError(f"{output} would overwrite the float model: give another --output")
    if options.images < 1 or options.parity_images < 1:
        raise UserError("--images and --parity-images must be at least 1")
    for path in (output, reference):
        check_writable(path)
    model = _prepared(source)
    view = network_from_onnx(model)
    (given,) = model.graph.inputs
    inputs = None if options.data is None else _Inputs(options, given)

    if options.calibration_cache is not None:
        placement, amax = _from_cache(view, options, calibrated=inputs is not None)
    else:
        placement, amax = place(view.network, options.keep_float), {}
    if inputs is not None:
        amax |= _calibrated(model, view, placement, inputs, options, set(amax))
    say_placement(placement)
    plain = ir.to_proto(model).SerializeToString()
    dead = insert(model, view, placement, amax)
    if dead:
        warn(f"{dead} weight channels are zero; their scales were floored")
    if findings := hard_findings(model):
        raise UserError(f"the network breaks {len(findings)} of TensorRT's rules, first {findings[0]}: report it")

    figures: dict[str, Any] = {"nodes": len(list(model.graph))}
    details: dict[str, Any] = {
        "placement": placement.to_json(),
        "calibrator": options.calibrator if inputs else None,
        "calibration_cache": options.calibration_cache.name if options.calibration_cache else None,
        "precision": "int8",
        "weights": options.weights,
        "input": "float32-nchw",
    }

    def write(path: Path) -> None:
        save(ir.to_proto(model), path, options.weights)
        figures["bytes"] = path.stat().st_size
        if inputs is not None:
            figures["parity"], details["reference"] = _compared(plain, path, inputs, reference)

    preprocessing = asdict(inputs.preprocessing) if inputs and inputs.preprocessing else {}
    sidecar = Sidecar(
        kind="onnx",
        parent=Parent.from_file(output, source, sha256_of(source)),
        inputs=tuple(map(_spec, model.graph.inputs)),
        outputs=tuple(map(_spec, model.graph.outputs)),
        preprocessing=preprocessing,
        figures=figures,
        details=details,
    )
    written = write_artifact(output, sidecar, write, seed=options.seed)
    say(f"wrote {output}, {megabytes(figures['bytes'])}\nnext: python -m deploy.build {output}")
    return written


class _Inputs:
    """What the network is fed in calibration and in the comparison: images, or arrays that are ready."""

    def __init__(self, options: QuantizeOptions, given: ir.Value) -> None:
        assert options.data is not None
        self.name, self.options = given.name or "", options
        self.shape = [extent if isinstance(extent, int) else -1 for extent in (given.shape or ())]
        self.fixed = bool(self.shape) and self.shape[0] > 0
        self.batch = self.shape[0] if self.fixed else _BATCH
        self.data: Data | None = None
        self.preprocessing: Preprocessing | None = None
        if options.data.endswith(".npy"):
            if options.mean is not None or options.std is not None:
                raise UserError(f"{options.data} holds inputs as the network takes them: leave out --mean and --std")
            self.arrays = _read_arrays(Path(options.data), self.shape)
        elif len(self.shape) != 4 or self.shape[1] != 3 or self.shape[2] != self.shape[3] or self.shape[2] < 1:
            raise UserError(
                f"the network takes {self.name} of shape {self.shape}, images are [N, 3, S, S]: give --data an .npy "
                "file of float32 inputs as the network takes them"
            )
        else:
            self.data = load_data(options.data, self.shape[2], options.seed, options.images, options.data_root)
            self.preprocessing = _preprocessing(options, self.data)
        if self.count < self.batch and self.fixed:
            raise UserError(f"the network takes batches of {self.batch}, there are {self.count} inputs: give more")

    @property
    def count(self) -> int:
        """Inputs to calibrate on."""
        return min(self.options.images, len(self.arrays if self.data is None else self.data.calibration))

    def calibration(self) -> Iterator[np.ndarray]:
        """Batches to find ranges on, float32, as the network takes them."""
        if self.data is None:
            yield from self._batches(self.arrays[: self.count])
            return
        assert self.preprocessing is not None
        for x_NCHW, _ in batches(self.data.calibration, self.batch, None):
            yield from self._batches(self.preprocessing.normalize(x_NCHW).numpy())

    def comparison(self) -> tuple[Iterator[np.ndarray], Sample | None]:
        """Batches to compare two networks on, and the images that they were made of, where there are any."""
        count = self.options.parity_images
        if self.data is None:
            return self._batches(self.arrays[:count]), None
        assert self.preprocessing is not None
        images = first_images(self.data, count)
        return self._batches(self.preprocessing.normalize(images.images_NCHW).numpy()), images

    def _batches(self, arrays: np.ndarray) -> Iterator[np.ndarray]:
        """All of ``arrays``; of a fixed batch only whole ones."""
        end = len(arrays) - self.batch + 1 if self.fixed else len(arrays)
        for start in range(0, end, self.batch):
            yield arrays[start : start + self.batch]


def _read_arrays(path: Path, shape: list[int]) -> np.ndarray:
    try:
        arrays = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read inputs {path} ({error}): check the path") from error
    fits = arrays.ndim == len(shape) and all(a == b or b < 0 for a, b in zip(arrays.shape[1:], shape[1:], strict=True))
    if not fits or arrays.dtype != np.float32 or not len(arrays):
        raise UserError(
            f"{path} holds {arrays.dtype} {list(arrays.shape)}, the network takes float32 {shape}: correct it"
        )
    return arrays


def _preprocessing(options: QuantizeOptions, data: Data) -> Preprocessing:
    """The model's own where its sidecar tells, else the data set's; --mean and --std come before both."""
    found = data.preprocessing
    if sidecar_path(options.model).exists():
        stated = read_sidecar(options.model, "onnx").preprocessing
        found = Preprocessing.from_json(dict(stated)) if stated else found
    changes = {name: value for name in ("mean", "std") if (value := getattr(options, name)) is not None}
    return replace(found, **changes)


def _prepared(path: Path) -> ir.Model:
    """The float network with constants computed and batch normalization folded into convolutions."""
    model = read_onnx(path)
    if is_quantized(model):
        raise UserError(f"{path} is quantized already: give the float network (python -m export.lint checks this one)")
    for value in list(model.graph.inputs):
        if value.name in model.graph.initializers:  # as old files list their weights
            model.graph.inputs.remove(value)
    if any(value.dtype == ir.DataType.FLOAT16 for node in model.graph for value in node.outputs):
        raise UserError(f"{path} computes in float16, whose scales TensorRT reads otherwise: export it as float32")
    if len(model.graph.inputs) != 1:
        names = ", ".join(value.name or "" for value in model.graph.inputs)
        raise UserError(f"{path} has {len(model.graph.inputs)} inputs ({names}): only networks of one are understood")
    if model.opset_imports[""] < _FIRST_PER_CHANNEL:
        try:
            model = ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), OPSET))
        except Exception as error:
            raise UserError(f"{path} cannot be converted to operator set {OPSET} ({error}): export it again") from error
    onnxscript.optimizer.optimize_ir(model, input_size_limit=_MOST_FOLDED, output_size_limit=_MOST_FOLDED)
    norms = [rewrites.fuse_batchnorm_into_conv_rule, rewrites.fuse_batchnorm_into_conv_transpose_rule]
    model = onnxscript.rewriter.rewrite(model, norms)
    take_earlier_concats(model.graph)
    return model


def _from_cache(view: OnnxNetwork, options: QuantizeOptions, *, calibrated: bool) -> tuple[Placement, dict[str, float]]:
    """The placement of what the cache knows, and the amax of its quantizers.

    Where tensors share a scale, the largest of theirs is it. Tensors that the cache does not know stay in float, unless
    they will be ``calibrated``.
    """
    assert options.calibration_cache is not None
    scales = read_calibration_cache(options.calibration_cache)
    unknown: set[str] = set()
    while True:  # without a tensor the placement is another, which may want others
        placement = place(view.network, options.keep_float, unknown)
        known = {tensor.quantizer: 0.0 for tensor in placement.tensors}
        for tensor in placement.tensors:
            known[tensor.quantizer] = max(known[tensor.quantizer], scales.get(tensor.tensor, 0.0))
        missing = {tensor.tensor for tensor in placement.tensors if not known[tensor.quantizer]}
        if not unknown:
            _say_missing(placement, known, scales, options.calibration_cache, calibrated)
        if calibrated or not missing:
            return placement, {name: 127 * scale for name, scale in known.items() if scale}
        unknown |= missing


def _say_missing(
    placement: Placement, known: Mapping[str, float], scales: Mapping[str, float], cache: Path, calibrated: bool
) -> None:
    """Names the tensors that the cache lacks; raises UserError when it lacks most of them."""
    wanted = [tensor.tensor for tensor in placement.tensors]
    found = [tensor for tensor in wanted if tensor in scales]
    if 2 * len(found) < len(wanted):
        raise UserError(
            f"{cache} is a cache for another network: it knows {len(found)} of the {len(wanted)} tensors to quantize "
            f"({', '.join(wanted[:3])}, ...), but {', '.join(list(scales)[:3])}, ..."
        )
    say(f"calibration cache: {len(found)} of {len(wanted)} tensors found")
    for tensor in placement.tensors:
        if tensor.tensor not in scales:
            then = "calibrated on the data" if calibrated else "what reads it stays in float"
            if known[tensor.quantizer]:
                then = "it shares the scale of one that is there"
            warn(f"not in the cache, or renamed by fusion: {tensor.tensor} ({then})")


def _calibrated(
    model: ir.Model,
    view: OnnxNetwork,
    placement: Placement,
    inputs: _Inputs,
    options: QuantizeOptions,
    known: Iterable[str],
) -> dict[str, float]:
    """The amax of every quantizer of ``placement`` that is not ``known``, from one pass of the float network."""
    wanted = {tensor.tensor: tensor.quantizer for tensor in placement.tensors if tensor.quantizer not in set(known)}
    observers = {quantizer: HistogramObserver(quantizer) for quantizer in wanted.values()}
    network = session_with_tensors(ir.to_proto(model), wanted)
    with progress("calibrating", math.ceil(inputs.count / inputs.batch)) as task:
        for batch in inputs.calibration():
            found = run(network, batch) | {inputs.name: batch}
            for tensor, quantizer in wanted.items():
                observers[quantizer](torch.from_numpy(found[tensor]))
            check_finite(observers.values())
            task.advance()
    chosen = choose_ranges(list(observers.values()), options.calibrator, options.percentile)
    return dict(zip(observers, chosen, strict=True))


def _compared(
    plain: bytes, quantized: Path, inputs: _Inputs, reference: Path
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """How far the quantized network is from the float one, and the reference file that was written, if any."""
    given, images = inputs.comparison()
    networks = session(plain), session(quantized)
    answers: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for batch in given:
        for network, found in zip(networks, answers, strict=True):
            found.append(next(iter(run(network, batch).values())))
    exact, rounded = (np.concatenate(found) for found in answers)
    figures: dict[str, Any] = {"inputs": len(exact), "sqnr_db": sqnr_db(exact, rounded)}
    distance = figures["sqnr_db"]
    line = f"float against INT8 on {len(exact)} inputs: {decibels(distance)}"
    record = None
    if exact.ndim == 2:
        same = exact.argmax(1) == rounded.argmax(1)
        figures["same_top1"] = 100 * float(same.mean())
        line += f", the same class on {same.sum()} of {len(same)}"
        if images is not None and len(exact) == len(images.labels):
            record = write_reference(reference, images, torch.from_numpy(exact))
    say(line)
    return figures, record


def _spec(value: ir.Value) -> TensorSpec:
    shape = tuple(extent if isinstance(extent, int) else -1 for extent in (value.shape or ()))
    return TensorSpec(value.name or "", shape, "float32" if value.dtype is None else str(value.dtype.numpy()))
