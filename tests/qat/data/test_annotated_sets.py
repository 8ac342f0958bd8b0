"""Sets with boxes and masks: what is read from each form, and one line for every mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotated import NAMES, write_coco, write_image, write_masks, write_yolo
from PIL import Image

from qat.base.errors import UserError
from qat.base.image_files import upright_size
from qat.data.annotated_sets import is_annotated, read_annotated, training_images
from qat.data.mask_folders import read_mask
from qat.data.splits import load_unlabelled
from qat.data.yolo_sets import label_file

BOXES = [[(0, 2, 3, 20, 30), (2, 40, 8, 60, 40)], [], [(1, 0, 0, 64, 48)]]


def refused(source: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_annotated(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    yolo = read_annotated(write_yolo(tmp_path / "yolo", BOXES))
    coco = read_annotated(write_coco(tmp_path / "coco", BOXES, first=7))
    assert yolo.class_names == coco.class_names == NAMES
    assert (yolo.category_ids, coco.category_ids) == ((), (7, 9, 11))
    assert not yolo.masks
    assert [Path(one.file).name for one in yolo.images] == [Path(one.file).name for one in coco.images]
    for one, other, boxes in zip(yolo.images, coco.images, BOXES, strict=True):
        np.testing.assert_allclose(one.boxes, np.reshape([box[1:] for box in boxes], (-1, 4)), atol=1e-6)
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-6)
        np.testing.assert_array_equal(one.labels, other.labels)
    assert len(read_annotated(tmp_path / "yolo" / "set.yaml", most=2).images) == 2


def test_lists_of_files_and_tables_of_names(tmp_path: Path) -> None:
    """As Ultralytics' coco.yaml: train is a list of files, relative to the list; path is relative to the file."""
    write_yolo(tmp_path / "data", BOXES)
    (tmp_path / "data" / "train.txt").write_text("./images/2.png\nimages/0.png\n")
    path = tmp_path / "set.yaml"
    path.write_text("path: data\ntrain: [train.txt]\nval: images\nnames: {0: a, 1: b, 2: c}\n")
    assert [Path(file).name for file in training_images(path)] == ["2.png", "0.png"]
    assert read_annotated(path, "train").class_names == ("a", "b", "c")
    assert len(read_annotated(path, "val").images) == 3
    assert label_file("images/a/images/b.jpg") == Path("images/a/labels/b.txt")


def test_a_polygon_gives_the_box_around_it(tmp_path: Path) -> None:
    path = write_yolo(tmp_path, [[]])
    (tmp_path / "labels" / "0.txt").write_text("1 0.25 0.5 0.5 0.25 0.75 0.5\n")
    (image,) = read_annotated(path).images
    np.testing.assert_allclose(image.boxes, [[16, 12, 48, 24]])


def test_boxes_are_those_of_the_upright_image(tmp_path: Path) -> None:
    path = write_yolo(tmp_path, [[(0, 0, 0, 64, 24)]])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "images" / "0.png", exif=exif)
    assert upright_size(str(tmp_path / "images" / "0.png")) == (48, 64)
    np.testing.assert_allclose(read_annotated(path).images[0].boxes, [[0, 0, 48, 32]])


def test_coco_finds_its_images_as_it_is_unpacked(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "annotations", BOXES)
    (tmp_path / "annotations" / "images").rename(tmp_path / "val2017")
    assert "put the folder of images beside it" in refused(path)
    moved = path.rename(path.with_name("instances_val2017.json"))
    assert Path(read_annotated(moved).images[0].file).parent == tmp_path / "val2017"
    assert len(training_images(moved)) == 3


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("0 0.5 0.5 0.2", "line 1: 3 numbers behind the class must be 4"),
        ("0 0.5 0.5 0.2 x", "must be numbers: class x y width height"),
        (
            "1 0.5 0.5 0.2 0.2\n3 0.5 0.5 0.2 0.2",
            "line 2: class 3 must be from 0 to 2, as names has 3; the first class is 0",
        ),
        ("0.5 0.5 0.5 0.2 0.2", "class 0.5 must be from 0 to 2"),
        ("0 0.95 0.5 0.2 0.2", "must have an area and lie inside of the image of 64x48 pixels: correct it"),
        ("0 0.5 0.5 0 0.2", "must have an area"),
    ],
)
def test_mistakes_in_labels(labels: str, said: str, tmp_path: Path) -> None:
    path = write_yolo(tmp_path, [[], []])
    (tmp_path / "labels" / "1.txt").write_text(labels)
    assert said in refused(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("train: images\nval: nowhere\nnames: [a]\n", "nowhere does not exist: correct path, train or val"),
        ("path: gone\ntrain: images\nnames: [a]\nval: images", ""),
        ("val: images\nnames: {1: a, 2: b}\n", "the keys of names must be from 0 to 1"),
        ("val: images\n", "names no classes"),
        ("train: images\nnames: [a]\n", "has no val"),
        ("val: empty.txt\nnames: [a]\n", "lists no image"),
        ("val: wrong.txt\nnames: [a]\n", "which does not exist: correct it"),
        ("val: set.yaml\nnames: [a]\n", "must be a folder of images or a .txt file"),
        ("- a\n", "does not describe a set"),
        ("val: [\n", "cannot read"),
        (f"val: {'a' * 5000}\nnames: [a]\n", "does not exist: correct path, train or val"),
        (f"val: images\nnames: {'[' * 50_000}", "lists or tables lie more than 32 deep within each other"),
        (f"val: images\nnames:\n{'- ' * 40}a", "lists or tables lie more than 32 deep within each other"),
        ("val: long.txt\nnames: [a]\n", "which does not exist: correct it"),
    ],
)
def test_mistakes_in_a_yaml_file(content: str, said: str, tmp_path: Path) -> None:
    path = write_yolo(tmp_path, [[]])
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.txt").write_text("images/9.png\n")
    (tmp_path / "long.txt").write_text("a" * 5000)
    path.write_text(content)
    if said:
        assert said in refused(path)
    else:  # where its path is not, what is beside the file is taken
        assert len(read_annotated(path).images) == 1


