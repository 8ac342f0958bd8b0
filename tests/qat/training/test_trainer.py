"""Each option of the training loop, shown to change what it says that it changes."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import struct
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from compiled import gradient_errors
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event
from torch import Tensor, nn

import qat.fake_quantize.quantizer
from qat.base.artifact import read_sidecar
from qat.base.errors import UserError
from qat.calibration.activation_ranges import calibrate_ranges
from qat.compute.compiled import CompiledNetwork
from qat.compute.device import Compute
from qat.data.batches import ImageSet
from qat.data.splits import Data
from qat.evaluate import evaluate
from qat.fake_quantize.prepare import prepare
from qat.fake_quantize.quantizer import WeightQuantizer
from qat.options import TrainOptions
from qat.train import main as run
from qat.training.failures import first_not_finite
from qat.training.log import TrainingLog
from qat.training.recipe import Recipe
from qat.training.trainer import Fit, FitState

CPU = Compute(torch.device("cpu"))


def recipe(**changes: Any) -> Recipe:
    given: dict[str, Any] = {"epochs": 1, "lr": 0.01, "schedule": "cosine", "batch_size": 9, "weight_decay": 0.0}
    return Recipe(**(given | {"label_smoothing": 0.0, "seed": 0} | changes))


def linear() -> nn.Module:
    """Nothing in it depends on the other images of a batch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))


def fitted(model: nn.Module, data: Data, compute: Compute = CPU, **changes: Any) -> FitState:
    return Fit("float", model, data, recipe(**changes), compute).run(lambda: None, 3600)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def first(images: ImageSet, count: int) -> ImageSet:
    return dataclasses.replace(images, indices=images.indices[:count], labels=images.labels[:count])


# --- what is computed


def test_accumulated_batches_make_the_step_of_one_large_batch(data: Data) -> None:
    data = dataclasses.replace(data, train=first(data.train, 72))
    whole, parts, small = linear(), linear(), linear()
    fitted(whole, data, batch_size=18, clip_norm=0.5)
    fitted(parts, data, batch_size=9, accumulate=2, clip_norm=0.5)
    fitted(small, data, batch_size=9, clip_norm=0.5)
    torch.testing.assert_close(weights(parts), weights(whole))
    assert not torch.allclose(small[1].weight, whole[1].weight)


def gradient_norms(model: nn.Module, data: Data, **changes: Any) -> list[float]:
    """Of all parameters together, at each step of the optimizer."""
    found = []
    fit = Fit("float", model, data, recipe(**changes), CPU)
    fit._optimizer.register_step_pre_hook(
        lambda *_: found.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))
    )
    fit.run(lambda: None, 3600)
    return found


def test_the_last_step_of_an_epoch_is_the_mean_of_the_batches_that_are_left(data: Data) -> None:
    data = dataclasses.replace(data, train=first(data.train, 27))  # with weights that stay: steps of two and one
    single, accumulated = (gradient_norms(linear(), data, lr=0.0, accumulate=count) for count in (1, 2))
    assert (len(single), len(accumulated)) == (3, 2)
    assert accumulated[1] == pytest.approx(single[2])


def test_gradients_are_clipped_to_the_norm(model: nn.Module, data: Data) -> None:
    assert max(gradient_norms(model, data)) > 0.1
    assert max(gradient_norms(model, data, clip_norm=0.01)) == pytest.approx(0.01, rel=1e-3)


