"""What each operation's quantization costs: parts of a network in INT8, against the same by hand; the command."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from commands import Run
from torch import Tensor, nn

from qat.calibration.activation_ranges import calibrate_ranges
from qat.checkpoint import load_checkpoint
from qat.costs import Cost, PartlyQuantized, multiply_adds
from qat.evaluate import Accuracy
from qat.fake_quantize.prepare import activation_quantizers, prepare
from qat.fake_quantize.quantizer import fake_quantize, fake_quantize_weight, scale_from_amax
from qat.graph.tracing import network_of


class Network(nn.Module):
    """Two convolutions on the same input, one behind a reshape, and a functional one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x)) * torch.sigmoid(self.second(x))
        return self.fc(F.conv2d(y, self.kernel).relu().amax((2, 3)).flatten(1))


@pytest.fixture
def images() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 3) for n in (8, 5)]


@pytest.fixture
def network(images: list[tuple[Tensor, Tensor]]) -> PartlyQuantized:
    torch.manual_seed(0)
    model = Network().eval()
    prepared = prepare(model, input_shape=(3, 8, 8))
    with torch.no_grad():
        calibrate_ranges(prepared, [images[0][0]], "max")
    for quantizer in activation_quantizers(prepared).values():
        quantizer.amax.mul_(0.5)  # clips, so that quantization is worth noticing
    return PartlyQuantized(prepared, network_of(prepared), images)


def logits(found: PartlyQuantized, quantized: set[str], x: Tensor) -> Tensor:
    """The network by hand; what ``quantized`` names reads codes."""
    model = found.prepared
    amax = {name: quantizer.amax for name, quantizer in activation_quantizers(model).items()}

    def given(op: str, tensor: str, value: Tensor) -> Tensor:
        return fake_quantize(value, scale_from_amax(amax[tensor])) if op in quantized else value

    def weight(op: str, value: Tensor) -> Tensor:
        return fake_quantize_weight(value, 0) if op in quantized else value

    def conv(op: str) -> Tensor:
        layer = model.get_submodule(op)
        return F.conv2d(given(op, "x", x), weight(op, layer.weight), layer.bias, padding=1)

    y = F.relu(conv("first")) * torch.sigmoid(conv("second"))
    y = F.conv2d(given("conv2d", "mul", y), weight("conv2d", model.get_parameter("kernel"))).relu().amax((2, 3))
    fc = model.get_submodule("fc")
    (tensor,) = set(amax) - {"x", "mul"}
    return F.linear(given("fc", tensor, y), weight("fc", fc.weight), fc.bias)


@pytest.mark.parametrize(
    "quantized",
    [(), ("first",), ("second",), ("conv2d",), ("fc",), ("first", "fc"), ("first", "second", "conv2d", "fc")],
)
def test_any_part_of_a_network_in_int8(
    network: PartlyQuantized, images: list[tuple[Tensor, Tensor]], quantized: tuple[str, ...]
) -> None:
    assert set(network.ops) == {"first", "second", "conv2d", "fc"}
    with torch.no_grad():
        found = torch.cat([logits(network, set(quantized), x) for x, _ in images])
    labels = torch.cat([labels for _, labels in images])
    measured = network.measure(frozenset(quantized))
    assert measured.loss == pytest.approx(float(F.cross_entropy(found, labels)), rel=1e-5)
    assert measured.top1 == pytest.approx(100 * float((found.argmax(1) == labels).float().mean()))


def test_the_network_is_as_it_was(network: PartlyQuantized, images: list[tuple[Tensor, Tensor]]) -> None:
    x = images[0][0]
    with torch.no_grad():
        before = network.prepared(x)
        network.measure(frozenset({"first"}))
        assert torch.equal(network.prepared(x), before)
        torch.testing.assert_close(before, logits(network, set(network.ops), x))


