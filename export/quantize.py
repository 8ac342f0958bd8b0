"""Quantize a float ONNX file from anywhere: calibrate, place Q/DQ nodes where TensorRT wants them, write INT8 weights.

    python -m export.quantize model.onnx --data path/to/images
    python -m export.quantize model.onnx --calibration-cache calibration.cache

This is for networks that cannot be trained again. The second form takes over the scales that an older TensorRT
calibrated. Tensors that the cache lacks, or for which it has a scale of 0, are named and stay in float; with --data
they are calibrated.
Next: python -m deploy.build model.int8.onnx
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from export.file_form import files_beside, quantized_path
from qat.base.choices import Calibrator, WeightCalibrator, WeightStorage
from qat.base.console import Command, run_command
from qat.base.onnx_structure import check_structure
from qat.base.outputs import READS, READS_IMAGES, Writes
from qat.rules.kernel_profile import given_profile
from qat.rules.tuned import tuned_names

_OUTPUT = Writes(default=lambda options: quantized_path(options.model), beside=files_beside)


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(Command):
    """The options of ``python -m export.quantize``."""

    model: Annotated[Path, tyro.conf.Positional, READS]
    """A float ONNX file with one input, batch first."""
    data: Annotated[str | None, READS_IMAGES] = None
    """Images to calibrate on: a folder of images without labels, a folder with train/ and val/, digits, an .npz file,
    torchvision:NAME; or an .npy file of float32 inputs as the network takes them, [N, ...]."""
    calibration_cache: Annotated[Path | None, READS] = None
    """A calibration cache that TensorRT 10 or older wrote for this network."""
    output: Annotated[Path | None, _OUTPUT] = None
    """The ONNX file to write; by default model.int8.onnx beside the model."""
    keep_float: tuple[str, ...] = ()
    """Nodes and tensors that stay in float: patterns such as '/classifier/*'."""
    placement: Annotated[Path | None, READS] = None
    """A placement that deploy.tune wrote for this network: what it leaves in float stays in float."""
    profile: Annotated[Path | None, READS] = None
    """What deploy.kernels measured on the GPU that the engine is for; by default what was measured on an H200."""
    calibrator: Calibrator = "mse"
    """How activation ranges are chosen from the images."""
    weight_calibrator: WeightCalibrator = "max"
    """How weight ranges are chosen. max: the largest magnitude of each channel; mse: the range with the least squared
    quantization error."""
    percentile: float = 99.99
    """The share of the values, in percent, that the percentile calibrator does not clip."""
    weights: WeightStorage = "int8"
    """float: the same codes as float weights in front of a QuantizeLinear, for tools that refuse INT8 weights."""
    float_type: Literal["float32", "float16"] = "float32"
    """float16: layers that are not INT8 compute in this, apart from those that need float32. TensorRT 10, 11 and RTX
    take types from the file."""
    images: int = 512
    """Images to calibrate on, at most."""
    mean: tuple[float, ...] | None = None
    """Mean of the normalization for each channel, of pixels in 0 to 1; by default the model's sidecar's, else the data
    set's."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the normalization, likewise."""
    parity_images: int = 512
    """Test images on which the float and the quantized network are compared, at most."""
    seed: int = 0
    """Decides which images are calibrated on."""
    data_root: Annotated[Path, READS] = Path("data")
    """Where torchvision's data sets are, or are downloaded to."""


def main(options: QuantizeOptions) -> None:
    """Quantizes. Torch is imported here, so that --help answers at once, and what no parser may see is refused so."""
    if options.model.is_file():
        check_structure(options.model)
    from export.from_float_onnx import quantize_onnx
    from export.read import blaming_inconsistencies

    with blaming_inconsistencies(options.model):
        quantize_onnx(
            options.model,
            options.output,
            data=options.data,
            calibration_cache=options.calibration_cache,
            calibrator=options.calibrator,
            weight_calibrator=options.weight_calibrator,
            percentile=options.percentile,
            keep_float=(*options.keep_float, *(tuned_names(options.placement) if options.placement else ())),
            profile=given_profile(options.profile),
            weights=options.weights,
            float_type=options.float_type,
            images=options.images,
            mean=options.mean,
            std=options.std,
            parity_images=options.parity_images,
            seed=options.seed,
            data_root=options.data_root,
        )


def cli() -> None:
    """The console script export-quantize."""
    run_command(main, QuantizeOptions, supervised=True)


if __name__ == "__main__":
    cli()
