"""The options of ``python -m export.onnx`` and ``python -m export.quantize``. No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qat.base.choices import Calibrator, ExportPrecision, InputKind, WeightStorage
from qat.base.console import Command


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Command):
    """The options of ``python -m export.onnx``."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """The checkpoint that python -m qat.train or qat.calibrate wrote."""
    output: Path | None = None
    """The ONNX file to write; by default beside the checkpoint, its name saying which options were given:
    model.merged-padded.onnx."""
    input: InputKind = "float32-nchw"
    """float32-nchw: normalized images; uint8-nhwc, uint8-nchw: raw RGB bytes, preprocessing becomes part of the
    network; int8-nchw: normalized images that the caller has quantized by the input_scale in the sidecar, which leaves
    the least for the GPU to do."""
    precision: ExportPrecision = "int8"
    """float32, float16: the same weights without any quantizer, as the baseline that INT8 is compared with."""
    weights: WeightStorage = "int8"
    """float: the same codes as float weights in front of a QuantizeLinear, four times the size, for tools that refuse
    INT8 weights; deploy.build makes them by itself where TensorRT 8.6 does."""
    pad_channels: bool = False
    """Put zero channels into residual blocks that end with fewer than 128 input channels: the answers stay the same,
    and some GPUs have a faster kernel for them (measure it: python -m deploy.benchmark --variants)."""
    merge_shortcuts: bool = False
    """Merge a 1x1 shortcut into the convolution that it is added to, as in each stage of ResNet50: one kernel for two,
    and a wide tensor less to write. Input channels must be multiples of 32. Some weights are rounded again; the export
    says what that changes."""
    parity_images: int = 512
    """Test images on which PyTorch and ONNX Runtime are compared, at most; they go into the reference file."""
    layer_images: int = 8
    """Images on which they are compared layer by layer."""


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
    calibrator: Calibrator = "mse"
    """How activation ranges are chosen from the images."""
    percentile: float = 99.99
    """Share of the values, in percent, that the percentile calibrator keeps unclipped."""
    weights: WeightStorage = "int8"
    """float: the same codes as float weights in front of a QuantizeLinear, for tools that refuse INT8 weights."""
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
