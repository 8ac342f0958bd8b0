"""Folding batch normalization changes no code, only scales; dead channels are floored and named.

Folded to float, a network computes what it computes with all quantizers disabled.
"""

import copy

import numpy as np
import pytest
import tiny
import torch
import torchvision
from first_layer import input_of
from torch import fx, nn

from export.fold import fold, fold_float
from export.lower import BatchNorm
from qat.checkpoint import load_checkpoint
from qat.fake_quantize.prepare import prepare
from qat.fake_quantize.quantizer import SCALE_FLOOR, ActivationQuantizer, WeightQuantizer


def lively_norms(model: nn.Module) -> None:
    """Batch statistics and factors as after training, some factors negative."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.normal_(0, 1, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)


def prepared(model: nn.Module, amax: float = 4.0) -> nn.Module:
    lively_norms(model)
    result = prepare(model, input_shape=input_of(model)).eval()
    for module in result.modules():
        if isinstance(module, ActivationQuantizer):
            module.amax.fill_(amax)
    return result


def test_codes_are_those_of_the_unfolded_weight_up_to_the_sign_of_the_factor():
    model = prepared(torchvision.models.resnet18(num_classes=10))
    folded, dead = fold(model)
    assert not dead
    weight = model.get_parameter("layer1.0.conv1.weight").detach().numpy().astype(np.float64)
    norm = model.get_submodule("layer1.0.bn1")
    amax = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
    scale = (amax.astype(np.float32) / np.float32(127)).astype(np.float32)
    codes = np.rint(weight.astype(np.float32) / scale)
    factor = (norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()).numpy()
    signs = np.where(factor < 0, -1, 1).reshape(-1, 1, 1, 1)
    stored = folded.get_buffer("layer1.0.conv1.weight")
    assert stored.dtype == torch.int8
    np.testing.assert_array_equal(stored.numpy(), codes * signs)
    np.testing.assert_allclose(
        folded.get_buffer("layer1.0.conv1.weight_quantizer.scale").numpy(),
        scale.ravel() * np.abs(factor),
        rtol=1e-6,
    )
    assert (factor < 0).any(), "the test needs negative factors"


@pytest.mark.parametrize("bias", [False, True])
def test_a_folded_convolution_computes_the_same(bias):
    model = prepared(nn.Sequential(nn.Conv2d(16, 24, 3, bias=bias), nn.BatchNorm2d(24)))
    folded, _ = fold(model)
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_a_float_convolution_is_folded_too():
    model = prepared(nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 16, 3)))
    folded, _ = fold(model)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


@pytest.mark.parametrize("kernel", [2, 4], ids=["INT8", "float"])
def test_a_transposed_convolution_is_folded_along_its_output_channels(kernel):
    model = prepared(nn.Sequential(nn.ConvTranspose2d(16, 24, kernel, stride=2), nn.BatchNorm2d(24)))
    folded, _ = fold(model)
    assert not any(isinstance(module, nn.BatchNorm2d | BatchNorm) for module in folded.modules())
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_batch_norm_that_others_read_past_is_not_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) + x.sigmoid()

    model = prepared(Shared())
    folded, _ = fold(model)
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(folded(x), model(x))
    assert any(isinstance(module, BatchNorm) for module in folded.modules())


@pytest.mark.parametrize("cause", ["weight", "norm"])
def test_a_dead_channel_is_floored_and_named(cause):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16))
    ready = prepared(model)
    layer = ready.get_submodule("0" if cause == "weight" else "1")
    layer.weight.data[5] = 0
    folded, dead = fold(ready)
    assert [(channel.layer, channel.channel) for channel in dead] == [("0", 5)]
    scale = folded.get_buffer("0.weight_quantizer.scale")
    assert scale[5] == SCALE_FLOOR
    assert (folded.get_buffer("0.weight")[5] == 0).all()
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(folded(x), ready(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("folding", [fold, fold_float])
def test_fold_leaves_the_prepared_model_alone(folding):
    model = prepared(torchvision.models.resnet18(num_classes=10))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folding(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_batch_norm_called_twice_is_kept_for_the_call_that_cannot_be_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

        def forward(self, x):
            return self.norm(self.norm(self.conv(x)).relu())

    model = prepared(Twice())
    folded, _ = fold(model)
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_normalization_over_another_axis_than_the_channels_of_a_linear_layer_is_not_folded():
    model = prepared(nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)))
    model.get_submodule("1").weight.data.uniform_(0.5, 2)
    folded, _ = fold(model)
    x = torch.randn(2, 8, 16)  # BatchNorm1d normalizes axis 1, the linear layer computes axis 2
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_flatten_of_the_first_dimensions_is_not_taken_for_one_of_the_last():
    class Head(nn.Module):
        def forward(self, x):
            return torch.flatten(x, end_dim=1)

    model = prepared(Head())
    assert fold(model)[0](torch.zeros(2, 3, 4)).shape == (6, 4)


# --- without quantizers


def without_quantizers(model: fx.GraphModule) -> fx.GraphModule:
    disabled = copy.deepcopy(model).eval()
    for module in disabled.modules():
        if isinstance(module, ActivationQuantizer | WeightQuantizer):
            module.enabled = False
    return disabled


def tiny_net() -> nn.Module:
    module: dict = {}
    exec(tiny.NET, module)
    return module["net"](3)


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 24, 2, stride=2, bias=False),
        nn.BatchNorm2d(24),
    )


@pytest.mark.parametrize("make", [tiny_net, torchvision.models.resnet18, torchvision.models.mobilenet_v2, transposed])
def test_the_float_twin_computes_what_the_network_does_without_quantizers(make):
    torch.manual_seed(0)
    assert_float_twin(prepared(make()), torch.randn(4, 3, 32, 32))


def test_the_float_twin_of_a_trained_network(trained):
    images = np.load(trained / "images.npz")["test_images"]
    checkpoint = load_checkpoint(trained / "model.qat")
    assert_float_twin(checkpoint.model, checkpoint.preprocessing.normalize(torch.tensor(images).permute(0, 3, 1, 2)))


def assert_float_twin(model: fx.GraphModule, x: torch.Tensor) -> None:
    twin = fold_float(model)
    with torch.no_grad():
        expected = without_quantizers(model)(x)
        assert (twin(x) - expected).norm() < 1e-5 * expected.norm()
        assert (model(x) - expected).norm() > 1e-3 * expected.norm(), "quantizers make no difference in this test"
    assert not any(
        isinstance(module, nn.BatchNorm2d | WeightQuantizer | ActivationQuantizer) for module in twin.modules()
    )
    folded = fold(model)[0]
    assert [node.name for node in twin.graph.nodes] == [
        node.name for node in folded.graph.nodes if not str(node.target).startswith("activation_quantizers.")
    ]


def test_an_uncalibrated_network_has_a_float_twin():
    model = prepared(tiny_net(), amax=float("nan"))
    assert fold_float(model)(torch.zeros(1, 3, 16, 16)).isfinite().all()
