"""Insertion of quantizers: keys, modes, numerics, and models that cannot be traced."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from qat.base.errors import UserError
from qat.fake_quantize.prepare import placement_of, prepare
from qat.fake_quantize.quantizer import ActivationQuantizer, WeightQuantizer, fake_quantize, fake_quantize_weight
from qat.graph.fx_network import function_name
from qat.graph.tracing import trace
from qat.rules.placement import Decision, Placement, QuantizedRead, QuantizedTensor

IMAGE = (3, 64, 64)


def set_ranges(model: nn.Module, amax: float) -> None:
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.amax.fill_(amax)


def test_float_keys_and_values_stay_and_only_ranges_are_added():
    model = torchvision.models.resnet18(num_classes=10)
    prepared = prepare(model, input_shape=IMAGE)
    before, after = model.state_dict(), prepared.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(
        key.startswith("activation_quantizers.") and key.endswith(".amax") for key in after.keys() - before.keys()
    )
    assert len(after.keys() - before.keys()) == len({t.quantizer for t in placement_of(prepared).tensors})


def test_prepare_leaves_the_float_model_alone():
    model = torchvision.models.resnet18(num_classes=10)
    prepared = prepare(model, input_shape=IMAGE)
    assert not any(isinstance(module, WeightQuantizer) for module in model.modules())
    next(prepared.parameters()).data.fill_(7.0)
    assert not (next(model.parameters()) == 7.0).any()


def test_it_computes_what_the_placement_says():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
    prepared = prepare(model, input_shape=(3, 8, 8))
    set_ranges(prepared, 2.0)
    x = torch.randn(2, 3, 8, 8)
    scale = torch.tensor(2.0) / 127
    hidden = F.conv2d(fake_quantize(x, scale), fake_quantize_weight(model[0].weight, 0), model[0].bias)
    want = F.conv2d(fake_quantize(hidden.relu(), scale), fake_quantize_weight(model[2].weight, 0), model[2].bias)
    assert torch.equal(prepared(x), want)


def test_gradients_reach_every_parameter():
    prepared = prepare(torchvision.models.resnet18(num_classes=10), input_shape=IMAGE).train()
    set_ranges(prepared, 4.0)
    prepared(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in prepared.parameters())


def test_switched_off_it_is_the_float_model():
    model = torchvision.models.resnet18(num_classes=10).eval()
    prepared = prepare(model, input_shape=IMAGE)
    for module in prepared.modules():
        if isinstance(module, (ActivationQuantizer, WeightQuantizer)):
            module.enabled = False
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(prepared(x), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(training):
    prepared = prepare(torchvision.models.resnet18(num_classes=10).train(training), input_shape=IMAGE)
    assert all(module.training is training for module in prepared.modules())


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), 0.5, training=self.training)


def test_functional_dropout_follows_train_and_eval():
    traced = trace(FunctionalDropout(), (3, 8, 8))
    x = torch.randn(1, 3, 8, 8)
    assert (traced.train()(x) == 0).any()
    assert not (traced.eval()(x) == 0).any()


def test_a_module_called_twice_has_one_weight_quantizer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.relu(self.conv(x)))

    prepared = prepare(Twice(), input_shape=(16, 4, 4))
    set_ranges(prepared, 4.0)
    assert sum(isinstance(module, WeightQuantizer) for module in prepared.modules()) == 1
    assert prepared(torch.randn(1, 16, 4, 4)).shape == (1, 16, 4, 4)


class DependsOnValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_an_untraceable_model_is_one_line_that_names_the_line():
    with pytest.raises(UserError, match=r"test_prepare\.py:\d+: if x\.sum\(\) > 0") as error:
        prepare(DependsOnValues(), input_shape=(3, 8, 8))
    assert "\n" not in str(error.value)


def test_the_placement_of_another_model_is_refused():
    placement = placement_of(prepare(torchvision.models.resnet18(), input_shape=IMAGE))
    with pytest.raises(UserError, match="made for another model"):
        prepare(nn.Sequential(nn.Conv2d(3, 16, 3)), placement, input_shape=(3, 8, 8))


def test_the_weight_of_a_transposed_convolution_has_one_scale():
    model = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, stride=2))
    read = QuantizedTensor("input_1", "input_1", (QuantizedRead("_0", "weighted_input"),))
    decision = Decision("_0", "0", "transposed_convolution", True, "weighted_input")
    prepared = prepare(model, Placement((read,), (decision,)), input_shape=(16, 4, 4))
    set_ranges(prepared, 4.0)
    x = torch.randn(1, 16, 4, 4)
    want = F.conv_transpose2d(
        fake_quantize(x, torch.tensor(4.0) / 127),
        fake_quantize_weight(model[0].weight, None),
        model[0].bias,
        stride=2,
    )
    assert torch.equal(prepared(x), want)


def test_a_branch_of_training_follows_the_mode():
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.training else x

    prepared, x = prepare(Branch(), input_shape=(3, 8, 8)), torch.randn(1, 3, 8, 8)
    assert torch.equal(prepared.train()(x), 2 * x)
    assert torch.equal(prepared.eval()(x), x)


def test_a_node_named_like_a_method_of_modules():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.to(torch.float32))

    assert list(prepare(Cast(), input_shape=(3, 8, 8)).activation_quantizers._modules) == ["to_"]


def test_an_operation_in_place_is_what_later_readers_read():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(16, 16, 1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            self.relu(x)  # nobody takes its answer
            y = self.conv(x)
            y += x
            F.relu(y, inplace=True)
            return self.conv(y)

    model = InPlace()
    found = placement_of(prepare(model, input_shape=(16, 4, 4)))
    reads = {t.tensor: [read.reader for read in t.reads] for t in found.tensors}
    assert reads == {"relu": ["conv", "add"], "relu_1": ["conv_1"]}
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(trace(model, (16, 4, 4))(x), model(x))


def test_what_nobody_uses_is_not_quantized():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.unused = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.conv(x)

    assert [decision.op for decision in placement_of(prepare(Dead(), input_shape=(16, 4, 4))).decisions] == ["conv"]


def same_without_quantizers(model: nn.Module, *shape: int) -> bool:
    """Whether the prepared model, its quantizers switched off, computes what the model does in evaluation."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    prepared = prepare(model.eval(), input_shape=shape[1:])
    for module in prepared.modules():
        if isinstance(module, (ActivationQuantizer, WeightQuantizer)):
            module.enabled = False
    return torch.allclose(prepared.eval()(x), model(x), atol=1e-5)


