"""Image files as people have them: unusual ranges, orientations, extensions, one channel, folders without splits."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qat.base.errors import UserError
from qat.data.pixels import ArrayPixels, decode, grey
from qat.data.preprocessing import ImagePreset, Preprocessing
from qat.data.splits import load_data, load_unlabelled

RAMP_HW = np.add.outer(np.arange(30), np.arange(40)) / 68  # 0..1
GREY_HW = np.rint(RAMP_HW * 255)


def saved(path: Path, array: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def png_of_16_bits(path: Path, levels_HWC: np.ndarray) -> Path:
    """An RGB file, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = levels_HWC.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels_HWC)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def pgm(path: Path, levels_HW: np.ndarray, most: int) -> Path:
    height, width = levels_HW.shape
    path.write_bytes(f"P5\n{width} {height}\n{most}\n".encode() + levels_HW.astype(">u2").tobytes())
    return path


def assert_shows_the_ramp(image: Tensor) -> None:
    assert image.shape == (3, 30, 40)
    assert image.dtype == torch.uint8
    assert np.abs(image.numpy() - GREY_HW).max() <= 1


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        decode(str(path))
    assert str(caught.value).startswith(f"{path} ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- ranges


def test_other_types_are_scaled_to_8_bits(tmp_path: Path) -> None:
    for name, array in {
        "integers.tif": GREY_HW.astype(np.int32),
        "unit.tif": RAMP_HW.astype(np.float32),
        "floats.tif": GREY_HW.astype(np.float32),
        "16.png": (RAMP_HW * 65535).astype(np.uint16),
        "16.tif": (RAMP_HW * 65535).astype(np.uint16),
    }.items():
        assert_shows_the_ramp(decode(str(saved(tmp_path / name, array))))
    assert_shows_the_ramp(decode(str(png_of_16_bits(tmp_path / "rgb.png", np.stack([RAMP_HW * 65535] * 3, 2)))))
    assert_shows_the_ramp(decode(str(pgm(tmp_path / "12.pgm", RAMP_HW * 4095, 4095))))  # the file states its range
    assert_shows_the_ramp(decode(str(pgm(tmp_path / "16.pgm", RAMP_HW * 65535, 65535))))
    black = saved(tmp_path / "black.png", np.zeros((30, 40), np.uint16))
    assert decode(str(black)).max() == 0


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_fewer_bits_in_files_of_16_are_refused(tmp_path: Path, bits: int) -> None:
    levels = RAMP_HW * ((1 << bits) - 1)
    told = "stores 16 bits per value, but the largest is below 16384"
    for path in (
        saved(tmp_path / "a.png", levels.astype(np.uint16)),
        saved(tmp_path / "b.tif", levels.astype(np.uint16), compression="tiff_lzw"),
        png_of_16_bits(tmp_path / "c.png", np.stack([levels] * 3, 2)),
        pgm(tmp_path / "d.pgm", levels, 65535),
    ):
        assert told in refusal(path)


def test_values_of_unknown_range_are_refused(tmp_path: Path) -> None:
    integers = saved(tmp_path / "a.tif", (RAMP_HW * 65535).astype(np.int32))
    assert "32-bit integers from 0 to 65535, of which only 0..255 is known" in refusal(integers)
    assert "from -5 to" in refusal(saved(tmp_path / "b.tif", (GREY_HW - 5).astype(np.int32)))
    for name, factor, shift in (("bright", 4, 0), ("negative", 1, -0.5), ("large", 1000, 0), ("nan", np.nan, 0)):
        path = saved(tmp_path / f"{name}.tif", (RAMP_HW * factor + shift).astype(np.float32))
        assert "floats from" in refusal(path)


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(np.zeros((30, 40, 3), np.uint8))
    upright.paste((255, 255, 255), (0, 0, 20, 10))  # white at the top left, as a person sees it
    stored_as = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    stored = upright
    for operation in stored_as:
        stored = stored.transpose(operation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = decode(str(tmp_path / "a.jpg"))
    assert image.shape == (3, 30, 40)
    assert image[:, :8, :18].min() > 200
    assert image[:, 12:].max() < 50


# --- extensions


def test_every_kind_that_pillow_reads_is_taken_and_the_rest_is_counted(tmp_path: Path) -> None:
    kinds = [
        *("a.JPG", "b.jfif", "c.gif", "d.webp", "e.bmp", "f.TIFF", "g.PnG", "h.jpeg"),
        *(["i.avif"] if ".avif" in Image.registered_extensions() else []),
    ]
    color = np.stack([GREY_HW.astype(np.uint8)] * 3, 2)
    for name in kinds:
        saved(tmp_path / name, color, **({"format": "JPEG"} if name.endswith("jfif") else {}))
    for name in ("notes.txt", "x.HEIC", "y.heic", "README", ".hidden", "._a.jpg"):
        (tmp_path / name).write_text("no image")
    data = load_unlabelled(tmp_path, 24, 0)
    assert sum(data.sizes.values()) == len(kinds)
    assert data.notes[0].startswith("left out: 4 files that are not images by their extension (2 .heic, 1 ")
    for name in ("notes.txt", "x.HEIC", "y.heic", "README"):
        (tmp_path / name).unlink()
    assert not any("left out" in note for note in load_unlabelled(tmp_path, 24, 0).notes)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.dng").write_bytes(b"")
    with pytest.raises(UserError, match=r"raw has no image \(found: 1 .dng; read: .*\.avif .*\.webp\): add some"):
        load_unlabelled(tmp_path / "raw", 24, 0)


# --- folders that are not split


def class_folders(root: Path, images: int = 40) -> Path:
    for label, name in enumerate(("cat", "dog")):
        for index in range(images):
            saved(root / name / f"{index}.png", np.full((8, 8, 3), 100 * label + index, np.uint8))
    return root


def test_class_folders_are_split_by_class_and_it_is_said(tmp_path: Path) -> None:
    folder = class_folders(tmp_path)
    saved(folder / "loose.png", np.zeros((8, 8, 3), np.uint8))
    (folder / "cat" / "cat.xml").write_text("")
    data = load_data(str(folder), 8, 0)
    assert data.class_names == ("cat", "dog")
    assert data.sizes == {"train": 42, "calibration": 14, "validation": 8, "test": 16}
    for split in (data.train, data.calibration, data.validation, data.test):
        assert sorted(torch.bincount(split.labels).tolist()) == [len(split) // 2] * 2
        for index, label in enumerate(split.labels.tolist()):
            assert (float(split.pixels[int(split.indices[index])].float().mean()) >= 100) == bool(label)
    assert data.notes[0] == f"{folder} has no train/ and no val/: its 2 class folders are split here"
    assert "left out: 1 images that are in no class folder" in data.notes
    assert "left out: 1 files that are not images by their extension (1 .xml)" in data.notes
    assert torch.equal(data.test.indices, load_data(str(folder), 8, 0).test.indices)
    assert not torch.equal(data.test.indices, load_data(str(folder), 8, 1).test.indices)


def test_one_class_folder_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "only" / "a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"only one class folder \(only\): put <class>/<image> into it for every class"):
        load_data(str(tmp_path), 8, 0)


@pytest.mark.parametrize(
    ("most", "images", "count", "reason"),
    [
        (5, 120, 5, "the most that was asked for"),
        (512, 120, 27, "at most a quarter of what is left"),
        (512, 480, 64, "enough for ranges"),
        (512, 1000, 90, "a tenth of what is left"),
    ],
)
def test_how_many_images_calibrate_and_why_is_said(
    tmp_path: Path, most: int, images: int, count: int, reason: str
) -> None:
    arrays = {"images": np.zeros((images, 4, 4), np.uint8), "labels": np.arange(images) % 2}
    splits = {f"{split}_{key}": value for split in ("train", "test") for key, value in arrays.items()}
    np.savez(tmp_path / "a.npz", **splits)
    data = load_data(str(tmp_path / "a.npz"), None, 0, most)
    assert len(data.calibration) == count
    stated = f"calibration: {count} of {images} images, held out of training, stratified by class: {reason}"
    assert stated in data.notes


def test_an_npz_need_not_hold_every_class(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {f"{split}_images": random.integers(0, 256, (40, 8, 8), np.uint8) for split in ("train", "test")}
    labels = {"train_labels": np.arange(40) % 2 * 3, "test_labels": np.arange(40) % 5}
    np.savez(tmp_path / "numbers.npz", **arrays, **labels)
    data = load_data(str(tmp_path / "numbers.npz"), None, 0)
    assert data.class_names == tuple("01234")
    assert not data.all_classes
    assert data.notes[0] == "3 of 5 classes have no training image (class 1 is the first)"
    np.savez(tmp_path / "names.npz", **arrays, **labels, class_names=list("abcdefg"))
    data = load_data(str(tmp_path / "names.npz"), None, 0)
    assert (len(data.class_names), data.all_classes) == (7, True)
    assert data.notes[0].startswith("5 of 7 classes")


# --- one channel


def test_grey_is_pillows(tmp_path: Path) -> None:
    color = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(color).convert("L"))
    assert np.array_equal(grey(torch.from_numpy(color).permute(2, 0, 1))[0].numpy(), expected)


def test_one_channel_from_every_kind_of_source(tmp_path: Path) -> None:
    preset = ImagePreset().in_channels(1)
    assert (preset.mean, preset.std) == (pytest.approx((0.449,)), pytest.approx((0.226,)))
    random = np.random.default_rng(0)
    labels = np.arange(40) % 2
    for name, shape in (("grey", (40, 8, 8)), ("color", (40, 8, 8, 3))):
        images = random.integers(0, 256, shape, dtype=np.uint8)
        given = {f"{split}_{key}": value for split in ("train", "test") for key, value in (("images", images),)}
        np.savez(tmp_path / f"{name}.npz", **given, train_labels=labels, test_labels=labels)
        data = load_data(str(tmp_path / f"{name}.npz"), None, 0, preset=preset)
        expected = images if name == "grey" else np.stack([np.asarray(Image.fromarray(i).convert("L")) for i in images])
        assert isinstance(data.test.pixels, ArrayPixels)
        assert np.array_equal(data.test.pixels.images[:, 0].numpy(), expected)
        assert data.train[0, 5][0].shape == (1, 8, 8)
        assert data.train.take(torch.tensor([[0, 5], [1, 6]]))[0].shape == (2, 1, 8, 8)
    folder = class_folders(tmp_path / "folder")
    for size in (8, 80):
        train = load_data(str(folder), size, 0, preset=preset).train
        assert train[0, 5][0].shape == (1, size, size)
    assert load_unlabelled(folder, 8, 0, preset=preset).calibration[0, 0][0].shape == (1, 8, 8)
    digits = load_data("digits", None, 0, preset=preset)
    assert digits.preprocessing.mean == (0.305,)
    assert digits.preprocessing.input_shape == (1, 32, 32)
    x_NCHW = digits.preprocessing.normalize(digits.test[0, 0][0][None])
    assert x_NCHW.shape == (1, 1, 32, 32)


def test_preprocessing_has_a_mean_for_every_channel() -> None:
    one = Preprocessing(24, 24, (0.5,), (0.25,), 24, color="grey")
    assert Preprocessing.from_json({**vars(one), "mean": [0.5], "std": [0.25]}) == one
    assert one.preset.channels == one.channels == 1
    with pytest.raises(UserError, match='RGB with 1 means and 1 deviations: give three of each for "RGB"'):
        Preprocessing(24, 24, (0.5,), (0.25,), 24)
    with pytest.raises(UserError, match="RGB with 3 means and 1 deviations"):
        Preprocessing(24, 24, (0.5,) * 3, (0.25,), 24)


# --- resampling


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_images_are_resampled_as_pillow_does(name: Any) -> None:
    random = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    resampling = getattr(Image.Resampling, name.upper())
    expected = np.asarray(Image.fromarray(random).resize((48, 32), resampling))[4:28, 12:36]
    preprocessing = Preprocessing.from_preset(ImagePreset(interpolation=name), 24, 24, 32)
    found = preprocessing.fit(torch.from_numpy(random).permute(2, 0, 1))
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    assert preprocessing.preset.interpolation == name


def test_training_crops_are_resampled_as_evaluation_is(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for label in ("a", "b"):
        for index in range(10):
            noise = np.random.default_rng(index).integers(0, 256, (90, 90, 3), dtype=np.uint8)
            saved(folder / label / f"{index}.png", noise)
    linear, cubic = (
        load_data(str(folder), 80, 0, preset=ImagePreset(interpolation=name)).train[0, 1][0]
        for name in ("bilinear", "bicubic")
    )
    assert not torch.equal(linear, cubic)


def test_older_files_are_bilinear() -> None:
    recorded = {"height": 24, "width": 24, "mean": [0.5] * 3, "std": [0.5] * 3, "resize": 24}
    assert Preprocessing.from_json(recorded).interpolation == "bilinear"
    assert Preprocessing.from_json(recorded | {"interpolation": "bicubic"}).interpolation == "bicubic"
    with pytest.raises(UserError, match="nearest interpolation"):
        Preprocessing.from_json(recorded | {"interpolation": "nearest"})
