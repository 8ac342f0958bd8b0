"""Post-training quantization alone: the same as in qat.train; images without labels, from folder to report."""

from __future__ import annotations

import html
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import Run, one_thread
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qat.post_training
from deploy import build, report
from deploy.reference import network_input
from deploy.report_page.artifacts import gather
from deploy.report_page.verdict import stages_of
from export import export_onnx
from qat.base.artifact import Sidecar, read_sidecar, sha256_of
from qat.base.errors import UserError
from qat.base.ranges_file import Distributions, ranges_path, read_distributions
from qat.calibrate import main as quantize_pretrained
from qat.checkpoint import load_checkpoint, training_data
from qat.compute.device import Compute
from qat.data.splits import Data, load_unlabelled
from qat.evaluate import compare
from qat.fake_quantize.prepare import weights_and_quantizers
from qat.models import ModelSpec, build_model, spec_for
from qat.options import CalibrateOptions, TrainOptions
from qat.train import main as run

CPU = Compute(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def weights(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a float network of the trained weights would be saved as."""
    tensors = load_file(trained / "model.qat")
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if "quantizer" not in name}, path)
    return path


@pytest.fixture(scope="module")
def photos(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 of the images as files, some of them in a folder within; the brightest pixel of image i is 160 + i."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for index, pixels in enumerate(np.load(trained / "images.npz")["train_images"][:80]):
        scaled = (128 + pixels / pixels.max() * (32 + index)).round().astype(np.uint8)
        Image.fromarray(scaled).save((folder / "more" if index % 4 else folder) / f"{index:03}.png")
    return folder


def given(trained: Path, weights: Path, data: Path, output: Path, /, **changes: Any) -> dict[str, Any]:
    """The options of a run on images of the tiny network's size."""
    found = {"model": f"{trained / 'net.py'}:net", "weights": str(weights), "data": str(data), "output": output}
    return {**found, "image_size": 16, "batch_size": 9, "device": "cpu"} | changes


def calibrate(*places: Path, **changes: Any) -> Sidecar:
    """The sidecar of what a run in this process wrote; ``places``: trained, weights, data, output."""
    options = CalibrateOptions(**given(*places, **changes))
    quantize_pretrained(options)
    return read_sidecar(options.output, "checkpoint")


@pytest.fixture(scope="module")
def unlabelled(trained: Path, weights: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose ranges clip so much that some answers change. Not to be changed."""
    output = tmp_path_factory.mktemp("unlabelled") / "model.qat"
    calibrate(trained, weights, photos, output, calibrator="percentile", percentile=60.0)
    return output


def float_network(trained: Path, weights: Path) -> nn.Module:
    model = build_model(ModelSpec(f"{trained / 'net.py'}:net", 3))
    model.load_state_dict(load_file(weights))
    return model.eval()


def images_of(data: Data, split: str) -> Tensor:
    """All images of a split, normalized by hand."""
    images = getattr(data, split)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (torch.stack([images[index, 0][0] for index in range(len(images))]) / 255 - mean) / std


def ranges_of(output: Path) -> Distributions:
    return read_distributions(ranges_path(output), sha256_of(output))


def test_what_calibration_saw_is_written(trained: Path, unlabelled: Path) -> None:
    found = ranges_of(unlabelled)
    assert (found.calibrator, found.percentile) == ("percentile", 60.0)
    assert found.images == read_sidecar(unlabelled, "checkpoint").details["splits"]["calibration"]
    for one in found.activations:
        chosen = {choice.method: choice for choice in one.choices}
        assert one.amax == chosen["percentile"].amax
        assert chosen["max"].clipped == 0 < chosen["percentile"].clipped <= 40


def test_untrained_weights_are_told(
    trained: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = trained / "images.npz"
    calibrate(trained, weights, images, tmp_path / "m.qat")
    assert "chance" not in capsys.readouterr().err
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}
    save_file(zeros, tmp_path / "zero.safetensors")
    calibrate(trained, tmp_path / "zero.safetensors", images, tmp_path / "z.qat")
    said = (
        "warning: the float network itself is hardly better than chance, 33.33 % of 60: are these the trained weights?"
    )
    assert said in capsys.readouterr().err


def test_a_file_of_ranges_that_cannot_be_written_is_told_before_the_work(
    trained: Path, weights: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.ranges.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*m\.ranges\.json: that is a folder"):
        calibrate(trained, weights, photos, tmp_path / "m.qat")
    assert not (tmp_path / "m.qat").exists()


# --- with labels


@pytest.mark.parametrize("calibrator", ["mse", "entropy"])
def test_the_same_network_and_figures_as_training_with_no_epochs(
    trained: Path, weights: Path, tmp_path: Path, calibrator: str
) -> None:
    common = {"weights": str(weights), "calibrator": calibrator}
    none = tiny.options(trained, output=tmp_path / "t.qat", float_epochs=0, qat_epochs=0, **common)
    run(TrainOptions(**none))
    expected = read_sidecar(tmp_path / "t.qat", "checkpoint")
    found = calibrate(trained, weights, trained / "images.npz", tmp_path / "c.qat", calibrator=calibrator)
    then, now = load_file(tmp_path / "t.qat"), load_file(tmp_path / "c.qat")
    assert then.keys() == now.keys()
    assert [name for name in then if not torch.equal(then[name], now[name])] == []
    assert {key: found.figures[key] for key in ("float", "ptq")} == {
        key: expected.figures[key] for key in ("float", "ptq")
    }
    assert "qat" not in found.figures
    assert "qat" not in expected.figures  # nothing was trained
    assert found.class_names == expected.class_names == tiny.CLASSES
    assert found.details["splits"] == expected.details["splits"]
    assert found.details["data"]["labelled"] is True


def test_weights_are_rounded_by_adaround(trained: Path, weights: Path, photos: Path, tmp_path: Path) -> None:
    nearest = calibrate(trained, weights, photos, tmp_path / "nearest.qat")
    rounded = calibrate(trained, weights, photos, tmp_path / "rounded.qat", adaround=60)
    assert (nearest.details["adaround"], rounded.details["adaround"]) == (0, 60)
    one, other = (
        {path: (quantizer(weight), weight) for path, weight, quantizer in weights_and_quantizers(checkpoint.model)}
        for checkpoint in (load_checkpoint(tmp_path / f"{name}.qat") for name in ("nearest", "rounded"))
    )
    for path, (codes, weight) in other.items():
        assert torch.equal(codes, weight), path  # it is what the codes stand for
    assert any(not torch.equal(one[path][0], other[path][0]) for path in one)
    export_onnx(tmp_path / "rounded.qat")
    assert read_sidecar(tmp_path / "rounded.onnx", "onnx").figures["parity"]["other_top1"] == 0
    model = tmp_path / "rounded.onnx"
    assert build.main(build.BuildOptions(model=model, builder="tensorrt-rtx", compute_capabilities=("8.9",))) == 0
    report.main(report.ReportOptions(runs=(tmp_path / "rounded.engine",)))
    page = (tmp_path / "report.html").read_text()
    assert "rounded by AdaRound in 60 steps a layer" in " ".join(page.split())


def test_digits(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    state = build_model(ModelSpec(f"{trained / 'net.py'}:net", 10)).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    sidecar = calibrate(trained, tmp_path / "w.safetensors", Path("digits"), tmp_path / "d.qat")
    assert sidecar.class_names == tuple("0123456789")
    assert sidecar.figures["ptq"]["test_images"] == sidecar.figures["agreement"]["images"] == 359
    said = capsys.readouterr().out
    assert "Accuracy on the test split (359 images)" in said
    assert f"{sidecar.figures['agreement']['top1']:.2f} %" in said


def test_ranges_of_a_checkpoint_of_pytorch_quantization(
    trained: Path, weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = load_file(weights) | {"conv2._input_quantizer._amax": torch.tensor(7.0)}
    torch.save({"state_dict": old}, tmp_path / "old.pth")
    sidecar = calibrate(trained, tmp_path / "old.pth", photos, tmp_path / "o.qat")
    assert sidecar.details["amax"]["relu"] == 7.0
    said = capsys.readouterr().out
    assert "1 of 4 ranges of activations and 0 of 3 of weights are the checkpoint's" in said
    assert "not in the checkpoint, as the original does not quantize them, so calibrated here: x," in said
    (relu,) = (one for one in ranges_of(tmp_path / "o.qat").activations if one.quantizer == "relu")
    assert (relu.amax, relu.choices[-1].method, relu.choices[-1].amax) == (7.0, "in use", 7.0)
    recorded = sidecar.details["ranges"]
    assert recorded["from_checkpoint"] == {"tensors": ["relu"], "weights": []}
    assert "x" in recorded["calibrated_here"]["tensors"]
    assert "--weight-calibrator" not in said


def test_weights_that_the_checkpoint_has_no_range_for_follow_the_option(
    trained: Path, weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = load_file(weights)
    amax = old["conv1.weight"].abs().amax((1, 2, 3), keepdim=True)
    torch.save(old | {"conv1._weight_quantizer._amax": amax}, tmp_path / "old.pth")
    calibrate(trained, tmp_path / "old.pth", photos, tmp_path / "o.qat", weight_calibrator="mse")
    assert "--weight-calibrator mse sets 2 ranges: 1 weights keep the checkpoint's" in capsys.readouterr().out
    saved = load_file(tmp_path / "o.qat")
    assert "conv1.weight_quantizer.amax" not in saved  # it is the largest magnitude, which the range follows
    assert "conv2.weight_quantizer.amax" in saved


def test_the_output_tells_the_number_of_classes_where_the_function_decides_it(
    trained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "seven.py"
    head = "nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))"
    file.write_text(f"from torch import nn\ndef ignores(num_classes): return {head}\ndef takes_none(): return {head}\n")
    for function in ("ignores", "takes_none"):
        name = f"{file}:{function}"
        torch.save(build_model(ModelSpec(name, 1)).state_dict(), tmp_path / "w.pth")
        sidecar = calibrate(trained, tmp_path / "w.pth", photos, tmp_path / "o.qat", model=name)
        assert (sidecar.details["model"]["num_classes"], len(sidecar.class_names)) == (7, 7)
        assert "w.pth, 7 classes\n" in capsys.readouterr().out
        with pytest.raises(UserError, match="answers 7 classes, not 5: leave out --classes"):
            calibrate(trained, tmp_path / "w.pth", photos, tmp_path / "o.qat", model=name, classes=5)


# --- how ranges are chosen


def test_the_command_explains_tensors_of_images_without_labels(
    trained: Path, weights: Path, photos: Path, tmp_path: Path, command: Run
) -> None:
    output = tmp_path / "e.qat"
    flags = tiny.flags(given(trained, weights, photos, output, calibrator="entropy"))
    done = command("qat.calibrate", *flags, "--explain", "x", "rel*")
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "e.explain.html").read_text()
    assert "<title>How the ranges of e.qat are chosen</title>" in page
    assert re.findall("<h2>(.*)</h2>", page) == ["x", "relu", "relu_1"]
    assert [
        name for name in ("x", "relu", "relu_1", "flatten") if re.search(rf"(?m)^Range of {name}\b", done.stdout)
    ] == [
        *("x", "relu", "relu_1"),
    ]
    assert f"\npicture: {tmp_path / 'e.explain.html'}\nwrote {output}\nnext: " in done.stdout
    for name, amax in read_sidecar(output, "checkpoint").details["amax"].items():
        row = rf"entropy +│ +{re.escape(f'{amax:.5g}')} .* in use │"
        assert bool(re.search(row, done.stdout)) == (name != "flatten")
    calibrate(trained, weights, photos, tmp_path / "without.qat", calibrator="entropy")
    then, now = load_file(tmp_path / "without.qat"), load_file(output)
    assert all(torch.equal(tensor, now[name]) for name, tensor in then.items())
    assert not (tmp_path / "without.explain.html").exists()


def test_a_pattern_that_names_nothing_is_one_line_before_any_file(
    trained: Path, weights: Path, photos: Path, tmp_path: Path, command: Run
) -> None:
    flags = tiny.flags(given(trained, weights, photos, tmp_path / "e.qat"))
    done = command("qat.calibrate", *flags, "--explain", "x", "rellu")
    assert done.returncode == 2
    assert done.stderr == "error: --explain rellu names no quantized tensor (did you mean relu or relu_1?)\n"
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_told_before_the_work(
    trained: Path, weights: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "e.explain.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*e\.explain\.html: that is a folder"):
        calibrate(trained, weights, photos, tmp_path / "e.qat", explain=("x",))
    assert not (tmp_path / "e.qat").exists()


def test_a_range_of_the_checkpoint_is_explained_as_the_one_in_use(
    trained: Path, weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = load_file(weights) | {"conv2._input_quantizer._amax": torch.tensor(7.0)}
    torch.save({"state_dict": old}, tmp_path / "old.pth")
    calibrate(trained, tmp_path / "old.pth", photos, tmp_path / "o.qat", explain=("relu", "x"))
    said = capsys.readouterr().out
    assert re.search(r"│ in use +│ +7 │", said)
    assert re.search(r"│ mse .* in use │", said)  # of x, which is calibrated here


# --- without labels


def test_the_command_says_agreement_and_no_accuracy(
    trained: Path, weights: Path, photos: Path, tmp_path: Path, command: Run
) -> None:
    done = command("qat.calibrate", *tiny.flags(given(trained, weights, photos, tmp_path / "u.qat")))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"weights: {weights}, 3 classes\n" in done.stdout
    assert f"data {photos}: no labels, 16x16 pixels; images: calibration 64, test 16\n" in done.stdout
    assert "Agreement on 16 held-out images without labels" in done.stdout
    for absent in ("top-1", "loss", "ccuracy", "nan"):
        assert absent not in done.stdout
    assert done.stdout.endswith(f"\nnext: python -m export.onnx {tmp_path / 'u.qat'}\n")
    sidecar = read_sidecar(tmp_path / "u.qat", "checkpoint")
    assert list(sidecar.figures) == ["agreement"]
    assert sidecar.figures["agreement"]["sqnr_db"] > 20
    assert sidecar.details["splits"] == {"calibration": 64, "test": 16}
    assert sidecar.details["data"]["labelled"] is False
    assert sidecar.class_names == ("0", "1", "2")


def test_agreement_against_a_computation_by_hand(trained: Path, weights: Path, unlabelled: Path) -> None:
    checkpoint = load_checkpoint(unlabelled)
    x = images_of(training_data(checkpoint), "test")
    with torch.no_grad():
        before, after = (model(x).double().numpy() for model in (float_network(trained, weights), checkpoint.model))
    found = checkpoint.sidecar.figures["agreement"]
    same = [left == right for left, right in zip(before.argmax(1), after.argmax(1), strict=True)]
    assert found["images"] == len(same) == 16
    assert found["top1"] == 100 * sum(same) / 16
    assert 0 < found["top1"] < 100  # else a wrong count would not show
    assert found["sqnr_db"] == pytest.approx(20 * math.log10(np.linalg.norm(before) / np.linalg.norm(after - before)))


def test_networks_that_are_equal_have_no_noise(trained: Path, weights: Path, photos: Path) -> None:
    data, model = load_unlabelled(photos, 16, 0), float_network(trained, weights)
    agreement, accuracies = compare(model, model, data, data.test, 5, CPU, 0)
    assert (agreement.top1, agreement.sqnr_db, agreement.images) == (100.0, None, 16)
    assert accuracies == ()


def test_ranges_are_from_the_calibration_images_alone(
    trained: Path, weights: Path, photos: Path, tmp_path: Path
) -> None:
    sidecar = calibrate(trained, weights, photos, tmp_path / "m.qat", calibrator="max", calibration_images=20)
    data = load_unlabelled(photos, 16, 0, 20)
    assert data.sizes == sidecar.details["splits"] == {"calibration": 20, "test": 60}
    amax = {split: float(images_of(data, split).abs().max()) for split in ("calibration", "test")}
    assert amax["test"] > 1.01 * amax["calibration"]
    assert sidecar.details["amax"]["x"] == pytest.approx(amax["calibration"], rel=1e-6)


@pytest.mark.parametrize(
    ("wanted", "sizes"),
    [
        (512, {"calibration": 64, "test": 16}),
        (70, {"calibration": 64, "test": 16}),
        (8, {"calibration": 8, "test": 72}),
    ],
)
def test_images_are_held_out_of_calibration(photos: Path, wanted: int, sizes: dict[str, int]) -> None:
    data = load_unlabelled(photos, 16, 0, wanted)
    assert data.sizes == sizes
    paths: Any = data.test.pixels
    chosen = [paths.paths[int(index)] for split in (data.calibration, data.test) for index in split.indices]
    assert len(set(chosen)) == len(chosen) == sum(sizes.values())
    assert {int(split[0, 0][1]) for split in (data.calibration, data.test)} == {-1}
    assert not data.labelled


def test_no_more_than_1024_images_are_held_out_and_only_chosen_ones_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "0000.png")
    for index in range(1, 1100):
        (tmp_path / f"{index:04}.png").hardlink_to(tmp_path / "0000.png")
    data = load_unlabelled(tmp_path, 4, 0, 10)
    assert data.sizes == {"calibration": 10, "test": 1024}
    left = {str(path) for path in tmp_path.iterdir()} - set(data.test.pixels.paths)  # type: ignore[attr-defined]
    assert len(left) == 66
    (tmp_path / "bad").write_bytes(b"no image")
    (tmp_path / "bad").replace(left.pop())
    assert load_unlabelled(tmp_path, 4, 0, 10).sizes == data.sizes


def test_images_are_normalized_as_asked_for(trained: Path, weights: Path, photos: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    calibrate(trained, weights, photos, tmp_path / "model.qat", **asked)
    checkpoint = load_checkpoint(tmp_path / "model.qat")
    assert (checkpoint.preprocessing.mean, checkpoint.preprocessing.std) == (asked["mean"], asked["std"])
    data = training_data(checkpoint)
    assert data.preprocessing == checkpoint.preprocessing
    pixels = torch.stack([data.calibration[index, 0][0] for index in range(len(data.calibration))]) / 255
    mean, std = (torch.tensor(asked[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    largest = calibrate(trained, weights, photos, tmp_path / "max.qat", calibrator="max", **asked)
    assert largest.details["amax"]["x"] == pytest.approx(float(((pixels - mean) / std).abs().max()), rel=1e-5)


def test_the_seed_decides(trained: Path, weights: Path, photos: Path, tmp_path: Path) -> None:
    one, again, other = (
        calibrate(trained, weights, photos, tmp_path / f"{name}.qat", seed=seed, calibration_images=20)
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    assert one.sha256 == again.sha256
    assert one.figures == again.figures
    assert one.details["amax"] != other.details["amax"]


def test_too_few_images_to_hold_any_out(
    trained: Path, weights: Path, photos: Path, tmp_path: Path, command: Run
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(photos.glob("*.png"))[:4]:
        (few / path.name).write_bytes(path.read_bytes())
    done = command("qat.calibrate", *tiny.flags(given(trained, weights, few, tmp_path / "f.qat")))
    assert done.returncode == 0
    assert done.stderr == "warning: only 4 images to calibrate on: ranges may not fit other images; add images\n"
    assert "nothing was measured: there are too few images to hold any out" in done.stdout
    assert read_sidecar(tmp_path / "f.qat", "checkpoint").figures == {}
    done = command("export.onnx", tmp_path / "f.qat")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"ONNX Runtime on the calibration split of {few}: 0 of 4 images" in done.stdout


# --- what comes after


def test_export_and_report_of_images_without_labels(unlabelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = export_onnx(unlabelled, unlabelled.with_name("m.onnx"))
    said = capsys.readouterr()
    assert said.err == ""
    reference = onnx.details["reference"]
    assert (reference["images"], reference["top1"]) == (16, None)
    assert onnx.figures["parity"]["other_top1"] == 0
    assert onnx.figures["parity"]["images"] == 16
    assert (np.load(unlabelled.with_name("m.reference.npz"))["labels"] == -1).all()
    model = unlabelled.with_name("m.onnx")
    assert build.main(build.BuildOptions(model=model, builder="tensorrt-rtx", compute_capabilities=("8.9",))) == 0
    capsys.readouterr()
    report.main(report.ReportOptions(runs=(unlabelled.with_name("m.engine"),)))
    agreement = read_sidecar(unlabelled, "checkpoint").figures["agreement"]
    same = f"{agreement['top1']:.2f} %"
    page, said = html.unescape(unlabelled.with_name("report.html").read_text()), capsys.readouterr()
    known = f"same class on {same} of 16 images, SQNR of the logits {agreement['sqnr_db']:.1f} dB."
    assert f"Agreement with the float network: {known}" in page
    assert f"{same} of 16 images keep the float network's class; no accuracy was measured" in page
    assert "64 calibration images (percentile)" in page
    for absent in ("training images", "test images", "epochs chosen", "trained on <", "qat.sensitivity"):
        assert absent not in page
    assert "same class on 16 images" in said.out
    assert same in said.out
    assert "top-1 on" not in said.out


def test_report_of_a_labelled_checkpoint_has_accuracies_and_no_training(
    trained: Path, weights: Path, tmp_path: Path
) -> None:
    sidecar = calibrate(trained, weights, trained / "images.npz", tmp_path / "c.qat")
    stages = stages_of(gather(tmp_path / "c.qat"))
    assert [stage.label for stage in stages] == ["float", "INT8, calibrated"]
    assert stages[1].top1 == sidecar.figures["ptq"]["test_top1"]
    assert stages[1].images == 60


def test_sensitivity_says_that_it_needs_labels(unlabelled: Path, command: Run) -> None:
    done = command("qat.sensitivity", unlabelled)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "calibrated on images without labels, but losses need labels: run python -m qat.calibrate again" in line


# --- what the user can mend


def refused(*places: Path, **changes: Any) -> str:
    """The line that a run is refused with; it leaves nothing behind."""
    with pytest.raises(UserError) as caught:
        calibrate(*places, **changes)
    assert not places[-1].exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"weights": None}, "--weights is missing: give those of a trained network, or train one: python -m qat.train"),
        ({"classes": 0}, "--classes 0 is not positive"),
        ({"classes": 4}, "have 3 classes (fc), not 4: leave out --classes"),
        ({"std": (0.2, 0.0, 0.2)}, "--std 0.2 0.0 0.2: deviations must be above 0"),
        ({"adaround": -1}, "--adaround -1 is not a number of steps"),
        ({"percentile": 0.0}, "--percentile 0.0 is out of range"),
        ({"calibration_images": 0}, "--calibration-images 0 is too few: it must be at least 1"),
        ({"batch_size": 0}, "batch size 0 is not positive"),
        ({"data": "digits"}, "have 3 classes, but data digits has 10: give weights for these classes"),
        ({"data": "nowhere"}, "unknown data set 'nowhere', and no such folder"),
        ({"model": "resnet18"}, "do not fit the model"),
    ],
)
def test_options_that_do_not_fit(
    trained: Path, weights: Path, photos: Path, tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    assert part in refused(trained, weights, photos, tmp_path / "model.qat", **changes)


def test_a_full_gpu_names_the_option_that_asks_for_less(
    trained: Path, weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    options = {"adaround": "--calibration-images", "observe": "--batch-size", "compare": "--batch-size"}
    for name, option in options.items():
        with monkeypatch.context() as patch:
            patch.setattr(qat.post_training, name, full)
            line = refused(trained, weights, photos, tmp_path / "model.qat", adaround=5)
        assert line == f"the GPU does not have enough free memory: free some, or give a smaller {option}"


def test_nothing_quantized_is_said(
    trained: Path, weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate(trained, weights, photos, tmp_path / "model.qat", keep_float=("*",))
    assert "nothing in this network is quantized" in capsys.readouterr().err
    found = ranges_of(tmp_path / "model.qat")
    assert found.activations == ()
    assert [weight.label for weight in found.weights] == ["conv1", "conv2", "fc"]


def test_images_that_were_added_since_are_noticed(
    trained: Path, weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    calibrate(trained, weights, folder, tmp_path / "model.qat")
    checkpoint = load_checkpoint(tmp_path / "model.qat")
    training_data(checkpoint)
    assert "has changed since" not in capsys.readouterr().err
    for index in range(20):
        shutil.copy(next(photos.rglob("*.png")), folder / f"added{index}.png")
    training_data(checkpoint)
    assert "has changed since" in capsys.readouterr().err


def test_torchrun_is_refused(
    trained: Path, weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "start it without torchrun" in refused(trained, weights, photos, tmp_path / "model.qat")


def test_right_number_of_classes_may_be_told(trained: Path, weights: Path, photos: Path, tmp_path: Path) -> None:
    assert len(calibrate(trained, weights, photos, tmp_path / "model.qat", classes=3).class_names) == 3


def test_folders_that_hold_no_images_or_half_of_a_labelled_set(trained: Path, weights: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "images", tmp_path / "out" / "model.qat"
    (folder / "inner").mkdir(parents=True)
    (folder / "notes.txt").write_text("no image")
    assert f"{folder} has no image (found: 1 .txt; read: " in refused(trained, weights, folder, output)
    (folder / "train").mkdir()
    assert "has only one of train/ and val/ (found: inner, notes.txt, train)" in refused(
        trained, weights, folder, output
    )


def test_training_refuses_images_without_labels(trained: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"python -m qat\.calibrate also takes images without labels"):
        run(TrainOptions(**tiny.options(trained, data=str(photos), output=tmp_path / "model.qat")))


@pytest.mark.parametrize("limit", [0, 1 << 30])  # bytes: decoded on demand, or at the start
def test_a_corrupt_image_is_named(
    trained: Path, weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr("qat.data.pixels.MEMORY_LIMIT", limit)
    bad = tmp_path / "images" / "b.png"
    bad.parent.mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes((photos / "000.png").read_bytes())
    bad.write_bytes(bad.read_bytes()[:-60])
    line = refused(trained, weights, bad.parent, tmp_path / "model.qat", workers=0)
    assert line.startswith(f"{bad} is corrupt (")


def test_answers_that_are_not_finite(trained: Path, weights: Path, photos: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nan.safetensors"
    save_file(load_file(weights) | {"fc.bias": torch.full((3,), math.nan)}, broken)
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(next(photos.glob("*.png")), few)
    for folder in (photos, few):  # of few images none is held out
        assert "output has NaN or infinity" in refused(trained, broken, folder, tmp_path / "model.qat")


# --- one channel


def test_a_network_of_one_channel_goes_through_to_onnx(trained: Path, photos: Path, tmp_path: Path) -> None:
    source = (trained / "net.py").read_text().replace("nn.Conv2d(3, 8", "nn.Conv2d(1, 8")
    (tmp_path / "net.py").write_text(source)
    torch.save(build_model(ModelSpec(f"{tmp_path / 'net.py'}:net", 3)).state_dict(), tmp_path / "net.pth")
    output = tmp_path / "model.qat"
    calibrate(tmp_path, tmp_path / "net.pth", photos, output, channels=1)
    checkpoint = load_checkpoint(output)
    assert checkpoint.preprocessing.color == "grey"
    assert (len(checkpoint.preprocessing.mean), checkpoint.preprocessing.input_shape) == (1, (1, 16, 16))
    assert training_data(checkpoint).preprocessing == checkpoint.preprocessing
    sidecar = export_onnx(output, tmp_path / "bytes.onnx", input="uint8-nhwc")
    assert sidecar.inputs[0].shape == (-1, 16, 16, 1)
    assert sidecar.figures["parity"]["other_top1"] == 0
    exported = export_onnx(output, tmp_path / "model.onnx")
    with np.load(tmp_path / "model.reference.npz") as reference:
        given = network_input(reference["images"], exported)
        expected = checkpoint.preprocessing.normalize(torch.from_numpy(reference["images"]).permute(0, 3, 1, 2))
    assert np.array_equal(given, expected.numpy())
    with pytest.raises(UserError, match=r"takes 1 channels, and the images have 3: give --channels 1"):
        calibrate(tmp_path, tmp_path / "net.pth", photos, output)
    with pytest.raises(UserError, match=r"--mean 0.5: 1 for images of 3 channels; give one for each channel"):
        calibrate(tmp_path, tmp_path / "net.pth", photos, output, mean=(0.5,))


def test_timm_builds_a_network_of_one_channel() -> None:
    spec = spec_for("timm/resnet18", 3, 1)
    assert build_model(spec).conv1.in_channels == 1  # type: ignore[union-attr]
    assert spec_for("timm/resnet18", 3, 3).kwargs == spec_for("resnet18", 3, 1).kwargs == {}


def test_an_npz_with_fewer_classes_than_the_weights(trained: Path, weights: Path, tmp_path: Path) -> None:
    with np.load(trained / "images.npz") as arrays:
        kept = {key: arrays[key] for key in arrays if key != "class_names"}
    for split in ("train", "test"):
        chosen = kept[f"{split}_labels"] < 2
        kept |= {f"{split}_{kind}": kept[f"{split}_{kind}"][chosen] for kind in ("images", "labels")}
    np.savez(tmp_path / "two.npz", **kept)
    assert len(calibrate(trained, weights, tmp_path / "two.npz", tmp_path / "model.qat").class_names) == 3


# --- networks that answer no classes

HEADS = '''"""A small detector's head: boxes and scores of each cell."""

from torch import nn


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.boxes, self.scores = nn.Conv2d(32, 64, 1), nn.Conv2d(32, 5, 1)
        self.decode = nn.Conv2d(16, 1, 1, bias=False)

    def forward(self, x):
        y = self.body(x)
        shares = self.boxes(y).flatten(2).unflatten(1, (4, 16)).transpose(2, 1).softmax(1)
        return {"boxes": self.decode(shares).flatten(1, 2), "scores": self.scores(y).flatten(2).sigmoid()}
'''


def test_a_detector_is_calibrated_exported_built_and_reported(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "heads.py").write_text(HEADS)
    name = f"{tmp_path / 'heads.py'}:Heads"
    torch.manual_seed(0)
    model = build_model(ModelSpec(name, 1))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    sidecar = calibrate(tmp_path, tmp_path / "w.safetensors", photos, tmp_path / "d.qat", model=name)
    said = capsys.readouterr().out
    assert "w.safetensors, the network answers no classes\n" in said
    assert re.search(r"│ boxes +│ +16 │ +[\d.]+ dB │", said)
    agreement = sidecar.figures["agreement"]
    assert (sidecar.class_names, agreement["top1"], agreement["images"]) == ((), None, 16)
    checkpoint = load_checkpoint(tmp_path / "d.qat")
    with torch.no_grad():
        x = images_of(load_unlabelled(photos, 16, 0), "test")
        before, after = ({key: one.double() for key, one in of(x).items()} for of in (model.eval(), checkpoint.model))
    assert [one["tensor"] for one in agreement["outputs"]] == ["boxes", "scores"]
    for one in agreement["outputs"]:
        error = before[one["tensor"]] - after[one["tensor"]]
        ratio = 20 * math.log10(float(before[one["tensor"]].norm() / error.norm()))
        assert one["sqnr_db"] == pytest.approx(ratio, abs=1e-3)
    assert agreement["sqnr_db"] == min(one["sqnr_db"] for one in agreement["outputs"]) > 25

    exported = export_onnx(tmp_path / "d.qat")
    assert [output.name for output in exported.outputs] == ["boxes", "scores"]
    assert build.main(build.BuildOptions(model=tmp_path / "d.onnx")) == 0
    report.main(report.ReportOptions(runs=(tmp_path,), markdown=tmp_path / "d.md"))
    page = (tmp_path / "report.html").read_text()
    assert "Not known yet: INT8 against float on 16 images: " in page
    assert "0 classes" not in page
    assert re.search(r'<b class="big ">not measured</b><p>INT8 against float on 16 images: ', page)
    assert re.search(r"\| INT8 against float on 16 images, boxes \| SQNR [\d.]+ dB \|", (tmp_path / "d.md").read_text())


def test_labels_are_of_no_use_to_a_network_without_classes(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "heads.py").write_text(HEADS)
    name = f"{tmp_path / 'heads.py'}:Heads"
    save_file(build_model(ModelSpec(name, 1)).state_dict(), tmp_path / "w.safetensors")
    sidecar = calibrate(tmp_path, tmp_path / "w.safetensors", trained / "images.npz", tmp_path / "d.qat", model=name)
    assert list(sidecar.figures) == ["agreement"]
    assert sidecar.figures["agreement"]["top1"] is None