class Masks(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        positive = x > 0
        small = positive & (x < 0.5)
        return self.conv(torch.where(small, x, -x) + torch.where(positive, x, 3 * x))


class Named(nn.Module):
    """Arguments by their names, in an order of their own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 16, 1, 1)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(input=self.conv(input=x))
        return torch.flatten(input=F.conv2d(bias=self.bias, weight=self.weight, input=x), start_dim=1)


class Swapped(nn.Module):
    """Halves of the channels change places; their order comes from a tuple that is never taken apart."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat(self.conv(x).chunk(2, 1)[::-1], 1))


class Indices(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x) + (x.argmax(1, keepdim=True) + x.argmin(1, keepdim=True)))


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(sum([self.first(x.flatten(2).mT).mean(1), x.mean((2, 3))]))


@pytest.mark.parametrize("make", [Masks, Named, Swapped, Indices, Turned])
def test_odd_ways_to_write_a_network(make):
    model = make()
    assert same_without_quantizers(model, 2, 16, 4, 4)
    assert any(decision.quantized for decision in placement_of(prepare(model, input_shape=(16, 4, 4))).weights)


def test_a_functional_dropout_of_channels_follows_the_mode():
    class Dropped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout2d(x, 0.5, training=self.training)

    assert same_without_quantizers(Dropped(), 2, 16, 4, 4)


