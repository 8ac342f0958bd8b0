"""Image folders with links: an image is in one class and one split, whatever leads to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qat.base.errors import UserError
from qat.data.folders import read_folder
from qat.data.mask_folders import read_mask
from qat.data.yolo_sets import read as read_yolo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def test_loops_add_no_image(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "cat" / "loop").symlink_to(folder)
        (folder / split / "dog" / "up").symlink_to("..")
    found = read_folder(folder)
    assert found.test is not None
    assert (len(found.train.labels), len(found.test.labels)) == (12, 4)


@pytest.mark.parametrize(("link", "target"), [("val/cat/more", "train/cat"), ("train/dog/x.png", "train/cat/0.png")])
def test_one_file_in_two_splits_or_classes_is_refused(folder: Path, link: str, target: str) -> None:
    (folder / link).symlink_to(folder / target)
    with pytest.raises(UserError, match=r"are one file, by links, as are . in all: classes and splits must not share"):
        read_folder(folder)


def test_a_folder_that_is_two_splits_by_a_link_is_refused(folder: Path) -> None:
    (folder / "test").symlink_to(folder / "val")
    with pytest.raises(UserError, match="are one file, by links, as are 2 in all"):
        read_folder(folder)


def test_links_to_images_that_lie_elsewhere_are_taken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("linked")
    for path in folder.rglob("*.png"):
        link = root / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert len(read_folder(root).train.labels) == 12


def test_a_mask_of_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (30, 30)).save(tmp_path / "m.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    with pytest.raises(UserError, match=r"cannot read mask .*m\.png"):
        read_mask(str(tmp_path / "m.png"))


def test_aliases_of_yaml_that_would_become_a_large_tree(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)), "train: ."]
    (tmp_path / "set.yaml").write_text("\n".join([*lines, "names: [*a39]"]))
    with pytest.raises(UserError, match="names no classes"):
        read_yolo(tmp_path / "set.yaml", "train")
