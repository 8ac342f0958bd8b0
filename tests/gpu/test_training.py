"""Training on a GPU: what is computed there is what the CPU computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch")

from compiled import gradient_errors
from processes import NET, train
from safetensors.torch import load_file
from torchvision.models import resnet18

from qat.base.artifact import read_sidecar
from qat.base.errors import UserError
from qat.calibration.activation_ranges import calibrate_ranges, choose_ranges
from qat.calibration.adaround import adaround
from qat.calibration.histogram import BINS, HistogramObserver, check_finite
from qat.checkpoint import load_checkpoint
from qat.compute.device import Compute
from qat.compute.precision import exact_float32
from qat.data.batches import batches as batches_of
from qat.data.splits import load_data
from qat.fake_quantize.prepare import prepare, weights_and_quantizers
from qat.fake_quantize.weight_ranges import learn_ranges
from qat.models import ModelSpec, build_model
from qat.options import TrainOptions
from qat.train import main as run
from qat.training.recipe import Recipe
from qat.training.trainer import Fit

DEVICE = "cuda"

# Inductor's advice about float32, and a warning that it provokes and drops; as errors they end the compilation.
pytestmark = [
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]


def batches(scale: float = 1.0) -> list[torch.Tensor]:
    """Of every size that kernels treat differently, zeros first, growing."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 31, 1025, 70_001, 3_000_000)
    normal = [scale * 3**index * torch.randn(size, generator=generator) for index, size in enumerate(sizes)]
    return [torch.zeros(5), *normal, normal[-1].relu(), torch.zeros(10_000)]


def observed(on: str, tensors: list[torch.Tensor]) -> HistogramObserver:
    observer = HistogramObserver("x", on)
    for x in tensors:
        observer(x.to(on))
    return observer


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_counts_are_those_of_the_cpu(scale: float):
    cpu, gpu = (observed(on, batches(scale)) for on in ("cpu", "cuda"))
    assert (gpu.amax, gpu.limit.item()) == (cpu.amax, cpu.limit.item())
    assert gpu.counts.sum() == cpu.counts.sum()
    # A value at the edge of two bins may fall into either one, by float32 rounding.
    off = (gpu.counts.cpu().cumsum(0) - cpu.counts.cumsum(0)).abs()
    assert off.max() <= 2e-5 * cpu.counts.sum()
    for method in ("max", "percentile", "mse", "entropy"):
        (one,), (other,) = choose_ranges([cpu], method), choose_ranges([gpu], method)
        assert one == pytest.approx(other, abs=3 * cpu.limit.item() / BINS)


def test_growth_by_more_than_all_bins():
    gpu = observed(DEVICE, [torch.full((7,), 1e-20), torch.tensor([3.0, 1e20])])
    assert gpu.counts[0] == 8
    assert gpu.counts.sum() == 9
    assert gpu.limit >= gpu.amax == pytest.approx(1e20)


