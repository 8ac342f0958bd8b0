"""Turns a decoded image into the network's input, at random in training and in a fixed way in evaluation.

An engine must repeat the preprocessing of evaluation, so its few numbers are stored in every sidecar. Resampling is
torchvision's, bilinear or bicubic, with antialiasing as in Pillow. Files of before bicubic resampling are bilinear.

Layouts: N images, C channels (RGB or grey), H height, W width. Images are uint8, 0..255, until they are
normalized on the device that trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from qat.base.errors import UserError
from qat.base.image_files import LETTERBOX_GREY
from qat.base.letterbox import extents_within

Interpolation = Literal["bilinear", "bicubic"]
_COLORS = {1: "grey", 3: "RGB"}  # by channels
_CROP_SCALE, _CROP_RATIO, _CROP_TRIALS = (0.35, 1.0), (3 / 4, 4 / 3), 10


@dataclass(frozen=True)
class ImagePreset:
    """How photographs are preprocessed for a network; the defaults are those of most ImageNet weights.

    ``size``: height and width of the input in pixels, unless another size is asked for. ``short_side``: the length to
    which the short side is resized before a crop of that size. ``mean`` and ``std``: of pixels in 0..1, for red, green
    and blue, or one number for grey. ``interpolation``: how images are resampled. ``letterbox``: see Preprocessing.
    """

    size: int = 224
    short_side: int = 256
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bilinear"
    letterbox: bool = False

    @classmethod
    def of_sidecar(cls, preprocessing: Mapping[str, Any]) -> ImagePreset:
        """The preset of a square network, from what the sidecar of its ONNX file or engine states."""
        mean, std = (tuple(preprocessing[name]) for name in ("mean", "std"))
        how = preprocessing.get("interpolation", "bilinear"), preprocessing.get("letterbox", False)
        return cls(preprocessing["height"], preprocessing["resize"], mean, std, *how)

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return len(self.mean)

    def in_channels(self, channels: int) -> ImagePreset:
        """The same for images of 1 or 3 channels: grey has the average of the three colors, as in timm."""
        if channels == self.channels:
            return self
        mean, std = ((sum(values) / len(values),) * channels for values in (self.mean, self.std))
        return replace(self, mean=mean, std=std)


@dataclass(frozen=True)
class Preprocessing:
    """From an image to the network's input: resize, center crop, normalize. Stored in every sidecar.

    ``resize`` is the length in pixels to which the short side is resized before the center crop of ``height`` x
    ``width``. An image whose short side already has this length is not resampled. ``mean`` and ``std`` have one number
    for each channel: three for color RGB, one for color grey. With ``letterbox`` the whole image is resized, without
    antialiasing, to the largest that fits, and grey of value 114 is put around it, as detectors are fed. Raises
    UserError when an entry is invalid.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int
    interpolation: Interpolation = "bilinear"
    color: Literal["RGB", "grey"] = "RGB"
    letterbox: bool = False

    def __post_init__(self) -> None:
        counts = f"{self.color} with {len(self.mean)} means and {len(self.std)} deviations"
        if _COLORS.get(len(self.mean)) != self.color or len(self.mean) != len(self.std):
            raise UserError(f'preprocessing of {counts}: give three of each for "RGB", one of each for color="grey"')
        if self.interpolation not in get_args(Interpolation) or min(self.std) <= 0:
            raise UserError(
                f"preprocessing with {self.interpolation} interpolation and std {self.std}: give "
                f"{' or '.join(get_args(Interpolation))}, and deviations above 0"
            )
        if not 0 < min(self.height, self.width) <= self.resize:
            raise UserError(
                f"preprocessing crops {self.height}x{self.width} out of {self.resize}: give a longer resize"
            )

    @classmethod
    def from_preset(cls, preset: ImagePreset, height: int, width: int, resize: int) -> Preprocessing:
        """What ``preset`` says for a network of this size."""
        color: Literal["RGB", "grey"] = "grey" if preset.channels == 1 else "RGB"
        return cls(height, width, preset.mean, preset.std, resize, preset.interpolation, color, preset.letterbox)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Preprocessing:
        """The inverse of ``dataclasses.asdict``. Raises UserError when an entry is missing or invalid."""
        try:
            return cls(**{**content, **{name: tuple(map(float, content[name])) for name in ("mean", "std")}})
        except (KeyError, TypeError, ValueError, UserError) as error:
            raise UserError(
                f"preprocessing lacks or misstates an entry ({type(error).__name__}: {error}): make it again"
            ) from error

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return len(self.mean)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of the network's input."""
        return self.channels, self.height, self.width

    @property
    def preset(self) -> ImagePreset:
        """The preset from which ``load_data`` makes the same preprocessing again."""
        return ImagePreset(self.height, self.resize, self.mean, self.std, self.interpolation, self.letterbox)

    def normalize(self, images_NCHW: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> float32 [N, C, H, W] on the same device: (x / 255 - mean) / std."""
        mean, std = (_per_channel(values, images_NCHW.device) for values in (self.mean, self.std))
        return (images_NCHW.float() / 255 - mean) / std

    def fit(self, image: Tensor) -> Tensor:
        """uint8 [..., C, h, w] -> [..., C, height, width]: resized, and cropped at the center or put in a letterbox."""
        if self.letterbox:
            return self._put_in_letterbox(image)
        if min(image.shape[-2:]) != self.resize:
            image = transforms.resize(image, [self.resize], InterpolationMode(self.interpolation), antialias=True)
        if image.shape[-2:] != (self.height, self.width):
            image = transforms.center_crop(image, [self.height, self.width])
        return image

    def places(self, height: int, width: int) -> tuple[list[int], list[int]]:
        """Where ``fit`` puts an image of this size: the [height, width] to which it is resized, and what is then added.

        That is [left, top, right, bottom] in pixels, below 0 where so many are cut off.
        """
        if self.letterbox:
            size = [*extents_within((height, width), (self.height, self.width))]
        else:
            size = [int(self.resize * extent / min(height, width)) for extent in (height, width)]
        (top, bottom), (left, right) = (
            _sides(wanted - extent) for wanted, extent in zip((self.height, self.width), size, strict=True)
        )
        return size, [left, top, right, bottom]

    def _put_in_letterbox(self, image: Tensor) -> Tensor:
        size, around = self.places(*image.shape[-2:])
        if size != list(image.shape[-2:]):
            image = transforms.resize(image, size, InterpolationMode(self.interpolation), antialias=False)
        padded: Tensor = transforms.pad(image, around, LETTERBOX_GREY)
        return padded


def _sides(missing: int) -> tuple[int, int]:
    """How many pixels are added before and behind, or, below 0, cut off at the center."""
    first = missing // 2 if missing >= 0 else -round(-missing / 2)
    return first, missing - first


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image.

    ``padding``: shift by up to this many pixels, filling with black; 0: crop 35..100 % of the area and resize it.
    ``flip``: mirror half of the images left to right.
    """

    padding: int
    flip: bool

    def __call__(self, image: Tensor, preprocessing: Preprocessing, seed: int) -> Tensor:
        """uint8 [C, h, w] -> [C, height, width]; what is random depends only on ``seed``."""
        if self.padding:
            return self.shift(preprocessing.fit(image)[None], torch.tensor([seed]))[0]
        generator = torch.Generator().manual_seed(seed)
        size = [preprocessing.height, preprocessing.width]
        box = _random_box(image.shape[-2], image.shape[-1], generator)
        interpolation = InterpolationMode(preprocessing.interpolation)
        image = transforms.resized_crop(image, *box, size, interpolation, antialias=True)
        if self.flip and torch.rand((), generator=generator) < 0.5:
            image = transforms.horizontal_flip(image)
        return image

    def shift(self, images_NCHW: Tensor, seeds: Tensor) -> Tensor:
        """Shifts and mirrors uint8 [N, C, H, W], each image by its seed (int64 [N], at least 0, on the same device)."""
        count, _, height, width = images_NCHW.shape
        reach = 2 * self.padding + 1
        down, right, mirrored = seeds % reach, seeds // reach % reach, seeds // reach**2 % 2 == 1
        rows, columns = (torch.arange(size, device=seeds.device).expand(count, size) for size in (height, width))
        if self.flip:
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        rows, columns = rows + down[:, None], columns + right[:, None]
        padded_NHWC = transforms.pad(images_NCHW, [self.padding]).permute(0, 2, 3, 1)
        every = torch.arange(count, device=seeds.device)
        shifted_NHWC = padded_NHWC[every[:, None, None], rows[:, :, None], columns[:, None, :]]
        shifted_NCHW: Tensor = shifted_NHWC.permute(0, 3, 1, 2)
        return shifted_NCHW


def _random_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random part of an image (Inception's crop, Szegedy et al. 2015)."""
    log_ratio = [math.log(ratio) for ratio in _CROP_RATIO]
    for share, skew, down, right in torch.rand(_CROP_TRIALS, 4, generator=generator).tolist():
        area = height * width * (_CROP_SCALE[0] + share * (_CROP_SCALE[1] - _CROP_SCALE[0]))
        ratio = math.exp(log_ratio[0] + skew * (log_ratio[1] - log_ratio[0]))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


@lru_cache(maxsize=16)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [C, 1, 1]. Cached, because a copy to a GPU waits for all work before it, here a whole training step."""
    return torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1)


def three_floats(values: Sequence[float]) -> tuple[float, float, float]:
    """``values`` as one float for each color."""
    red, green, blue = map(float, values)
    return red, green, blue
