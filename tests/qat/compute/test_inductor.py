"""What a compiled backward pass writes to memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx as inductor
from compiled import gradient_errors
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config, metrics
from torch._inductor.utils import fresh_cache

import qat.compute.inductor
from qat.calibration.activation_ranges import calibrate_ranges
from qat.compute.device import Compute
from qat.fake_quantize.prepare import prepare
from qat.fake_quantize.weight_ranges import learn_ranges

BLOCKS, SHAPE = 4, (4, 8, 16, 16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)) + x)


def network(quantized: bool) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Conv2d(8, 8, 1), *(Block() for _ in range(BLOCKS)))
    if quantized:
        model = prepare(model, input_shape=SHAPE[1:])
        calibrate_ranges(model, [torch.randn(SHAPE)], "max")
    return model.train()


@pytest.fixture
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(qat.compute.inductor, "_LARGE", 4 * 8 * 16 * 16)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[fx.Node]:
    """Fills with what ``write_shared`` returns."""
    found: list[fx.Node] = []
    write_shared = qat.compute.inductor.write_shared
    monkeypatch.setattr(qat.compute.inductor, "write_shared", lambda graph: found.extend(write_shared(graph)))
    return found


def trained_once(model: nn.Module, amp: torch.dtype = torch.float32) -> None:
    compute = Compute(torch.device("cpu"), amp, compiled=True)
    forward = compute.forward(model, SHAPE[0], steps=1)
    with compute.autocast():
        found = forward(torch.randn(SHAPE))
    found.float().square().mean().backward()
    assert forward.whole is not forward.model, "it could not be compiled"


def bytes_accessed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the kernels that inductor makes of a training step, by its own count."""
    metrics.reset()
    monkeypatch.setattr(inductor.inductor_metrics_log, "isEnabledFor", lambda level: True)
    with fresh_cache():
        trained_once(model)
    return metrics.num_bytes_accessed


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("amp", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("all_are_large")
def test_the_gradient_of_a_residual_sum_is_written_in_the_type_of_training(
    quantized: bool, amp: torch.dtype, written: list[fx.Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "compile_fx_inner", as_it_is)
    trained_once(network(quantized), amp)
    # The last block's comes from the loss alone, and a mask.
    values = [node.meta["val"] for node in written]
    assert [(tuple(value.shape), value.dtype) for value in values] == [(SHAPE, amp)] * (BLOCKS - 1)


def as_it_is(graph: fx.GraphModule, inputs: Any, **_: Any) -> Any:
    """In the place of inductor's compiler: the graph."""
    return make_boxed_func(graph)


def test_inductor_joins_more_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def noting(graph: fx.GraphModule, inputs: Any, **about: Any) -> Any:
        thresholds = config.realize_reads_threshold, config.realize_opcount_threshold
        found.append((about.get("is_backward", False), thresholds))
        return as_it_is(graph, inputs)

    usual = config.realize_reads_threshold, config.realize_opcount_threshold
    monkeypatch.setattr(inductor, "compile_fx_inner", noting)
    torch._dynamo.reset()
    trained_once(network(quantized=True))
    assert found == [(False, usual), (True, (8, 60))]
    assert usual[0] < 8


class Reordered(nn.Module):
    """Its residual sums are normalized over the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(BLOCKS):
            x = x + self.linear(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x


def learning() -> nn.Module:
    model = network(quantized=True)
    learn_ranges(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [partial(network, False), learning, Reordered])
@pytest.mark.usefixtures("all_are_large")
def test_gradients_stay_what_they_are(
    make: Callable[[], nn.Module], written: list[fx.Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = compiled_errors(make)
    assert written
    # Terms of a range's gradient cancel, and others remain where one code is another.
    assert all(error < (0.05 if "amax" in name else 1e-3) for name, error in errors.items()), errors
    monkeypatch.setattr(qat.compute.inductor, "write_shared", lambda graph: [])
    assert errors == pytest.approx(compiled_errors(make), abs=1e-5)


def compiled_errors(make: Callable[[], nn.Module]) -> dict[str, float]:
    torch.manual_seed(0)
    with fresh_cache():
        return gradient_errors(make(), "cpu", torch.float32, torch.randn(SHAPE))


@pytest.mark.slow
@pytest.mark.usefixtures("all_are_large")
def test_other_rules_do_not_find_what_these_have_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "inductor.py"
    other.write_text("another version")
    with fresh_cache():
        for file, misses in ((qat.compute.inductor.__file__, 1), (qat.compute.inductor.__file__, 0), (str(other), 1)):
            monkeypatch.setattr(qat.compute.inductor, "__file__", file)
            torch._dynamo.reset()
            counters.clear()
            trained_once(network(quantized=False))
            assert min(counters["aot_autograd"]["autograd_cache_miss"], 1) == misses


@pytest.mark.slow
@pytest.mark.usefixtures("all_are_large")
def test_a_step_of_a_quantized_network_accesses_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bytes_accessed(network(quantized=True), monkeypatch)
    monkeypatch.setattr(qat.compute.inductor, "write_shared", lambda graph: [])
    assert 0 < found < 0.9 * bytes_accessed(network(quantized=True), monkeypatch)
