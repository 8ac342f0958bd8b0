"""The reference file of an ONNX file: test images and PyTorch's answers, for a machine without torch or the data set.

``python -m export.onnx`` writes it: ``model.onnx`` -> ``model.reference.npz``. The sidecar records its SHA-256.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qat.base.array_file import DAMAGED, opened_arrays
from qat.base.artifact import Sidecar, sha256_of
from qat.base.errors import UserError, one_line
from qat.base.number_format import INT8

LOGITS, OUTPUT = "logits", "output_"
"""Arrays of the file: the only output, if it is [N, values], or each output by its place."""


@dataclass(frozen=True, eq=False)
class Reference:
    """N images and PyTorch's answers.

    Attributes:
        images: uint8 [N, H, W, C], RGB or grey, before normalization: resized and cropped, or as a camera gives them
            where the network does that itself.
        labels: int64 [N]; -1 for an image without a label, such as a random one.
        outputs: by name, [N, ...] each, of the folded network in PyTorch.
        source: where the images come from.
    """

    images: np.ndarray
    labels: np.ndarray
    outputs: Mapping[str, np.ndarray]
    source: str

    @property
    def logits(self) -> np.ndarray:
        """The only output of a classifier: float32 [N, classes]."""
        (found,) = self.outputs.values()
        return found


def read_reference(onnx_path: Path, sidecar: Sidecar) -> Reference:
    """Reads the reference file beside ``onnx_path`` that the ``sidecar`` of the ONNX file records.

    Raises UserError when the sidecar records none, when the file is missing, and when it is another file.
    """
    if "reference" not in sidecar.details:
        raise UserError(f"{onnx_path} records no reference file: export it again with python -m export.onnx")
    recorded = sidecar.details["reference"]
    if recorded is None:
        raise UserError(f"{onnx_path} has no reference file, which is written for networks of images: give --data")
    path = onnx_path.with_name(recorded["file"])
    if not path.is_file():
        raise UserError(
            f"no reference file {path}: copy it from beside the ONNX file where that was exported, or export again"
        )
    found = sha256_of(path)
    if found != recorded["sha256"]:
        raise UserError(
            f"{path} has SHA-256 {found}, the sidecar of {onnx_path.name} records {recorded['sha256']}: "
            "the file is truncated or is another one; copy it again or export again"
        )
    try:
        with opened_arrays(path) as arrays:
            if isinstance(arrays, np.ndarray):
                raise ValueError("a single array")
            names = [spec.name for spec in sidecar.outputs]
            kept = [LOGITS] if LOGITS in arrays else [f"{OUTPUT}{index}" for index in range(len(names))]
            if len(kept) != len(names) or not {"images", "labels", *kept} <= set(arrays):
                raise UserError(
                    f"{path} has {', '.join(arrays) or 'nothing'}, and the sidecar of {onnx_path.name} records "
                    f"{len(names)} outputs: export it again"
                )
            outputs = {name: arrays[key] for name, key in zip(names, kept, strict=True)}
            return Reference(arrays["images"], arrays["labels"], outputs, recorded["source"])
    except DAMAGED as error:
        raise UserError(f"{path} is not a reference file ({one_line(error)}): export again") from error


def network_input(images_NHWC: np.ndarray, sidecar: Sidecar) -> np.ndarray:
    """Turns images into what the network's input takes.

    Args:
        images_NHWC: uint8 [N, H, W, C], RGB or grey.
        sidecar: that of the ONNX file or of the engine.

    Returns the images unchanged, or uint8 [N, C, H, W], or float32 [N, C, H, W] = (x / 255 - mean) / std, bit for bit
    as qat.data.preprocessing computes it, or the INT8 codes of that, by the recorded ``input_scale``. Raises UserError
    when the input has another type or shape.
    """
    (spec,) = sidecar.inputs
    given = images_NHWC
    if spec.shape[1] == images_NHWC.shape[-1]:  # [N, C, H, W]
        given = np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))
    if spec.dtype in ("float32", INT8.dtype):
        mean, std = (np.array(sidecar.preprocessing[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
        given = given.astype(np.float32)
        given /= 255  # in place, because three more copies of the images would need much memory
        given -= mean
        given /= std
    if spec.dtype == INT8.dtype:
        given /= np.float32(sidecar.preprocessing["input_scale"])
        given = np.rint(given, out=given).clip(INT8.low, INT8.high).astype(INT8.dtype)
    if given.dtype != spec.dtype or given.shape[1:] != spec.shape[1:]:
        raise UserError(
            f"input {spec.name!r} takes {spec.dtype} {list(spec.shape)}, the images are {given.dtype} "
            f"{list(given.shape)}: give images of the size that the network was exported for"
        )
    return given