def test_a_set_without_any_labels(tmp_path: Path) -> None:
    path = write_yolo(tmp_path, [[], []])
    for index in range(2):
        (tmp_path / "labels" / f"{index}.txt").unlink()
    assert "no image of val has labels" in refused(path)
    assert len(training_images(path)) == 2
    assert "no file" in refused(tmp_path / "other.yaml")


def change(entries: str, index: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[entries][index].update(values)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (change("annotations", 0, image_id=99), "annotation 1 is of image 99, which is not in images"),
        (
            change("annotations", 0, category_id=2),
            "annotation 1 has category 2, and categories has 1, 3, 5: correct it",
        ),
        (
            change("annotations", 1, bbox=[50, 0, 30, 10]),
            "annotation 2: the box from left, top to right, bottom (50, 0, 80",
        ),
        (change("annotations", 1, bbox=[50, 0]), "bbox must be left, top, width and height in pixels"),
        (change("images", 1, file_name="gone.png"), "1 of 3 images are not in"),
        (change("images", 0, file_name="a" * 5000), "and others around: put the folder of images beside it"),
        (change("images", 1, file_name="a" * 5000), "1 of 3 images are not in"),
        (change("images", 0, width=48), "has 64x48 pixels, and the file states 48x48"),
        (lambda content: content.pop("categories"), "categories must be a list of entries with id, name"),
        (lambda content: content.update(images=[]), "names no image"),
    ],
)
def test_mistakes_in_coco(damage: Callable[[dict[str, Any]], None], said: str, tmp_path: Path) -> None:
    path = write_coco(tmp_path, BOXES)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    assert said in refused(path)


@pytest.mark.parametrize("pair", [("images", "masks"), ("JPEGImages", "SegmentationClass")])
def test_masks(pair: tuple[str, str], tmp_path: Path) -> None:
    masks = [np.full((12, 16), index, np.uint8) for index in range(3)]
    write_masks(tmp_path, masks, pair)
    assert is_annotated(tmp_path)
    found = read_annotated(tmp_path)
    assert found.masks
    assert [int(read_mask(one.mask)[0, 0]) for one in found.images] == [0, 1, 2]
    if pair[0] == "JPEGImages":
        (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
        (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("1\n")
        assert [Path(one.file).stem for one in read_annotated(tmp_path).images] == ["1"]
    (tmp_path / pair[1] / "1.png").unlink()
    assert "have no mask in" in refused(tmp_path)


def test_masks_in_splits_and_masks_in_colours(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 1)):
        write_masks(tmp_path / split, [np.zeros((8, 8), np.uint8)] * count)
    assert is_annotated(tmp_path)
    assert (len(training_images(tmp_path)), len(read_annotated(tmp_path).images)) == (3, 1)
    palette = Image.new("P", (8, 8), 5)
    palette.putpalette([0] * 768)
    palette.save(tmp_path / "palette.png")
    assert read_mask(str(tmp_path / "palette.png")).tolist() == [[5] * 8] * 8
    write_image(tmp_path / "colours.png")
    with pytest.raises(UserError, match="has colours"):
        read_mask(str(tmp_path / "colours.png"))


def test_calibration_takes_training_images_and_reads_no_labels(tmp_path: Path) -> None:
    """Labels that are no labels do not matter, and masks are no images."""
    write_yolo(tmp_path / "boxes", [[]] * 10)
    (tmp_path / "boxes" / "labels" / "0.txt").write_text("nothing")
    write_masks(tmp_path / "masks", [np.zeros((48, 64), np.uint8)] * 10)
    for source in (tmp_path / "boxes" / "set.yaml", tmp_path / "masks"):
        data = load_unlabelled(source, 32, 0, calibration_images=6)
        assert data.sizes == {"calibration": 6, "test": 4}
        assert data.notes[0].startswith("10 training images")
    assert load_unlabelled(write_coco(tmp_path / "coco", BOXES), 32, 0).sizes["calibration"] == 3
