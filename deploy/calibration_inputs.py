"""What TensorRT's calibrators are fed: images from a folder, a list or a data set, or arrays. Needs no torch for files.

Images are resized, cropped and normalized as the sidecar of the ONNX file says. All are read before a build starts, so
that a file that cannot be read costs no build, and so that their hash is known.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.fitting import fitted
from deploy.reference import network_input
from deploy.settings import CalibrationSettings
from qat.base.array_file import DAMAGED, opened_arrays
from qat.base.artifact import Sidecar, TensorSpec
from qat.base.console import progress, say, warn
from qat.base.errors import UserError, one_line
from qat.base.regular_file import read_text
from qat.data.annotated_sets import is_annotated, training_images

FEW_IMAGES = 100
_IMAGENET: Mapping[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "share": 224 / 256}
_SMALL = 64  # pixels: images for networks up to this size are not cropped
Reader = Callable[[int, int], Mapping[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class CalibrationInputs:
    """Inputs to calibrate on.

    Attributes:
        source: where they come from, for messages.
        count: how many there are.
        digest: SHA-256 of what the network is fed, in hexadecimal.
        read: ``read(start, stop)`` gives these inputs as the network takes them, by the names of its inputs.
    """

    source: str
    count: int
    digest: str
    read: Reader

    def check_batch(self, batch: int) -> None:
        """Raises UserError when there is no whole batch; warns when there are few inputs, or some are left over."""
        if self.count < batch:
            raise UserError(
                f"{self.source} has {self.count} images, and a batch of calibration takes {batch}: give more, or a "
                "smaller --calibration-batch (of a fixed batch, smaller --profiles)"
            )
        if self.count < FEW_IMAGES:
            warn(f"{self.count} calibration images are few: their ranges may not hold for others; give some hundreds")
        if left := self.count % batch:
            say(f"{left} of the {self.count} calibration images are left out: only whole batches of {batch} are used")


def calibration_inputs(
    settings: CalibrationSettings, specs: Sequence[TensorSpec], sidecar: Sidecar | None
) -> CalibrationInputs:
    """The inputs that ``settings.data`` names, for a network with the inputs ``specs`` and, perhaps, a sidecar.

    Raises UserError when they cannot be read, or do not fit the network.
    """
    assert settings.data is not None
    path = Path(settings.data).expanduser()
    if path.suffix == ".npy" or (path.suffix == ".npz" and _holds_inputs(path, specs)):
        return _array_inputs(path, specs, settings)
    if len(specs) != 1 or len(specs[0].shape) != 4:
        shapes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in specs)
        raise UserError(
            f"the network does not take images alone ({shapes}): give --data an .npz file with an array of each"
        )
    preprocessing = _preprocessing(settings, specs[0], sidecar)
    if path.is_dir() or path.suffix == ".txt" or is_annotated(path):
        files = _files(path, settings.images)
        images_NHWC = _read_images(files, preprocessing)
    else:
        images_NHWC = _data_set(settings, preprocessing)
    stated = Sidecar(kind="onnx", inputs=tuple(specs), preprocessing=preprocessing)
    network_input(images_NHWC[:1], stated)  # wrong sizes are found now

    def read(start: int, stop: int) -> Mapping[str, np.ndarray]:
        return {specs[0].name: network_input(images_NHWC[start:stop], stated)}

    digest = hashlib.sha256(repr(sorted(preprocessing.items())).encode())
    digest.update(images_NHWC.tobytes())
    return CalibrationInputs(settings.data, len(images_NHWC), digest.hexdigest(), read)


# --- arrays


def _holds_inputs(path: Path, specs: Sequence[TensorSpec]) -> bool:
    """Whether an .npz file holds an array for each input, so that it is no data set of images."""
    with _opened(path) as arrays:
        return {spec.name for spec in specs} <= set(arrays)


@contextmanager
def _opened(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an .npz file, or the one of an .npy file under the name "".

    Raises UserError when the file is damaged, which may be found only when an array is read.
    """
    try:
        with opened_arrays(path) as loaded:
            if isinstance(loaded, np.ndarray) != (path.suffix == ".npy"):
                raise ValueError(f"by its content it is no {path.suffix} file")
            yield {"": loaded} if isinstance(loaded, np.ndarray) else loaded
    except DAMAGED as error:
        raise UserError(f"cannot read {path} ({one_line(error)}): check the path, or make the file again") from error


def _array_inputs(path: Path, specs: Sequence[TensorSpec], settings: CalibrationSettings) -> CalibrationInputs:
    if settings.mean is not None or settings.std is not None:
        raise UserError(f"{path} holds inputs as the network takes them: leave out --mean and --std")
    if path.suffix == ".npy" and len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise UserError(
            f"the network has {len(specs)} inputs ({names}): give --data an .npz file with an array of each"
        )
    with _opened(path) as arrays:
        found = {spec.name: arrays["" if path.suffix == ".npy" else spec.name] for spec in specs}
    for spec in specs:
        array = found[spec.name]
        fits = array.ndim == len(spec.shape) and all(
            wanted in (-1, extent) for extent, wanted in zip(array.shape[1:], spec.shape[1:], strict=True)
        )
        if not fits or str(array.dtype) != spec.dtype or not len(array):
            raise UserError(
                f"{path} holds {array.dtype} {list(array.shape)} for {spec.name}, the network takes {spec.dtype} "
                f"{list(spec.shape)}: correct it"
            )
    lengths = {len(array) for array in found.values()}
    if len(lengths) > 1:
        raise UserError(
            f"{path} holds arrays of {', '.join(map(str, sorted(lengths)))} inputs: give equally many of each"
        )
    count = min(settings.images, *lengths)
    digest = hashlib.sha256()
    for name in found:
        array = found[name] = np.ascontiguousarray(found[name][:count])
        if not np.isfinite(array).all():
            raise UserError(f"{path} holds NaN or infinity for {name}: correct it")
        digest.update(array.tobytes())
    return CalibrationInputs(
        str(path), count, digest.hexdigest(), lambda start, stop: {name: x[start:stop] for name, x in found.items()}
    )


