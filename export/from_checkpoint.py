"""Checkpoint, or a calibrated model in memory -> ONNX file, reference file and sidecar.

Steps: fold, rewrite what was asked for, emit, check TensorRT's rules, measure parity with ONNX Runtime.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from export import ops
from export.against_float import against_float, against_recorded
from export.emit import emit, example_input, input_quantizer, input_scale, with_ends
from export.file_form import FileForm, reference_path
from export.float_types import store_floats_as
from export.float_weights import save_onnx
from export.fold import fold, fold_float, layer_paths, remaining_dead_channels, warn_of_dead_channels
from export.fold_factors import fold_factors
from export.hard_rules import hard_findings
from export.merge_shortcuts import VECTOR
from export.merge_shortcuts import merge_shortcuts as merge
from export.names import SPLIT
from export.pad_channels import CHANNELS
from export.pad_channels import pad_channels as pad
from export.pad_groups import pad_groups
from export.parity import measure
from export.reference import Sample, write_reference
from export.scale_rules import SMALLEST_HALF
from export.session import sqnr_db
from export.split_projections import split_projections
from export.tensor_names import names_of_inputs, names_of_outputs, output_shapes
from export.trained_network import Images, TrainedNetwork
from qat.base.artifact import Sidecar, TensorSpec, read_sidecar, sidecar_path, write_artifact
from qat.base.choices import ExportPrecision, FloatType, InputKind, WeightStorage
from qat.base.console import say, warn
from qat.base.errors import UserError
from qat.base.text import megabytes
from qat.base.writing import check_writable
from qat.data.preprocessing import Preprocessing
from qat.fake_quantize.prepare import placement_of
from qat.fake_quantize.quantizer import quantize
from qat.graph.torch_patches import without_autocast

_PARITY_BATCH = 32
_ALIKE = 0.95  # cosine of the logits; rounding does not bring a useful network below it
_LEAST_DB = 30.0  # of a stretch between two quantizers, which gets the same inputs; float16 leaves 60 and more


@without_autocast()
def export_onnx(
    source: Path | str | fx.GraphModule,
    output: Path | str | None = None,
    *,
    input: InputKind = "float32-nchw",
    source_size: tuple[int, int] | None = None,
    precision: ExportPrecision = "int8",
    weights: WeightStorage = "int8",
    float_type: FloatType = "float32",
    pad_channels: bool = False,
    merge_shortcuts: bool = False,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] = (),
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    images: Images | None = None,
    parity_images: int = 512,
    layer_images: int = 8,
    allow_changed_model: bool = False,
    trust_code: bool = False,
) -> Sidecar:
    """Writes a trained network as explicit-precision ONNX: with INT8 weights and all Q/DQ nodes.

        export_onnx("runs/model.qat", "model.onnx")
        export_onnx(prepared, "model.onnx")  # a model that was prepared and calibrated

    The file takes [N, ...] with any N, and its outputs are [N, ...], float32 where they are floating-point. Beside it
    are written its sidecar and, for a network with known preprocessing, model.reference.npz: images with PyTorch's
    answers, to check an engine by. Classes are counted where there are class names.

    Args:
        source: the path of a checkpoint, or what ``prepare`` of qat made of a model, calibrated; it is not changed.
        output: the ONNX file to write. For a checkpoint, None means a file beside it whose name says which options
            were given: model.merged-padded.onnx.
        input: what the file takes. float32-nchw: normalized images; uint8-nhwc, uint8-nchw: raw RGB bytes; int8-nchw:
            normalized images that the caller has quantized by the ``input_scale`` in the sidecar's preprocessing.
        source_size: height and width of the images that a camera gives, for the uint8 inputs: the network resizes them
            itself, and crops them or puts them in a letterbox, as its preprocessing says.
        precision: int8; float32 or float16 for the same weights without any quantizer, as a baseline.
        weights: int8; float for the same codes as float weights in front of a QuantizeLinear, four times the size.
        float_type: what layers that are not INT8 compute in: float32, or a half precision. Those that need float32 keep
            it: normalizations, softmax, and what reaches large values on the images that are compared on.
        pad_channels: put zero channels into residual blocks that end with fewer than 128 input channels.
        merge_shortcuts: merge 1x1 shortcuts into the convolutions that they are added to.
        preprocessing: for a model: how images become inputs. A checkpoint has its own.
        class_names: for a model: the names of the classes, in the order of the logits. A checkpoint has its own.
        input_names: the names of the file's inputs; by default "input" for one, the names of the model's arguments for
            several.
        output_names: the names of the file's outputs; by default "logits" for [N, classes], "output" for another one,
            and for several the names in the model's answer: {"maps": (a, b)} gives maps.0 and maps.1.
        images: for a model: what PyTorch and ONNX Runtime are compared on; uint8 [N, 3, H, W] in RGB, or, without
            ``preprocessing``, float32 as the model takes them; by input, if there are several. None for random ones.
        parity_images: how many images PyTorch and ONNX Runtime are compared on, at most.
        layer_images: how many of them are compared layer by layer.
        allow_changed_model: go on when the code of a checkpoint's model has changed since it was saved.
        trust_code: run the code and read the images that a stranger's checkpoint names (docs/trust.md).

    Returns the sidecar of the ONNX file: ``figures["parity"]`` says how well the two agree.

    Raises UserError when a checkpoint cannot be read or the file cannot be written, when options exclude each other,
    when a model is not calibrated, or when ``images`` or ``class_names`` do not fit it.
    """
    form = FileForm(
        input=input,
        source_size=source_size,
        precision=precision,
        weights=weights,
        float_type=float_type,
        pad_channels=pad_channels,
        merge_shortcuts=merge_shortcuts,
    )
    output = _resolve_output(source, output, form)
    if parity_images < 1 or layer_images < 1:
        raise UserError("--parity-images and --layer-images must be at least 1: parity is part of every export")
    reference = reference_path(output)
    for path in (output, reference):
        check_writable(path)
    network = _load(source, preprocessing, class_names, images, (allow_changed_model, trust_code), source_size)
    if form.quantized:
        network.check_exportable()

    start = time.perf_counter()
    folded, dead = fold(network.model) if form.quantized else (fold_float(network.model), [])
    split = split_projections(folded, network.inputs) if form.quantized else []
    shapes = output_shapes(folded, network.inputs)
    inputs, outputs = names_of_inputs(network.inputs, input_names), names_of_outputs(folded, shapes, output_names)
    network.check_classes(shapes)
    trained = copy.deepcopy(folded) if merge_shortcuts else None
    merged = _merge_or_refuse(folded) if merge_shortcuts else []
    padded = _pad_or_refuse(folded) if pad_channels else []
    dead = remaining_dead_channels(folded, dead)
    warn_of_dead_channels(dead)
    stated = dict(network.stated_preprocessing)
    if input == "int8-nchw":
        stated["input_scale"] = input_scale(folded)
    examples = {name: example_input(shape, input) for name, shape in zip(inputs, network.file_shapes, strict=True)}
    details: dict[str, Any] = {
        "input": input,
        "precision": precision,
        "weights": weights if form.quantized else "float",
        "float_type": float_type if form.quantized else precision,
        "padded": padded,
        "merged": merged,
        "opset": ops.OPSET,
        "dead_channels": [asdict(channel) for channel in dead],
        "reference": None,
        **network.details,
    }
    is_classifier = bool(network.class_names)
    dtype = torch.float16 if precision == "float16" else torch.float32
    ready = with_ends(folded, network.preprocessing, input, dtype, network.source)
    model = emit(ready, examples, _metadata(network, details) | {SPLIT: json.dumps(split)}, outputs)
    fold_factors(model, SMALLEST_HALF if float_type == "float16" else 0.0)
    wider = pad_groups(model, placement_of(network.model), layer_paths(folded)) if form.quantized else {}
    compared = network.sample(parity_images)
    pairs = partial(_pairs, network, folded, compared, input, inputs)
    in_float32 = None
    if float_type == "bfloat16":
        in_float32 = ir.to_proto(model).SerializeToString()
        warn("ONNX Runtime has no bfloat16: parity is that of the same file in float32")
    if form.quantized and float_type != "float32":
        feeds = ({name: x.numpy() for name, x in given.items()} for _, given in pairs())
        details["kept_float32"] = [asdict(one) for one in store_floats_as(model, float_type, feeds)]
    if findings := hard_findings(model):
        raise UserError(f"the network breaks {len(findings)} of TensorRT's rules, first {findings[0]}: report it")
    seconds = time.perf_counter() - start
    figures: dict[str, Any] = {"export_seconds": round(seconds, 2), "nodes": len(list(model.graph))}

    def write(path: Path) -> None:
        save_onnx(ir.to_proto(model), path, weights)
        figures["bytes"] = path.stat().st_size
        say(f"exported in {seconds:.1f} s: {figures['nodes']} nodes, {megabytes(figures['bytes'])}")
        # A float16 file is compared with float32 PyTorch too, so that the loss of precision shows.
        parity, answers, found = measure(
            folded, in_float32 or path, pairs(), layer_images, logits=is_classifier, wider=wider
        )
        say(f"PyTorch against ONNX Runtime on {compared.source}: {parity}")
        cosine, least = parity.smallest_logit_cosine, parity.least_db
        if (cosine is not None and cosine < _ALIKE) or (least is not None and least < _LEAST_DB):
            warn(
                "ONNX Runtime computes other answers than PyTorch: check whether the network's own answers are of any "
                "use, and report it if they are"
            )
        figures["parity"] = {"source": compared.source} | parity.to_json()
        given, named = (x for x, _ in pairs()), list(zip(outputs, found, strict=True))
        agreement = against_float(network, folded.meta["outputs"], given, named, logits=is_classifier)
        say(f"{agreement.name} in float against ONNX Runtime: {agreement}")
        figures["against_float"] = asdict(agreement)
        recorded = against_recorded(network.recorded_figures, precision, compared, found[0]) if is_classifier else None
        if recorded is not None:
            (say if recorded.explained else warn)(str(recorded))
            figures["against_recorded"] = asdict(recorded)
        if trained is not None:
            figures["merging"] = _compare_with_trained(trained, network, compared, answers[0])
        if network.preprocessing is not None and len(inputs) == 1:
            details["reference"] = write_reference(reference, compared, answers, logits=is_classifier)

    sidecar = Sidecar(
        kind="onnx",
        parent=network.parent(output),
        inputs=tuple(
            TensorSpec(name, (-1, *one.shape[1:]), str(one.dtype).removeprefix("torch."))
            for name, one in examples.items()
        ),
        outputs=tuple(
            TensorSpec(
                value.name or "", (-1, *shape[1:]), "float32" if value.dtype is None else str(value.dtype.numpy())
            )
            for value, shape in zip(model.graph.outputs, shapes, strict=True)
        ),
        preprocessing=stated,
        class_names=network.class_names,
        figures=figures,
        details=details,
    )
    written = write_artifact(output, sidecar, write)
    beside = f" and {reference.name}" if details["reference"] else ""
    say(f"wrote {output}{beside}\nnext: python -m deploy.build {output}")
    return written


def _load(
    source: Path | str | fx.GraphModule,
    preprocessing: Preprocessing | None,
    class_names: Sequence[str],
    images: Images | None,
    allowed: tuple[bool, bool],
    source_size: tuple[int, int] | None,
) -> TrainedNetwork:
    """``allowed``: a changed model; code that the checkpoint names."""
    if not isinstance(source, (str, Path)):
        return TrainedNetwork.from_model(source, preprocessing, class_names, images, source_size)
    if preprocessing is not None or images is not None or class_names:
        raise UserError(
            f"{source} is a checkpoint, which has its own preprocessing, class names and images: leave out "
            "preprocessing, class_names and images"
        )
    return TrainedNetwork.from_checkpoint(Path(source), allowed[0], source_size, allowed[1])


def _resolve_output(source: Path | str | fx.GraphModule, output: Path | str | None, form: FileForm) -> Path:
    """The ONNX file to write. Raises UserError when it, or its reference file, would overwrite the checkpoint."""
    if not isinstance(source, (str, Path)):
        if output is None:
            raise UserError("output is missing, and a model has no file to be named after: give the file to write")
        return Path(output)
    checkpoint = Path(source)
    chosen = form.path_beside(checkpoint) if output is None else Path(output)
    for path in (chosen, reference_path(chosen)):
        if path.resolve() == checkpoint.resolve():
            if sidecar_path(checkpoint).exists():
                read_sidecar(checkpoint, "checkpoint")  # an ONNX file given as the checkpoint is another mistake
            raise UserError(f"{path} would overwrite the checkpoint: give another --output")
    return chosen


def _merge_or_refuse(folded: fx.GraphModule) -> list[str]:
    """Merges shortcuts. Raises UserError when there is none to merge."""
    merged = merge(folded)
    if not merged:
        raise UserError(
            "no shortcut of this network can be merged, which takes two INT8 convolutions 1x1 whose outputs are added "
            f"and whose input channels are multiples of {VECTOR}: leave out --merge-shortcuts"
        )
    say(f"shortcuts merged into {', '.join(merged)}")
    return merged


def _pad_or_refuse(folded: fx.GraphModule) -> list[str]:
    """Pads channels. Raises UserError when there is no convolution to pad."""
    padded = pad(folded)
    if not padded:
        raise UserError("no convolution of this network can be padded with zero channels: leave out --pad-channels")
    say(f"zero channels up to {CHANNELS} before {', '.join(padded)}")
    return padded


@torch.no_grad()
def _compare_with_trained(
    trained: nn.Module, network: TrainedNetwork, images: Sample, answers: Tensor
) -> dict[str, Any]:
    """How far merging has moved the ``answers`` to ``images``, [N, ...], from those of the ``trained`` network."""
    batches = torch.split(images.images_NCHW, _PARITY_BATCH)
    before = torch.cat([trained(network.normalize(batch)) for batch in batches])
    distance = sqnr_db(before.numpy(), answers.numpy())
    what, other = ("logit" if network.class_names else "answer"), None
    said = f"no {what} changed" if distance is None else f"{what}s at {distance:.1f} dB"
    if network.class_names:
        other = int((before.argmax(1) != answers.argmax(1)).sum())
        said = f"{other} of {len(answers)} images with another top-1, {said}"
    say(f"merged against trained: {said}")
    return {"images": len(answers), "other_top1": other, "sqnr_db": distance}


def _metadata(network: TrainedNetwork, details: Mapping[str, Any]) -> dict[str, str]:
    """What the ONNX file itself says, for programs that do not have the sidecar."""
    return {
        **network.metadata,
        "class_names": json.dumps(network.class_names),
        "preprocessing": json.dumps(dict(network.stated_preprocessing)),
        "padded": json.dumps(details["padded"]),
        "merged": json.dumps(details["merged"]),
    } | {name: details[name] for name in ("input", "precision", "weights", "float_type")}


def _pairs(
    network: TrainedNetwork, folded: fx.GraphModule, images: Sample, kind: InputKind, inputs: Sequence[str]
) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Tensor]]]:
    """Batches of (what ``folded`` takes, the same by input name as a file exported with ``kind`` takes it)."""
    batches = (torch.split(one, _PARITY_BATCH) for one in (images.images_NCHW, *images.others))
    for x_NCHW, *others in zip(*batches, strict=True):
        normalized = network.normalize(x_NCHW)
        given = normalized
        if kind == "uint8-nhwc":
            given = x_NCHW.permute(0, 2, 3, 1).contiguous()
        elif kind == "uint8-nchw":
            given = x_NCHW
        elif kind == "int8-nchw":
            quantizer = input_quantizer(folded)
            codes = quantize(normalized, quantizer.scale, quantizer.format)
            given = codes.to(ops.codes_dtype(quantizer.format))
        yield (normalized, *others), dict(zip(inputs, (given, *others), strict=True))
