"""Export a checkpoint as explicit-precision ONNX: INT8 weights inside, every Q/DQ node written down.

    python -m export.onnx runs/model.qat
    python -m export.onnx runs/model.qat --input uint8-nhwc --output runs/model_uint8.onnx
    python -m export.onnx runs/model.qat --input uint8-nhwc --source-size 1080x1920
    python -m export.onnx runs/model.qat --pad-channels
    python -m export.onnx runs/model.qat --precision float16

Beside model.onnx it writes model.reference.npz: test images with PyTorch's answers, to check an engine by.
Next: python -m deploy.build runs/model.onnx
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from export.file_form import FileForm, files_beside
from qat.base.choices import ExportPrecision, FloatType, InputKind, WeightStorage
from qat.base.console import Command, run_command
from qat.base.outputs import READS, Writes


def _default_output(options: Any) -> Path:
    from export.source_images import size_of

    form = FileForm(
        input=options.input,
        source_size=None if options.source_size is None else size_of(options.source_size),
        precision=options.precision,
        weights=options.weights,
        float_type=options.float_type,
        pad_channels=options.pad_channels,
        merge_shortcuts=options.merge_shortcuts,
    )
    return form.path_beside(options.checkpoint)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Command):
    """The options of ``python -m export.onnx``."""

    checkpoint: Annotated[Path, tyro.conf.Positional, READS]
    """The checkpoint that python -m qat.train or qat.calibrate wrote."""
    output: Annotated[Path | None, Writes(default=_default_output, beside=files_beside)] = None
    """The ONNX file to write; by default beside the checkpoint, with a name that says which options were given:
    model.merged-padded.onnx."""
    input: InputKind = "float32-nchw"
    """float32-nchw: normalized images; uint8-nhwc, uint8-nchw: raw RGB bytes, preprocessing becomes part of the
    network; int8-nchw: normalized images that the caller has quantized by the input_scale in the sidecar, which leaves
    the least work for the GPU."""
    source_size: str | None = None
    """Height and width of the images that a camera gives, such as 1080x1920, for the uint8 inputs: resizing, and the
    letterbox or crop, become part of the network too."""
    precision: ExportPrecision = "int8"
    """float32, float16: the same weights without any quantizer, as the baseline that INT8 is compared with."""
    weights: WeightStorage = "int8"
    """float: the same codes as float weights in front of a QuantizeLinear, four times the size, for tools that refuse
    INT8 weights. deploy.build makes them by itself if TensorRT 8.6 refuses INT8 weights."""
    float_type: FloatType = "float32"
    """float16, bfloat16: layers that are not INT8 compute in this, apart from those that need float32. TensorRT 10, 11
    and RTX take types from the file; TensorRT 8.6 chooses them itself."""
    pad_channels: bool = False
    """Put zero channels into residual blocks that end with fewer than 128 input channels: the answers stay the same,
    and some GPUs have a faster kernel for them (measure it: python -m deploy.benchmark --variants)."""
    merge_shortcuts: bool = False
    """Merge a 1x1 shortcut into the convolution that it is added to, as in each stage of ResNet50: one kernel instead
    of two, and one wide tensor less to write. Input channels must be multiples of 32. Some weights are rounded again;
    the export says what that changes."""
    parity_images: int = 512
    """Test images on which PyTorch and ONNX Runtime are compared, at most; they go into the reference file."""
    layer_images: int = 8
    """Images on which they are compared layer by layer."""
    allow_changed_model: bool = False
    """Go on when the code of the model has changed since training, so that the network answers something else."""
    trust_code: bool = False
    """Run the code and read the images that the sidecar names, though it was not made by you on this machine."""


def main(options: ExportOptions) -> None:
    """Exports. Torch is imported here, so that --help answers at once."""
    from export.from_checkpoint import export_onnx
    from export.source_images import size_of

    export_onnx(
        options.checkpoint,
        options.output,
        input=options.input,
        source_size=None if options.source_size is None else size_of(options.source_size),
        precision=options.precision,
        weights=options.weights,
        float_type=options.float_type,
        pad_channels=options.pad_channels,
        merge_shortcuts=options.merge_shortcuts,
        parity_images=options.parity_images,
        layer_images=options.layer_images,
        allow_changed_model=options.allow_changed_model,
        trust_code=options.trust_code,
    )


def cli() -> None:
    """The console script export-onnx."""
    run_command(main, ExportOptions, supervised=True)


if __name__ == "__main__":
    cli()
