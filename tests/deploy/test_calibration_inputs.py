"""What calibrators are fed: which images of a folder, list or data set, and what becomes of them on the way."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from deploy.calibration_inputs import CalibrationInputs, calibration_inputs
from deploy.fitting import fitted
from deploy.settings import CalibrationSettings
from qat.base.artifact import Sidecar, TensorSpec
from qat.base.errors import UserError
from qat.data.pixels import decode, grey
from qat.data.preprocessing import Preprocessing

SIZE = 16
SPEC = TensorSpec("input", (-1, 3, SIZE, SIZE), "float32")
PLAIN = Preprocessing(SIZE, SIZE, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), resize=SIZE)


def sidecar_of(preprocessing: Preprocessing) -> Sidecar:
    return Sidecar("onnx", preprocessing=asdict(preprocessing))


OF_PLAIN = sidecar_of(PLAIN)


def inputs(
    data: Path | str,
    specs: tuple[TensorSpec, ...] = (SPEC,),
    sidecar: Sidecar | None = OF_PLAIN,
    **settings: Any,
) -> CalibrationInputs:
    return calibration_inputs(CalibrationSettings(data=str(data), **settings), specs, sidecar)


def refused(*given: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        inputs(*given, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def levels(found: CalibrationInputs, preprocessing: Preprocessing = PLAIN) -> np.ndarray:
    """The uint8 images [N, C, H, W] that the inputs were made of."""
    (values,) = found.read(0, found.count).values()
    mean, std = (np.array(numbers).reshape(-1, 1, 1) for numbers in (preprocessing.mean, preprocessing.std))
    return np.rint((values * std + mean) * 255).astype(int)


def shades(found: CalibrationInputs) -> list[int]:
    """The red of each image's first pixel."""
    return [int(image[0, 0, 0]) for image in levels(found)]


def saved(path: Path, pixels: np.ndarray | int, size: int = SIZE) -> Path:
    """A .png; of a number, an image that has this value everywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pixels, int):
        pixels = np.full((size, size, 3), pixels, np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image with edges of every strength and some smooth parts."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 5), -(-width // 5), 3), dtype=np.uint8)
    fine = coarse.repeat(5, 0).repeat(5, 1)[:height, :width]
    fine[: height // 2] //= 2
    return np.ascontiguousarray(fine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of ten images each, without splits; the shade of image i of class c is 10 * c + i."""
    root = tmp_path_factory.mktemp("images")
    for label in range(10):
        for index in range(10):
            saved(root / f"class{label}" / f"{index}.png", 10 * label + index)
    (root / "class0" / "notes.txt").write_text("not an image")
    return root


# --- which images


def test_a_folder_is_read_with_its_subfolders_in_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inputs(folder)
    assert found.count == 100
    assert shades(found) == list(range(100))
    assert "left out: 1 files that are not images" in capsys.readouterr().out


@pytest.mark.parametrize("count", [10, 13, 50, 99])
def test_fewer_images_of_a_folder_are_evenly_spaced_and_always_the_same(folder: Path, count: int) -> None:
    first, again = (inputs(folder, images=count) for _ in range(2))
    chosen = shades(first)
    assert chosen == shades(again)
    assert first.digest == again.digest
    assert first.count == len(set(chosen)) == count
    assert chosen == sorted(chosen)
    assert {shade // 10 for shade in chosen} == set(range(10))  # every class
    gaps = np.diff(chosen)
    assert gaps.max() - gaps.min() <= 1


def test_the_training_images_of_a_folder_come_first(tmp_path: Path) -> None:
    for index, name in enumerate(("train/a", "train/b", "val/a", "val/b", "a")):
        saved(tmp_path / name / "0.png", 10 * index)
    assert shades(inputs(tmp_path)) == [0, 10]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} has no image" in refused(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "x.csv").write_text("")
    message = refused(tmp_path)
    assert "has no image" in message
    assert "1 .csv" in message


def test_a_list_names_images_relative_to_itself(folder: Path, tmp_path: Path) -> None:
    saved(tmp_path / "here" / "a b.png", 201)
    listed = tmp_path / "here" / "list.txt"
    listed.write_text(
        f"# some\n\n  a b.png  \n../here/a b.png\n{folder}/class3/4.png\n   # more\n{folder}/class1/2.png\n"
    )
    found = inputs(listed)
    assert shades(found) == [201, 201, 34, 12]
    assert found.source == str(listed)
    assert shades(inputs(listed, images=3)) == [201, 201, 34]


