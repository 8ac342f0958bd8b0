"""The options of ``python -m qat.train`` and ``python -m qat.calibrate``.

No torch is imported here, so that --help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from qat.base.artifact import sidecar_path
from qat.base.choices import Amp, Calibrator, Schedule, WeightCalibrator
from qat.base.console import Command
from qat.base.number_format import BITS
from qat.base.outputs import READS, READS_IMAGES, Writes
from qat.base.ranges_file import ranges_path
from qat.calibration.settings import CalibrationSettings
from qat.data.request import ImageRequest
from qat.rules.kernel_profile import KernelProfile, given_profile
from qat.rules.tuned import tuned_names
from qat.training.interrupts import state_path
from qat.training.recipe import DistillationSettings, Recipe

_BOTH_PHASES = (
    *("batch_size", "accumulate", "weight_decay", "label_smoothing", "clip_norm", "ema", "seed", "mixup", "cutmix"),
)
_FLOAT_LR, _ATTENTION_LR = 2e-3, 5e-4


def _beside_checkpoint(output: Path, options: Any) -> tuple[Path, ...]:
    return sidecar_path(output), ranges_path(output), state_path(output), output.with_suffix(".explain.html")


@dataclass(frozen=True, kw_only=True)
class SharedOptions(Command):
    """The options of both commands."""

    model: Annotated[str, READS] = "resnet50"
    """A torchvision model, timm/NAME, ultralytics/FILE, or path/to/file.py:function."""
    data: Annotated[str, READS_IMAGES] = "digits"
    """digits, an image folder with train/ and val/ or of <class>/<image>, an .npz file, or torchvision:NAME
    (torchvision:CIFAR10)."""
    output: Annotated[Path, Writes(beside=_beside_checkpoint)] = Path("runs/model.qat")
    """The checkpoint to write; its sidecar is written beside it."""
    weights: Annotated[str | None, READS] = None
    """Pretrained weights: a name that torchvision knows (IMAGENET1K_V2), a .safetensors or a .pth file. A checkpoint of
    pytorch-quantization also brings its ranges."""
    image_size: int | None = None
    """Height and width of the network's input in pixels; by default the size that suits the data."""
    channels: Literal[1, 3] = 3
    """Channels of the network's input: 3 for red, green and blue; 1 for grey, to which images in color are
    converted."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel by which images are normalized, in 0..1; by default the mean that the weights were trained
    with if it is known, else ImageNet's."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel by which images are normalized; its default is chosen as for --mean."""
    keep_float: tuple[str, ...] = ()
    """Patterns (* ? []) of modules, operations and tensors that stay in float, by the names that python -m
    qat.placement shows."""
    placement: Annotated[Path | None, READS] = None
    """A placement that deploy.tune wrote for this network: what it leaves in float stays in float."""
    profile: Annotated[Path | None, READS] = None
    """What deploy.kernels measured on the GPU that the engine is for; by default what was measured on an H200."""
    calibrator: Calibrator = "mse"
    """How activation ranges are chosen from the calibration images."""
    weight_calibrator: WeightCalibrator = "max"
    """How weight ranges are chosen. max: they follow the largest magnitude of each channel, during training as well;
    mse: they are fixed at the least squared quantization error."""
    percentile: float = 99.99
    """Percentage of the values that the percentile calibrator leaves unclipped."""
    smoothquant: float | None = None
    """For transformers: outliers of LayerNorms' outputs are moved into the weights of the linear layers that read them,
    before ranges are chosen (SmoothQuant). How much of them, from 0 to 1; 0.5 is usual. The float network computes the
    same."""
    calibration_images: int = 512
    """Largest number of images in the calibration split; of labelled images a tenth is taken, at least 64."""
    batch_size: int = 32
    """Images per batch."""
    seed: int = 0
    """Determines the splits and, in training, the initial weights, the order of images, augmentation and dropout."""
    device: str = "auto"
    """cpu, cuda, or cuda:1 and so on; auto takes a GPU if there is one."""
    workers: int = 2
    """Processes that decode images, for data sets that do not fit in memory."""
    data_root: Annotated[Path, READS] = Path("data")
    """Folder in which torchvision's data sets are found, or to which they are downloaded."""

    def images(self) -> ImageRequest:
        """The images that the options ask for."""
        return ImageRequest(
            source=self.data,
            image_size=self.image_size,
            seed=self.seed,
            calibration_images=self.calibration_images,
            root=self.data_root,
            channels=self.channels,
            mean=self.mean,
            std=self.std,
            batch_size=self.batch_size,
            workers=self.workers,
        )

    def kept_float(self) -> tuple[str, ...]:
        """What stays in float. Raises UserError when --placement cannot be read."""
        return (*self.keep_float, *tuned_names(self.placement)) if self.placement else self.keep_float

    def kernel_profile(self) -> KernelProfile | None:
        """What was measured on a GPU. Raises UserError when --profile cannot be read."""
        return given_profile(self.profile)

    def calibration(self) -> CalibrationSettings:
        """How ranges are chosen. Raises UserError when a value is out of range."""
        return CalibrationSettings(self.calibrator, self.percentile, self.weight_calibrator, self.smoothquant)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(SharedOptions):
    """The options of ``python -m qat.train``."""

    float_epochs: int = 8
    """Epochs of float training before quantization; give 0 if the pretrained weights need none."""
    float_lr: float | None = None
    """Peak learning rate of the float training (AdamW); by default 2e-3, of networks with attention 5e-4."""
    float_schedule: Schedule = "one-cycle"
    """Learning-rate schedule. one-cycle warms up for the first three tenths of the epochs; cosine only falls."""
    qat_epochs: int = 2
    """Epochs of fine-tuning with fake quantization."""
    qat_lr: float = 2e-5
    """Highest learning rate of the fine-tuning (AdamW)."""
    qat_schedule: Schedule = "cosine"
    """Learning-rate schedule of the fine-tuning, as for --float-schedule."""
    freeze_norms_after: int | None = None
    """Number of fine-tuning epochs after which the statistics of batch normalization are frozen."""
    progressive: int = 0
    """Number of epochs at the start of the fine-tuning in which only part of the network is quantized: each epoch
    quantizes more of it, starting at the input. Must be below --qat-epochs."""
    learn_ranges: bool = False
    """Learn the ranges of weights and activations in the fine-tuning too (LSQ), starting from the calibrated ranges."""
    ranges_lr: float = 10.0
    """Learning rate of the learned ranges, as a multiple of the learning rate of the weights."""
    distill: float = 0.0
    """Weight, from 0 to 1, of the distance to the float network's outputs in the loss of the fine-tuning; the labels
    have the rest."""
    distill_temperature: float = 4.0
    """Temperature by which the logits of both networks are divided for --distill; above 1, unlikely classes count
    more."""
    distill_features: float = 0.0
    """Weight of the distance to the float network's tensors at the ends of its stages; 0 turns it off."""
    accumulate: int = 1
    """Number of batches whose gradients are accumulated for one training step."""
    weight_decay: float = 1e-2
    """Weight decay of matrices and kernels."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread evenly over all classes."""
    mixup: float = 0.0
    """Blend pairs of training images, with weights from Beta(A, A) for this value A; 0 turns it off."""
    cutmix: float = 0.0
    """Paste a box of one training image into another, its area from Beta(A, A) for this value A; 0 turns it off."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0: no limit."""
    ema: float = 0.0
    """Decay of a moving average of weights and statistics, which then becomes the result; 0 turns it off."""
    bits: int = BITS
    """Bits of weights and activations. Fewer than 8 are a simulation, which cannot be exported; the first and the last
    layer keep 8."""
    amp: Amp = "auto"
    """Type that training computes convolutions in; quantization stays in float32. auto: bfloat16 on a GPU."""
    compile: bool | None = None
    """Compile the training step with torch.compile, which takes about a minute; by default on a GPU, for 1000 steps or
    more."""
    log_folder: Annotated[Path | None, Writes(folder=True, beside=lambda path, _: (path / "train.jsonl",))] = None
    """Folder for the figures of training as it proceeds: train.jsonl and TensorBoard's files."""
    resume: bool = False
    """Continue the stopped run that was to write this output."""
    save_seconds: float = 60.0
    """Seconds between two saves of the training state."""

    def float_recipe(self) -> Recipe:
        """How the float network is trained. Raises UserError when a value is out of range."""
        return Recipe(
            epochs=self.float_epochs,
            lr=_FLOAT_LR if self.float_lr is None else self.float_lr,
            attention_lr=_ATTENTION_LR if self.float_lr is None else None,
            schedule=self.float_schedule,
            **self._both_phases(),
        )

    def qat_recipe(self) -> Recipe:
        """How the network is fine-tuned with fake quantization. Raises UserError when a value is out of range."""
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
        """How the fine-tuning follows the float network. Raises UserError when a value is out of range."""
        return DistillationSettings(self.distill, self.distill_temperature, self.distill_features)

    def _both_phases(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _BOTH_PHASES}


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(SharedOptions):
    """The options of ``python -m qat.calibrate``."""

    data: Annotated[str, READS_IMAGES] = "digits"
    """A folder of images without labels; a set with boxes or masks (set.yaml, instances.json, a folder with images/ and
    masks/), whose training images are taken; or labelled images as python -m qat.train takes them: digits, an image
    folder with train/ and val/, an .npz file, or torchvision:NAME (torchvision:CIFAR10)."""
    weights: Annotated[str | None, READS] = None
    """The network's weights (required): a name that torchvision knows (IMAGENET1K_V2), a .safetensors or a .pth file. A
    checkpoint of pytorch-quantization also brings its ranges."""
    classes: int | None = None
    """Number of classes of the network, if the weights do not show it."""
    decode: bool = False
    """Of a model of Ultralytics: the outputs are boxes in pixels and scores (detections, and proto), instead of what
    the head computes (boxes, scores, ...)."""
    adaround: int = 0
    """Steps per layer in which AdaRound chooses which weights to round up and which to round down; 1000 is usual. It
    takes minutes on a GPU, much longer on a CPU, and keeps tensors of both networks for all calibration images: for
    ResNet50 at 224 px up to 15 MB per image. 0: all weights are rounded to the nearest code."""
    explain: tuple[str, ...] = ()
    """Patterns (* ? []) of quantized tensors, by the names that python -m qat.placement shows. How the range of each is
    chosen is printed, and drawn in a page beside the output: model.explain.html."""
