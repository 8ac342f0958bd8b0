"""The options of ``python -m qat.train`` and ``python -m qat.calibrate``.

No torch is imported here, so that --help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.base.choices import Amp, Calibrator, Schedule, WeightCalibrator
from qat.base.console import Command
from qat.base.number_format import BITS
from qat.calibration.settings import CalibrationSettings
from qat.data.request import ImageRequest
from qat.training.recipe import DistillationSettings, Recipe

_BOTH_PHASES = (
    *("batch_size", "accumulate", "weight_decay", "label_smoothing", "clip_norm", "ema", "seed", "mixup", "cutmix"),
)


@dataclass(frozen=True, kw_only=True)
class SharedOptions(Command):
    """Options that both commands have."""

    model: str = "resnet50"
    """A torchvision classification model, timm/NAME, or path/to/file.py:function."""
    data: str = "digits"
    """digits, an image folder with train/ and val/, an .npz file, or torchvision:NAME (torchvision:CIFAR10)."""
    output: Path = Path("runs/model.qat")
    """The checkpoint to write; its sidecar is written beside it."""
    weights: str | None = None
    """Pretrained weights: a name that torchvision knows (IMAGENET1K_V2), a .safetensors or a .pth file; the ranges of a
    checkpoint of pytorch-quantization are taken over."""
    image_size: int | None = None
    """Height and width of the network's input in pixels; by default what suits the data."""
    mean: tuple[float, float, float] | None = None
    """By which images are normalized: of red, green and blue, each in 0..1; by default what the weights were trained
    with where that is known, else ImageNet's."""
    std: tuple[float, float, float] | None = None
    """As --mean: the deviation."""
    keep_float: tuple[str, ...] = ()
    """Patterns (* ? []) of modules, operations and tensors that stay in float, by the names that python -m
    qat.placement shows."""
    calibrator: Calibrator = "mse"
    """How activation ranges are chosen from the calibration images."""
    weight_calibrator: WeightCalibrator = "max"
    """How ranges of weights are chosen: max, they follow the largest magnitude of each channel, in training too; mse,
    they are fixed where the squared error of the codes is least."""
    percentile: float = 99.99
    """Share of the values, in percent, that the percentile calibrator keeps unclipped."""
    calibration_images: int = 512
    """Upper limit on the size of the calibration split."""
    batch_size: int = 32
    """Images in a batch."""
    seed: int = 0
    """Fixes the splits and, in training, the initial weights, the order of the images, augmentation and dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a GPU where there is one."""
    workers: int = 2
    """Processes that decode images, for data sets that do not fit in memory."""
    data_root: Path = Path("data")
    """Where torchvision's data sets are looked for and downloaded to."""

    def images(self) -> ImageRequest:
        """Which images are asked for."""
        return ImageRequest(
            source=self.data,
            image_size=self.image_size,
            seed=self.seed,
            calibration_images=self.calibration_images,
            root=self.data_root,
            mean=self.mean,
            std=self.std,
            batch_size=self.batch_size,
            workers=self.workers,
        )

    def calibration(self) -> CalibrationSettings:
        """How ranges are chosen. Raises UserError where a value is out of range."""
        return CalibrationSettings(self.calibrator, self.percentile, self.weight_calibrator)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(SharedOptions):
    """The options of ``python -m qat.train``."""

    float_epochs: int = 8
    """Epochs of float training before quantization; 0 with pretrained weights that need none."""
    float_lr: float = 2e-3
    """Peak learning rate of the float training (AdamW)."""
    float_schedule: Schedule = "one-cycle"
    """one-cycle warms up for three tenths of the epochs; cosine only falls."""
    qat_epochs: int = 2
    """Epochs of fine-tuning with quantization in the loop."""
    qat_lr: float = 2e-5
    """Highest learning rate of the fine-tuning (AdamW)."""
    qat_schedule: Schedule = "cosine"
    """As for the float training."""
    freeze_norms_after: int | None = None
    """Epochs of the fine-tuning after which the statistics of batch normalization stay as they are."""
    progressive: int = 0
    """Epochs of the fine-tuning at its start in which only a part of the network is quantized, from the input on, and
    more of it in each; must be below --qat-epochs."""
    learn_ranges: bool = False
    """Learn the ranges of weights and activations in the fine-tuning too (LSQ), from those that calibration found."""
    ranges_lr: float = 10.0
    """How many times the learning rate of the weights that of the learned ranges is."""
    distill: float = 0.0
    """Share of the loss of the fine-tuning that is the distance from the float network's answers, from 0 to 1."""
    distill_temperature: float = 4.0
    """By which both networks' logits are divided for that distance; above 1, unlikely classes count more."""
    distill_features: float = 0.0
    """Weight of the distance from the float network's tensors where its stages end; 0: not."""
    accumulate: int = 1
    """Batches whose gradients make one training step."""
    weight_decay: float = 1e-2
    """Weight decay of matrices and kernels."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over all classes."""
    mixup: float = 0.0
    """Blends pairs of training images, with weights from Beta(A, A); 0: not."""
    cutmix: float = 0.0
    """Puts a box of one training image into another, its area from Beta(A, A); 0: not."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0: no limit."""
    ema: float = 0.0
    """Decay of a moving average of weights and statistics, which then is the result; 0: none."""
    bits: int = BITS
    """Bits of weights and activations; below 8 it is a simulation, which cannot be exported: the first and the last
    layer keep 8."""
    amp: Amp = "auto"
    """Type that training computes convolutions in; quantization stays float32. auto: bfloat16 on a GPU."""
    compile: bool | None = None
    """Whether torch.compile compiles the training step, which takes about a minute; by default on a GPU, for 1000 steps
    or more."""
    log_folder: Path | None = None
    """Folder for figures of training as it goes on: train.jsonl and TensorBoard's files."""
    resume: bool = False
    """Continue the run that was stopped while writing this output."""
    save_seconds: float = 60.0
    """Seconds between two saves of the training state."""

    def float_recipe(self) -> Recipe:
        """How the float network is trained. Raises UserError where a value is out of range."""
        return Recipe(epochs=self.float_epochs, lr=self.float_lr, schedule=self.float_schedule, **self._both_phases())

    def qat_recipe(self) -> Recipe:
        """How it is fine-tuned with quantization in the loop; likewise."""
        return Recipe(
            epochs=self.qat_epochs,
            lr=self.qat_lr,
            schedule=self.qat_schedule,
            freeze_norms_after=self.freeze_norms_after,
            ranges_lr=self.ranges_lr,
            progressive=self.progressive,
            **self._both_phases(),
        )

    def distillation(self) -> DistillationSettings:
        """How the fine-tuning follows the float network; likewise."""
        return DistillationSettings(self.distill, self.distill_temperature, self.distill_features)

    def _both_phases(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _BOTH_PHASES}


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(SharedOptions):
    """The options of ``python -m qat.calibrate``."""

    data: str = "digits"
    """A folder of images without labels; or, with labels, what python -m qat.train takes: digits, an image folder with
    train/ and val/, an .npz file, or torchvision:NAME (torchvision:CIFAR10)."""
    weights: str | None = None
    """The network's weights, which are needed: a name that torchvision knows (IMAGENET1K_V2), a .safetensors or a .pth
    file; the ranges of a checkpoint of pytorch-quantization are taken over."""
    classes: int | None = None
    """How many classes the network has, where the weights do not tell."""
    adaround: int = 0
    """Steps in which AdaRound chooses for each layer which weights to round up and which down, 1000 being usual:
    minutes on a GPU, much longer on a CPU. It keeps both networks' tensors of all calibration images, of ResNet50 at
    224 px up to 15 MB each. 0: all weights are rounded to the nearest code."""
