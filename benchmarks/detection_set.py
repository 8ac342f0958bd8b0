"""A set for detectors from data that is here: handwritten digits of scikit-learn among clutter, in YOLO's format.

    python -m benchmarks.detection_set FOLDER [--train 600] [--val 200] [--pixels 160] [--seed 0]

Each image has 2 to 6 digits of 16 to 64 pixels, which overlap by at most a third, in any colour on a background of
noise, lines and parts of digits that are not labelled. Training and validation images show different digits.
FOLDER/set.yaml names the classes, FOLDER/{train,val}/{images,labels} are as Ultralytics reads them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

CLASSES = 10
SMALLEST, LARGEST, MOST_OVERLAP = 16, 64, 1 / 3
_TRIALS = 20

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels."""


def overlap(one: Box, other: Box) -> float:
    """The share of the smaller of two boxes that the other covers."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(width, 0) * max(height, 0) / smaller


def background(pixels: int, random: np.random.Generator) -> Image.Image:
    """Noise of several scales, and lines."""
    coarse = Image.fromarray(random.integers(0, 120, (5, 5, 3), dtype=np.uint8)).resize((pixels, pixels))
    noisy = np.asarray(coarse) + random.normal(0, 8, (pixels, pixels, 3))
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(random.integers(3, 9)):
        ends = [int(end) for end in random.integers(0, pixels, 4)]
        draw.line(
            ends, fill=tuple(int(level) for level in random.integers(60, 200, 3)), width=int(random.integers(1, 4))
        )
    return image


def paste(image: Image.Image, digit: np.ndarray, place: Box, random: np.random.Generator) -> None:
    """Puts a digit, float [h, w] in 0..1, into ``place``, in a bright colour."""
    size = (place[2] - place[0], place[3] - place[1])
    mask = Image.fromarray((255 * digit).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    colour = tuple(int(level) for level in random.integers(120, 256, 3))
    image.paste(Image.new("RGB", size, colour), place[:2], mask)


def compose(
    digits: np.ndarray, labels: np.ndarray, pixels: int, random: np.random.Generator
) -> tuple[Image.Image, list[tuple[int, Box]]]:
    """An image, and its digits: class and box of each."""
    image = background(pixels, random)
    for _ in range(random.integers(2, 6)):  # parts that are no digits
        part = digits[random.integers(len(digits))][: random.integers(2, 5)]
        left, top = (int(at) for at in random.integers(0, pixels - LARGEST, 2))
        paste(image, part, (left, top, left + 24, top + 10), random)
    found: list[tuple[int, Box]] = []
    for _ in range(random.integers(2, 7)):
        for _ in range(_TRIALS):
            size = int(SMALLEST * (LARGEST / SMALLEST) ** random.random())
            left, top = (int(at) for at in random.integers(0, pixels - size, 2))
            place = (left, top, left + size, top + size)
            if all(overlap(place, other) <= MOST_OVERLAP for _, other in found):
                index = random.integers(len(digits))
                rows, columns = (np.flatnonzero(digits[index].any(axis)) for axis in (1, 0))
                cut = digits[index][rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                width = max(4, round(size * cut.shape[1] / cut.shape[0]))
                place = (left, top, min(left + width, pixels), top + size)
                paste(image, cut, place, random)
                found.append((int(labels[index]), place))
                break
    return image, found


def write(folder: Path, split: str, count: int, pixels: int, seed: int) -> None:
    """The images of one split; each has its own digits of scikit-learn's."""
    random = np.random.default_rng([seed, split == "val"])
    data = load_digits()
    mine = np.arange(len(data.target)) % 4 == 0 if split == "val" else np.arange(len(data.target)) % 4 != 0
    digits, labels = data.images[mine] / 16, data.target[mine]
    for kind in ("images", "labels"):
        (folder / split / kind).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image, boxes = compose(digits, labels, pixels, random)
        image.save(folder / split / "images" / f"{index:05}.png")
        lines = []
        for label, (left, top, right, bottom) in boxes:
            values = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
            lines.append(" ".join([str(label), *(f"{value / pixels:.6f}" for value in values)]))
        (folder / split / "labels" / f"{index:05}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--val", type=int, default=200)
    parser.add_argument("--pixels", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for split in ("train", "val"):
        write(options.folder, split, getattr(options, split), options.pixels, options.seed)
    names = "\n".join(f"  {label}: '{label}'" for label in range(CLASSES))
    content = f"path: {options.folder.resolve()}\ntrain: train/images\nval: val/images\nnames:\n{names}\n"
    (options.folder / "set.yaml").write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
