"""Each entry of each file of ours, left out or of another value, through what reads it: right, or one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_entries import changed_entries

from deploy.difference_search import _built_with
from deploy.reference import read_reference
from deploy.report_page.artifacts import gather
from deploy.report_page.render import render
from deploy.triton_repository import write_repository
from qat.base.artifact import read_sidecar, sidecar_path
from qat.base.errors import UserError
from qat.base.ranges_file import ranges_path, read_distributions
from qat.base.trust import SEAL, remember, seal_of
from qat.checkpoint import load_checkpoint, save_state
from qat.placement_view import view_placement
from qat.rules.float_steps import read_float_steps
from qat.rules.kernel_profile import KernelProfile, given_profile
from qat.rules.tuned import FrontierPoint, Trial, TunedPlacement, tuned_names
from qat.training.run_state import read_progress, state_path
from qat.training.trainer import FitState

Use = Callable[[Path], object]
NAMES = ("model.qat", "model.onnx", "model.engine")
each_change = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])


@pytest.fixture
def family(chain: Path, trained: Path, tmp_path: Path) -> Path:
    """A copy of the chain, with what calibration saw."""
    for name in NAMES:
        shutil.copy(chain / name, tmp_path)
        shutil.copy(sidecar_path(chain / name), tmp_path)
    shutil.copy(chain / "model.reference.npz", tmp_path)
    shutil.copy(ranges_path(trained / "model.qat"), tmp_path)
    return tmp_path


def faults(content: Any, write: Callable[[Any], object], use: Callable[[], object], *, every: bool) -> list[str]:
    """What was neither right nor one line."""
    found, count, refused = [], 0, 0
    for what, changed in changed_entries(content, every=every):
        count += 1
        write(changed)
        try:
            use()
        except UserError as error:
            refused += 1
            if "\n" in str(error):
                found.append(f"{what}: several lines")
        except Exception as error:
            found.append(f"{what}: {type(error).__name__}: {error}")
    assert count > 10
    assert refused > count / 10
    return found


def write_sealed(path: Path) -> Callable[[Any], None]:
    """Writes a sidecar as if this user had written it, so that it is what it says that is judged."""

    def write(content: dict[str, Any]) -> None:
        sealed = content | {SEAL: seal_of(content)}
        remember(sealed[SEAL])
        path.write_text(json.dumps(sealed))

    return write


def report(path: Path) -> object:
    return render([gather(path.with_name("model.engine"))])


def evaluated_with(path: Path) -> object:
    return read_reference(path, read_sidecar(path, "onnx"))


def built_again(path: Path) -> object:
    return _built_with(read_sidecar(path, "engine"))


def served(path: Path) -> object:
    return write_repository(path, path.with_name("repository"), name="model", overwrite=True)


USES: list[tuple[str, Use]] = [
    *((name, report) for name in NAMES),
    ("model.qat", load_checkpoint),
    ("model.qat", lambda path: view_placement(str(path))),
    ("model.onnx", evaluated_with),
    ("model.engine", built_again),
    ("model.engine", served),
]


@each_change
@pytest.mark.parametrize(("name", "use"), USES)
def test_sidecars(family: Path, name: str, use: Use, every: bool, capsys: pytest.CaptureFixture[str]) -> None:
    path = family / name
    content = json.loads(sidecar_path(path).read_text())
    assert faults(content, write_sealed(sidecar_path(path)), lambda: use(path), every=every) == []


# --- results of commands


def latency(name: str, batch: int, median: float) -> dict[str, Any]:
    spread = {"low": 0.9 * median, "high": 1.1 * median, "p99": 1.2 * median}
    return {"name": name, "batch": batch, "runs": 9, "median": median, **spread, "images_per_second": batch / median}


def results(family: Path) -> dict[str, dict[str, Any]]:
    """One of each kind about the family."""
    engine, onnx, checkpoint = (
        json.loads(sidecar_path(family / name).read_text()) for name in ("model.engine", "model.onnx", "model.qat")
    )
    made_by = engine["made_by"]
    label = checkpoint["details"]["network"][1]["label"]
    scores = {"figures": {"mAP50-95": 50.0, "mAP50": 60.0}, "by_class": {"red": 50.0, "blue": None}}
    return {
        "evaluation": {
            "made_by": made_by,
            "engine": engine["sha256"],
            "images": 60,
            "source": "the test split",
            "top1": {"engine": 91.0, "PyTorch": None},
            "agreement": {"engine, PyTorch": 98.0},
            "outputs": {"engine, PyTorch, logits": {"sqnr_db": 30.0, "equal_percent": None}},
            "scores": {"engine": scores, "PyTorch in float": scores},
            "first_difference": {"tensor": "t", "node": "conv1", "sqnr_db": 7.0},
            "layers": [{"tensor": "t", "node": "conv1", "sqnr_db": 7.0}],
        },
        "benchmark": {
            "made_by": made_by,
            "date": "2026-11-30",
            "device": {"name": "A GPU", "driver": "1"},
            "tensorrt": "8.6.0",
            "models": {"INT8 (QAT)": {"file": "model.onnx", "sha256": onnx["sha256"]}},
            "builds": [],
            "latency": [latency("FP16", 32, 2.0), latency("INT8 (QAT)", 32, 1.0)],
            "slower_in_int8": [{"batch": 32, "node": "conv1", "int8": 0.2, "fp16": 0.1}],
        },
        "audit": {
            "made_by": made_by,
            "engine": engine["sha256"],
            "peaks": {"bytes_per_s": 1e12, "int8_per_s": 1e14, "fp16_per_s": 5e13},
            "batch": 8,
            "runs": 50,
            "totals": {"INT8": {"layers": 2, "milliseconds": 0.1}},
            "layers": [{**one, "milliseconds": 0.1} for one in engine["details"]["layers"]],
            "findings": engine["details"]["findings"],
            "kernels": [{"name": "k", "microseconds": 1.0}],
        },
        "sensitivity": {
            "made_by": made_by,
            "checkpoint": checkpoint["sha256"],
            "images": 12,
            "quantized": {"loss": 0.5, "top1": 90.0},
            "operations": [{"op": "conv1", "label": label, "loss_without": 0.4, "sqnr_db": 20.0}],
            "target_drop": 0.5,
        },
    }


@each_change
@pytest.mark.parametrize("kind", ["evaluation", "benchmark", "audit", "sensitivity"])
def test_results(family: Path, kind: str, every: bool, capsys: pytest.CaptureFixture[str]) -> None:
    path = family / f"{kind}.json"
    content = results(family)[kind]

    def use() -> object:
        return render([gather(family / "model.engine", [path])])

    path.write_text(json.dumps(content))
    use()  # as it is, it is taken
    assert faults(content, lambda changed: path.write_text(json.dumps(changed)), use, every=every) == []


def test_a_damaged_result_beside_the_engine_is_said_and_left_out(family: Path) -> None:
    content = results(family)["benchmark"]
    content["latency"][0]["median"] = 0
    (family / "benchmark.json").write_text(json.dumps(content))
    (line,) = gather(family / "model.engine").left_out
    assert "is not what deploy.benchmark writes (latency[0].median: Expected `float` > " in line


# --- other files

TUNED = TunedPlacement(
    keep_float=("a",),
    layers=("a", "b"),
    gpu="A GPU",
    tensorrt="8.6.0",
    batch=32,
    int8_ms=1.0,
    float_ms=2.0,
    tuned_ms=0.9,
    trials=(Trial("a in float", 0.9, True),),
    frontier=(FrontierPoint(0.5, ("a",), 0.9),),
)
COSTS = {
    "float": {"top1": 90.0, "loss": 0.1},
    "quantized": {"top1": 88.0},
    "keep_float": [{"label": "a", "top1": 89.0}],
}


def profile() -> Any:
    content = asdict(KernelProfile.shipped())
    return {**content, "kinds": list(content["kinds"][:3])}


OTHERS: Mapping[str, tuple[Callable[[], Any], Use]] = {
    "placement": (lambda: asdict(TUNED), tuned_names),
    "profile": (profile, given_profile),
    "costs": (lambda: COSTS, read_float_steps),
}


@pytest.mark.parametrize(
    ("kind", "every"),
    [("placement", True), ("costs", True), ("profile", False), pytest.param("profile", True, marks=pytest.mark.slow)],
)
def test_other_files(kind: str, every: bool, tmp_path: Path) -> None:
    path, (make, use) = tmp_path / "file.json", OTHERS[kind]
    content = json.loads(json.dumps(make()))
    path.write_text(json.dumps(content))
    use(path)
    assert faults(content, lambda changed: path.write_text(json.dumps(changed)), lambda: use(path), every=every) == []


@each_change
def test_files_of_ranges(family: Path, every: bool) -> None:
    path = ranges_path(family / "model.qat")
    content = json.loads(path.read_text())
    digest = content["checkpoint"]

    def use() -> object:
        return read_distributions(path, digest)

    use()
    assert faults(content, lambda changed: path.write_text(json.dumps(changed)), use, every=every) == []


@each_change
def test_states(tmp_path: Path, every: bool) -> None:
    output = tmp_path / "model.qat"
    epoch = {"train_loss": 1.0, "validation_top1": 50.0, "validation_loss": 1.0, "learning_rate": 0.1}
    test = {"test_top1": 50.0, "test_loss": 1.0, "test_images": 60}
    content = {
        "phase": "qat",
        "figures": {"float": test, "ptq": test, "float_history": [epoch]},
        "fit": FitState(epoch=1, history=[epoch]).numbers(),
        "options": {"seed": 0, "model": "resnet18"},
    }
    tensors = {"model.w": torch.zeros(2)}

    def write(changed: Any) -> None:
        save_state(state_path(output), tensors, changed)

    write(content)
    found = read_progress(output, content["options"])
    assert (found.phase, found.fit.epoch, found.fit.history) == ("qat", 1, [epoch])
    assert faults(content, write, lambda: read_progress(output, content["options"]), every=every) == []
    save_state(state_path(output), {"elsewhere.w": torch.zeros(2)}, content)
    with pytest.raises(UserError, match=r"'elsewhere\.w', which no run saves"):
        read_progress(output, content["options"])
