"""Checkpoint -> ONNX file, reference file and sidecar: fold, emit, check TensorRT's rules, measure parity."""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from export.emit import INPUT_NAME, OUTPUT_NAME, emit, example_input, input_scale, with_ends
from export.float_weights import save
from export.fold import DeadChannel, fold, fold_float
from export.hard_rules import hard_findings
from export.merge_shortcuts import VECTOR, merge_shortcuts
from export.ops import OPSET
from export.pad_channels import CHANNELS, pad_channels
from export.parity import measure
from export.reference import Sample, reference_path, sample, write_reference
from export.session import sqnr_db
from qat.base.artifact import Parent, Sidecar, TensorSpec, check_writable, read_sidecar, sidecar_path, write_artifact
from qat.base.choices import InputKind
from qat.base.console import say, warn
from qat.base.errors import UserError
from qat.base.number_format import BITS
from qat.base.text import megabytes
from qat.checkpoint import Checkpoint, load_checkpoint
from qat.data.preprocessing import Preprocessing
from qat.fake_quantize.quantizer import ACTIVATION, quantize

if TYPE_CHECKING:
    from export.options import ExportOptions

_PARITY_BATCH = 32
_ALIKE = 0.95  # cosine of the logits that no rounding brings a network of any use below


def export_checkpoint(options: ExportOptions) -> Sidecar:
    """Exports a checkpoint and returns the sidecar of the ONNX file. Raises UserError for what the user can mend."""
    quantized = options.precision == "int8"
    needless = {
        "--pad-channels": options.pad_channels,
        "--merge-shortcuts": options.merge_shortcuts,
        "--weights": options.weights == "float",
        "--input int8-nchw": options.input == "int8-nchw",
    }
    if not quantized and any(needless.values()):
        given = " and ".join(name for name, is_given in needless.items() if is_given)
        raise UserError(f"--precision {options.precision} computes nothing in INT8: leave out {given}")
    output = options.output or options.checkpoint.with_suffix(f"{_special(options)}.onnx")
    reference = reference_path(output)
    for path in (output, reference):
        if path.resolve() == options.checkpoint.resolve():
            if sidecar_path(options.checkpoint).exists():
                read_sidecar(options.checkpoint, "checkpoint")  # an ONNX file in its place is another mistake
            raise UserError(f"{path} would overwrite the checkpoint: give another --output")
    if options.parity_images < 1 or options.layer_images < 1:
        raise UserError("--parity-images and --layer-images must be at least 1: parity is part of every export")
    for path in (output, reference):
        check_writable(path)
    checkpoint = load_checkpoint(options.checkpoint)
    if quantized and (bits := checkpoint.sidecar.details.get("bits", BITS)) != BITS:
        raise UserError(
            f"{options.checkpoint} simulates {bits} bits, which no engine computes: train with --bits {BITS}"
        )

    start = time.perf_counter()
    folded, dead = fold(checkpoint.model) if quantized else (fold_float(checkpoint.model), [])
    trained = copy.deepcopy(folded) if options.merge_shortcuts else None
    shape = (3, checkpoint.preprocessing.height, checkpoint.preprocessing.width)
    merged = _merged(folded, shape) if options.merge_shortcuts else []
    padded = _padded(folded) if options.pad_channels else []
    dead = _still_dead(folded, dead)
    _warn_of_dead_channels(dead)
    dtype = torch.float16 if options.precision == "float16" else torch.float32
    preprocessing = dict(checkpoint.sidecar.preprocessing)
    if options.input == "int8-nchw":
        preprocessing["input_scale"] = input_scale(folded)
    network = with_ends(folded, checkpoint.preprocessing, options.input, dtype)
    example = example_input(checkpoint.preprocessing, options.input)
    details: dict[str, Any] = {
        "input": options.input,
        "precision": options.precision,
        "weights": options.weights if quantized else "float",
        "padded": padded,
        "merged": merged,
        "opset": OPSET,
        "dead_channels": [asdict(channel) for channel in dead],
    }
    model = emit(network, example, _metadata(checkpoint, details))
    if findings := hard_findings(model):
        raise UserError(f"the network breaks {len(findings)} of TensorRT's rules, first {findings[0]}: report it")
    seconds = time.perf_counter() - start
    figures: dict[str, Any] = {"export_seconds": round(seconds, 2), "nodes": len(list(model.graph))}

    def write(path: Path) -> None:
        save(ir.to_proto(model), path, options.weights)
        figures["bytes"] = path.stat().st_size
        say(f"exported in {seconds:.1f} s: {figures['nodes']} nodes, {megabytes(figures['bytes'])}")
        images = sample(checkpoint, options.parity_images)
        # The float16 file too is held against float32 PyTorch: what half the bits cost is to be seen.
        pairs = _pairs(images, checkpoint.preprocessing, options.input, preprocessing.get("input_scale"))
        parity, logits = measure(folded, path, pairs, options.layer_images)
        say(f"PyTorch against ONNX Runtime on {images.source}: {parity}")
        if parity.smallest_logit_cosine < _ALIKE:
            warn("ONNX Runtime computes other answers than PyTorch: are the network's own of any use? if so, report it")
        figures["parity"] = {"source": images.source} | parity.to_json()
        if trained is not None:
            figures["merging"] = _merging(trained, images, checkpoint.preprocessing, logits)
        details["reference"] = write_reference(reference, images, logits)

    sidecar = Sidecar(
        kind="onnx",
        parent=Parent.from_file(output, options.checkpoint, checkpoint.sidecar.sha256),
        inputs=(TensorSpec(INPUT_NAME, (-1, *example.shape[1:]), str(example.dtype).removeprefix("torch.")),),
        outputs=(TensorSpec(OUTPUT_NAME, (-1, len(checkpoint.sidecar.class_names)), "float32"),),
        preprocessing=preprocessing,
        class_names=checkpoint.sidecar.class_names,
        figures=figures,
        details=details,
    )
    written = write_artifact(output, sidecar, write)
    say(f"wrote {output} and {reference.name}\nnext: python -m deploy.build {output}")
    return written