def test_mixup_blends_images_and_labels_alike(data: Data) -> None:
    mix = Fit("float", linear(), data, recipe(mixup=1.0), CPU)._mix
    assert mix is not None
    torch.manual_seed(1)
    x, targets = mix(torch.eye(3).reshape(3, 3, 1, 1).expand(3, 3, 4, 4).clone(), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(x.mean((2, 3)), targets)
    assert ((targets > 0.01) & (targets < 0.99)).sum() == 6


def test_cutmix_puts_a_box_of_one_image_into_another(data: Data) -> None:
    mix = Fit("float", linear(), data, recipe(cutmix=1.0), CPU)._mix
    assert mix is not None
    torch.manual_seed(1)
    x, targets = mix(torch.eye(3).reshape(3, 3, 1, 1).expand(3, 3, 16, 16).clone(), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(x.mean((2, 3)), targets)
    assert set(x.flatten().tolist()) == {0.0, 1.0}
    assert ((targets > 0.01) & (targets < 0.99)).sum() == 6


def test_the_loss_is_that_of_the_mixed_labels(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = F.cross_entropy

    def cross_entropy(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        seen.append(targets)
        return real(logits, targets, **options)

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    fitted(linear(), data, mixup=0.4, cutmix=1.0)
    training, validation = [t for t in seen if t.ndim == 2], [t for t in seen if t.ndim == 1]
    assert (len(training), len(validation)) == (9, 2)
    assert all(t.shape == (9, 3) and torch.allclose(t.sum(1), torch.ones(9)) for t in training)


def test_the_moving_average_of_the_weights_is_the_result(model: nn.Module, data: Data) -> None:
    fit = Fit("float", model, data, recipe(ema=0.8), CPU)
    history = [weights(model)]
    fit._optimizer.register_step_post_hook(lambda *_: history.append(weights(model)))
    fit.run(lambda: None, 3600)
    average = history[1]  # torch begins with the first weights that it is shown
    for later in history[2:]:
        average = {name: 0.8 * average[name] + 0.2 * later[name] for name in later}
    for name in ("conv1.weight", "fc.bias"):
        torch.testing.assert_close(model.state_dict()[name], average[name])
        assert not torch.allclose(model.state_dict()[name], history[-1][name])


def test_statistics_of_batch_normalization_stay_after_the_epoch(model: nn.Module, data: Data) -> None:
    means = []
    fit = Fit("float", model, data, recipe(epochs=3, freeze_norms_after=1), CPU)
    fit._optimizer.register_step_post_hook(lambda *_: means.append(model.get_buffer("bn1.running_mean").clone()))
    weight = model.get_parameter("bn1.weight").detach().clone()
    fit.run(lambda: None, 3600)
    first_epoch, rest = means[: tiny.STEPS], means[tiny.STEPS :]
    assert not torch.equal(first_epoch[0], first_epoch[-1])
    assert all(torch.equal(mean, first_epoch[-1]) for mean in rest)
    assert not torch.equal(model.get_parameter("bn1.weight"), weight)  # it still learns


# --- how it is computed


def test_training_computes_in_bfloat16_and_quantization_and_evaluation_in_float32(
    model: nn.Module, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(model, input_shape=(3, 16, 16))
    calibrate_ranges(prepared, [torch.randn(8, 3, 16, 16)], "max")
    types: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    prepared.get_submodule("conv2").register_forward_hook(lambda layer, _, y: types[layer.training].add(y.dtype))
    quotients = []
    real = qat.fake_quantize.quantizer._codes

    def codes(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        found = real(x, scale, low, high)
        quotients.append((scale.dtype, found.dtype))
        return found

    monkeypatch.setattr("qat.fake_quantize.quantizer._codes", codes)
    state = fitted(prepared, data, Compute(torch.device("cpu"), torch.bfloat16))
    assert types == {True: {torch.bfloat16}, False: {torch.float32}}
    assert set(quotients) == {(torch.float32, torch.float32)}
    assert state.history[0]["train_loss"] < 1.5
    assert all(parameter.dtype == torch.float32 for parameter in prepared.parameters())


@pytest.mark.slow
def test_a_compiled_step_learns_the_same(model: nn.Module, data: Data) -> None:
    """Compiled whole, quantizers included: fullgraph=True refuses graph breaks."""
    plain = prepare(model, input_shape=(3, 16, 16))
    calibrate_ranges(plain, [torch.randn(8, 3, 16, 16)], "max")
    compiled = prepare(model, input_shape=(3, 16, 16))
    compiled.load_state_dict(plain.state_dict())
    for one in (plain, compiled):
        one.get_submodule("dropout").p = 0.0  # compiled code draws other random numbers
    data = dataclasses.replace(data, train=first(data.train, 20))  # two whole batches and one of two images
    calls = []
    compute = Compute(torch.device("cpu"), compiled=True)

    class Counting(Compute):
        def forward(self, *about: Any, **more: Any) -> Any:
            made = compute.forward(*about, **more)
            whole = made.whole
            del made.whole
            made.whole = lambda x: calls.append(len(x)) or whole(x)
            return made

    before = weights(plain)
    states = [fitted(plain, data, lr=1e-4), fitted(compiled, data, Counting(torch.device("cpu")), lr=1e-4)]
    assert calls == [9, 9]
    assert states[1].history[0]["train_loss"] == pytest.approx(states[0].history[0]["train_loss"], rel=1e-3)
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=0, atol=5e-4)
    for name, parameter in plain.named_parameters():
        moved, expected = compiled.get_parameter(name) - before[name], parameter - before[name]
        assert F.cosine_similarity(moved.flatten(), expected.flatten(), 0) > 0.9, name


def test_compiled_gradients_are_those_of_the_network_as_it_is(model: nn.Module) -> None:
    x = torch.randn(8, 3, 16, 16)
    prepared = prepare(model, input_shape=(3, 16, 16))
    calibrate_ranges(prepared, [x], "max")
    prepared.get_submodule("dropout").p = 0.0
    errors = gradient_errors(prepared, "cpu", torch.float32, x)
    assert len(errors) == len(list(model.parameters()))
    assert all(error < 1e-3 for error in errors.values()), errors


def test_on_a_cpu_auto_changes_nothing() -> None:
    assert Compute.from_options("cpu") == CPU
    assert Compute.from_options("cpu", "bfloat16", True) == Compute(torch.device("cpu"), torch.bfloat16, compiled=True)


@pytest.mark.parametrize(("compiled", "steps", "expected"), [(None, 999, False), (None, 1000, True), (True, 1, True)])
def test_a_network_is_compiled_where_that_pays(compiled: bool | None, steps: int, expected: bool) -> None:
    forward = Compute(torch.device("cpu"), compiled=compiled).forward(linear(), 9, steps)
    assert hasattr(forward, "whole") == expected


def test_quantization_progresses_from_the_input_on(model: nn.Module, data: Data) -> None:
    prepared = prepare(model, input_shape=(3, 16, 16))
    calibrate_ranges(prepared, [torch.randn(8, 3, 16, 16)], "max")
    seen = []

    class Watching(Fit):
        def _end_epoch(self) -> None:
            for one in (self.model, self.result):
                on = [m.enabled for m in one.modules() if isinstance(m, WeightQuantizer)]
                assert on == sorted(on, reverse=True)
                seen.append(sum(on) / len(on))
            super()._end_epoch()

    fit = Watching("qat", prepared, data, recipe(epochs=4, progressive=2, lr=1e-4, ema=0.5), CPU)
    state = fit.run(lambda: None, 3600)
    assert seen == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1])
    assert state.best_epoch >= 2  # what was measured before is of another network
    with pytest.raises(UserError, match="progressive must be below the 2 epochs of the fine-tuning, but is 2"):
        recipe(epochs=2, progressive=2)


def test_channels_last(model: nn.Module, data: Data) -> None:
    compute = Compute(torch.device("cpu"), channels_last=True)
    assert compute.place(model).get_parameter("conv2.weight").is_contiguous(memory_format=torch.channels_last)
    x = compute.images(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert data.preprocessing.normalize(x).is_contiguous(memory_format=torch.channels_last)


# --- as options of a run


def test_a_stopped_run_ends_with_the_same_weights_whatever_the_options(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"accumulate": 2, "ema": 0.9, "mixup": 0.2, "cutmix": 1.0, "clip_norm": 1.0, "save_seconds": 0}
    options |= {"float_schedule": "cosine", "qat_schedule": "one-cycle", "freeze_norms_after": 1}

    def train(name: str, **changes: Any) -> dict[str, Tensor]:
        output = tmp_path / name / "model.qat"
        run(TrainOptions(**tiny.options(trained, output=output, **options, **changes)))
        return load_file(output)

    whole = train("whole")
    tiny.stop_in_steps(monkeypatch, lambda step: step % 7 == 0)
    stops = 0
    while not (tmp_path / "stopped" / "model.qat").exists():
        try:
            stopped = train("stopped", resume=stops > 0)
        except tiny.Stopped:
            stops += 1
    assert stops > 4
    assert [name for name in whole if not torch.equal(whole[name], stopped[name])] == []


@pytest.mark.parametrize(
    ("name", "value"), [("accumulate", 0), ("clip_norm", -1.0), ("mixup", math.nan), ("cutmix", -1.0), ("ema", 1.0)]
)
def test_options_out_of_range(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} must be at .*, but is {value}"):
        recipe(**{name: value})


# --- what stops it


def test_the_first_tensor_that_is_no_number_is_named(model: nn.Module) -> None:
    x = torch.randn(2, 3, 16, 16)
    assert first_not_finite(model.eval(), [x, x]) == ""
    weight = model.get_parameter("conv2.weight")
    with torch.no_grad():
        weight.fill_(1e38)
        model.get_buffer("bn2.running_mean").fill_(math.nan)  # which the overflow has spoilt
        assert first_not_finite(model.train(), [x * 0, x]) == "the output of conv2"
        weight[0, 0, 0, 0] = math.nan
        assert first_not_finite(model, [x]) == "conv2.weight"
        assert first_not_finite(model, []) == "conv2.weight"
        weight.fill_(1.0)
        model.get_buffer("bn1.running_var")[0] = math.inf
    assert first_not_finite(model.train(), [x]) == "bn1.running_var"  # nothing else is wrong
    assert not any(module._forward_hooks for module in model.modules() if module is not model.get_submodule("bn1"))


def test_gradients_that_are_no_numbers_stop_the_run_though_the_loss_is_one(data: Data) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.mean((2, 3))) + self.fc.weight.square().sum().sub(self.fc.weight.square().sum()).sqrt()

    with pytest.raises(UserError, match=r"fc\.weight became NaN or infinite|the loss became nan.* first in fc\.weight"):
        Fit("float", Root(), data, recipe(), CPU).run(lambda: None, 0)


def test_a_loss_that_is_no_number_names_the_tensor(model: nn.Module, data: Data) -> None:
    with torch.no_grad():
        model.get_parameter("fc.weight").fill_(math.inf)
    with pytest.raises(UserError, match=r"at step 9 of 9 or shortly before, first in fc\.weight; the"):
        fitted(model, data)


class Hungry(nn.Module):
    """Has memory for so many images, those that somebody still holds on to included."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.fc = most, nn.Linear(3, 3)
        self.held: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def forward(self, x: Tensor) -> Tensor:
        kept = x * 2  # as activations are
        self.held.add(kept)
        if sum(map(len, self.held)) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.fc(kept.mean((2, 3)))


def test_a_batch_that_does_not_fit_in_memory_says_which_would(data: Data) -> None:
    with pytest.raises(UserError, match="for batches of 9 images; 4 fit: give --batch-size 4 --accumulate 3, which"):
        fitted(Hungry(5), data)
    with pytest.raises(UserError, match="nor for 2: free some, or give a smaller --image-size"):
        fitted(Hungry(1), data)


class AsOnGpu(Compute):
    """Makes what a GPU would get, but does not compile it."""

    def forward(self, *about: Any, **more: Any) -> nn.Module:
        made = Compute(torch.device("cuda"), compiled=True).forward(*about, **more)
        made.whole = None
        made.whole = made.model
        self.made.append(made)
        return made


@pytest.fixture
def as_on_gpu() -> Compute:
    compute = AsOnGpu(torch.device("cpu"))
    object.__setattr__(compute, "made", [])
    return compute


def test_gradients_that_are_added_up_do_not_come_from_cuda_graphs(data: Data, as_on_gpu: Compute) -> None:
    for accumulate in (1, 2):
        fitted(linear(), data, as_on_gpu, accumulate=accumulate)
    assert [made.graphs for made in as_on_gpu.made] == [True, False]


def test_cuda_graphs_are_given_up_where_they_take_too_much_memory(
    data: Data, as_on_gpu: Compute, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(Hungry):
        def forward(self, x: Tensor) -> Tensor:
            if CompiledNetwork.graphs_fit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return super().forward(x)

    monkeypatch.setattr(CompiledNetwork, "graphs_fit", True)
    assert fitted(Full(9), data, as_on_gpu).epoch == 1
    assert "training continues without them" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="for batches of 9 images; 4 fit"):
        fitted(Full(5), data, as_on_gpu)


# --- the log


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show of ``folder``: (step, value) by name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:  # length, checksum, event, checksum
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            content = content[16 + size :]
    return found


def test_figures_are_logged_as_lines_and_for_tensorboard(trained: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run(TrainOptions(**tiny.options(trained, output=tmp_path / "model.qat", log_folder=log)))
    lines = [json.loads(line) for line in (log / "train.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [
        (phase, step) for phase in ("float", "qat") for step in (9, 9, 18, 18)
    ]
    history = read_sidecar(tmp_path / "model.qat", "checkpoint").figures["qat_history"]
    last = [line for line in lines if line["phase"] == "qat"][-2:]
    measured = {name: value for name, value in history[1].items() if name != "learning_rate"}
    assert last[1] == {"phase": "qat", "step": 18} | measured
    assert last[0]["loss"] == pytest.approx(history[1]["train_loss"])
    assert last[0]["learning_rate"] > 0
    assert last[0]["images_per_second"] > 0
    shown = scalars(log / "qat")
    assert shown["validation_top1"] == [(9, history[0]["validation_top1"]), (18, history[1]["validation_top1"])]


def test_a_resumed_run_takes_out_what_was_logged_after_the_state(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path)
    for phase, steps in (("float", (9, 18)), ("qat", (9, 16))):
        log.begin(phase, 0)
        for step in steps:
            log.add(phase, step, {"loss": 1.0})
    log.close()
    with open(tmp_path / "train.jsonl", "a", encoding="utf-8") as file:
        file.write('{"phase": "qat", "st')  # killed in the middle of a line
    with pytest.raises(UserError, match=r"train\.jsonl is the log of another run: give --log-folder another folder"):
        TrainingLog(tmp_path)
    TrainingLog(tmp_path, resumed=True).begin("qat", 9)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [("float", 9), ("float", 18), ("qat", 9)]
    TrainingLog(tmp_path, resumed=True).begin("float", 0)
    assert (tmp_path / "train.jsonl").read_text() == ""


# --- what only shows where memory has a layout, and where nothing can be compiled


def test_the_optimizers_state_keeps_the_layout_of_the_weights(model: nn.Module, data: Data) -> None:
    """The fused optimizer of a GPU takes no other, and files hold tensors in plain order."""
    compute = Compute(torch.device("cpu"), channels_last=True)
    first_run = Fit("float", compute.place(model), data, recipe(), compute)
    first_run.run(lambda: None, 3600)
    plain = {name: tensor.contiguous() for name, tensor in first_run.tensors().items()}
    again = Fit("float", model, data, recipe(), compute)
    again.resume(FitState(), plain)
    weight = model.get_parameter("conv2.weight")
    moments = again._optimizer.state[weight]
    assert weight.stride() != weight.contiguous().stride()
    assert [moments[name].stride() for name in ("exp_avg", "exp_avg_sq")] == 2 * [weight.stride()]
    assert torch.equal(moments["exp_avg"], first_run._optimizer.state[weight]["exp_avg"])


def test_a_short_last_batch_weighs_what_it_holds(data: Data) -> None:
    data = dataclasses.replace(data, train=first(data.train, 30))  # 9, 9, 9, 3: the second step has 9 and 3
    whole, parts = linear(), linear()
    fitted(whole, data, batch_size=18)
    fitted(parts, data, batch_size=9, accumulate=2)
    torch.testing.assert_close(weights(parts), weights(whole))


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.passes = nn.Linear(3, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        print(end="")  # a graph break
        return self.fc(x.mean((2, 3)))


class Counting(Breaking):
    """Is another program in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.fc(x.mean((2, 3))) + 0.1 * self.passes


@pytest.mark.parametrize(
    ("network", "reason", "rounding"),
    [(Breaking, "print", 0), (Counting, "TORCH_LOGS=recompiles", 1e-6)],  # its first pass is compiled
)
def test_what_cannot_be_compiled_is_trained_all_the_same(
    network: type[Breaking], reason: str, rounding: float, data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    plain = network()
    other = copy.deepcopy(plain)
    fitted(plain, data, epochs=2)
    with torch._dynamo.config.patch(recompile_limit=1):
        fitted(other, data, Compute(torch.device("cpu"), compiled=True), epochs=2)
    torch.testing.assert_close(plain.fc.weight, other.fc.weight, rtol=0, atol=rounding)
    printed = capsys.readouterr()
    warning = " ".join(printed.err.split())
    assert warning.count("torch.compile failed (") == 1
    assert reason in warning
    assert "as with --compile False" in warning
    assert printed.out.count("compiling the training step, which takes about a minute\n") == 1


def test_evaluation_is_exact_float32(model: nn.Module, data: Data) -> None:
    seen = []
    conv = model.get_submodule("conv1")
    conv.register_forward_hook(
        lambda *_: seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
    )
    before = torch.backends.cudnn.conv.fp32_precision
    evaluate(model, data.validation, 9, CPU)
    assert set(seen) == {("ieee", "ieee")}
    assert torch.backends.cudnn.conv.fp32_precision == before


@pytest.mark.parametrize(("images", "warned"), [(15, True), (16, False)])
def test_few_calibration_images_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], images: int, warned: bool
) -> None:
    options = {"output": tmp_path / "model.qat", "calibration_images": images, "float_epochs": 0, "qat_epochs": 0}
    run(TrainOptions(**tiny.options(tmp_path, **options)))
    assert (f"only {images} images to calibrate on" in capsys.readouterr().err) == warned