def test_costs_of_every_operation(network: PartlyQuantized, images: list[tuple[Tensor, Tensor]]) -> None:
    costs = {cost.op: cost for cost in network.costs()}
    assert list(costs) == list(network.ops)
    for op, cost in costs.items():
        assert cost.loss_alone == network.measure(frozenset({op})).loss
        assert cost.loss_without == network.measure(network.all - {op}).loss
    x = images[0][0]
    with torch.no_grad():
        layer = network.prepared.get_submodule("first")
        exact = F.conv2d(x, layer.weight, layer.bias, padding=1)
        scale = scale_from_amax(activation_quantizers(network.prepared)["x"].amax)
        coarse = F.conv2d(fake_quantize(x, scale), fake_quantize_weight(layer.weight, 0), layer.bias, padding=1)
    expected = 10 * math.log10(float(exact.double().square().sum() / (coarse - exact).double().square().sum()))
    assert costs["first"].sqnr_db == pytest.approx(expected, abs=1e-3)
    work = {"first": 64 * 8 * 3 * 9, "second": 64 * 8 * 3 * 9, "conv2d": 64 * 8 * 8, "fc": 8 * 3}
    assert {op: multiply_adds(network.network[op]) for op in work} == work
    assert sum(cost.multiply_adds for cost in costs.values()) == pytest.approx(1)


def test_what_gains_most_is_kept_in_float_first(network: PartlyQuantized, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [Cost(op, op, "convolution", 30.0, 1.0, loss, 0.25) for op, loss in zip("abcd", (4, 1, 3, 2), strict=True)]
    top1 = {4: 90.0, 3: 90.5, 2: 91.0, 1: 92.0}  # by how many are quantized
    network.all = frozenset("abcd")
    monkeypatch.setattr(network, "measure", lambda quantized: Accuracy(top1[len(quantized)], 1.0, 100))
    assert [cost.op for cost, _ in network.keep_float(costs, 91.0)] == ["b", "d"]
    assert network.keep_float(costs, 91.0)[-1][1].top1 == 91.0
    assert network.keep_float(costs, 90.0) == []


# --- the command


def test_the_command_ranks_and_writes(trained: Path, tmp_path: Path, command: Run) -> None:
    found = tmp_path / "s.json"
    done = command("qat.sensitivity", str(trained / "model.qat"), "--json", str(found), "--target-drop", "100")
    assert (done.returncode, done.stderr) == (0, "")
    assert "12 images of the validation split: float" in done.stdout
    assert "nothing has to stay in float" in done.stdout
    content = json.loads(found.read_text())
    assert (content["images"], content["keep_float"]) == (12, [])
    assert [entry["label"] for entry in content["operations"]] == ["conv1", "conv2", "add", "adaptive_avg_pool2d", "fc"]
    assert all(entry["sqnr_db"] > 20 for entry in content["operations"])
    loaded = load_checkpoint(trained / "model.qat")
    assert loaded.sidecar.figures["qat"]["test_images"] == 60  # which is another split


def test_a_network_that_quantization_ruins_gets_a_list(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    from qat.base.artifact import read_sidecar, write_artifact
    from qat.sensitivity import SensitivityOptions, main

    ruined = tmp_path / "ruined.qat"
    tensors = load_file(trained / "model.qat")
    tensors["activation_quantizers.relu.amax"] *= 1e-6
    sidecar = dataclasses.replace(read_sidecar(trained / "model.qat", "checkpoint"))
    write_artifact(ruined, sidecar, lambda path: save_file(tensors, path))
    shutil.copy(trained / "net.py", tmp_path)
    main(SensitivityOptions(checkpoint=ruined, target_drop=0.0))
    said = " ".join(capsys.readouterr().out.split())
    assert "suggested: --keep-float" in said
    assert "of the multiply-adds then leave INT8" in said


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [("images", "0", "at least 1"), ("target-drop", "-1", "at least 0"), ("show", "-1", "at least 0")],
)
def test_options_out_of_range(trained: Path, command: Run, option: str, value: str, found: str) -> None:
    done = command("qat.sensitivity", str(trained / "model.qat"), f"--{option}", value)
    assert done.returncode == 2
    assert found in done.stderr
    assert len(done.stderr.splitlines()) == 1
