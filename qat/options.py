"""The options of ``python -m qat.train``. No torch is imported here, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qat.console import Command


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Command):
    """The options of ``python -m qat.train``."""

    model: str = "resnet50"
    """A torchvision classification model, timm/NAME, or path/to/file.py:function."""
    data: str = "digits"
    """digits, an image folder with train/ and val/, an .npz file, or torchvision:NAME (torchvision:CIFAR10)."""
    output: Path = Path("runs/model.qat")
    """The checkpoint to write; its sidecar is written beside it."""
    weights: str | None = None
    """Pretrained weights: a name that torchvision knows (IMAGENET1K_V2), a .safetensors or a .pth file."""
    image_size: int | None = None
    """Height and width of the network's input in pixels; by default what suits the data."""
    float_epochs: int = 8
    """Epochs of float training before quantization; 0 with pretrained weights that need none."""
    float_lr: float = 2e-3
    """Peak learning rate of the float training (AdamW, one cycle)."""
    qat_epochs: int = 2
    """Epochs of fine-tuning with quantization in the loop."""
    qat_lr: float = 2e-5
    """First learning rate of the fine-tuning (AdamW, cosine)."""
    batch_size: int = 32
    """Images in a training step."""
    weight_decay: float = 1e-2
    """Weight decay of matrices and kernels."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over all classes."""
    keep_float: tuple[str, ...] = ()
    """Patterns (* ? []) of modules, operations and tensors that stay in float, by the names that python -m
    qat.placement shows."""
    calibrator: Literal["max", "percentile", "mse", "entropy"] = "mse"
    """How activation ranges are chosen from the calibration images."""
    percentile: float = 99.99
    """Share of the values, in percent, that the percentile calibrator keeps unclipped."""
    calibration_images: int = 512
    """Upper limit on the size of the calibration split."""
    seed: int = 0
    """Fixes the splits, the initial weights, the order of the images, augmentation and dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a GPU where there is one."""
    workers: int = 2
    """Processes that decode images, for data sets that do not fit in memory."""
    data_root: Path = Path("data")
    """Where torchvision's data sets are looked for and downloaded to."""
    resume: bool = False
    """Continue the run that was stopped while writing this output."""
    save_seconds: float = 60.0
    """Seconds between two saves of the training state."""
