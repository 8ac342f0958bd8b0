"""A ReLU and its quantizer as one operation: the same codes, the same gradients, one mask instead of two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qat.compute.device import Compute
from qat.compute.fused_relu import FusedReluQuantizer, fuse_relus
from qat.fake_quantize.prepare import activation_quantizers, prepare
from qat.fake_quantize.quantizer import ActivationQuantizer
from qat.fake_quantize.weight_ranges import learn_ranges


class Net(nn.Module):
    """Two convolutions, a norm and a shortcut; each ReLU is written in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        y = F.relu(self.second(x))
        return self.last((x + y).relu_()).mean((2, 3))


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(seed))


def prepared(model: nn.Module, amax: float = 1.0) -> fx.GraphModule:
    made = prepare(model, input_shape=(8, 6, 6))
    for quantizer in activation_quantizers(made).values():
        quantizer.amax.fill_(amax)
    return made


def merged_in(model: nn.Module) -> list[FusedReluQuantizer]:
    return [module for module in fuse_relus(model).modules() if isinstance(module, FusedReluQuantizer)]


@pytest.mark.parametrize("learned", [False, True])
def test_outputs_and_gradients_are_those_of_two_operations_bitwise(learned: bool):
    torch.manual_seed(0)
    model = prepared(Net())
    if learned:
        learn_ranges(model)
    found = []
    for network in (model, fuse_relus(model)):
        x = images().requires_grad_()
        output = network(x)
        output.square().sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        found.append({"output": output.detach(), "x": x.grad, **gradients})
        model.zero_grad()
    assert len(merged_in(model)) == 3
    for name, expected in found[0].items():
        assert expected.abs().sum() > 0, name
        assert torch.equal(found[1][name], expected), name


@pytest.mark.parametrize("learned", [False, True])
def test_at_zero_and_at_the_ends_of_the_range(learned: bool):
    quantizer = ActivationQuantizer()
    quantizer.amax.fill_(127.0)
    if learned:
        quantizer.learn()
    values = torch.tensor([-300.0, -0.6, -0.0, 0.0, 1e-30, 0.4, 126.6, 127.0, 127.0001, 500.0])
    for function in (lambda x: quantizer(F.relu(x)), quantizer.fake_quantize_relu):
        x = values.clone().requires_grad_()
        output = function(x)
        output.sum().backward()
        assert output.tolist() == [0, 0, 0, 0, 0, 0, 127, 127, 127, 127]
        assert x.grad.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]


def test_modules_and_their_state_are_shared():
    model = prepared(Net())
    merged = fuse_relus(model)
    before = model.norm.running_mean.clone()
    merged.train()(images())
    assert not torch.equal(model.norm.running_mean, before)
    assert {id(p) for p in merged.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("state", ["observed", "disabled"])
def test_while_the_quantizer_only_passes_its_input_the_relu_stays(state: str):
    model, seen = prepared(Net()), []

    class Observer(nn.Module):
        def forward(self, x: Tensor) -> None:
            seen.append(x)

    merged = fuse_relus(model)
    for quantizer in activation_quantizers(model).values():
        quantizer.observer, quantizer.enabled = (Observer() if state == "observed" else None), state != "disabled"
    assert torch.equal(merged.eval()(images()), model.eval()(images()))
    if state == "observed":
        assert [torch.equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True)] == [True] * 4
        assert min(x.min() for x in seen[1:4]) == 0


class TwoReaders(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        return self.second(x) + x.sigmoid()  # reads the float tensor


class InputReadAgain(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(F.relu(x)) + x.sigmoid()


class OtherFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu6(self.first(x)))


@pytest.mark.parametrize("make", [TwoReaders, InputReadAgain, OtherFunction])
def test_what_others_read_or_what_is_no_relu_is_not_merged(make: Callable[[], nn.Module]):
    torch.manual_seed(0)
    model = prepared(make())
    assert merged_in(model) == []
    assert torch.equal(fuse_relus(model).eval()(images()), model.eval()(images()))


def saved_masks(network: nn.Module, x: Tensor) -> int:
    """Bytes of the masks that a compiled forward pass keeps for the backward pass."""
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() if tensor.dtype == torch.bool else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.compile(network, backend="aot_eager_decomp_partition", fullgraph=True)(x)
    return sum(sizes)


def test_a_compiled_step_keeps_one_byte_an_element_and_not_more():
    torch.manual_seed(0)
    model, x = prepared(Net()).train(), images()
    merged = Compute(torch.device("cpu")).forward(model, len(x), steps=1)
    separate = saved_masks(model, x)
    torch._dynamo.reset()
    assert 0 < 2 * saved_masks(merged, x) <= separate
