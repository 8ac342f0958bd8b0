"""Sidecars that strangers made to run code, to read elsewhere, to reach the network or to unpickle: all are refused."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import Run
from sidecars import edit

from deploy.dynamic_ranges import RangeTable
from deploy.tuned_engine import exported_to_tune
from export import export_onnx
from qat import ModelSpec, Preprocessing, build_model, calibrate_ranges, prepare, save_checkpoint
from qat.base.artifact import sidecar_path
from qat.base.errors import UserError
from qat.base.trust import NotTrustedError
from qat.checkpoint import load_checkpoint, training_data
from qat.costs import measure_sensitivity
from qat.placement_view import view_placement
from qat.pretrained.named_models import loads_something

EVIL = (
    """
import pathlib
pathlib.Path(__file__).with_name("ran").write_text("")
"""
    + tiny.NET
)
PREPROCESSING = Preprocessing(32, 32, (0.5,) * 3, (0.25,) * 3, 32)


@pytest.fixture(scope="module")
def of_a_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model of torchvision, which needs no code of its own."""
    path = tmp_path_factory.mktemp("library") / "model.qat"
    spec = ModelSpec("squeezenet1_1", 3)
    prepared = prepare(build_model(spec), input_shape=(3, 32, 32))
    calibrate_ranges(prepared, [torch.randn(2, 3, 32, 32)], "max")
    save_checkpoint(path, prepared, spec, PREPROCESSING, ("a", "b", "c"))
    return path


