"""Checkpoint -> ONNX file and sidecar: fold, emit, check TensorRT's rules, measure parity on what was written."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from export.emit import INPUT_NAME, OUTPUT_NAME, Uint8Input, emit, example_input
from export.fold import DeadChannel, fold
from export.lint import lint
from export.ops import OPSET
from export.parity import measure
from qat.artifact import Parent, Sidecar, TensorSpec, UserError, check_writable, write_artifact
from qat.checkpoint import Checkpoint, load_checkpoint
from qat.console import say, warn
from qat.data import batches, load_data

if TYPE_CHECKING:
    from export.onnx import ExportOptions

_PARITY_BATCH = 32
_RANDOM_IMAGES = 8


def export_checkpoint(options: ExportOptions) -> Sidecar:
    """Exports a checkpoint and returns the sidecar of the ONNX file. Raises UserError for what the user can mend."""
    output = options.output or options.checkpoint.with_suffix(".onnx")
    if output.resolve() == options.checkpoint.resolve():
        raise UserError(f"{output} would overwrite the checkpoint: give another --output")
    if options.parity_images < 1 or options.layer_images < 1:
        raise UserError("--parity-images and --layer-images must be at least 1: parity is part of every export")
    check_writable(output)
    checkpoint = load_checkpoint(options.checkpoint)

    start = time.perf_counter()
    folded, dead = fold(checkpoint.model)
    _warn_of_dead_channels(dead)
    network = Uint8Input(folded, checkpoint.preprocessing) if options.input == "uint8-nhwc" else folded
    example = example_input(checkpoint.preprocessing, options.input)
    model = emit(network, example, _metadata(checkpoint, options))
    if findings := lint(model):
        raise UserError(f"the network breaks {len(findings)} of TensorRT's rules, first {findings[0]}: report it")
    seconds = time.perf_counter() - start
    figures: dict[str, Any] = {"export_seconds": round(seconds, 2), "nodes": len(list(model.graph))}

    def write(path: Path) -> None:
        ir.save(model, path)
        figures["bytes"] = path.stat().st_size
        say(f"exported in {seconds:.1f} s: {figures['nodes']} nodes, {figures['bytes'] / 1e6:.2f} MB")
        figures["parity"] = _parity(options, checkpoint, folded, path)

    sidecar = Sidecar(
        kind="onnx",
        parent=Parent.of(output, options.checkpoint, checkpoint.sidecar.sha256),
        inputs=(TensorSpec(INPUT_NAME, (-1, *example.shape[1:]), str(example.dtype).removeprefix("torch.")),),
        outputs=(TensorSpec(OUTPUT_NAME, (-1, len(checkpoint.sidecar.class_names)), "float32"),),
        preprocessing=checkpoint.sidecar.preprocessing,
        class_names=checkpoint.sidecar.class_names,
        figures=figures,
        details={
            "input": options.input,
            "opset": OPSET,
            "dead_channels": [asdict(channel) for channel in dead],
        },
    )
    written = write_artifact(output, sidecar, write)
    say(f"wrote {output}\nnext: python -m deploy.build {output}")
    return written


def _warn_of_dead_channels(dead: list[DeadChannel]) -> None:
    for layer, channels in itertools.groupby(dead, lambda channel: channel.layer):
        numbers = [channel.channel for channel in channels]
        listed = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        warn(f"{layer}: dead channels {listed}, {len(numbers)} in all: their weights are zero; the scales were floored")


def _metadata(checkpoint: Checkpoint, options: ExportOptions) -> dict[str, str]:
    """What travels inside the ONNX file, for programs that have no sidecar."""
    return {
        "checkpoint_sha256": checkpoint.sidecar.sha256,
        "class_names": json.dumps(checkpoint.sidecar.class_names),
        "preprocessing": json.dumps(dict(checkpoint.sidecar.preprocessing)),
        "input": options.input,
    }


def _parity(options: ExportOptions, checkpoint: Checkpoint, folded: fx.GraphModule, path: Path) -> dict[str, Any]:
    images, source = _test_images(checkpoint)
    parity = measure(folded, path, _pairs(options, checkpoint, images), options.layer_images)
    say(f"PyTorch against ONNX Runtime on {source}: {parity}")
    return {"source": source} | parity.to_json()


def _pairs(
    options: ExportOptions, checkpoint: Checkpoint, images: Iterator[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(normalized images, the same as the exported network takes them), up to the number asked for."""
    left = options.parity_images
    for x_NCHW, _ in images:
        x_NCHW = x_NCHW[:left]
        normalized = checkpoint.preprocessing.normalize(x_NCHW)
        yield (
            normalized,
            x_NCHW.permute(0, 2, 3, 1).contiguous() if options.input == "uint8-nhwc" else normalized,
        )
        left -= len(x_NCHW)
        if left <= 0:
            return


def _test_images(checkpoint: Checkpoint) -> tuple[Iterator[tuple[Tensor, Tensor]], str]:
    """The test split that the checkpoint was measured on, or random images where it is not at hand."""
    details = checkpoint.sidecar.details
    data = details["data"]
    try:
        loaded = load_data(
            data["source"],
            data["image_size"],
            details["seed"],
            details["calibration_images"],
            Path(data["root"]),
        )
        return batches(loaded.test, _PARITY_BATCH, None), f"the test split of {data['source']}"
    except UserError as error:
        warn(f"the test images are not at hand ({error}); comparing on random ones, which says less")
        generator = torch.Generator().manual_seed(0)
        shape = (_RANDOM_IMAGES, 3, checkpoint.preprocessing.height, checkpoint.preprocessing.width)
        x_NCHW = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return iter([(x_NCHW, torch.zeros(_RANDOM_IMAGES))]), "random images"