def test_growth_merges_bins():
    x = torch.rand(5_000, generator=torch.Generator().manual_seed(2))
    x[0] = 1.0
    before, after = observed(DEVICE, [x]), observed(DEVICE, [x, torch.tensor([6.5])])
    assert after.limit == 8
    assert torch.equal(after.counts[: BINS // 8], before.counts.view(-1, 8).sum(dim=1))


def test_memory_layout_does_not_matter():
    x = torch.randn(2, 6, 5, 4)
    views = (
        x.to(memory_format=torch.channels_last),
        x.permute(2, 0, 3, 1),
        x[:, ::2, 1:],
        x[..., ::2],  # one stride reaches all elements
        x[0, 0, 0, :1].expand(3, 7),
    )
    for view in views:
        assert torch.equal(observed(DEVICE, [view]).counts, observed(DEVICE, [view.contiguous()]).counts)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_names_the_tensor(bad: float):
    with pytest.raises(UserError, match="in tensor x"):
        check_finite([observed(DEVICE, [torch.ones(3), torch.tensor([1.0, bad])])])


def test_images_in_the_memory_of_the_gpu_make_the_same_batches(tmp_path: Path):
    random = np.random.default_rng(0)
    arrays = {
        f"{split}_images": random.integers(0, 256, (90, 32, 32, 3), dtype=np.uint8) for split in ("train", "test")
    }
    np.savez(tmp_path / "data.npz", **arrays, train_labels=np.arange(90) % 3, test_labels=np.arange(90) % 3)
    data = load_data(str(tmp_path / "data.npz"), None, 0)
    moved = data.on(torch.device(DEVICE))
    for split in ("train", "test"):
        ours, theirs = (batches_of(getattr(one, split), 16, 5, epoch=1) for one in (data, moved))
        for (x, labels), (moved_x, moved_labels) in zip(ours, theirs, strict=True):
            assert moved_x.is_cuda
            assert moved_labels.is_cuda
            assert x.is_pinned()
            assert torch.equal(x, moved_x.cpu())
            assert torch.equal(labels, moved_labels.cpu())


def trained(folder: Path, **changes: Any) -> dict[str, float]:
    """What a run of the whole pipeline measured of the network that it trained with quantization."""
    options = TrainOptions(**tiny.options(folder, **({"device": DEVICE} | changes)))
    run(options)
    found: dict[str, float] = read_sidecar(options.output, "checkpoint").figures["qat"]
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"cutmix": 1.0}, {"mixup": 0.2, "ema": 0.9, "clip_norm": 1.0, "accumulate": 2}],
    ids=lambda changes: "-".join(changes) or "plain",
)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(("learns", "compiled"), [(False, False), (True, False), (True, True)])
def test_no_step_waits_for_the_gpu(changes: dict[str, Any], learns: bool, compiled: bool, tmp_path: Path):
    """While the GPU computes a step the next ones are sent; only where the loss is looked at, the CPU waits."""
    random, compute = np.random.default_rng(0), Compute.from_options(DEVICE, "bfloat16", compiled)
    images, labels = random.integers(0, 256, (400, 32, 32, 3), dtype=np.uint8), np.arange(400) % 3
    splits = {"train_images": images, "train_labels": labels, "test_images": images[:9], "test_labels": labels[:9]}
    np.savez(tmp_path / "data.npz", **splits)
    data = load_data(str(tmp_path / "data.npz"), None, 0).on(compute.device)
    model = prepare(resnet18(num_classes=3), input_shape=(3, 32, 32))
    calibrate_ranges(model, [torch.randn(8, 3, 32, 32)], "max")
    if learns:
        learn_ranges(model)
    fit = Fit("qat", compute.place(model), data, Recipe(1, 1e-4, "cosine", 16, 0.05, 0.1, 0, **changes), compute)
    steps = fit._epoch()
    for _ in range(4):  # what is made once, CUDA graphs too
        next(steps)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(10):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("amp", [torch.float32, torch.bfloat16])
def test_compiled_gradients_are_those_of_the_network_as_it_is(amp: torch.dtype, learns: bool, tmp_path: Path):
    tiny.options(tmp_path)  # which writes its files
    torch.manual_seed(0)
    x = torch.randn(32, 3, 16, 16)
    model = prepare(build_model(ModelSpec(f"{tmp_path / 'net.py'}:net", 3)), input_shape=(3, 16, 16))
    calibrate_ranges(model, [x], "mse")
    if learns:
        learn_ranges(model)
    model.get_submodule("dropout").p = 0.0  # compiled code draws other random numbers
    errors = gradient_errors(model, DEVICE, amp, x)
    assert errors
    bound = 1e-2 if amp == torch.float32 else 0.3
    assert all(error < bound for error in errors.values()), errors


