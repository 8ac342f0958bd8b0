"""Small sets of images with boxes in both formats, and with masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("square", "bar", "dot")

Boxes = Sequence[tuple[int, float, float, float, float]]
"""Class, left, top, right, bottom in pixels."""


def write_image(path: Path, size: tuple[int, int] = (64, 48), seed: int = 0) -> None:
    """Noise of ``size``, (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def write_yolo(folder: Path, images: Sequence[Boxes], size: tuple[int, int] = (64, 48)) -> Path:
    """FOLDER/set.yaml with the same images for training and validation."""
    for index, boxes in enumerate(images):
        write_image(folder / "images" / f"{index}.png", size, index)
        lines = []
        for label, left, top, right, bottom in boxes:
            x, y = (left + right) / 2 / size[0], (top + bottom) / 2 / size[1]
            lines.append(f"{label} {x:.9f} {y:.9f} {(right - left) / size[0]:.9f} {(bottom - top) / size[1]:.9f}")
        (folder / "labels").mkdir(exist_ok=True)
        (folder / "labels" / f"{index}.txt").write_text("\n".join(lines))
    path = folder / "set.yaml"
    path.write_text(f"train: images\nval: images\nnames: [{', '.join(NAMES)}]\n")
    return path


def write_coco(folder: Path, images: Sequence[Boxes], size: tuple[int, int] = (64, 48), first: int = 1) -> Path:
    """FOLDER/instances.json, whose categories have the numbers ``first``, ``first`` + 2, ...; and the images."""
    annotations = []
    for index, boxes in enumerate(images):
        write_image(folder / "images" / f"{index}.png", size, index)
        for label, left, top, right, bottom in boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": first + 2 * label,
                    "bbox": [left, top, right - left, bottom - top],
                }
            )
    content = {
        "images": [
            {"id": index, "file_name": f"{index}.png", "width": size[0], "height": size[1]}
            for index in range(len(images))
        ],
        "annotations": annotations,
        "categories": [{"id": first + 2 * place, "name": name} for place, name in enumerate(NAMES)],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def write_masks(folder: Path, masks: Sequence[np.ndarray], pair: tuple[str, str] = ("images", "masks")) -> Path:
    """FOLDER/images and FOLDER/masks, uint8 [H, W] each."""
    for index, mask in enumerate(masks):
        write_image(folder / pair[0] / f"{index}.png", (mask.shape[1], mask.shape[0]), index)
        (folder / pair[1]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / pair[1] / f"{index}.png")
    return folder
