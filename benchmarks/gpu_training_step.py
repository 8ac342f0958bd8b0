"""Time and memory of a training step with fake quantization against the float step, on a GPU.

    python -m benchmarks.gpu_training_step [--model resnet50] [--batch 256] [--pixels 224] [--json FILE]

A network by name (qat/models.py) in bfloat16, channels last, each step as qat.training.trainer.Fit does it (mixing of
images and logging aside): float and quantized, plain and compiled, and NVIDIA ModelOpt's where it is installed. All
take turns in one process, in blocks of steps without a pause between them; medians of the blocks are compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.calibration.activation_ranges import calibrate_ranges
from qat.compute.device import Compute
from qat.fake_quantize.prepare import prepare
from qat.models import ModelSpec, build_model
from qat.training.optimizer import make_optimizer
from qat.training.recipe import Recipe

CLASSES = 1000
ROUNDS, STEPS, WARM_UP = 12, 10, 3


class Step:
    """One variant: model, optimizer, and what they keep in memory between two steps."""

    def __init__(self, make: Callable[[], nn.Module], compute: Compute, images: int) -> None:
        torch.manual_seed(0)
        self.compute, model = compute, compute.place(make()).train()
        self.forward = compute.forward(model, images, STEPS * ROUNDS)
        recipe = Recipe(1, 1e-5, "cosine", 256, 1e-2, 0.0, 0)
        self.optimizer, self.scaler = make_optimizer(model, recipe), compute.scaler()
        self.milliseconds: list[float] = []
        self.peak = 0

    def step(self, x: Tensor, labels: Tensor) -> None:
        """Forward, backward, optimizer."""
        with self.compute.autocast():
            logits = self.forward(x)
        loss = F.cross_entropy(logits.float(), labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def measure_memory(self, x: Tensor, labels: Tensor) -> None:
        """Of the second step: after compilation, and before CUDA graphs take the memory that they have."""
        kept = allocated()
        if self.compute.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.step(x, labels)
        if self.compute.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated() - kept

    def measure(self, x: Tensor, labels: Tensor) -> None:
        """A block of steps, of which the first do not count."""
        for index in range(WARM_UP + STEPS):
            if index == WARM_UP:
                start = now()
            self.step(x, labels)
        self.milliseconds.append(1e3 * (now() - start) / STEPS)


def now() -> float:
    """Seconds, when all that was asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def network(name: str) -> nn.Module:
    return build_model(ModelSpec(name, CLASSES))


def quantized(name: str, x: Tensor) -> nn.Module:
    prepared = prepare(network(name), input_shape=tuple(x.shape[1:]))
    calibrate_ranges(prepared, [x[:4].cpu()], "max")
    return prepared


def modelopt(name: str, x: Tensor) -> nn.Module:
    import modelopt.torch.quantization as mtq

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(x[:4])

    model: nn.Module = mtq.quantize(network(name).to(x.device), mtq.INT8_DEFAULT_CFG, forward)
    return model


def steps(model: str, x: Tensor, labels: Tensor, device: torch.device) -> dict[str, dict[str, float]]:
    plain = Compute(device, torch.bfloat16, channels_last=True)
    compiled = Compute(device, torch.bfloat16, channels_last=True, compiled=True)
    variants: dict[str, tuple[Callable[[], nn.Module], Compute]] = {
        "float": (lambda: network(model), plain),
        "float, compiled": (lambda: network(model), compiled),
        "quantized": (lambda: quantized(model, x), plain),
        "quantized, compiled": (lambda: quantized(model, x), compiled),
    }
    if importlib.util.find_spec("modelopt"):
        variants["ModelOpt"] = (lambda: modelopt(model, x), plain)
    found = {}
    for name, (make, compute) in variants.items():
        start = now()
        found[name] = Step(make, compute, len(x))
        found[name].step(x, labels)
        print(f"{name}: first step after {now() - start:.1f} s", flush=True)
        found[name].measure_memory(x, labels)
    order = torch.Generator().manual_seed(0)
    for _ in range(ROUNDS):
        for index in torch.randperm(len(found), generator=order).tolist():
            list(found.values())[index].measure(x, labels)
    return {
        name: {
            "median_ms": round(statistics.median(step.milliseconds), 3),
            "low_ms": round(min(step.milliseconds), 3),
            "high_ms": round(max(step.milliseconds), 3),
            "peak_gib": round(step.peak / 2**30, 3),
        }
        for name, step in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    x = torch.randn(options.batch, 3, options.pixels, options.pixels, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (options.batch,), device=device)
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "model": options.model}
    found |= {"batch": options.batch, "pixels": options.pixels, "steps": steps(options.model, x, labels, device)}
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\n{name}, torch {torch.__version__}, {options.model}, {options.pixels} px, batch {options.batch}, bfloat16")
    for variant, step in found["steps"].items():
        spread = f"({step['low_ms']:.2f} to {step['high_ms']:.2f})"
        print(f"  {variant:22} {step['median_ms']:8.2f} ms {spread:22} {step['peak_gib']:7.2f} GiB in a step")
    base = found["steps"]["float, compiled"]["median_ms"]
    ours = found["steps"]["quantized, compiled"]["median_ms"]
    print(f"  quantized / float, compiled: {ours / base:.3f}")
    if "ModelOpt" in found["steps"]:
        print(f"  ModelOpt / quantized, compiled: {found['steps']['ModelOpt']['median_ms'] / ours:.3f}")


if __name__ == "__main__":
    main()