@pytest.fixture
def gift(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint of a stranger, whose model is code beside it."""
    (tmp_path / "gift.py").write_text(EVIL)
    for name in ("model.qat", "model.qat.json"):
        shutil.copy(trained / name, tmp_path / name)
    name, code = f"{tmp_path / 'gift.py'}:net", {"file": str(tmp_path / "gift.py"), "sha256": "0" * 64}
    edit(tmp_path / "model.qat", lambda content: content["details"]["model"].update(name=name), own=False)
    edit(tmp_path / "model.qat", lambda content: content["details"].update(code=code), own=False)
    return tmp_path / "model.qat"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where somebody tried to connect to."""
    asked: list[Any] = []

    def refuse(*given: Any, **named: Any) -> Any:
        asked.append(given)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


USES: dict[str, Callable[[Path], object]] = {
    "load": load_checkpoint,
    "export": export_onnx,
    "placement": lambda path: view_placement(str(path)),
    "sensitivity": lambda path: measure_sensitivity(
        path,
        images=8,
        target_drop=1,
        show=1,
        output=None,
        compute=None,  # type: ignore[arg-type]
    ),
    "ranges": RangeTable.read,
    "tune": lambda path: exported_to_tune(path, path.with_suffix(".onnx"), trust_code=False),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_code_that_a_sidecar_names_is_not_run(gift: Path, use: Callable[[Path], object]) -> None:
    with pytest.raises(
        NotTrustedError, match=r"wants to run net of .*gift\.py \(SHA-256 [0-9a-f]{64}\): .*--trust-code"
    ):
        use(gift)
    assert not (gift.parent / "ran").exists()
    assert not gift.with_suffix(".onnx").exists()


def test_the_command_line_refuses_it_in_one_line_and_runs_it_when_told(gift: Path, command: Run) -> None:
    done = command("export.onnx", gift)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"wants to run net of {gift.parent / 'gift.py'}" in done.stderr
    assert not (gift.parent / "ran").exists()
    done = command("export.onnx", gift, "--trust-code", environment={"INT8_QAT_UNTRUSTED": "1"})
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "refused, because INT8_QAT_UNTRUSTED is set" in done.stderr
    assert not (gift.parent / "ran").exists()
    done = command("export.onnx", gift, "--trust-code", "--parity-images", 4)
    assert done.returncode == 0, done.stderr
    assert (gift.parent / "ran").exists()


def test_the_users_own_run_is_exported_without_a_question(trained: Path, tmp_path: Path, command: Run) -> None:
    done = command("export.onnx", trained / "model.qat", "--output", tmp_path / "m.onnx", "--parity-images", 4)
    assert (done.returncode, done.stderr) == (0, "")


def test_code_of_the_same_name_where_the_command_runs_is_not_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sidecar is the user's own, the file in a stranger's folder is not what the user gave."""
    for name in ("model.qat", "model.qat.json"):
        shutil.copy(trained / name, tmp_path / name)
    edit(tmp_path / "model.qat", lambda content: content["details"]["model"].update(name="net.py:net"))
    edit(tmp_path / "model.qat", lambda content: content["details"]["code"].update(file="/gone/net.py"))
    (tmp_path / "net.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotTrustedError, match=r"wants to run net of .*net\.py"):
        load_checkpoint(tmp_path / "model.qat")
    assert not (tmp_path / "ran").exists()


# --- images


@pytest.fixture
def reads_elsewhere(of_a_library: Path, trained: Path, tmp_path: Path) -> Path:
    """A stranger's checkpoint that names images of the user, and a data set that is downloaded."""
    for name in ("model.qat", "model.qat.json"):
        shutil.copy(of_a_library.with_name(name), tmp_path / name)
    data = {"source": str(trained / "images.npz"), "root": str(tmp_path), "image_size": 32, "labelled": True}
    details = {"data": data, "seed": 0, "calibration_images": 8, "splits": {"test": 60}}
    edit(tmp_path / "model.qat", lambda content: content["details"].update(details), own=False)
    return tmp_path / "model.qat"


def test_images_that_a_sidecar_names_are_not_read(reads_elsewhere: Path, trained: Path, command: Run) -> None:
    done = command("export.onnx", reads_elsewhere)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"wants to read the images of {trained / 'images.npz'}" in done.stderr
    assert not reads_elsewhere.with_suffix(".reference.npz").exists()
    with pytest.raises(NotTrustedError):
        training_data(load_checkpoint(reads_elsewhere))
    done = command("export.onnx", reads_elsewhere, environment={"INT8_QAT_UNTRUSTED": "1"})
    assert done.returncode == 0, done.stderr
    assert "comparing on random ones" in done.stderr
    with np.load(trained / "images.npz") as own, np.load(reads_elsewhere.with_suffix(".reference.npz")) as found:
        assert not any((own["test_images"] == image[:16, :16]).all((1, 2, 3)).any() for image in found["images"])
    assert len(training_data(load_checkpoint(reads_elsewhere, trust_code=True)).test) == 60


def test_a_data_set_is_not_downloaded(reads_elsewhere: Path, no_network: list[Any]) -> None:
    edit(
        reads_elsewhere,
        lambda content: content["details"]["data"].update(source="torchvision:CIFAR10"),
        own=False,
    )
    with pytest.raises(NotTrustedError, match=r"wants to read torchvision:CIFAR10 in .*, or download it"):
        training_data(load_checkpoint(reads_elsewhere))
    assert no_network == []


# --- arguments that load, and names that unpickle

LOADING: list[tuple[str, dict[str, Any]]] = [
    ("resnet18", {"weights": "IMAGENET1K_V1"}),
    ("resnet18", {"weights": "DEFAULT"}),
    ("fcn_resnet50", {"weights_backbone": "IMAGENET1K_V1"}),
    ("resnet18", {"progress": True}),  # harmless, but nothing that only shapes the network
    ("resnet18", {"width_per_group": 10**9}),
    ("resnet18", {"width_per_group": [[[[[1]]]]]}),
    ("timm/resnet18", {"checkpoint_path": "/tmp/evil.pth"}),
    ("timm/resnet18", {"pretrained": True}),
    ("timm/resnet18", {"pretrained_cfg": {"url": "http://127.0.0.1:9/x.pth"}}),
    ("timm/resnet18", {"pretrained_cfg_overlay": {"file": "/tmp/evil.pth"}}),
    ("timm/resnet18", {"cache_dir": "/tmp"}),
    ("timm/resnet18", {"global_pool": "../../x"}),
    ("timm/hf_hub:somebody/model", {}),
    ("ultralytics/best.pt", {}),
    ("ultralytics/https://127.0.0.1:9/best.pt", {}),
    ("ultralytics/../somewhere/yolo11n.yaml", {}),
    ("ultralytics/yolo11n.yaml", {"model": "x"}),
]


@pytest.mark.parametrize(("name", "kwargs"), LOADING)
def test_arguments_that_load_and_names_that_unpickle_are_refused(
    of_a_library: Path, tmp_path: Path, no_network: list[Any], name: str, kwargs: dict[str, Any]
) -> None:
    for file in ("model.qat", "model.qat.json"):
        shutil.copy(of_a_library.with_name(file), tmp_path / file)
    model = {"name": name, "num_classes": 3, "kwargs": kwargs}
    edit(tmp_path / "model.qat", lambda content: content["details"].update(model=model), own=False)
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path / "model.qat")
    assert isinstance(caught.value, NotTrustedError)
    assert "wants to " in str(caught.value)
    assert no_network == []


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {}),
        (
            "resnet18",
            {"zero_init_residual": True, "weights": None, "replace_stride_with_dilation": [False, True, False]},
        ),
        ("timm/vit_tiny_patch16_224", {"img_size": 32, "in_chans": 1, "pretrained": False}),
        ("timm/resnet18.a1_in1k", {"features_only": True, "out_indices": [1, 2]}),
        ("ultralytics/yolo11n-seg.yaml", {"decoded": True}),
    ],
)
def test_models_of_libraries_that_load_nothing_are_not_asked_about(name: str, kwargs: dict[str, Any]) -> None:
    assert loads_something(name, kwargs) == ""


def test_a_yaml_file_in_the_folder_is_not_the_librarys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert loads_something("ultralytics/yolo11n.yaml", {}) == ""
    (tmp_path / "yolo11n.yaml").write_text("activation: __import__('os').abort()")
    assert "can run code" in loads_something("ultralytics/yolo11n.yaml", {})


def test_a_strangers_checkpoint_of_a_library_is_exported_as_before(of_a_library: Path, tmp_path: Path) -> None:
    for file in ("model.qat", "model.qat.json"):
        shutil.copy(of_a_library.with_name(file), tmp_path / file)
    edit(tmp_path / "model.qat", lambda content: content["made_by"].update(command=["by somebody"]), own=False)
    export_onnx(tmp_path / "model.qat")
    content = json.loads(sidecar_path(tmp_path / "model.onnx").read_text())
    assert content["figures"]["parity"]["source"] == "random images"
