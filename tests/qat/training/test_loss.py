"""Distillation: the loss against a computation by hand, and what it does in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from qat.base.errors import UserError
from qat.checkpoint import load_state
from qat.compute.device import Compute
from qat.fake_quantize.prepare import prepare
from qat.graph.inner_outputs import with_inner_outputs
from qat.graph.tracing import network_of, trace
from qat.options import TrainOptions
from qat.train import main as run
from qat.training.loss import Distillation, stage_ends
from qat.training.recipe import DistillationSettings

CPU = Compute(torch.device("cpu"))


def test_stages_end_before_the_resolution_changes() -> None:
    network = network_of(trace(torchvision.models.resnet18(num_classes=10), (3, 64, 64)))
    assert stage_ends(network) == ("relu", "layer1_1_relu_1", "layer2_1_relu_1", "layer3_1_relu_1", "layer4_1_relu_1")


def test_tensors_beside_the_answer(model: nn.Module) -> None:
    model.eval()
    prepared = prepare(model, input_shape=(3, 16, 16))
    for quantizer in prepared.get_submodule("activation_quantizers").children():
        quantizer.amax.fill_(4.0)
    seen: list[Tensor] = []
    prepared.get_submodule("conv2").register_forward_hook(lambda *given: seen.append(given[2]))
    x = torch.randn(2, 3, 16, 16)
    answer, (tensor,) = with_inner_outputs(prepared, ["conv2"])(x)
    assert torch.equal(answer, prepared(x))
    assert torch.equal(tensor, seen[0])
    assert with_inner_outputs(prepared, []).get_submodule("conv2") is prepared.get_submodule("conv2")


def test_the_loss_by_hand(model: nn.Module) -> None:
    model.eval()
    torch.manual_seed(1)
    logits, x, labels = torch.randn(4, 3), torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    teacher = trace(model, (3, 16, 16))
    tensor = torch.randn(4, 8, 8, 8)
    loss = Distillation(teacher, CPU, 0.1, DistillationSettings(0.3, 2.0, 0.5), points=["conv2"], images=4, steps=9)
    with torch.no_grad():
        wanted, (wanted_tensor,) = with_inner_outputs(teacher, ["conv2"])(x)
    hard = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    p, q = (wanted / 2).softmax(1), (logits / 2).softmax(1)
    soft = 4 * (p * (p.log() - q.log())).sum(1).mean()
    share = (tensor - wanted_tensor).square().sum() / wanted_tensor.square().sum()
    expected = 0.7 * hard + 0.3 * soft + 0.5 * share
    torch.testing.assert_close(loss((logits, [tensor]), labels, x), expected)
    same = loss((wanted, [wanted_tensor]), labels, x)
    torch.testing.assert_close(same, 0.7 * nn.functional.cross_entropy(wanted, labels, label_smoothing=0.1))


def test_the_teacher_does_not_learn(model: nn.Module) -> None:
    loss = Distillation(
        trace(model, (3, 16, 16)), CPU, 0.0, DistillationSettings(1.0, 1.0, 0.0), points=["conv2"], images=4, steps=9
    )
    assert loss.points == ()
    logits = torch.randn(4, 3, requires_grad=True)
    loss((logits, []), torch.tensor([0, 1, 2, 0]), torch.randn(4, 3, 16, 16)).backward()
    assert logits.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


def train(folder: Path, output: Path, **changes: Any) -> dict[str, Tensor]:
    run(TrainOptions(**tiny.options(folder, output=output, **changes)))
    return load_file(output)


@pytest.mark.parametrize("changes", [{"distill": 0.9}, {"distill_features": 1.0}])
def test_a_run_with_distillation_resumes_to_the_same_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, float]
) -> None:
    whole = train(trained, tmp_path / "whole.qat", **changes)
    without = load_file(trained / "model.qat")
    assert not torch.equal(whole["conv1.weight"], without["conv1.weight"])
    tiny.stop_in_steps(monkeypatch, lambda step: step == tiny.FLOAT_STEPS + 5)
    with pytest.raises(tiny.Stopped):
        train(trained, tmp_path / "model.qat", save_seconds=0, **changes)
    saved = load_state(tmp_path / "model.qat.state")[0]
    assert "teacher.conv1.weight" in saved
    stopped = train(trained, tmp_path / "model.qat", save_seconds=0, resume=True, **changes)
    assert [name for name in whole if not torch.equal(whole[name], stopped[name])] == []


@pytest.mark.parametrize("changes", [{"distill": 1.5}, {"distill_temperature": 0.0}, {"distill_features": -1.0}])
def test_options_out_of_range(trained: Path, tmp_path: Path, changes: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"--distill \S+ must be from 0 to 1"):
        train(trained, tmp_path / "model.qat", **changes)
