"""The library interface of qat: everything here comes from ``import qat``, as in a program of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from own_network import CLASSES, PREPROCESSING, Net
from torch import Tensor, nn

import qat

LABELS = torch.arange(12) % 3


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images() -> Tensor:
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    images[torch.arange(12), LABELS] += 1
    return images


def quantized(model: nn.Module, images: Tensor) -> torch.fx.GraphModule:
    prepared = qat.prepare(model, input_shape=(3, 16, 16))
    assert qat.calibrate_ranges(prepared, images.split(4)) == []
    return prepared


def test_prepare_calibrate_train_save_and_load(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    prepared = quantized(model, images).train()
    optimizer = torch.optim.SGD(prepared.parameters(), 0.2)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(prepared(images), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    path = tmp_path / "model.qat"
    qat.save_checkpoint(path, prepared, None, PREPROCESSING, CLASSES)

    loaded = qat.load_checkpoint(path, Net())
    assert torch.equal(loaded.model(images), prepared.eval()(images))
    assert loaded.sidecar.class_names == CLASSES
    assert loaded.preprocessing == PREPROCESSING
    assert qat.placement_of(loaded.model) == qat.placement_of(prepared)
    with pytest.raises(
        qat.UserError, match=r"model\.qat does not record how to build its model: .* pass the float model"
    ):
        qat.load_checkpoint(path)
    with pytest.raises(qat.UserError, match="it was made for another model"):
        qat.load_checkpoint(path, nn.Sequential(nn.Conv2d(3, 8, 3)))


def test_a_checkpoint_knows_no_autocast(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        prepared = quantized(model, images)
        qat.save_checkpoint(tmp_path / "model.qat", prepared)
    qat.load_checkpoint(tmp_path / "model.qat", Net())
    prepared.forward = torch.autocast("cpu", torch.bfloat16)(prepared.forward)  # as accelerate does
    qat.save_checkpoint(tmp_path / "model.qat", prepared)
    qat.load_checkpoint(tmp_path / "model.qat", Net())


def test_a_model_by_name_is_built_again(images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(tiny.NET)
    spec = qat.ModelSpec(f"{tmp_path / 'net.py'}:net", 3)
    prepared = quantized(qat.build_model(spec), images)
    qat.save_checkpoint(tmp_path / "model.qat", prepared, spec, PREPROCESSING, CLASSES)
    assert torch.equal(qat.load_checkpoint(tmp_path / "model.qat").model(images), prepared.eval()(images))
    view = qat.view_placement(str(tmp_path / "model.qat"))
    assert view.placement == qat.placement_of(prepared)
    assert qat.draw(view).startswith("<svg")


def test_the_float_model_stays_as_it_is(model: nn.Module, images: Tensor) -> None:
    before = model.eval()(images)
    quantized(model, images)
    assert torch.equal(model(images), before)
    assert not any("quantizer" in name for name, _ in model.named_modules())


def test_ranges_can_be_fixed_learned_and_rounded(model: nn.Module, images: Tensor) -> None:
    prepared = quantized(model, images)
    assert len(qat.adaround(prepared, [images], steps=4)) == 3
    prepared = quantized(model, images)
    qat.learn_ranges(prepared)
    F.cross_entropy(prepared.train()(images), torch.zeros(12, dtype=torch.int64)).backward()
    gradients = {name: parameter.grad for name, parameter in prepared.named_parameters() if name.endswith(".amax")}
    assert len(gradients) == 7  # of three weights and four tensors
    assert all(gradient is not None for gradient in gradients.values())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_faster_network_of_a_loop_learns_the_same(model: nn.Module, images: Tensor, compiled: bool) -> None:
    prepared = quantized(model, images).train()
    labels = torch.zeros(12, dtype=torch.int64)
    gradients = []
    for network in (prepared, qat.compile_for_training(prepared, len(images), compiled=compiled)):
        prepared.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        gradients.append({name: parameter.grad for name, parameter in prepared.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'qat' has no attribute 'quantise'; it has Checkpoint, "):
        _ = qat.quantise
    assert qat.__version__ == "0.1.0"
