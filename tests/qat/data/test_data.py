"""Data sets made in tmp_path: disjoint splits, batches that depend on their seed alone, one line for bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import qat.data.pixels
from qat.base.errors import UserError
from qat.data.batches import ImageSet, batch_count, batches
from qat.data.preprocessing import ImagePreset, Preprocessing
from qat.data.splits import SPLITS, Data, load_data, stratified_split

# Python 3.12 and later warn of any fork in a process with threads, which torch always has.
ignore_fork = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def photo(path: Path, value: int, size: tuple[int, int] = (48, 40), mode: str = "RGB") -> None:
    """An image whose pixels vary, and whose mean tells ``value``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    ramp = np.add.outer(np.arange(height), np.arange(width)) % 16 + value
    Image.fromarray(ramp.astype(np.uint8)).convert(mode).save(path)


def make_folder(root: Path, train: int = 12, val: int = 3, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            for index in range(count):
                photo(root / split / name / f"{index:03}.png", 100 * label + index)
    return root


def npz_arrays(train: int = 100, test: int = 20, size: int = 32, channels: tuple[int, ...] = (3,)) -> dict[str, Any]:
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", train), ("test", test)):
        arrays[f"{split}_images"] = random.integers(0, 256, (count, size, size, *channels), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 4
    return arrays


def save_npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def all_batches(images: ImageSet, *args: Any, **kwargs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(batches(images, *args, **kwargs))


def same(left: list[Any], right: list[Any]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def refused(source: object, *parts: str, **kwargs: Any) -> str:
    """The one line that ``load_data`` refuses ``source`` with; it must contain ``parts``."""
    with pytest.raises(UserError) as caught:
        load_data(str(source), kwargs.pop("image_size", None), 0, **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line
    return line


# --- splits


def assert_disjoint(data: Data) -> None:
    """No image of the same store stands in two splits."""
    seen: set[tuple[int, int]] = set()
    for name in SPLITS:
        images = getattr(data, name)
        keys = {(id(images.pixels), int(index)) for index in images.indices}
        assert len(keys) == len(images) > 0
        assert not keys & seen, name
        seen |= keys


def test_stratified_split_is_disjoint_proportional_and_a_function_of_the_seed() -> None:
    labels = torch.tensor([0] * 500 + [1] * 300 + [2] * 199 + [3])
    groups = stratified_split(labels, [200, 100], 7)
    assert [len(group) for group in groups] == [200, 100, 700]
    assert sorted(torch.cat(groups).tolist()) == list(range(1000))
    for group, share in zip(groups, (0.2, 0.1, 0.7), strict=True):
        counts = torch.bincount(labels[group], minlength=4)
        assert (counts[:3] - share * torch.tensor([500, 300, 199])).abs().max() <= 1.5
    assert 999 in groups[-1]  # the only image of its class is trained on
    assert all(map(torch.equal, groups, stratified_split(labels, [200, 100], 7)))
    assert not torch.equal(groups[0], stratified_split(labels, [200, 100], 8)[0])


def test_digits() -> None:
    data = load_data("digits", None, 0)
    assert [len(getattr(data, name)) for name in SPLITS] == [1134, 125, 179, 359]
    assert_disjoint(data)
    assert data.class_names == tuple("0123456789")
    assert len(data.notes) == 3
    image, label = data.test[0, 0]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8
    assert label == int(data.test.labels[0])
    assert (image[0] == image[1]).all()
    counts = torch.bincount(data.test.labels)
    assert counts.min() >= 34
    assert counts.max() <= 37
    x_NCHW = torch.stack([data.calibration[i, 0][0] for i in range(len(data.calibration))])
    normalized = data.preprocessing.normalize(x_NCHW)
    assert abs(float(normalized.mean())) < 0.1
    assert 0.7 < float(normalized.std()) < 1.1


def test_splits_depend_on_the_seed_and_calibration_is_capped() -> None:
    first, again, other = (load_data("digits", None, seed, 40) for seed in (0, 0, 1))
    assert len(first.calibration) == 40
    for name in SPLITS:
        assert torch.equal(getattr(first, name).indices, getattr(again, name).indices)
        assert not torch.equal(getattr(first, name).indices, getattr(other, name).indices)


def test_folder_without_test_tests_on_val(tmp_path: Path) -> None:
    data = load_data(str(make_folder(tmp_path)), 24, 0)
    assert [len(getattr(data, name)) for name in SPLITS] == [17, 5, 2, 6]
    assert_disjoint(data)
    assert data.class_names == ("cat", "dog")
    assert str(tmp_path / "val") in data.notes[0]
    for images in (data.train, data.test):
        for index, label in enumerate(images.labels.tolist()):
            assert (float(images[index, 0][0].float().mean()) > 80) == bool(label)
    assert [getattr(data, name).augment for name in SPLITS] == [True, False, False, False]


def test_folder_with_test_keeps_all_three(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for name in ("cat", "dog"):
        photo(folder / "test" / name / "a" / "deeper.png", 3)
        (folder / "test" / name / "notes.txt").write_text("not an image")
    data = load_data(str(folder), 24, 0)
    assert [len(getattr(data, name)) for name in SPLITS] == [18, 6, 6, 2]


def test_large_images_get_the_margin_of_224_in_256(tmp_path: Path) -> None:
    data = load_data(str(make_folder(tmp_path)), None, 0)
    assert (data.preprocessing.height, data.preprocessing.width, data.preprocessing.resize) == (224, 224, 256)
    assert data.test[0, 0][0].shape == (3, 224, 224)
    assert data.train[0, 5][0].shape == (3, 224, 224)


def test_npz_native_size_is_untouched(tmp_path: Path) -> None:
    arrays = npz_arrays()
    data = load_data(save_npz(tmp_path / "a.npz", **arrays), None, 0)
    assert_disjoint(data)
    assert np.array_equal(data.test[3, 0][0].permute(1, 2, 0).numpy(), arrays["test_images"][3])
    assert data.class_names == ("0", "1", "2", "3")
    assert [len(getattr(data, name)) for name in SPLITS] == [68, 22, 10, 20]


def test_npz_of_grey_images_with_validation_names_and_another_size(tmp_path: Path) -> None:
    arrays = npz_arrays(channels=())
    arrays |= {"val_images": arrays["test_images"][:8], "val_labels": arrays["test_labels"][:8]}
    data = load_data(save_npz(tmp_path / "a.npz", **arrays, class_names=list("abcd")), 96, 0)
    assert data.class_names == tuple("abcd")
    assert [len(getattr(data, name)) for name in SPLITS] == [75, 25, 8, 20]
    assert next(batches(data.train, 4, 0))[0].shape == (4, 3, 96, 96)
    assert next(batches(data.test, 4, None))[0].shape == (4, 3, 96, 96)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_torchvision_set_in_memory(tmp_path: Path) -> None:
    arrays = npz_arrays(channels=(), size=28)
    for split, file in (("train", "train"), ("test", "t10k")):
        raw = tmp_path / "FashionMNIST" / "raw"
        write_idx(raw / f"{file}-images-idx3-ubyte", arrays[f"{split}_images"])
        write_idx(raw / f"{file}-labels-idx1-ubyte", arrays[f"{split}_labels"].astype(np.uint8))
    data = load_data("torchvision:FashionMNIST", None, 0, root=tmp_path)
    assert [len(getattr(data, name)) for name in SPLITS] == [68, 22, 10, 20]
    assert data.class_names[0] == "T-shirt/top"
    assert np.array_equal(data.test[1, 0][0][2].numpy(), arrays["test_images"][1])


def test_torchvision_set_of_files(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("val", 2)):
        for label, wnid in enumerate(("n01440764", "n02102040")):
            for index in range(count):
                photo(tmp_path / "imagenette2" / split / wnid / f"{index}.jpeg", 100 * label + index)
    data = load_data("torchvision:Imagenette", 64, 0, root=tmp_path)
    assert data.class_names == ("tench, Tinca tinca", "English springer, English springer spaniel")
    x_NCHW, labels = next(batches(data.test, 8, None))
    assert x_NCHW.shape == (4, 3, 64, 64)
    assert labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "imagenette2" / "val" / "n01440764" / "0.jpeg").write_bytes(b"no image")
    with pytest.raises(UserError, match="Imagenette is corrupt"):
        all_batches(data.test, 8, None)


# --- preprocessing and augmentation


def test_preprocessing_goes_through_json_and_normalizes() -> None:
    preprocessing = Preprocessing(24, 16, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0), 24)
    assert Preprocessing.from_json(json.loads(json.dumps(dataclasses.asdict(preprocessing)))) == preprocessing
    x_NCHW = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = (x_NCHW.numpy() / 255 - np.reshape([0.5, 0.25, 0], (3, 1, 1))) / np.reshape([0.5, 0.25, 1], (3, 1, 1))
    assert preprocessing.normalize(x_NCHW).dtype == torch.float32
    np.testing.assert_allclose(preprocessing.normalize(x_NCHW).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("change", [{"mean": [1, 2]}, {"std": [0, 1, 1]}, {"color": "BGR"}, {"resize": 9}, {"x": 1}])
def test_preprocessing_of_a_damaged_sidecar_is_refused(change: dict[str, Any]) -> None:
    wide = Preprocessing(20, 20, (0.0,) * 3, (1.0,) * 3, 20, letterbox=True)
    boxed = wide.fit(torch.full((3, 30, 75), 200, dtype=torch.uint8))  # the whole image, 20 x 8, in the middle
    assert (boxed[:, 6:14] == 200).all()
    assert (boxed[:, :6] == 114).all()
    assert (boxed[:, 14:] == 114).all()
    assert wide.fit(torch.zeros(3, 1, 200, dtype=torch.uint8)).shape == (3, 20, 20)
    assert wide.preset.letterbox
    assert Preprocessing.from_preset(wide.preset, 20, 20, 20) == wide
    good = dataclasses.asdict(Preprocessing(24, 24, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 24))
    with pytest.raises(UserError, match="preprocessing"):
        Preprocessing.from_json(good | change)


def test_fit_is_pillows_bilinear_resize_and_center_crop(tmp_path: Path) -> None:
    random = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(random).resize((48, 32), Image.Resampling.BILINEAR))[4:28, 12:36]
    found = Preprocessing(24, 24, (0.5,) * 3, (0.5,) * 3, 32).fit(torch.from_numpy(random).permute(2, 0, 1))
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_digits_are_shifted_by_at_most_two_pixels_and_not_mirrored() -> None:
    train = load_data("digits", None, 0).train
    still = dataclasses.replace(train, augmentation=None)[0, 0][0]
    padded = torch.nn.functional.pad(still, [2] * 4)
    shifted = [padded[:, top : top + 32, left : left + 32] for top in range(5) for left in range(5)]
    found = set()
    for seed in range(200):
        matches = [index for index, image in enumerate(shifted) if torch.equal(train[0, seed][0], image)]
        assert matches
        found.add(matches[0])
    assert len(found) > 20


def test_a_batch_is_shifted_and_mirrored_as_its_images_are(tmp_path: Path) -> None:
    train = load_data(save_npz(tmp_path / "x.npz", **npz_arrays()), None, 0).train
    assert train.ready
    keys = torch.stack([torch.arange(50), torch.arange(50) * 7919 + 2**31], 1)
    images, labels = train.take(keys)
    single = [train[index, seed] for index, seed in keys.tolist()]
    assert torch.equal(images, torch.stack([image for image, _ in single]))
    assert labels.tolist() == [label for _, label in single]
    still = dataclasses.replace(train, augmentation=None)
    moves = set()
    for found, (index, _) in zip(images, keys.tolist(), strict=True):
        padded = torch.nn.functional.pad(still[index, 0][0], [4] * 4)
        moves.add(
            next(
                (top, left, mirrored)
                for top, left, mirrored in itertools.product(range(9), range(9), (False, True))
                if torch.equal(found.flip(2) if mirrored else found, padded[:, top : top + 32, left : left + 32])
            )
        )
    assert {mirrored for _, _, mirrored in moves} == {False, True}
    assert len(moves) > 30


def test_photographs_are_taken_as_the_weights_have_it(tmp_path: Path) -> None:
    folder = str(make_folder(tmp_path))
    others = ImagePreset(96, 100, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    found = load_data(folder, None, 0, preset=others).preprocessing
    assert found == Preprocessing(96, 96, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), 100)
    assert load_data(folder, 192, 0, preset=others).preprocessing.resize == 200
    assert load_data(folder, None, 0, preset=found.preset).preprocessing == found
    digits = load_data("digits", None, 0).preprocessing
    assert digits.mean != ImagePreset().mean
    assert load_data("digits", None, 0, preset=digits.preset).preprocessing == digits
    assert load_data("digits", None, 0, preset=others).preprocessing.mean == others.mean
    images = load_data(folder, None, 0, preset=others).test
    x = torch.full((1, 3, 96, 96), 51, dtype=torch.uint8)  # 0.2
    assert torch.allclose(images.preprocessing.normalize(x)[0, :, 0, 0], torch.tensor([-3.0, -1.0, -1 / 3]), atol=1e-6)


def test_photographs_are_cropped_and_mirrored(tmp_path: Path) -> None:
    train = load_data(str(make_folder(tmp_path)), 96, 0).train
    assert torch.equal(train[0, 11][0], train[0, 11][0])
    images = [train[0, seed][0] for seed in range(20)]
    assert all(image.shape == (3, 96, 96) for image in images)
    assert not any(torch.equal(images[0], image) for image in images[1:])


# --- batches


def test_evaluation_is_in_order_and_complete() -> None:
    test = load_data("digits", None, 0).test
    found = all_batches(test, 100, None)
    assert [len(labels) for _, labels in found] == [100, 100, 100, 59]
    assert len(found) == batch_count(test, 100)
    assert torch.equal(torch.cat([labels for _, labels in found]), test.labels)
    assert found[0][0].is_contiguous()


def test_order_depends_on_seed_and_epoch() -> None:
    train = load_data("digits", None, 0).train
    first = all_batches(train, 500, 3, epoch=1)
    assert same(first, all_batches(train, 500, 3, epoch=1))
    for other in (all_batches(train, 500, 3, epoch=2), all_batches(train, 500, 4, epoch=1)):
        assert not torch.equal(first[0][0], other[0][0])
    labels = torch.cat([labels for _, labels in first])
    assert torch.equal(labels.sort().values, train.labels.sort().values)


@ignore_fork
def test_batches_depend_neither_on_workers_nor_on_resuming(tmp_path: Path) -> None:
    train = load_data(str(make_folder(tmp_path)), 80, 0).train
    whole = all_batches(train, 4, 5, epoch=2)
    assert len(whole) == 5
    assert same(whole, all_batches(train, 4, 5, epoch=2, workers=2))
    for start in (2, 5):
        assert same(whole[start:], all_batches(train, 4, 5, epoch=2, start=start))
        assert same(whole[start:], all_batches(train, 4, 5, epoch=2, start=start, workers=2))


@ignore_fork
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_leave_the_global_generator_alone(tmp_path: Path, workers: int) -> None:
    train = load_data(str(make_folder(tmp_path)), 80, 0).train
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    all_batches(train, 4, 0, workers=workers)
    assert torch.equal(torch.rand(1), expected)


def test_skipped_batches_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qat.data.pixels, "MEMORY_LIMIT", 0)
    folder = make_folder(tmp_path)
    test = load_data(str(folder), 80, 0).test
    (folder / "val" / "cat" / "000.png").write_bytes(b"")
    assert len(all_batches(test, 2, None, start=1)) == 2


def test_last_batch_of_one_is_left_out_in_training() -> None:
    train = load_data("digits", None, 0).train  # 1134 = 11 * 103 + 1
    assert batch_count(train, 103) == 12
    assert batch_count(train, 103, training=True) == 11
    assert [len(labels) for _, labels in batches(train, 103, 0, training=True)] == [103] * 11
    assert batch_count(train, 1, training=True) == 1134
    assert batch_count(train, 5000, training=True) == 1
    with pytest.raises(UserError, match="batch size 0"):
        batch_count(train, 0)


# --- bad input


@ignore_fork
@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_found_while_training_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(qat.data.pixels, "MEMORY_LIMIT", 0)  # decode on demand
    bad = make_folder(tmp_path) / "val" / "dog" / "001.png"
    bad.write_bytes(bad.read_bytes()[:-60])  # the header is whole
    data = load_data(str(tmp_path), 80, 0)
    with pytest.raises(UserError) as caught:
        all_batches(data.test, 2, None, workers=workers)
    assert str(caught.value).startswith(f"{bad} is corrupt (")
    assert str(caught.value).endswith("remove or replace it")
    assert "\n" not in str(caught.value)


def test_corrupt_images_are_found_at_the_start(tmp_path: Path) -> None:
    bad = make_folder(tmp_path) / "train" / "cat" / "004.png"
    whole = bad.read_bytes()
    for content in (whole[:-60], b"", b"no image", whole[:20]):
        bad.write_bytes(content)
        refused(tmp_path, f"{bad} is corrupt (", "remove or replace it")
    bad.unlink()
    bad.symlink_to("nowhere")
    refused(tmp_path, f"cannot read {bad}")


def test_all_kinds_of_images_become_rgb(tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}"
        grey = Image.fromarray(np.full((5, 7), 255, np.uint8))
        white = Image.fromarray(np.full((5, 7), 65535, np.uint16)) if mode == "I;16" else grey
        (white if mode == "I;16" else grey.convert("RGB").convert(mode)).save(path)
        image = qat.data.pixels.decode(str(path))
        assert image.shape == (3, 5, 7)
        assert (image >= 254).all(), mode
    grey.convert("P").save(tmp_path / "t.png", transparency=bytes(range(256)))
    assert qat.data.pixels.decode(str(tmp_path / "t.png")).shape == (3, 5, 7)


def test_bad_folders(tmp_path: Path) -> None:
    refused(tmp_path, "has no class folders")
    (tmp_path / "half" / "train").mkdir(parents=True)
    refused(tmp_path / "half", "only one of train/ and val/", "found: train")
    folder = make_folder(tmp_path / "a")
    (folder / "train" / "empty").mkdir()
    refused(folder, str(folder / "train" / "empty"), "has no image", "remove the folder")
    photo(folder / "train" / "empty" / "1.png", 0)
    refused(folder, "1 of the 3 classes", "missing from", "'empty'", str(folder / "val"))
    photo(folder / "val" / "empty" / "1.png", 0)
    photo(folder / "val" / "new" / "1.png", 0)
    refused(folder, "1 of the 4 classes", str(folder / "val"), f"missing from {folder / 'train'}", "'new'")
    (tmp_path / "b" / "train").mkdir(parents=True)
    (tmp_path / "b" / "val").mkdir()
    refused(tmp_path / "b", "has no class folders")


def test_too_few_images(tmp_path: Path) -> None:
    refused(make_folder(tmp_path / "a", train=4), "8 training images", "too few for a validation split", "at least 10")
    arrays = npz_arrays(train=4)
    arrays |= {"val_images": arrays["test_images"], "val_labels": arrays["test_labels"]}
    for key in ("train_images", "train_labels"):
        arrays[key] = arrays[key][:3]
    names = ["x", "y", "z"]
    for key in ("val_labels", "test_labels"):
        arrays[key] = arrays[key] % 3
    source = save_npz(tmp_path / "b.npz", **arrays, class_names=names)
    refused(source, "3 training images", "too few for a calibration split", "at least 4")


def test_unknown_names(tmp_path: Path) -> None:
    refused("digit", "unknown data set 'digit'", "did you mean digits", "torchvision:NAME", "CIFAR10")
    refused(tmp_path / "absent", "no such folder")
    refused("torchvision:cifar10", "did you mean CIFAR10", "give one of CIFAR10, CIFAR100")
    refused("torchvision:CocoDetection", "no classification data set")
    refused(tmp_path / "absent.npz", "no file")
    refused("digits", "image size 0", image_size=0)
    refused("digits", "--calibration-images 0 is too few: it must be at least 1", calibration_images=0)
    with pytest.raises(UserError, match="seed -1"):
        load_data("digits", None, -1)


def test_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of its first use
    refused("torchvision:CIFAR10", "cannot download CIFAR10", str(tmp_path), "check the network", root=tmp_path)
    refused("torchvision:ImageNet", "ImageNet is not in", "by hand", root=tmp_path)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"test_images": None}, ("does not have test_images", "found: train_images, train_labels, test_labels")),
        ({"train_images": np.zeros((100, 32, 32, 3), np.float32)}, ("train_images is float32 [100, 32, 32, 3]",)),
        ({"train_images": np.zeros((100, 3, 32, 32), np.uint8)}, ("[100, 3, 32, 32]", "[N, H, W, 3]")),
        ({"test_images": np.zeros((20, 28, 28, 3), np.uint8)}, ("28x28", "32x32")),
        ({"test_images": np.zeros((0, 32, 32, 3), np.uint8)}, ("[0, 32, 32, 3]",)),
        ({"train_labels": np.zeros(100)}, ("train_labels is float64",)),
        ({"train_labels": np.zeros(99, int)}, ("[99]", "100 images")),
        ({"test_labels": np.arange(20), "class_names": list("abcd")}, ("labels range from 0 to 19", "4 classes")),
        ({"train_labels": np.arange(100) % 4 - 1}, ("train_labels range from -1 to 2",)),
        ({"class_names": ["a", "b"]}, ("range from 0 to 3", "2 classes")),
        ({"class_names": [1, 2, 3, 4]}, ("class_names is int64",)),
        ({"class_names": np.array(["a", None], object)}, ("Python objects",)),
        ({"val_images": np.zeros((1, 32, 32, 3), np.uint8)}, ("only one of val_images and val_labels",)),
    ],
)
def test_bad_npz(tmp_path: Path, change: dict[str, Any], parts: tuple[str, ...]) -> None:
    arrays = {key: value for key, value in (npz_arrays() | change).items() if value is not None}
    path = tmp_path / "a.npz"
    refused(save_npz(path, **arrays), str(path), *parts)


def test_damaged_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save_npz(path, **npz_arrays())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (whole[: len(whole) // 2], b"", b"nonsense", bytes(flipped)):
        path.write_bytes(content)
        refused(path, str(path), "truncated", "np.savez")
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    refused(path, "a single array")
