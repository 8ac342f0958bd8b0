"""Simulation of fewer bits: which codes each layer has, what they compute, and that none of it is exported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx

from export import export_onnx
from qat.base.errors import UserError
from qat.base.number_format import low_bit_format
from qat.calibration.activation_ranges import calibrate_ranges
from qat.checkpoint import load_checkpoint
from qat.compute.fused_relu import fuse_relus
from qat.fake_quantize.low_bit import simulate_bits
from qat.fake_quantize.prepare import activation_quantizers, prepare, weights_and_quantizers
from qat.fake_quantize.quantizer import ACTIVATION, WEIGHT
from qat.fake_quantize.weight_ranges import learn_ranges, weight_amax_mse
from qat.options import TrainOptions
from qat.train import main as run

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(bits: int, method: Any = "max") -> fx.GraphModule:
    torch.manual_seed(0)
    prepared = prepare(torchvision.models.resnet18(num_classes=7), input_shape=(3, 32, 32))
    simulate_bits(prepared, bits)
    calibrate_ranges(prepared, [IMAGES], method)
    return prepared.eval()


def test_the_first_and_the_last_layer_keep_eight_bits_and_all_others_do_not() -> None:
    prepared = network(4)
    weights = {path: quantizer.format for path, _, quantizer in weights_and_quantizers(prepared)}
    eight = {"conv1.weight_quantizer", "fc.weight_quantizer"}
    assert {path for path, codes in weights.items() if codes == WEIGHT} == eight
    assert {codes for path, codes in weights.items() if path not in eight} == {low_bit_format(4, signed=True).narrow()}
    tensors = {name: quantizer.format for name, quantizer in activation_quantizers(prepared).items()}
    whole = {name for name, codes in tensors.items() if codes == ACTIVATION}
    assert whole == {"x", "flatten"}
    signed = {name for name, codes in tensors.items() if codes == low_bit_format(4, signed=True)}
    assert signed == {name for name in tensors if "downsample" in name} != set()
    assert {codes for name, codes in tensors.items() if name not in whole | signed} == {low_bit_format(4, signed=False)}


def test_tensors_that_cannot_be_negative_use_all_codes_for_what_they_hold() -> None:
    torch.manual_seed(0)
    for name in ("mobilenet_v2", "mobilenet_v3_large"):
        prepared = prepare(torchvision.models.get_model(name, num_classes=7).eval(), input_shape=(3, 32, 32))
        calibrate_ranges(prepared, [IMAGES], "max")
        lowest: dict[str, float] = {}
        for tensor, quantizer in activation_quantizers(prepared).items():
            quantizer.enabled = False
            quantizer.register_forward_hook(
                lambda _, given, __, tensor=tensor, lowest=lowest: lowest.update({tensor: given[0].min().item()})
            )
        prepared(IMAGES)
        simulate_bits(prepared, 4)
        unsigned = {
            key for key, one in activation_quantizers(prepared).items() if one.format == low_bit_format(4, signed=False)
        }
        assert len(unsigned) > 10
        assert all(lowest[key] >= 0 for key in unsigned)
        if name == "mobilenet_v2":
            signed = {key for key in lowest if key not in unsigned}
            assert not [key for key in signed if lowest[key] >= 0 and key != "flatten"]


@pytest.mark.parametrize(("kept", "eight"), [("conv1", {"fc"}), ("fc", {"conv1"})])
def test_keeping_an_end_in_float_leaves_all_others_at_few_bits(kept: str, eight: set[str]) -> None:
    prepared = prepare(torchvision.models.resnet18(num_classes=7), input_shape=(3, 32, 32), keep_float=[kept])
    simulate_bits(prepared, 4)
    weights = {path: quantizer.format for path, _, quantizer in weights_and_quantizers(prepared)}
    assert {path for path, codes in weights.items() if codes == WEIGHT} == {
        f"{name}.weight_quantizer" for name in eight
    }


def test_eight_bits_change_nothing() -> None:
    prepared = network(8)
    assert all(quantizer.format == ACTIVATION for quantizer in activation_quantizers(prepared).values())
    assert all(quantizer.format == WEIGHT for _, _, quantizer in weights_and_quantizers(prepared))


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_tensors_and_weights_take_no_more_values_than_there_are_codes(bits: int) -> None:
    prepared = network(bits)
    seen: dict[str, Tensor] = {}
    for name, quantizer in activation_quantizers(prepared).items():
        quantizer.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    prepared(IMAGES)
    for name, quantizer in activation_quantizers(prepared).items():
        codes = seen[name].unique() / (quantizer.amax / quantizer.format.high)
        assert (codes - codes.round()).abs().max() < 1e-3
        assert quantizer.format.low <= codes.min().round()
        assert codes.max().round() <= quantizer.format.high
    for _, weight, quantizer in weights_and_quantizers(prepared):
        high = quantizer.format.high
        rows = weight.flatten(1)
        step = rows.abs().amax(1, keepdim=True) / high
        want = (rows / step).round() * step
        assert torch.allclose(quantizer(weight).flatten(1), want, atol=1e-6)
        assert len((quantizer(weight)[0] / step[0]).round().unique()) <= 2 * high + 1


def test_one_operation_with_the_relu_computes_the_same() -> None:
    prepared = network(4)
    merged = fuse_relus(prepared)
    assert torch.equal(merged(IMAGES), prepared(IMAGES))
    learn_ranges(prepared)
    assert torch.equal(merged(IMAGES), prepared(IMAGES))


def test_ranges_are_chosen_for_the_codes_that_there_are() -> None:
    few, many = (activation_quantizers(network(bits, "mse")) for bits in (3, 8))
    clipped = [name for name in few if few[name].format.high < 127 and few[name].amax < 0.9 * many[name].amax]
    assert len(clipped) > len(few) / 2  # coarse codes gain more from clipping
    assert all(few[name].amax == many[name].amax for name in few if few[name].format == ACTIVATION)


def test_ranges_of_weights_are_those_of_the_least_error_of_their_codes() -> None:
    weight = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    codes = low_bit_format(4, signed=True).narrow()

    def error(amax: Tensor) -> Tensor:
        step = amax[:, None] / 7
        return ((weight / step).round().clamp(-7, 7) * step - weight).square().mean(1)

    largest = weight.abs().amax(1)
    tried = torch.stack([error(largest * share / 100) for share in range(1, 101)])
    assert torch.allclose(error(weight_amax_mse(weight, 0, codes)), tried.amin(0))
    assert (weight_amax_mse(weight, 0, codes) < weight_amax_mse(weight, 0)).all()


def test_learned_ranges_get_the_gradient_scale_of_their_codes() -> None:
    prepared = network(4)
    learn_ranges(prepared)
    quantizer = activation_quantizers(prepared)["layer1_0_relu"]
    x = torch.rand(50, generator=torch.Generator().manual_seed(2)) * 2 * quantizer.amax.detach()
    quantizer(x).sum().backward()
    scale = quantizer.amax.detach() / 15
    inside = x < quantizer.amax.detach()
    of_scale = torch.where(inside, (x / scale).round() - x / scale, torch.tensor(15.0)).sum()
    expected = of_scale / (50 * 15) ** 0.5 / 15  # of amax = 15 * scale
    assert quantizer.amax.grad is not None
    assert torch.allclose(quantizer.amax.grad, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated")
    run(TrainOptions(**tiny.options(folder, bits=4, learn_ranges=True)))
    return folder / "model.qat"


def test_a_checkpoint_computes_with_the_bits_that_it_was_trained_with(simulated: Path) -> None:
    checkpoint = load_checkpoint(simulated)
    codes = {path: quantizer.format for path, _, quantizer in weights_and_quantizers(checkpoint.model)}
    assert codes["conv2.weight_quantizer"] == low_bit_format(4, signed=True).narrow()
    coarse = copy.deepcopy(checkpoint.model)
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    before = coarse(x)
    for quantizer in activation_quantizers(coarse).values():
        quantizer.format = ACTIVATION
    assert not torch.equal(coarse(x), before)
    assert F.cosine_similarity(coarse(x).flatten(), before.flatten(), 0) > 0.5


def test_it_is_not_exported(simulated: Path) -> None:
    with pytest.raises(UserError, match=r"simulates U?INT4, which no engine computes: train with --bits 8"):
        export_onnx(simulated)


@pytest.mark.parametrize("bits", [1, 9, 0])
def test_bits_out_of_range_are_refused(tmp_path: Path, bits: int) -> None:
    with pytest.raises(UserError, match=f"--bits {bits} is out of range"):
        run(TrainOptions(**tiny.options(tmp_path, bits=bits)))
