"""A run from images to checkpoint: what it writes, how it resumes bit by bit, and which split is used for what."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import ONE_THREAD, ROOT, Run, one_thread
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.base.artifact import read_sidecar, sha256_of
from qat.base.errors import UserError
from qat.base.ranges_file import ranges_path, read_distributions
from qat.checkpoint import load_checkpoint, load_state
from qat.compute.device import Compute
from qat.data.batches import ImageSet
from qat.data.pixels import ArrayPixels
from qat.data.preprocessing import Preprocessing
from qat.data.splits import Data
from qat.evaluate import evaluate
from qat.models import ModelSpec, build_model
from qat.options import TrainOptions
from qat.train import main as run
from qat.training.interrupts import Interrupted
from qat.training.recipe import Recipe
from qat.training.trainer import Fit, FitState

CPU = Compute(torch.device("cpu"))
KILL, INTERRUPT = signal.SIGKILL, signal.SIGINT
MADE = ["model.qat", "model.qat.json", "model.ranges.json"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "model.qat"


def train(folder: Path, output: Path, **changes: Any) -> dict[str, Tensor]:
    """The tensors of the checkpoint that a run in this process wrote."""
    run(TrainOptions(**tiny.options(folder, output=output, **changes)))
    return load_file(output)


def arguments(folder: Path, output: Path, **changes: Any) -> list[str]:
    return tiny.flags(tiny.options(folder, output=output, **changes))


def stop(in_pass: int, by: int) -> dict[str, str]:
    """Environment in which the tiny network sends itself a signal in the middle of a training step."""
    return {"STOP_IN_PASS": str(in_pass), "STOP_BY": str(int(by))}


def state_of(output: Path) -> tuple[str, int, int]:
    """Phase, epoch and step that the saved state stands at."""
    details = load_state(output.with_name("model.qat.state"))[1]
    return details["phase"], details["fit"]["epoch"], details["fit"]["step"]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, line
    assert done.returncode == 2
    assert "Traceback" not in done.stdout


# --- the run as a whole


def test_a_run_learns_and_writes_a_checkpoint_with_its_figures(trained: Path) -> None:
    sidecar = read_sidecar(trained / "model.qat", "checkpoint")
    for name in ("float", "ptq", "qat"):
        figures = sidecar.figures[name]
        assert figures["test_images"] == 60
        assert figures["test_top1"] > 60  # chance is 33
        assert 0 < figures["test_loss"] < math.log(3)
    for name in ("float_history", "qat_history"):
        assert [sorted(epoch) for epoch in sidecar.figures[name]] == [
            ["learning_rate", "train_loss", "validation_loss", "validation_top1"]
        ] * 2
    details = sidecar.details
    assert details["splits"] == {"train": 81, "calibration": 27, "validation": 12, "test": 60}
    assert details["seed"] == sidecar.made_by["seed"] == 0
    assert details["data"]["source"] == str(trained / "images.npz")
    quantized = [decision["label"] for decision in details["placement"]["decisions"] if decision["quantized"]]
    assert quantized == ["conv1", "conv2", "add", "adaptive_avg_pool2d", "fc"]
    assert all(value > 0 for value in details["amax"].values())
    assert details["recipes"]["qat"]["lr"] == 1e-3
    assert sidecar.class_names == tiny.CLASSES
    assert sidecar.inputs[0].shape == (-1, 3, 16, 16)


def test_nothing_but_the_checkpoint_its_sidecar_and_the_file_of_ranges_stays(trained: Path) -> None:
    made = {path.name for path in trained.iterdir()} - {"net.py", "images.npz", "__pycache__"}
    assert made == {"model.qat", "model.qat.json", "model.ranges.json"}


def test_what_calibration_saw_is_written(trained: Path) -> None:
    details = read_sidecar(trained / "model.qat", "checkpoint").details
    found = read_distributions(trained / "model.ranges.json", sha256_of(trained / "model.qat"))
    assert (found.calibrator, found.percentile, found.images) == ("mse", 99.99, 27)
    assert {one.quantizer: one.amax for one in found.activations} == pytest.approx(details["amax"], rel=1e-4)
    assert sum(found.activations[0].counts) == 27 * 3 * 16 * 16
    assert [weight.label for weight in found.weights] == ["conv1", "conv2", "fc"]
    assert [len(weight.largest) for weight in found.weights] == [8, 8, 3]


def test_the_same_seed_gives_the_same_weights_and_another_one_others(trained: Path, output: Path) -> None:
    assert_same(train(trained, output), load_file(trained / "model.qat"))
    other = train(trained, output, seed=1)
    expected = load_file(trained / "model.qat")
    assert not torch.equal(other["conv1.weight"], expected["conv1.weight"])
    assert not torch.equal(other["fc.weight"], expected["fc.weight"])


def test_pretrained_weights_without_float_training_are_quantized_as_they_are(trained: Path, output: Path) -> None:
    torch.manual_seed(5)
    model = build_model(ModelSpec(f"{trained / 'net.py'}:net", 3))
    weights = output.parent.parent / "w.safetensors"
    save_file(model.state_dict(), weights)
    found = train(trained, output, weights=str(weights), float_epochs=0, qat_epochs=0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor)
    assert read_sidecar(output, "checkpoint").figures["float_history"] == []


def test_an_empty_run_folder_is_made(trained: Path, output: Path) -> None:
    assert not output.parent.exists()
    train(trained, output, float_epochs=0, qat_epochs=0)
    assert sorted(path.name for path in output.parent.iterdir()) == MADE


def test_a_file_of_ranges_that_cannot_be_written_is_told_before_the_work(trained: Path, output: Path) -> None:
    ranges_path(output).mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*model\.ranges\.json: that is a folder"):
        train(trained, output)
    assert [path.name for path in output.parent.iterdir()] == ["model.ranges.json"]


# --- stopping and resuming


@pytest.mark.parametrize(
    ("in_pass", "state"),
    [
        (tiny.STEPS + 4, ("float", 1, 3)),
        (tiny.FLOAT_STEPS + 2, ("qat", 0, 1)),
    ],
)
def test_a_killed_run_resumes_to_the_same_weights(
    trained: Path, output: Path, command: Run, in_pass: int, state: tuple[str, int, int]
) -> None:
    given = arguments(trained, output, save_seconds=0)
    assert command("qat.train", *given, environment=stop(in_pass, KILL)).returncode == -KILL
    assert state_of(output) == state
    assert not output.exists()
    done = command("qat.train", *given, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"resuming {state[0]} training at epoch {state[1] + 1}, step {state[2]}" in done.stdout
    assert_same(load_file(output), load_file(trained / "model.qat"))
    then, now = (read_sidecar(path, "checkpoint") for path in (trained / "model.qat", output))
    assert now.figures == then.figures
    assert sorted(path.name for path in output.parent.iterdir()) == MADE
    assert ranges_path(output).read_bytes() == (trained / "model.ranges.json").read_bytes()


@pytest.mark.parametrize("gone", [False, True])
def test_a_resumed_run_completes_the_file_of_ranges_that_it_finds(
    trained: Path, output: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    options, path = {"float_epochs": 0, "qat_epochs": 1}, ranges_path(output)
    tiny.stop_in_steps(monkeypatch, (3).__eq__)
    with pytest.raises(tiny.Stopped):
        train(trained, output, **options)
    with pytest.raises(UserError, match="belongs to a run that has not ended"):
        read_distributions(path, "")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"images": 99}))
    if gone:
        path.unlink()
    train(trained, output, **options, resume=True)
    if gone:
        assert not path.exists()
    else:
        assert read_distributions(path, sha256_of(output)).images == 99  # it was not written anew


def test_a_run_killed_between_two_saves_repeats_the_steps_since_the_last(
    trained: Path, output: Path, command: Run
) -> None:
    given = arguments(trained, output, save_seconds=3600)
    command("qat.train", *given, environment=stop(tiny.FLOAT_STEPS + tiny.STEPS, KILL))
    assert state_of(output) == ("qat", 0, 0)  # saved when the phase begins, whatever the clock says
    assert command("qat.train", *given, "--resume").returncode == 0
    assert_same(load_file(output), load_file(trained / "model.qat"))


def test_a_run_stopped_every_five_steps_ends_with_the_same_weights(
    trained: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the sixth step is not finished, and not saved
    tiny.stop_in_steps(monkeypatch, lambda step: step % 6 == 0)
    stops = 0
    while not output.exists():
        try:
            train(trained, output, save_seconds=0, resume=stops > 0)
        except tiny.Stopped:
            stops += 1
    assert stops == (2 * tiny.FLOAT_STEPS - 1) // 5
    assert_same(load_file(output), load_file(trained / "model.qat"))


def test_ctrl_c_saves_and_prints_a_command_that_ends_with_the_same_weights(
    trained: Path, output: Path, command: Run
) -> None:
    given = arguments(trained, output)  # saves every minute: what is saved here is saved because of Ctrl-C
    done = command("qat.train", *given, environment=stop(5, INTERRUPT))
    assert done.returncode == 130
    (line,) = done.stderr.splitlines()
    assert line.startswith("interrupted: saved; continue with: python -m qat.train ")
    assert state_of(output) == ("float", 0, 5)  # the step that was under way is done
    words = shlex.split(line.partition("continue with: ")[2])
    resumed = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=ROOT,
        env={**os.environ, **ONE_THREAD},
        capture_output=True,
        text=True,
        check=True,
    )
    assert resumed.stderr == ""
    assert_same(load_file(output), load_file(trained / "model.qat"))


def test_a_second_ctrl_c_while_resuming_prints_a_command_with_one_resume(
    trained: Path, output: Path, command: Run
) -> None:
    given = arguments(trained, output)
    command("qat.train", *given, environment=stop(5, INTERRUPT))
    done = command("qat.train", *given, "--resume", environment=stop(2, signal.SIGTERM))
    assert done.returncode == 130
    assert done.stderr.count("--resume") == 1
    assert state_of(output) == ("float", 0, 7)


def test_resuming_with_other_options_names_them_and_keeps_the_state(trained: Path, output: Path, command: Run) -> None:
    command("qat.train", *arguments(trained, output), environment=stop(5, INTERRUPT))
    state = output.with_name("model.qat.state")
    before = sha256_of(state)
    done = command("qat.train", *arguments(trained, output, float_lr=0.5, seed=7), "--resume")
    assert_one_line(done, "float_lr was 0.02, now 0.5", "seed was 0, now 7")
    assert "batch_size" not in done.stderr
    assert sha256_of(state) == before


def test_nothing_to_resume(trained: Path, output: Path, command: Run) -> None:
    done = command("qat.train", *arguments(trained, output), "--resume")
    assert_one_line(done, f"nothing to resume: there is no {output}.state", "start without --resume")


@pytest.mark.parametrize("keep", [0, 7, 1000])
def test_a_truncated_state_is_refused(trained: Path, output: Path, monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    for name, value in stop(1, INTERRUPT).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Interrupted):
        train(trained, output)
    state = output.with_name("model.qat.state")
    state.write_bytes(state.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.qat\.state is not a safetensors file, or is truncated"):
        train(trained, output, resume=True)


# --- what stays in float on request


def test_what_is_kept_in_float_is_said_before_training_and_recorded(
    trained: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(trained, output, keep_float=("conv2",), float_epochs=0, qat_epochs=0)
    said = capsys.readouterr().out
    assert "placement: INT8: 2 of 3 convolutions and linear layers, 1 of 1 additions" in said
    assert "; kept in float on request: --keep-float conv2\n  float: conv2: kept in float\n" in said
    placement = read_sidecar(output, "checkpoint").details["placement"]
    assert placement["keep_float"] == ["conv2"]
    assert [d["label"] for d in placement["decisions"] if d["rule"] == "kept_float"] == ["conv2"]
    loaded = load_checkpoint(output).model
    assert not hasattr(loaded.get_submodule("conv2"), "weight_quantizer")
    assert hasattr(loaded.get_submodule("conv1"), "weight_quantizer")


def test_a_pattern_that_matches_nothing_is_refused_before_training(trained: Path, output: Path, command: Run) -> None:
    done = command("qat.train", *arguments(trained, output), "--keep-float", "conv2", "convv*")
    assert_one_line(done, "--keep-float convv* matches none of the", "conv")
    assert "epoch" not in done.stdout
    assert list(output.parent.iterdir()) == []


def test_a_run_resumes_with_the_same_patterns_and_with_no_others(trained: Path, output: Path, command: Run) -> None:
    given = [*arguments(trained, output), "--keep-float", "conv2", "fc"]
    whole = train(trained, output.with_name("whole.qat"), keep_float=("conv2", "fc"))
    command("qat.train", *given, environment=stop(tiny.FLOAT_STEPS + 2, INTERRUPT))
    for others in ([], ["--keep-float", "conv2"]):
        done = command("qat.train", *arguments(trained, output), *others, "--resume")
        assert_one_line(done, f"keep_float was ['conv2', 'fc'], now {others[1:]}")
    done = command("qat.train", *given, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert_same(load_file(output), whole)


# --- what can go wrong in training


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        ("self.conv1(x)", r"a tensor of shape \[1, 8, 8, 8\]"),
        ("{'out': super().forward(x)}", "something other than one tensor"),
        ("super().forward(x)[:, 1:]", r"a tensor of shape \[1, 2\]"),
    ],
)
def test_a_model_that_makes_no_logits_is_refused_before_training(
    trained: Path, output: Path, capsys: pytest.CaptureFixture[str], forward: str, found: str
) -> None:
    net = output.parent.parent / "other.py"
    net.write_text(f"{tiny.NET}\nclass Other(Net):\n    def forward(self, x):\n        return {forward}\n")
    with pytest.raises(
        UserError, match=rf"for one image, model .*:Other returns {found}; it must return logits of shape \[1, 3\]"
    ):
        train(trained, output, model=f"{net}:Other")
    assert "epoch" not in capsys.readouterr().out


def test_images_that_the_model_does_not_take_are_refused_before_training(trained: Path, output: Path) -> None:
    net = output.parent.parent / "other.py"
    net.write_text(
        "from torch import nn\ndef net(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(9, 3))"
    )
    with pytest.raises(UserError, match=r"does not take one image of 3x16x16: .*RuntimeError: .*another --image-size"):
        train(trained, output, model=f"{net}:net")


def test_a_loss_that_becomes_nan_is_one_line_and_leaves_the_state_before_it(
    trained: Path, output: Path, command: Run
) -> None:
    done = command("qat.train", *arguments(trained, output, float_lr=1e30, save_seconds=0))
    assert_one_line(done, "the loss became nan in epoch 1, at step 2 of 9", "start again with a lower one")
    assert [path.name for path in output.parent.iterdir()] == ["model.qat.state"]
    assert state_of(output) == ("float", 0, 1)
    tensors = load_state(output.with_name("model.qat.state"))[0]
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_weights_that_became_nan_in_the_last_step_of_an_epoch_are_noticed(trained: Path, output: Path) -> None:
    # One step: its own loss is that of the weights before it.
    with pytest.raises(UserError, match="loss in evaluation is nan"):
        train(trained, output, float_lr=1e30, float_epochs=1, batch_size=81, save_seconds=0)
    assert list(output.parent.iterdir()) == []


def test_weights_that_are_nan_from_the_start_are_noticed(trained: Path, output: Path) -> None:
    weights = output.parent.parent / "nan.safetensors"
    state = build_model(ModelSpec(f"{trained / 'net.py'}:net", 3)).state_dict()
    save_file(state | {"fc.bias": torch.full((3,), math.nan)}, weights)
    with pytest.raises(UserError, match="loss in evaluation is nan"):
        train(trained, output, weights=str(weights), float_epochs=0, qat_epochs=0)
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("percentile", [0.0, 100.5, math.nan])
def test_a_percentile_out_of_range_is_refused_before_training(
    trained: Path, output: Path, capsys: pytest.CaptureFixture[str], percentile: float
) -> None:
    with pytest.raises(UserError, match=f"--percentile {percentile} is out of range"):
        train(trained, output, percentile=percentile)
    assert "epoch" not in capsys.readouterr().out


def test_a_device_that_is_not_there(trained: Path, output: Path) -> None:
    with pytest.raises(UserError, match=r"device 'nonsense' cannot be used .*--device cpu"):
        train(trained, output, device="nonsense")


# --- the recipe


def recipe(**changes: Any) -> Recipe:
    given: dict[str, Any] = {
        "epochs": 2,
        "lr": 0.5,
        "schedule": "one-cycle",
        "batch_size": 9,
        "weight_decay": 0.0,
        "label_smoothing": 0.0,
        "seed": 0,
    }
    return Recipe(**(given | changes))


@pytest.mark.parametrize(
    ("schedule", "done", "lr"),
    [
        ("one-cycle", 0.0, 0.02),  # 1/25 of the peak
        ("one-cycle", 0.15, 0.26),  # half of the way up
        ("one-cycle", 0.3, 0.5),
        ("one-cycle", 0.65, 0.25),  # half of the way down
        ("one-cycle", 1.0, 0.0),
        ("cosine", 0.0, 0.5),
        ("cosine", 0.5, 0.25),
        ("cosine", 1.0, 0.0),
    ],
)
def test_learning_rate(schedule: str, done: float, lr: float) -> None:
    assert recipe(schedule=schedule).lr_at(done) == pytest.approx(lr, abs=1e-12)


def test_learning_rate_rises_to_the_peak_and_falls_from_there() -> None:
    rates = [recipe().lr_at(done / 100) for done in range(101)]
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", -1),
        ("lr", -1e-3),
        ("lr", math.nan),
        ("batch_size", 1),  # BatchNorm cannot train on one image
        ("weight_decay", -0.1),
        ("label_smoothing", -0.1),
        ("label_smoothing", 1.5),
    ],
)
def test_a_recipe_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} must be at .*but is {value}"):
        recipe(**{name: value})


# --- which split is used for what


class Untouchable:
    """A split that nobody may look at."""

    def __len__(self) -> int:
        raise AssertionError("the test split was used")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test split was used: {name}")


def fitted(model: nn.Module, data: Data, state: FitState, **changes: Any) -> FitState:
    fit = Fit("float", model, data, recipe(lr=0.02, **changes), CPU)
    fit.resume(state, {})
    return fit.run(lambda: None, 3600)


def test_fit_never_looks_at_the_test_split(model: nn.Module, data: Data) -> None:
    blind = dataclasses.replace(data, test=Untouchable(), calibration=Untouchable())  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="was used"):
        evaluate(model, blind.test, 9, CPU)
    assert len(fitted(model, blind, FitState()).history) == 2


def test_the_weights_of_the_epoch_that_is_best_on_validation_are_kept(model: nn.Module, data: Data) -> None:
    state = fitted(model, data, FitState(), epochs=4)
    scores = [(epoch["validation_top1"], -epoch["validation_loss"]) for epoch in state.history]
    assert state.best_epoch == scores.index(max(scores))
    measured = evaluate(model, data.validation, 9, CPU)
    assert (measured.top1, -measured.loss) == max(scores)


def test_an_epoch_that_is_worse_on_validation_does_not_replace_the_best_one(model: nn.Module, data: Data) -> None:
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perfect = FitState(epoch=1, best_epoch=0, best_top1=100.0, best_loss=0.0, best_weights=best)
    state = fitted(model, data, perfect)
    assert (state.epoch, state.best_epoch) == (2, 0)
    assert len(state.history) == 1
    assert_same(dict(model.state_dict()), best)


def test_among_epochs_of_equal_accuracy_the_smaller_loss_decides(model: nn.Module, data: Data) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tied = FitState(epoch=1, best_epoch=0, best_top1=-1.0, best_loss=1e9, best_weights=before)
    (epoch,) = fitted(model, data, tied).history
    again = FitState(epoch=1, best_top1=epoch["validation_top1"], best_loss=epoch["validation_loss"] * 2)
    model.load_state_dict(before)
    assert fitted(model, data, again).best_epoch == 1
    better = FitState(epoch=1, best_top1=epoch["validation_top1"], best_loss=epoch["validation_loss"] / 2)
    model.load_state_dict(before)
    assert fitted(model, data, better).best_epoch == -1


# --- evaluate


def test_evaluate_against_a_computation_by_hand() -> None:
    """The logits are the means of the three channels, 0 or 1; dropout of nearly all would ruin them."""
    colors = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 0, 0], [0, 255, 0]], dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 1, 0])  # the first three are right
    pixels = ArrayPixels(colors.reshape(5, 3, 1, 1).expand(5, 3, 4, 4).contiguous())
    preprocessing = Preprocessing(4, 4, (0.0,) * 3, (1.0,) * 3, 4)  # type: ignore[arg-type]
    images = ImageSet(pixels, torch.arange(5), labels, preprocessing)
    model = nn.Sequential(nn.Dropout(0.99), nn.AvgPool2d(4), nn.Flatten())
    measured = evaluate(model, images, 2, CPU)
    right, wrong = math.log(math.e + 2) - 1, math.log(math.e + 2)
    assert (measured.top1, measured.images) == (60.0, 5)
    assert measured.loss == pytest.approx((3 * right + 2 * wrong) / 5, rel=1e-6)
    assert str(measured) == "60.00 % of 5"
