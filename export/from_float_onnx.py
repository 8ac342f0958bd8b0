"""Float ONNX file -> INT8 ONNX file, without training: read, place, find scales, write, compare."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from export.calibration_cache import placement_from_cache
from export.file_form import quantized_path, reference_path
from export.float_network import read_float_network
from export.float_types import KeptFloat32, store_floats_as
from export.float_weights import save_onnx
from export.fold_factors import fold_factors
from export.hard_rules import hard_findings
from export.insert import insert
from export.network_inputs import Channels, NetworkInputs, load_inputs
from export.onnx_network import network_from_onnx
from export.pad_groups import pad_groups
from export.reference import write_reference
from export.scale_rules import SMALLEST_HALF
from export.session import run, runs_in_onnx_runtime, session, session_with_tensors
from export.weight_codes import WeightQuantizer
from qat.base.artifact import Parent, Sidecar, TensorSpec, read_sidecar, sha256_of, sidecar_path, write_artifact
from qat.base.calibration_cache import check_cache
from qat.base.choices import Calibrator, WeightCalibrator, WeightStorage
from qat.base.console import progress, say, warn
from qat.base.errors import UserError
from qat.base.output_agreement import OutputSums
from qat.base.sqnr import worst_first
from qat.base.text import megabytes
from qat.base.writing import check_writable
from qat.calibration.activation_ranges import choose_ranges
from qat.calibration.histogram import HistogramObserver, check_finite
from qat.fake_quantize.quantizer import ACTIVATION, scale_from_amax
from qat.graph.network_record import network_to_json
from qat.rules.describe import say_placement
from qat.rules.kernel_profile import KernelProfile
from qat.rules.place import place
from qat.rules.placement import Placement


def quantize_onnx(
    model: Path | str,
    output: Path | str | None = None,
    *,
    data: str | Path | None = None,
    inputs: np.ndarray | None = None,
    calibration_cache: Path | str | None = None,
    calibrator: Calibrator = "mse",
    weight_calibrator: WeightCalibrator = "max",
    percentile: float = 99.99,
    keep_float: Collection[str] = (),
    profile: KernelProfile | None = None,
    weights: WeightStorage = "int8",
    float_type: Literal["float32", "float16"] = "float32",
    images: int = 512,
    mean: Channels | None = None,
    std: Channels | None = None,
    parity_images: int = 512,
    seed: int = 0,
    data_root: Path | str = Path("data"),
) -> Sidecar:
    """Quantizes a float ONNX file, without training.

        quantize_onnx("model.onnx", "model.int8.onnx", inputs=images)  # float32 [N, 3, 224, 224], normalized
        quantize_onnx("model.onnx", "model.int8.onnx", calibration_cache="calibration.cache")

    Args:
        model: a float32 ONNX file with one input, batch first.
        output: the ONNX file to write; None for MODEL.int8.onnx. Its sidecar is written beside it, and a reference file
            where images were given as ``data``.
        data: images to calibrate on: a folder of images without labels, a folder with train/ and val/, digits, an .npz
            file, torchvision:NAME; or an .npy file of float32 inputs as the network takes them, [N, ...].
        inputs: float32 [N, ...]: what the network takes, instead of ``data``.
        calibration_cache: one that TensorRT 10 or older wrote for this network. Its scales are taken bit by bit.
            Tensors that it lacks, or for which it has 0, stay in float, or are calibrated if there are ``data`` or
            ``inputs``.
        calibrator: how activation ranges are chosen: max, percentile, mse or entropy.
        weight_calibrator: how weight ranges are chosen: max, or mse for the least squared quantization error.
        percentile: the share of the values, in percent, that the percentile calibrator does not clip.
        keep_float: patterns of nodes and tensors that stay in float, such as "/classifier/*".
        profile: what deploy.kernels measured on a GPU; None for what was measured on an H200.
        weights: int8, or float for the same codes as float weights in front of a QuantizeLinear.
        float_type: what layers that are not INT8 compute in. float16 is kept from those that need float32.
        images: how many inputs to calibrate on, at most.
        mean: the mean of the normalization, of pixels in 0 to 1; None for the model's sidecar's, else the data set's.
        std: the standard deviation of the normalization, likewise.
        parity_images: how many inputs the float and the quantized network are compared on, at most.
        seed: decides which images are calibrated on.
        data_root: where torchvision's data sets are, or are downloaded to.

    Returns the sidecar of the new file: ``figures["parity"]["sqnr_db"]`` says how far it is from the float network, in
    dB, at the floating-point output that is farthest; ``figures["parity"]["outputs"]`` says it of every output.

    Raises UserError when a file cannot be read or written, is quantized already, or does not fit ``data``; when nothing
    tells the ranges; when a pattern matches nothing.
    """
    model, cache = Path(model), None if calibration_cache is None else Path(calibration_cache)
    output = quantized_path(model) if output is None else Path(output)
    reference = reference_path(output)
    if data is not None and inputs is not None:
        raise UserError("both data and inputs are given: leave out one of them")
    given: str | np.ndarray | None = None if inputs is None else np.asarray(inputs)
    if data is not None:
        given = str(data)
    if given is None and cache is None:
        raise UserError("nothing tells the activation ranges: give --data, or --calibration-cache, or both")
    if output.resolve() == model.resolve():
        raise UserError(f"{output} would overwrite the float model: give another --output")
    if images < 1 or parity_images < 1:
        raise UserError("--images and --parity-images must be at least 1")
    for path in (output, reference):
        check_writable(path)
    network = read_float_network(model, same_tensors=cache is not None)
    view = network_from_onnx(network)
    fed = None
    if given is not None:
        (spec,) = map(_spec, network.graph.inputs)
        fed = load_inputs(
            spec.name,
            spec.shape,
            model,
            given,
            limit=images,
            mean=mean,
            std=std,
            seed=seed,
            data_root=Path(data_root),
        )

    scales: dict[str, float] = {}
    if cache is not None:
        check_cache(cache, sha256_of(model))
        placement, scales = placement_from_cache(view.network, cache, keep_float, profile, calibrated=fed is not None)
    else:
        placement = place(view.network, keep_float, profile=profile)
    if fed is not None:
        with runs_in_onnx_runtime(model):
            scales |= _calibrate(network, placement, fed, calibrator, percentile, known=scales)
    say_placement(placement)
    plain = ir.to_proto(network).SerializeToString()
    weights_of = WeightQuantizer(weight_calibrator, ACTIVATION)
    insert(network, view, placement, scales, ACTIVATION, weights_of)
    if weights_of.dead:
        warn(f"{weights_of.dead} weight channels are zero; their scales were floored")
    fold_factors(network, SMALLEST_HALF if float_type == "float16" else 0.0)
    pad_groups(network, placement)
    kept: list[KeptFloat32] = []
    if float_type == "float16":
        if fed is None:
            warn("large values cannot be measured without --data: float16 holds up to 65504")
        kept = store_floats_as(network, "float16", ({fed.name: x} for x in fed.calibration()) if fed else ())
    if findings := [one for one in hard_findings(network, ACTIVATION) if one.severity == "error"]:
        raise UserError(f"the network breaks {len(findings)} of TensorRT's rules, first {findings[0]}: report it")

    figures: dict[str, Any] = {"nodes": len(list(network.graph))}
    details: dict[str, Any] = {
        "placement": placement.to_json(),
        "network": network_to_json(view.network),
        "calibrator": calibrator if fed else None,
        "weight_calibrator": weight_calibrator,
        "calibration_cache": cache.name if cache else None,
        "precision": "int8",
        "weights": weights,
        "float_type": float_type,
        "kept_float32": [asdict(one) for one in kept],
        "input": "float32-nchw",
    }

    def write(path: Path) -> None:
        save_onnx(ir.to_proto(network), path, weights)
        figures["bytes"] = path.stat().st_size
        if fed is not None:
            figures["parity"], details["reference"] = _compare(
                plain, path, fed, parity_images, reference, logits=bool(class_names)
            )

    outputs = tuple(map(_spec, network.graph.outputs))
    class_names = _class_names(model, fed, outputs)
    sidecar = Sidecar(
        kind="onnx",
        parent=Parent.from_file(output, model, sha256_of(model)),
        inputs=tuple(map(_spec, network.graph.inputs)),
        outputs=outputs,
        class_names=class_names,
        preprocessing=asdict(fed.preprocessing) if fed and fed.preprocessing else {},
        figures=figures,
        details=details,
    )
    written = write_artifact(output, sidecar, write, seed=seed)
    say(f"wrote {output}, {megabytes(figures['bytes'])}\nnext: python -m deploy.build {output}")
    return written


def _calibrate(
    model: ir.Model,
    placement: Placement,
    inputs: NetworkInputs,
    calibrator: Calibrator,
    percentile: float,
    *,
    known: Collection[str],
) -> dict[str, float]:
    """The scale of every quantizer of ``placement`` that is not ``known``, from one pass of the float network."""
    wanted = {tensor.tensor: tensor.quantizer for tensor in placement.tensors if tensor.quantizer not in known}
    observers = {quantizer: HistogramObserver(quantizer) for quantizer in wanted.values()}
    network = session_with_tensors(ir.to_proto(model), wanted)
    with progress("calibrating", math.ceil(inputs.count / inputs.batch)) as task:
        for batch in inputs.calibration():
            found = run(network, batch) | {inputs.name: batch}
            for tensor, quantizer in wanted.items():
                observers[quantizer](torch.from_numpy(found[tensor]))
            check_finite(observers.values())
            task.advance()
    chosen = choose_ranges(list(observers.values()), calibrator, percentile, ACTIVATION.levels)
    scales = (float(scale_from_amax(torch.tensor(amax), ACTIVATION)) for amax in chosen)
    return dict(zip(observers, scales, strict=True))


def _class_names(model: Path, inputs: NetworkInputs | None, outputs: Sequence[TensorSpec]) -> tuple[str, ...]:
    """The names of the classes whose logits the network answers; () if nothing says that it answers logits.

    They are those of the float file's sidecar, or of the data set, if it has as many classes as the only output values.
    """
    answers = [(spec.dtype, spec.shape[1:]) for spec in outputs]
    if sidecar_path(model).exists():
        try:
            names = read_sidecar(model, "onnx").class_names
        except UserError as error:
            warn(f"no class names are taken from the sidecar of {model}: {error}")
        else:
            if names and answers == [("float32", (len(names),))]:
                return names
    names = inputs.class_names if inputs is not None else ()
    if not names or answers != [("float32", (len(names),))]:
        return ()
    say(f"{outputs[0].name} is taken for logits of the data's classes, because both are {len(names)}")
    return names


def _compare(
    plain: bytes, quantized: Path, inputs: NetworkInputs, count: int, reference: Path, *, logits: bool
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """How far the quantized network is from the float one, and the record of the reference file, if one was written.

    ``logits``: whether the only output is known to be logits [N, classes].
    """
    given, images = inputs.comparison(count)
    networks = session(plain), session(quantized)
    sums = {output.name: OutputSums(output.name) for output in networks[0].get_outputs()}
    vectors: list[list[np.ndarray]] = []  # of an only output that is [N, values]
    compared = 0
    for batch in given:
        exact, rounded = (run(network, batch) for network in networks)
        for name, of_output in sums.items():
            of_output.add(exact[name], rounded[name])
        compared += len(batch)
        one, *others = exact.values()
        if not others and one.ndim == 2 and one.dtype == np.float32:
            vectors.append([one, *rounded.values()])
    outputs = [of_output.agreement() for of_output in sums.values()]
    figures: dict[str, Any] = {"inputs": compared, "outputs": [asdict(output) for output in outputs]}
    if ratios := [output.sqnr_db for output in outputs if output.equal_percent is None]:
        figures["sqnr_db"] = min(ratios, key=worst_first)
    line = f"float against INT8 on {compared} inputs: {', '.join(map(str, outputs))}"
    record = None
    if vectors:
        float_answers, answers = (np.concatenate(found) for found in zip(*vectors, strict=True))
        if logits:
            same = float_answers.argmax(1) == answers.argmax(1)
            figures["same_top1"] = 100 * float(same.mean())
            line += f", the same class on {same.sum()} of {len(same)}"
        if images is not None and len(answers) == len(images.labels):
            record = write_reference(reference, images, [torch.from_numpy(float_answers)], logits=logits)
    say(line)
    return figures, record


def _spec(value: ir.Value) -> TensorSpec:
    shape = tuple(extent if isinstance(extent, int) else -1 for extent in (value.shape or ()))
    return TensorSpec(value.name or "", shape, "float32" if value.dtype is None else str(value.dtype.numpy()))
