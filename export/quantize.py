"""Quantize a float ONNX file from anywhere: calibrate, place Q/DQ nodes where TensorRT wants them, write INT8 weights.

    python -m export.quantize model.onnx --data path/to/images
    python -m export.quantize model.onnx --calibration-cache calibration.cache

For those who cannot train again. The second form carries over what an older TensorRT calibrated; tensors that the cache
does not know are named and stay in float, or are calibrated where --data is given too.
Next: python -m deploy.build model.int8.onnx
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qat.console import Command, run_command


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(Command):
    """The options of ``python -m export.quantize``."""

    model: Annotated[Path, tyro.conf.Positional]
    """A float ONNX file with one input, batch first."""
    data: str | None = None
    """Images to calibrate on: digits, an image folder with train/ and val/, an .npz file, torchvision:NAME; or an .npy
    file of float32 inputs just as the network takes them, [N, ...]."""
    calibration_cache: Path | None = None
    """A calibration cache that TensorRT 10 or older wrote for this network."""
    output: Path | None = None
    """The ONNX file to write; by default model.int8.onnx beside the model."""
    keep_float: tuple[str, ...] = ()
    """Nodes and tensors that stay in float: patterns such as '/classifier/*'."""
    calibrator: Literal["max", "percentile", "mse", "entropy"] = "mse"
    """How activation ranges are chosen from the images."""
    percentile: float = 99.99
    """Share of the values, in percent, that the percentile calibrator keeps unclipped."""
    weights: Literal["int8", "float"] = "int8"
    """float: the same codes as float weights in front of a QuantizeLinear, for TensorRT 8.6 where it refuses INT8."""
    images: int = 512
    """Images to calibrate on, at most."""
    mean: tuple[float, float, float] | None = None
    """Mean of the normalization, of pixels in 0 to 1; by default the model's sidecar's, else the data set's."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the normalization, likewise."""
    parity_images: int = 512
    """Test images on which the float and the quantized network are compared, at most."""
    seed: int = 0
    """Decides which images are calibrated on."""
    data_root: Path = Path("data")
    """Where torchvision's data sets are looked for and downloaded to."""


def main(options: QuantizeOptions) -> None:
    """Quantizes. Torch is imported here, so that --help answers at once."""
    from export.post_training import quantize_file

    quantize_file(options)


if __name__ == "__main__":
    run_command(main, QuantizeOptions)