@pytest.mark.parametrize("amp", ["float32", "bfloat16", "float16"])
def test_training_learns_in_every_type(amp: str, tmp_path: Path):
    on_cpu = trained(tmp_path, device="cpu", float_epochs=4)
    on_gpu = trained(tmp_path, amp=amp, float_epochs=4)
    assert on_cpu["test_top1"] > 60  # of three classes
    assert on_gpu["test_top1"] > on_cpu["test_top1"] - 15
    weights = [weight for _, weight, _ in weights_and_quantizers(load_checkpoint(tmp_path / "model.qat").model)]
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights)


@pytest.mark.parametrize(
    "changes",
    [
        {"compile": True},
        {"compile": True, "accumulate": 2},
        {"compile": True, "learn_ranges": True, "ema": 0.9},
        {"compile": True, "distill": 0.5, "distill_features": 0.5},
        {"bits": 4, "learn_ranges": True, "mixup": 0.2},
        {"progressive": 1, "accumulate": 2, "clip_norm": 1.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_run_that_was_stopped_goes_on(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    whole = trained(tmp_path, **changes)
    assert "torch.compile failed" not in " ".join(capfd.readouterr().err.split())
    with monkeypatch.context() as patch:
        tiny.stop_in_steps(patch, lambda step: step == tiny.FLOAT_STEPS + tiny.STEPS + 3)
        with pytest.raises(tiny.Stopped):
            trained(tmp_path, save_seconds=0.0, **changes)
    resumed = trained(tmp_path, resume=True, save_seconds=0.0, **changes)
    assert resumed["test_loss"] == pytest.approx(whole["test_loss"], rel=0.1)  # sums on a GPU have no fixed order


def test_a_model_on_the_gpu_is_prepared_and_rounded_there(tmp_path: Path):
    tiny.options(tmp_path)  # which writes its files
    torch.manual_seed(0)
    x = torch.randn(32, 3, 16, 16)
    prepared = {}
    for device in ("cpu", DEVICE):
        torch.manual_seed(1)
        model = build_model(ModelSpec(f"{tmp_path / 'net.py'}:net", 3)).eval().to(device)
        prepared[device] = prepare(model, input_shape=(3, 16, 16))
        with exact_float32():
            calibrate_ranges(prepared[device], [x.to(device)], "mse")
        found = adaround(prepared[device], [x.to(device)], steps=100)
        assert all(layer.mse <= layer.mse_nearest for layer in found)
    on_cpu, on_gpu = (prepared[device](x.to(device)).detach().cpu() for device in ("cpu", DEVICE))
    assert torch.nn.functional.cosine_similarity(on_cpu.flatten(), on_gpu.flatten(), 0) > 0.99
    for _, weight, quantizer in weights_and_quantizers(prepared[DEVICE]):
        assert weight.device.type == DEVICE
        assert torch.equal(quantizer(weight), weight)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="training on several GPUs: torch finds fewer than two")
@pytest.mark.parametrize("changes", [{}, {"compile": "True"}, {"accumulate": 2}], ids=lambda changes: "-".join(changes))
def test_two_gpus_train_the_network_that_one_trains(changes: dict[str, Any], tmp_path: Path):
    (tmp_path / "plain.py").write_text(NET)
    found = {}
    for gpus in (1, 2):
        output = tmp_path / f"{gpus}.qat"
        about = {"model": f"{tmp_path / 'plain.py'}:net", "output": output, "device": DEVICE, "amp": "float32"}
        done = train(tmp_path, gpus, seconds=300, batch_size=16, float_epochs=6, float_lr=2e-2, **about, **changes)
        assert done.returncode == 0, done.stderr
        assert "torch.compile failed" not in " ".join(done.stderr.split())
        found[gpus] = load_file(output), read_sidecar(output, "checkpoint").figures
    (one, figures), (two, figures_of_two) = found.values()
    for key in ("float", "ptq", "qat"):
        assert figures_of_two[key]["test_loss"] == pytest.approx(figures[key]["test_loss"], abs=0.02)
    ranges = [name for name in one if name.endswith(".amax")]
    assert ranges
    for name in ranges:
        torch.testing.assert_close(two[name], one[name], rtol=0.05, atol=1e-4)