def _merged(folded: fx.GraphModule, input_shape: Sequence[int]) -> list[str]:
    merged = merge_shortcuts(folded, input_shape)
    if not merged:
        raise UserError(
            "no shortcut of this network can be merged, which takes two INT8 convolutions 1x1 whose outputs are added "
            f"and whose input channels are multiples of {VECTOR}: leave out --merge-shortcuts"
        )
    say(f"shortcuts merged into {', '.join(merged)}")
    return merged


def _padded(folded: fx.GraphModule) -> list[str]:
    padded = pad_channels(folded)
    if not padded:
        raise UserError("no convolution of this network can be padded with zero channels: leave out --pad-channels")
    say(f"zero channels up to {CHANNELS} before {', '.join(padded)}")
    return padded


def _warn_of_dead_channels(dead: list[DeadChannel]) -> None:
    for layer, channels in itertools.groupby(dead, lambda channel: channel.layer):
        numbers = [channel.channel for channel in channels]
        listed = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        warn(f"{layer}: dead channels {listed}, {len(numbers)} in all: their weights are zero; the scales were floored")


def _still_dead(folded: nn.Module, dead: list[DeadChannel]) -> list[DeadChannel]:
    """Those of ``dead`` that are, now that layers may have been merged."""
    layers: dict[str, Any] = dict(folded.named_modules())
    there = [(channel, layers[channel.layer]) for channel in dead if channel.layer in layers]
    return [one for one, layer in there if not layer.weight.select(layer.weight_quantizer.axis, one.channel).any()]


def _special(options: ExportOptions) -> str:
    """What the file's name says of how it was exported, in front of .onnx: what is not the default."""
    chosen = {
        options.precision: options.precision != "int8",
        "merged": options.merge_shortcuts,
        "padded": options.pad_channels,
        "float-weights": options.weights == "float",
        options.input: options.input != "float32-nchw",
    }
    names = "-".join(name for name, wanted in chosen.items() if wanted)
    return f".{names}" if names else ""


@torch.no_grad()
def _merging(trained: nn.Module, images: Sample, preprocessing: Preprocessing, logits: Tensor) -> dict[str, Any]:
    """How far merging has moved the ``logits`` of ``images``, [N, classes], from what was ``trained``."""
    batches = images.images_NCHW.split(_PARITY_BATCH)
    before = torch.cat([trained(preprocessing.normalize(x_NCHW)) for x_NCHW in batches])
    other = int((before.argmax(1) != logits.argmax(1)).sum())
    decibels = sqnr_db(before.numpy(), logits.numpy())
    distance = "no logit changed" if decibels is None else f"logits at {decibels:.1f} dB"
    say(f"merged against trained: {other} of {len(logits)} images with another top-1, {distance}")
    return {"images": len(logits), "other_top1": other, "sqnr_db": decibels}


def _metadata(checkpoint: Checkpoint, details: Mapping[str, Any]) -> dict[str, str]:
    """What travels inside the ONNX file, for programs that have no sidecar."""
    return {
        "checkpoint_sha256": checkpoint.sidecar.sha256,
        "class_names": json.dumps(checkpoint.sidecar.class_names),
        "preprocessing": json.dumps(dict(checkpoint.sidecar.preprocessing)),
        "padded": json.dumps(details["padded"]),
        "merged": json.dumps(details["merged"]),
    } | {name: details[name] for name in ("input", "precision", "weights")}


def _pairs(
    images: Sample, preprocessing: Preprocessing, kind: InputKind, scale: float | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(normalized images, the same as the exported network takes them) in batches."""
    for x_NCHW in images.images_NCHW.split(_PARITY_BATCH):
        normalized = preprocessing.normalize(x_NCHW)
        given = normalized
        if kind == "uint8-nhwc":
            given = x_NCHW.permute(0, 2, 3, 1).contiguous()
        elif kind == "uint8-nchw":
            given = x_NCHW
        elif scale is not None:
            given = quantize(normalized, torch.tensor(scale), ACTIVATION).to(torch.int8)
        yield normalized, given
