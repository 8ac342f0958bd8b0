"""The reference file of an ONNX file: test images and PyTorch's answers on them, for a machine without torch and data.

``python -m export.onnx`` writes it: ``model.onnx`` -> ``model.reference.npz``, recorded in the sidecar by its SHA-256.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qat.base.artifact import Sidecar, sha256_of
from qat.base.errors import UserError


@dataclass(frozen=True, eq=False)
class Reference:
    """N images and what PyTorch answers on them.

    ``images``: uint8 [N, H, W, 3] in RGB, as they go into the network, before normalization.
    ``labels``: int64 [N]; -1 where there are none, as of random images.
    ``logits``: float32 [N, classes], of the folded network in PyTorch.
    ``source``: where the images come from.
    """

    images: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    source: str


def read_reference(onnx_path: Path, sidecar: Sidecar) -> Reference:
    """Reads the reference file that lies beside ``onnx_path`` and that its ``sidecar`` records.

    Raises UserError when none is recorded, it is missing, or it is another file.
    """
    recorded = sidecar.details.get("reference")
    if recorded is None:
        raise UserError(f"{onnx_path} records no reference file: export it again with python -m export.onnx")
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
    with np.load(path, allow_pickle=False) as arrays:
        return Reference(arrays["images"], arrays["labels"], arrays["logits"], recorded["source"])


def network_input(images_NHWC: np.ndarray, sidecar: Sidecar) -> np.ndarray:
    """uint8 [N, H, W, 3] in RGB -> what the network's input takes, by the ``sidecar`` of its ONNX file or engine.

    That is the images as they are, or float32 [N, 3, H, W], (x / 255 - mean) / std, the same to the last bit as
    qat.data.preprocessing computes it, or the INT8 codes of that, by the recorded ``input_scale``. Raises UserError for
    an input of another type or shape.
    """
    (spec,) = sidecar.inputs
    given = images_NHWC
    if spec.shape[1] == 3:  # [N, 3, H, W]
        given = np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))
    if spec.dtype in ("float32", "int8"):
        mean, std = (np.array(sidecar.preprocessing[name], np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
        given = given.astype(np.float32)
        given /= 255  # in place: three more copies of the images would be large
        given -= mean
        given /= std
    if spec.dtype == "int8":
        given /= np.float32(sidecar.preprocessing["input_scale"])
        given = np.rint(given, out=given).clip(-128, 127).astype(np.int8)
    if given.dtype != spec.dtype or given.shape[1:] != spec.shape[1:]:
        raise UserError(
            f"input {spec.name!r} takes {spec.dtype} {list(spec.shape)}, the images are {given.dtype} "
            f"{list(given.shape)}: give images of the size that the network was exported for"
        )
    return given