def test_arguments_may_depend_on_the_mode():
    class Mode(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(x, 0.1 if self.training else 0.2)

    model, x = Mode(), torch.randn(4, 16, 4, 4)
    prepared = prepare(model, input_shape=(16, 4, 4))
    for training in (True, False):
        assert torch.equal(prepared.train(training)(x), model.train(training)(x))


def test_a_model_that_learns_otherwise_than_its_trace_is_for_evaluation_only():
    """The model makes its statistics anew at every call; a trace would keep them."""

    class Forgets(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, torch.zeros(16), torch.ones(16), training=self.training)

    prepared, x = prepare(Forgets(), input_shape=(16, 4, 4)), torch.randn(4, 16, 4, 4)
    assert torch.equal(prepared(x), Forgets().eval()(x))
    with pytest.raises(UserError, match=r"cannot be trained: .* the statistics that move .*; it can be calibrated"):
        prepared.train()
    with pytest.raises(UserError, match=r"python -m qat\.calibrate takes it"):
        prepare(Forgets(), input_shape=(16, 4, 4), training=True)


class ChangedThroughView(nn.Module):
    """Writes through a view of a view and reads the whole."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.transpose(2, 3)[:, :8].add_(1)
        return y


class ChangedBehindView(nn.Module):
    """Takes half of a tensor, writes to the whole, and reads the half."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        half = y.chunk(2, 1)[0]
        return y.relu_() + torch.cat([half, half], 1)


@pytest.mark.parametrize("make", [ChangedThroughView, ChangedBehindView])
def test_what_a_view_hides_of_an_operation_in_place_is_refused(make):
    with pytest.raises(UserError, match=r"in place, and .* then reads the same memory through .*: write it without"):
        trace(make(), (16, 4, 4))


class Accumulates(nn.Module):
    """Another name for the same tensor sees ``+=``; another name for the same number does not."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        skip, count = y, x.size(1)
        channels = count
        y += 1
        y -= x
        y *= skip
        y /= 3
        count += 1
        return (skip + y).flatten(1)[:, : channels + count]


def test_assignment_in_place_changes_every_name_of_a_tensor():
    x, traced = torch.randn(2, 4, 3, 3), trace(Accumulates(), (4, 3, 3))
    assert torch.equal(traced(x.clone()), Accumulates()(x.clone()))
    assert not any(function_name(node) in ("iadd", "isub", "imul", "itruediv") for node in traced.graph.nodes)


class ViewsThatAreLeft(nn.Module):
    """Changes a view whose owner is read before, or asked for its size only."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        total = y.sum()
        flat = y.flatten(1)
        return (flat.relu_() + total).view(y.shape)


def test_a_view_changed_in_place_after_its_owner_was_read_is_fine():
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(trace(ViewsThatAreLeft(), (4, 3, 3))(x), ViewsThatAreLeft()(x))


def test_a_parameter_that_two_modules_share_is_one_weight():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.first(x)))

    kept = placement_of(prepare(Tied(), input_shape=(16, 4, 4), keep_float=["second"]))
    assert [(d.quantized, d.rule) for d in kept.weights] == [(False, "shared_weight"), (False, "kept_float")]
    prepared = prepare(Tied(), input_shape=(16, 4, 4))
    assert prepared.first.weight is prepared.second.weight
    assert [d.quantized for d in placement_of(prepared).weights] == [True, True]


def test_an_image_that_the_model_does_not_take_is_one_line():
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(UserError, match=r"Two\.forward also needs y: give the shapes of all inputs by name"):
        prepare(Two(), input_shape=(3, 8, 8))
    with pytest.raises(UserError, match=r"the model does not take x 3x8x8 and y 3x8x9: .*size of tensor a"):
        prepare(Two(), input_shape={"x": (3, 8, 8), "y": (3, 8, 9)})


def test_a_long_chain_of_data_movement():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(1100):
                x = x.transpose(2, 3)
            return self.conv(x) + self.conv(F.dropout(x, training=self.training))

    assert len(placement_of(prepare(Chain(), input_shape=(16, 8, 8))).weights) == 2
