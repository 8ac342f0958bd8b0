"""TensorRT's calibration cache as a file, with a sidecar that says what it was made of (--calibration-cache).

TensorRT itself takes any cache whose header fits: one that is cut, changed, or of another network is used without an
error. So a cache is given to it only if it is the file that its sidecar was written for, and if the model, the images,
the calibrator and the version of TensorRT are those of its sidecar. The GPU does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qat.base.artifact import Sidecar, read_sidecar, sidecar_path, write_artifact
from qat.base.calibration_cache import MOST_BYTES, CalibrationCache
from qat.base.console import say, warn
from qat.base.errors import UserError
from qat.base.regular_file import read_bytes
from qat.base.writing import check_writable


@dataclass(frozen=True)
class CacheKey:
    """What scales depend on. ``images`` is None if none are given, so that any are right.

    ``model`` and ``images`` are SHA-256 in hexadecimal, ``calibrator`` its name and settings, ``tensorrt`` a version.
    """

    model: str
    images: str | None
    calibrator: str
    tensorrt: str

    def differences(self, recorded: Mapping[str, Any]) -> list[str]:
        """How what a sidecar ``recorded`` differs, one text for each difference."""
        mine = {name: value for name, value in asdict(self).items() if value is not None}
        without_value = {"model": "another model", "images": "other images"}
        return [
            without_value.get(name) or f"{name} {recorded.get(name)} instead of {value}"
            for name, value in mine.items()
            if recorded.get(name) != value
        ]


class CalibrationCacheFile:
    """A calibration cache that is read if it fits, and otherwise written.

    Attributes:
        path: the file.
        content: the bytes of a cache that fits; b"" if calibration is needed.
    """

    def __init__(self, path: Path, key: CacheKey) -> None:
        """Reads the cache, if the file exists.

        Raises UserError when it is damaged, is not of this program, cannot be written, or does not fit while
        ``key.images`` says that there are none to calibrate on.
        """
        self.path, self.content, self._key = path, b"", key
        if not path.is_file():
            check_writable(path)
            if key.images is None:
                raise UserError(f"no calibration cache {path}: give --data to calibrate, or check the path")
            return
        if not sidecar_path(path).exists():
            raise UserError(
                f"the calibration cache {path} has no sidecar, so nothing tells what it was made of: --trust-cache "
                "uses it all the same, another name for --calibration-cache calibrates"
            )
        try:
            recorded = read_sidecar(path, "calibration-cache").details
            content = read_bytes(path, MOST_BYTES)
            CalibrationCache.parse(content, str(path))
        except UserError as error:
            raise UserError(f"the calibration cache is refused: {error}; delete it to calibrate again") from error
        if differences := key.differences(recorded):
            was = f"the calibration cache {path} was made of {', '.join(differences)}"
            if key.images is None:
                raise UserError(f"{was}: give --data to calibrate again, or --trust-cache to use it all the same")
            warn(f"{was}: calibrating again (--trust-cache uses it all the same)")
            check_writable(path)
            return
        self.content = content
        used = recorded.get("images_used")
        of_images = "" if used is None else f", of {used} images"
        say(f"calibration cache {path}: used{of_images}, nothing is calibrated")

    def save(self, content: bytes, images: int) -> None:
        """Writes what TensorRT calibrated on so many ``images``, byte by byte, and its sidecar."""
        sidecar = Sidecar(kind="calibration-cache", details=asdict(self._key) | {"images_used": images})
        write_artifact(self.path, sidecar, lambda path: path.write_bytes(content))
        say(f"calibration cache {self.path}: written, {len(content.splitlines()) - 1} tensors")