# --- images


def _preprocessing(settings: CalibrationSettings, spec: TensorSpec, sidecar: Sidecar | None) -> dict[str, Any]:
    """The sidecar's preprocessing, else ImageNet's; --mean and --std come before both."""
    channels = next((extent for extent in (spec.shape[1], spec.shape[-1]) if extent in (1, 3)), 0)
    height, width = spec.shape[2:] if spec.shape[1] == channels else spec.shape[1:3]
    if not channels or min(height, width) < 1:
        raise UserError(
            f"the network takes {spec.name} of shape {list(spec.shape)}, images have 1 or 3 channels and a fixed size: "
            "give --data an .npy file of inputs as the network takes them"
        )
    found: dict[str, Any] = dict(sidecar.preprocessing) if sidecar else {}
    short = min(height, width)
    if not found:
        found["resize"] = short if short <= _SMALL else round(short / _IMAGENET["share"])
    if missing := [key for key in ("mean", "std") if key not in found]:
        found |= {key: _IMAGENET[key] if channels == 3 else (sum(_IMAGENET[key]) / 3,) for key in missing}
        if spec.dtype != "uint8" and (settings.mean is None or settings.std is None):
            warn(
                "no sidecar says how the network takes images, so they are normalized as for ImageNet: --mean and "
                "--std say otherwise"
            )
    for key, values in (("mean", settings.mean), ("std", settings.std)):
        if values is not None:
            if len(values) != channels:
                raise UserError(f"--{key} has {len(values)} numbers, the network takes {channels} channels")
            found[key] = values
    defaults = {"resize": short, "interpolation": "bilinear"}
    found |= {key: tuple(map(float, found[key])) for key in ("mean", "std")}  # of a sidecar they are lists
    return defaults | found | {"height": height, "width": width, "color": "grey" if channels == 1 else "RGB"}


def _files(path: Path, most: int) -> list[str]:
    """Image files: the first of a list, or some of a folder at even distances, so that every class is among them."""
    from qat.base.image_files import all_image_files

    if path.suffix == ".txt" and not path.is_dir():
        try:
            lines = [line.strip() for line in read_text(path).splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the list of images {path} ({error}): check the path") from error
        named = [str(path.parent / line) for line in lines if line and not line.startswith("#")]
        if not named:
            raise UserError(f"{path} lists no image: write the path of one into each line")
        if missing := [name for name in named[:most] if not Path(name).is_file()]:
            raise UserError(f"{path} lists {len(missing)} files that do not exist, the first {missing[0]}: correct it")
        return named[:most]
    if is_annotated(path):
        files = training_images(path)
    else:
        files, notes = all_image_files(path / "train" if (path / "train").is_dir() else path)
        for note in notes:
            say(note)
    count = min(most, len(files))
    return [files[index * len(files) // count] for index in range(count)]


def _read_images(files: Sequence[str], preprocessing: Mapping[str, Any]) -> np.ndarray:
    """uint8 [N, height, width, C]."""
    shape = (preprocessing["height"], preprocessing["width"], len(preprocessing["mean"]))
    images_NHWC = np.empty((len(files), *shape), np.uint8)
    with progress("reading calibration images", len(files)) as task, ThreadPoolExecutor() as pool:
        for index, image in enumerate(pool.map(lambda name: fitted(name, preprocessing), files)):
            images_NHWC[index] = image
            task.advance()
    return images_NHWC


def _data_set(settings: CalibrationSettings, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """The calibration split of a data set that qat knows: uint8 [N, height, width, C]. Needs torch."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"no folder {settings.data}; the data sets of qat.calibrate need torch: install it, or give a folder"
        )
    if preprocessing["height"] != preprocessing["width"]:
        raise UserError(
            f"the network takes {preprocessing['height']}x{preprocessing['width']}, the data sets of qat.calibrate are "
            "square: give --data a folder of images"
        )
    return np.concatenate(list(_splits_images(settings, preprocessing)))


def _splits_images(settings: CalibrationSettings, preprocessing: Mapping[str, Any]) -> Iterator[np.ndarray]:
    from qat.data.batches import batches
    from qat.data.preprocessing import ImagePreset
    from qat.data.splits import load_data

    preset = ImagePreset.of_sidecar(preprocessing)
    data = load_data(str(settings.data), preprocessing["height"], 0, settings.images, settings.data_root, preset)
    for x_NCHW, _ in batches(data.calibration, 256, None):
        yield x_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
