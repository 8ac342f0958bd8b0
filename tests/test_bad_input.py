"""Bad input on the real command lines: one line that names it, exit code 2, and nothing under the final name."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import Run
from PIL import Image
from sidecars import edit

from qat.base.artifact import sidecar_path


@dataclass
class Workplace:
    """A folder of the user, and the files of a good chain to spoil."""

    folder: Path
    good: Path
    output: Path
    train: dict[str, Any] = field(default_factory=dict)

    def copy(self, name: str) -> Path:
        """A file of the chain with its sidecar, here."""
        for path in (self.good / name, sidecar_path(self.good / name)):
            shutil.copy(path, self.folder)
        return self.folder / name


@pytest.fixture
def place(trained: Path, chain: Path, tmp_path: Path) -> Workplace:
    output = tmp_path / "out" / "model"
    return Workplace(tmp_path, chain, output, tiny.options(trained, output=output))


def assert_refused(done: subprocess.CompletedProcess[str], output: Path, *parts: object) -> None:
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert str(part) in lines[0], lines[0]
    assert done.returncode == 2
    assert "Traceback" not in done.stdout
    assert not output.exists()
    assert not sidecar_path(output).exists()
    if output.parent.is_dir():
        assert [path.name for path in output.parent.iterdir()] == []


# --- python -m qat.train


def image_folder(root: Path) -> Path:
    """Two classes of a few images; good as it is."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def unknown_model(place: Workplace) -> tuple[object, ...]:
    place.train["model"] = "resnet51"
    return "unknown model 'resnet51'", "did you mean", "resnet50"


def unknown_function(place: Workplace) -> tuple[object, ...]:
    place.train["model"] = place.train["model"].replace(":net", ":nett")
    return "has no function 'nett'", "net, branching"


def untraceable_model(place: Workplace) -> tuple[object, ...]:
    place.train |= {"model": place.train["model"].replace(":net", ":branching"), "float_epochs": 0}
    return "the model cannot be traced", "net.py:", "if x.sum() > 0"


def unknown_data(place: Workplace) -> tuple[object, ...]:
    place.train["data"] = "digit"
    return "unknown data set 'digit'", "did you mean digits?"


def missing_weights(place: Workplace) -> tuple[object, ...]:
    place.train["weights"] = place.folder / "gone.safetensors"
    return place.folder / "gone.safetensors", "check the path"


def pickled_weights(place: Workplace) -> tuple[object, ...]:
    place.train["weights"] = place.folder / "weights.pth"
    torch.save({"epoch": 3, "state_dict": {}, "options": Fraction(1)}, place.train["weights"])
    return place.folder / "weights.pth", "(fractions.Fraction); unpickling", "torch.save(model.state_dict(), file)"


def weights_of_another_model(place: Workplace) -> tuple[object, ...]:
    weights = shutil.copy(place.good / "model.qat", place.folder / "other.safetensors")
    place.train |= {"weights": weights, "model": "resnet18"}
    return "do not fit the model", "keys missing"


def corrupt_image(place: Workplace) -> tuple[object, ...]:
    place.train["data"] = image_folder(place.folder / "images")
    path = place.train["data"] / "train" / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    return path, "is corrupt", "remove or replace it"


def empty_class(place: Workplace) -> tuple[object, ...]:
    place.train["data"] = image_folder(place.folder / "images")
    for path in (place.train["data"] / "train" / "dog").iterdir():
        path.unlink()
    return place.train["data"] / "train" / "dog", "has no image"


def class_missing_from_val(place: Workplace) -> tuple[object, ...]:
    place.train["data"] = image_folder(place.folder / "images")
    shutil.rmtree(place.train["data"] / "val" / "dog")
    return "'dog'", "are missing from", place.train["data"] / "val"


def truncated_images(place: Workplace) -> tuple[object, ...]:
    path = place.folder / "images.npz"
    path.write_bytes(Path(place.train["data"]).read_bytes()[:5000])
    place.train["data"] = path
    return path, "truncated"


def output_below_a_file(place: Workplace) -> tuple[object, ...]:
    (place.folder / "file").write_text("")
    place.output = place.train["output"] = place.folder / "file" / "model.qat"
    return f"cannot write {place.output}", "choose another path"


@pytest.mark.parametrize(
    "spoil",
    [
        unknown_model,
        unknown_function,
        untraceable_model,
        unknown_data,
        missing_weights,
        pickled_weights,
        weights_of_another_model,
        corrupt_image,
        empty_class,
        class_missing_from_val,
        truncated_images,
        output_below_a_file,
    ],
)
def test_train(place: Workplace, command: Run, spoil: Callable[[Workplace], tuple[object, ...]]) -> None:
    parts = spoil(place)
    assert_refused(command("qat.train", *tiny.flags(place.train)), place.output, *parts)


def test_the_image_folder_of_these_tests_is_good_until_it_is_spoiled(place: Workplace, command: Run) -> None:
    place.train |= {"data": image_folder(place.folder / "images"), "image_size": 16, "workers": 0}
    place.train |= {"float_epochs": 0, "qat_epochs": 0}
    done = command("qat.train", *tiny.flags(place.train))
    few = "warning: only 3 images to calibrate on: ranges may not fit other images; add images\n"
    assert (done.returncode, done.stderr) == (0, few)