def test_missing_files_of_a_list_are_counted_and_the_first_is_named(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"{folder}/class0/0.png\ngone.png\n{folder}/class0/1.png\nlost.png\nout-of-reach.png\n")
    message = refused(listed, images=4)
    assert f"{listed} lists 2 files that do not exist, the first {tmp_path / 'gone.png'}" in message
    assert shades(inputs(listed, images=1)) == [0]  # only those that are used matter


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n   \n"])
def test_an_empty_list_is_refused(tmp_path: Path, text: str) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(text)
    assert "lists no image" in refused(listed)


def test_a_list_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert f"cannot read the list of images {tmp_path / 'none.txt'}" in refused(tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert "cannot read the list of images" in refused(tmp_path / "binary.txt")


def test_a_corrupt_image_is_named_before_anything_is_built(folder: Path, tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.png", noise(40, 40)).read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    assert f"{tmp_path / 'b.png'} is corrupt" in refused(tmp_path)
    (tmp_path / "b.png").write_text("no image at all")
    assert f"{tmp_path / 'b.png'} is corrupt" in refused(tmp_path)


# --- data sets


def test_digits_go_through_the_data_sets_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    spec = TensorSpec("x", (-1, 1, 8, 8), "float32")
    preprocessing = Preprocessing(8, 8, (0.3,), (0.4,), resize=8, color="grey")
    found = inputs("digits", (spec,), sidecar_of(preprocessing), images=20)
    assert found.count == 20
    images = levels(found, preprocessing)
    assert images.shape == (20, 1, 8, 8)
    assert images.min() == 0
    assert images.max() == 255
    assert found.digest == inputs("digits", (spec,), sidecar_of(preprocessing), images=20).digest


def test_an_npz_file_of_labelled_images_is_a_data_set(tmp_path: Path) -> None:
    path = tiny.write_images(tmp_path / "images.npz")
    found = inputs(path)
    known = {image.tobytes() for image in np.load(path)["train_images"]}
    images = levels(found).astype(np.uint8).transpose(0, 2, 3, 1)
    assert 0 < found.count == len({image.tobytes() for image in images})
    assert all(image.tobytes() in known for image in images)  # none of the test images


def test_a_path_below_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "pictures" / "a.png", 7)
    assert shades(inputs("~/pictures")) == [7]
    tiny.write_images(tmp_path / "images.npz")
    assert inputs("~/images.npz").count > 0


@pytest.mark.parametrize("name", ["digit", "no/such/folder"])
def test_an_unknown_source_is_refused(name: str) -> None:
    assert name in refused(name)


# --- preprocessing


def expected_levels(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """What training makes of an image file, uint8 [H, W, C]."""
    image = decode(str(path))
    if preprocessing.color == "grey":
        image = grey(image)
    return preprocessing.fit(image).permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("color", ["RGB", "grey"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(60, 90), (91, 60), (33, 33), (301, 77), (47, 213), (20, 31), (29, 11), (36, 37)])
def test_images_are_fitted_as_in_training(
    tmp_path: Path, size: tuple[int, int], interpolation: Any, color: Any
) -> None:
    channels = 3 if color == "RGB" else 1
    path = saved(tmp_path / "a.png", noise(*size))
    for height, width, resize in ((32, 32, 36), (24, 31, 33), (32, 32, 32)):
        preprocessing = Preprocessing(height, width, (0.5,) * channels, (0.2,) * channels, resize, interpolation, color)
        found = fitted(str(path), asdict(preprocessing)).astype(int)
        assert found.shape == (height, width, channels)
        difference = np.abs(found - expected_levels(path, preprocessing))
        assert difference.max() <= 2
        assert difference.mean() < 0.5
        if min(size) == resize:
            assert not difference.any()


@pytest.mark.parametrize("color", ["RGB", "grey"])
@pytest.mark.parametrize("size", [(60, 90), (91, 60), (33, 33), (301, 77), (20, 31), (29, 11), (48, 48)])
def test_a_letterbox_is_that_of_training(tmp_path: Path, size: tuple[int, int], color: Any) -> None:
    channels = 3 if color == "RGB" else 1
    path = saved(tmp_path / "a.png", noise(*size))
    preprocessing = Preprocessing(48, 48, (0.0,) * channels, (1.0,) * channels, 48, "bilinear", color, letterbox=True)
    found = fitted(str(path), asdict(preprocessing)).astype(int)
    assert found.shape == (48, 48, channels)
    assert np.abs(found - expected_levels(path, preprocessing)).max() <= 1


def test_an_image_with_an_orientation_is_turned_first(tmp_path: Path) -> None:
    image = Image.fromarray(noise(40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turn right by 90 degrees to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    upright = saved(tmp_path / "b.png", np.ascontiguousarray(np.rot90(noise(40, 20), -1)))
    turned, straight = (fitted(str(tmp_path / name), asdict(PLAIN)) for name in ("a.png", "b.png"))
    np.testing.assert_array_equal(turned, straight)
    assert upright.exists()


@pytest.mark.parametrize("color", ["RGB", "grey"])
def test_normalization_is_that_of_training_bit_by_bit(tmp_path: Path, color: Any) -> None:
    channels = 3 if color == "RGB" else 1
    ramp = np.arange(256, dtype=np.uint8).reshape(SIZE, SIZE, 1).repeat(3, 2)
    for index in range(3):
        saved(tmp_path / f"{index}.png", np.roll(ramp, index, 2) if index < 2 else noise(SIZE, SIZE))
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    preprocessing = Preprocessing(SIZE, SIZE, mean, std, SIZE, color=color)
    found = inputs(tmp_path, (TensorSpec("x", (-1, channels, SIZE, SIZE), "float32"),), sidecar_of(preprocessing))
    images = torch.stack([decode(str(tmp_path / f"{index}.png")) for index in range(3)])
    expected = preprocessing.normalize(grey(images) if color == "grey" else images).numpy()
    values = found.read(0, 3)["x"]
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.view(np.int32), expected.view(np.int32))
    np.testing.assert_array_equal(found.read(1, 3)["x"], values[1:])


def test_a_network_that_takes_bytes_gets_bytes(folder: Path) -> None:
    found = inputs(folder, (TensorSpec("raw", (-1, SIZE, SIZE, 3), "uint8"),), images=10)
    values = found.read(0, 10)["raw"]
    assert values.dtype == np.uint8
    assert values[:, 0, 0, 0].tolist() == list(range(0, 100, 10))


def test_without_a_sidecar_images_are_normalized_as_for_imagenet(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = inputs(folder, sidecar=None)
    assert re.search("warning: .*no sidecar.*ImageNet.*--mean and --std", capsys.readouterr().err)
    of_imagenet = Preprocessing(SIZE, SIZE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), SIZE)
    expected = inputs(folder, sidecar=sidecar_of(of_imagenet))
    np.testing.assert_array_equal(found.read(0, 9)["input"], expected.read(0, 9)["input"])
    assert capsys.readouterr().err == ""


def test_without_a_sidecar_large_images_are_cropped_as_for_imagenet(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", noise(256, 300))
    found = inputs(path.parent, (TensorSpec("input", (-1, 3, 224, 224), "float32"),), None)
    of_imagenet = Preprocessing(224, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256)
    np.testing.assert_array_equal(levels(found, of_imagenet)[0].transpose(1, 2, 0), expected_levels(path, of_imagenet))


@pytest.mark.parametrize(("height", "width"), [(16, 40), (40, 16)])
@pytest.mark.parametrize(("tall", "wide"), [(50, 50), (30, 90), (90, 30), (7, 9)])
def test_a_network_that_is_not_square_gets_images_without_a_border(
    tmp_path: Path, height: int, width: int, tall: int, wide: int
) -> None:
    path = saved(tmp_path / "a.png", np.full((tall, wide, 3), 200, np.uint8))
    found = inputs(
        path.parent, (TensorSpec("input", (-1, 3, height, width), "float32"),), None, mean=(0, 0, 0), std=(1, 1, 1)
    )
    (values,) = found.read(0, 1).values()
    assert values.shape == (1, 3, height, width)
    np.testing.assert_allclose(values, 200 / 255, atol=1e-6)


def test_a_sidecar_that_tells_a_part_leaves_the_rest_as_for_imagenet(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = Sidecar("onnx", preprocessing={"resize": SIZE, "interpolation": "bicubic"})
    found = inputs(folder, sidecar=part).read(0, 9)["input"]
    assert "normalized as for ImageNet" in " ".join(capsys.readouterr().err.split())
    of_imagenet = Preprocessing(SIZE, SIZE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), SIZE, "bicubic")
    np.testing.assert_array_equal(found, inputs(folder, sidecar=sidecar_of(of_imagenet)).read(0, 9)["input"])


@pytest.mark.parametrize("sidecar", [None, sidecar_of(PLAIN)])
def test_mean_and_std_of_the_command_line_come_first(
    folder: Path, sidecar: Sidecar | None, capsys: pytest.CaptureFixture[str]
) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    found = inputs(folder, sidecar=sidecar, mean=mean, std=std, images=10)
    assert capsys.readouterr().err == ""
    expected = Preprocessing(SIZE, SIZE, mean, std, SIZE)
    assert [int(image[0, 0, 0]) for image in levels(found, expected)] == list(range(0, 100, 10))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mean": (0.5,)}, "--mean has 1 numbers, the network takes 3 channels"),
        ({"std": (0.5, 0.5)}, "--std has 2 numbers, the network takes 3 channels"),
        ({"mean": ()}, "--mean has 0 numbers, the network takes 3 channels"),
        ({"std": (0.2, 0.0, 0.2)}, "--std"),
        ({"std": (0.2, -0.1, 0.2)}, "--std"),
        ({"std": (0.2, float("nan"), 0.2)}, "--std"),
        ({"mean": (0.2, float("inf"), 0.2)}, "--mean"),
    ],
)
def test_a_mean_or_std_that_does_not_fit_is_refused(folder: Path, settings: dict[str, Any], says: str) -> None:
    assert says in refused(folder, **settings)


@pytest.mark.parametrize(
    "specs",
    [
        (SPEC, TensorSpec("length", (-1, 1), "float32")),
        (TensorSpec("tokens", (-1, 128), "float32"),),
    ],
)
def test_a_network_that_takes_other_things_than_images_is_told_what_to_give(
    folder: Path, specs: tuple[TensorSpec, ...]
) -> None:
    message = refused(folder, specs)
    assert ".npz" in message
    assert all(spec.name in message for spec in specs)


@pytest.mark.parametrize("shape", [(-1, 4, 16, 16), (-1, 3, -1, -1)])
def test_inputs_that_are_no_images_of_a_fixed_size_are_told_what_to_give(folder: Path, shape: tuple[int, ...]) -> None:
    message = refused(folder, (TensorSpec("input", shape, "float32"),))
    assert str(list(shape)) in message
    assert ".npy" in message


# --- the digest


def test_the_digest_changes_with_any_byte_with_the_order_and_with_the_normalization(tmp_path: Path) -> None:
    pixels = noise(SIZE, SIZE)
    files = [saved(tmp_path / "0.png", pixels), saved(tmp_path / "1.png", 90)]
    listed = tmp_path / "list.txt"

    def digest(*names: Path, **settings: Any) -> str:
        listed.write_text("\n".join(map(str, names)))
        return inputs(listed, **settings).digest

    first = digest(*files)
    assert len(first) == 64
    assert first == digest(*files) == inputs(tmp_path).digest
    others = [digest(*files[::-1]), digest(files[0]), digest(*files, files[0])]
    others += [digest(*files, mean=(0.5, 0.4, 0.31)), digest(*files, std=(0.25, 0.2, 0.31))]
    for position in ((0, 0, 0), (7, 8, 1), (SIZE - 1, SIZE - 1, 2)):
        changed = pixels.copy()
        changed[position] ^= 1
        others.append(digest(saved(tmp_path / "changed.png", changed), files[1]))
    assert len({first, *others}) == 1 + len(others)


def test_the_digest_is_of_what_is_fed_and_not_of_how_it_is_said(folder: Path) -> None:
    of_sidecar = inputs(folder, sidecar=sidecar_of(PLAIN)).digest
    as_read = Sidecar(
        "onnx", preprocessing={key: list(v) if isinstance(v, tuple) else v for key, v in asdict(PLAIN).items()}
    )
    assert inputs(folder, sidecar=as_read).digest == of_sidecar
    assert inputs(folder, sidecar=as_read, mean=PLAIN.mean, std=PLAIN.std).digest == of_sidecar


# --- arrays


def written(path: Path, **arrays: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, arrays["input"])
    else:
        np.savez(path, **arrays)
    return path


def values(count: int = 6, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, SIZE, SIZE)).astype(dtype)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_are_fed_as_they_are(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"a{suffix}", input=values())
    found = inputs(path)
    assert (found.count, found.source) == (6, str(path))
    np.testing.assert_array_equal(found.read(2, 5)["input"], values()[2:5])
    fewer = inputs(path, images=4)
    assert fewer.count == 4
    assert fewer.digest == inputs(written(tmp_path / f"b{suffix}", input=values()[:4])).digest != found.digest


def test_arrays_of_several_inputs_are_found_by_name(tmp_path: Path) -> None:
    specs = (SPEC, TensorSpec("ids", (-1, 5), "int64"))
    ids = np.arange(30).reshape(6, 5)
    path = written(tmp_path / "a.npz", ids=ids, input=values(), more=np.zeros(3))
    found = inputs(path, specs)
    assert found.count == 6
    fed = found.read(1, 3)
    assert list(fed) == ["input", "ids"]
    np.testing.assert_array_equal(fed["ids"], ids[1:3])
    np.testing.assert_array_equal(fed["input"], values()[1:3])
    swapped = written(tmp_path / "b.npz", ids=ids[::-1], input=values())
    assert inputs(swapped, specs).digest != found.digest
    assert "2 inputs (input, ids)" in refused(written(tmp_path / "a.npy", input=values()), specs)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
    ("array", "says"),
    [
        (values(dtype=np.float64), "float64 [6, 3, 16, 16] for input, the network takes float32 [-1, 3, 16, 16]"),
        (values(dtype=np.float32)[:, :2], "float32 [6, 2, 16, 16] for input"),
        (values()[0], "for input, the network takes"),
        (values(0), "[0, 3, 16, 16] for input"),
        (np.float32(3), "for input, the network takes"),
        (np.where(np.arange(SIZE) == 3, np.float32(np.nan), values()), "NaN"),
        (np.where(np.arange(SIZE) == 3, np.float32(np.inf), values()), "infinity"),
        (np.array([{}]), "cannot read"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, suffix: str, array: np.ndarray, says: str) -> None:
    path = written(tmp_path / f"a{suffix}", input=array)
    message = refused(path)
    assert says in message
    assert str(path) in message


def test_numbers_that_are_not_fed_may_be_anything(tmp_path: Path) -> None:
    array = values()
    array[4:] = np.nan
    assert inputs(written(tmp_path / "a.npy", input=array), images=4).count == 4


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("damage", ["empty", "cut", "head", "junk", "middle", "absent", "folder"])
def test_damaged_arrays_are_refused(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a{suffix}"
    np.savez_compressed(path, input=values()) if suffix == ".npz" else np.save(path, values())
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "absent":
        middle = bytearray(content)
        middle[len(content) // 2] ^= 255
        damaged = {"empty": b"", "cut": content[: len(content) // 2], "head": content[:9], "junk": b"PK\x03\x04 no"}
        path.write_bytes(damaged.get(damage, bytes(middle)))
    if damage == "middle" and suffix == ".npy":
        return  # one number among others: nothing shows it
    assert f"cannot read {path}" in refused(path)


def test_one_kind_of_array_file_with_the_name_of_the_other(tmp_path: Path) -> None:
    written(tmp_path / "a.npz", input=values()).rename(tmp_path / "b.npy")
    assert f"{tmp_path / 'b.npy'}" in refused(tmp_path / "b.npy")
    written(tmp_path / "a.npy", input=values()).rename(tmp_path / "b.npz")
    assert f"{tmp_path / 'b.npz'}" in refused(tmp_path / "b.npz")


def test_arrays_are_not_normalized(tmp_path: Path) -> None:
    assert "leave out --mean and --std" in refused(written(tmp_path / "a.npy", input=values()), mean=(0.5, 0.5, 0.5))


def test_arrays_of_different_lengths_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros((4, 3), np.float32), b=np.zeros((5, 2), np.float32))
    specs = (TensorSpec("a", (-1, 3), "float32"), TensorSpec("b", (-1, 2), "float32"))
    with pytest.raises(UserError, match="holds arrays of 4, 5 inputs: give equally many of each"):
        calibration_inputs(CalibrationSettings(data=str(tmp_path / "x.npz")), specs, None)
