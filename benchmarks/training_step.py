"""Time of a training step with fake quantization against the float step: ResNet50, batch 16, 64 px, on the CPU.

    python benchmarks/training_step.py

Both run in one process, interleaved step by step, so that both see the same machine; medians are compared.
"""

import statistics
import time

import torch
import torch.nn.functional as F
import torchvision
from stamp import stamp
from torch import nn

from qat.compute.device import Compute
from qat.fake_quantize.prepare import prepare
from qat.fake_quantize.quantizer import ActivationQuantizer

STEPS, WARMUP, BATCH, PIXELS = 30, 4, 16, 64


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, labels: torch.Tensor) -> float:
    start = time.perf_counter()
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    float_model = torchvision.models.resnet50(num_classes=10, zero_init_residual=True).train()
    models = {"float": float_model, "quantized": prepare(float_model, input_shape=(3, PIXELS, PIXELS)).train()}
    for module in models["quantized"].modules():
        if isinstance(module, ActivationQuantizer):
            module.amax.fill_(4.0)
    forwards = {name: Compute(torch.device("cpu")).forward(model, BATCH, STEPS) for name, model in models.items()}
    optimizers = {name: torch.optim.AdamW(model.parameters(), 1e-4) for name, model in models.items()}
    x, labels = torch.randn(BATCH, 3, PIXELS, PIXELS), torch.randint(0, 10, (BATCH,))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for index in range(WARMUP + STEPS):
        for name, model in forwards.items():
            taken = step(model, optimizers[name], x, labels)
            if index >= WARMUP:
                seconds[name].append(taken)
    print(stamp("python benchmarks/training_step.py"))
    print(f"ResNet50, batch {BATCH}, {PIXELS} px, AdamW, median (fastest, slowest) of {STEPS} steps")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"  {name:10} {median[name] * 1e3:7.1f} ms  ({min(values) * 1e3:.1f}, {max(values) * 1e3:.1f})")
    print(f"  quantized / float: {median['quantized'] / median['float']:.3f}")


if __name__ == "__main__":
    main()