# --- python -m export.onnx, deploy.build, deploy.report


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def missing_checkpoint(place: Workplace) -> tuple[object, ...]:
    return f"no file {place.folder / 'model.qat'}", "check the path"


def truncated_checkpoint(place: Workplace) -> tuple[object, ...]:
    cut(place.copy("model.qat"))
    return place.folder / "model.qat", "the file is truncated or is another one"


def truncated_checkpoint_sidecar(place: Workplace) -> tuple[object, ...]:
    cut(sidecar_path(place.copy("model.qat")))
    return place.folder / "model.qat.json", "is truncated", "make model.qat again"


def checkpoint_without_sidecar(place: Workplace) -> tuple[object, ...]:
    sidecar_path(place.copy("model.qat")).unlink()
    return place.folder / "model.qat", "has no sidecar model.qat.json"


def checkpoint_of_another_format(place: Workplace) -> tuple[object, ...]:
    rewrite(sidecar_path(place.copy("model.qat")), lambda content: content.update(format=2))
    return "has format version 2, but this program reads 1", "make model.qat again"


def checkpoint_of_a_model_that_is_gone(place: Workplace) -> tuple[object, ...]:
    path = place.copy("model.qat")
    edit(path, lambda content: content["details"]["model"].update(name="gone.py:net"), own=False)
    edit(path, lambda content: content["details"].update(code=None), own=False)
    return "no file gone.py", "check the path"


@pytest.mark.parametrize(
    "spoil",
    [
        missing_checkpoint,
        truncated_checkpoint,
        truncated_checkpoint_sidecar,
        checkpoint_without_sidecar,
        checkpoint_of_another_format,
        checkpoint_of_a_model_that_is_gone,
    ],
)
def test_export(place: Workplace, command: Run, spoil: Callable[[Workplace], tuple[object, ...]]) -> None:
    parts = spoil(place)
    given = (place.folder / "model.qat", "--output", place.output)
    assert_refused(command("export.onnx", *given), place.output, *parts)


def truncated_onnx(place: Workplace) -> tuple[object, ...]:
    cut(place.copy("model.onnx"))
    return place.folder / "model.onnx", "the file is truncated or is another one"


def truncated_onnx_sidecar(place: Workplace) -> tuple[object, ...]:
    cut(sidecar_path(place.copy("model.onnx")))
    return place.folder / "model.onnx.json", "is truncated", "make model.onnx again"


def checkpoint_for_an_onnx_file(place: Workplace) -> tuple[object, ...]:
    shutil.copy(place.copy("model.qat"), place.folder / "model.onnx")
    shutil.copy(place.folder / "model.qat.json", place.folder / "model.onnx.json")
    return "is a file of kind 'checkpoint', but must be of kind 'onnx'", "give the right file"


@pytest.mark.parametrize("spoil", [truncated_onnx, truncated_onnx_sidecar, checkpoint_for_an_onnx_file])
def test_build(place: Workplace, command: Run, spoil: Callable[[Workplace], tuple[object, ...]]) -> None:
    parts = spoil(place)
    given = (place.folder / "model.onnx", "--output", place.output, "--builder", "tensorrt-rtx")
    assert_refused(command("deploy.build", *given), place.output, *parts)


def test_report_of_a_truncated_engine(place: Workplace, command: Run) -> None:
    engine = place.copy("model.engine")
    cut(engine)
    done = command("deploy.report", engine, "--output", place.output)
    assert_refused(done, place.output, engine, "the file is truncated or is another one")


# --- a full disk, and --debug


@pytest.mark.parametrize(("save_seconds", "file", "after"), [(0, "state", False), (3600, "ranges.json", True)])
def test_a_full_disk_while_training(place: Workplace, command: Run, save_seconds: int, file: str, after: bool) -> None:
    """The disk takes no training state, and no file of ranges, which is written before the first state of QAT."""
    done = command("qat.train", *tiny.flags(place.train | {"save_seconds": save_seconds}), file_size=2000)
    assert_refused(done, place.output, "cannot write", f"{place.output}.{file}", "choose another folder")
    assert ("float epoch 2/2" in done.stdout) is after


def test_a_full_disk_while_exporting(place: Workplace, command: Run) -> None:
    checkpoint = place.copy("model.qat")
    done = command("export.onnx", checkpoint, "--output", place.output, file_size=2000)
    assert_refused(done, place.output, f"cannot write {place.output}", "choose another folder")


def test_a_full_disk_while_building(place: Workplace, command: Run) -> None:
    model = place.copy("model.onnx")
    given = (model, "--output", place.output, "--builder", "tensorrt-rtx", "--compute-capabilities", "8.9")
    done = command("deploy.build", *given, file_size=20_000)
    assert_refused(done, place.output, f"cannot write {place.output}", "choose another folder")


@pytest.mark.parametrize("module", ["qat.train", "export.onnx", "deploy.build", "deploy.report"])
def test_debug_shows_the_traceback(place: Workplace, command: Run, module: str) -> None:
    missing = place.folder / "gone"
    given = ("--data", missing) if module == "qat.train" else (missing,)
    quiet = command(module, *given, "--output", place.output)
    assert_refused(quiet, place.output, missing)
    loud = command(module, *given, "--output", place.output, "--debug")
    assert loud.returncode != 0
    assert "Traceback (most recent call last)" in loud.stderr
    assert loud.stderr.splitlines()[-1].startswith("qat.base.errors.UserError: ")
