"""Images per second of quantization-aware training on one GPU and on several of one machine.

    python -m benchmarks.gpu_scaling [--batch 256] [--json FILE]
    torchrun --nproc-per-node 2 -m benchmarks.gpu_scaling [--batch 256] [--json FILE]

ResNet50, 224 px, bfloat16, channels last, compiled, ``--batch`` images on each GPU, steps as those of
qat.training.trainer.Fit. Median of blocks of steps without a pause between them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu_training_step import CLASSES, ROUNDS, STEPS, Step, quantized
from qat.compute.device import Compute
from qat.compute.processes import process_group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    alone = Compute.from_options("auto", "bfloat16", True)
    with process_group(alone.device) as processes:
        compute = replace(alone, processes=processes)
        torch.manual_seed(processes.rank)
        x = torch.randn(options.batch, 3, options.pixels, options.pixels, device=compute.device)
        x = x.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, CLASSES, (options.batch,), device=compute.device)
        step = Step(lambda: quantized("resnet50", x), compute, len(x))
        for _ in range(ROUNDS):
            step.measure(x, labels)
        median = processes.mean(statistics.median(step.milliseconds))
        if processes.is_main:
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
            found = {
                "device": device,
                "torch": torch.__version__,
                "processes": processes.world_size,
                "batch": options.batch,
            }
            found |= {
                "median_ms": round(median, 3),
                "images_per_second": round(1e3 * processes.world_size * len(x) / median, 1),
            }
            found |= {"low_ms": min(step.milliseconds), "high_ms": max(step.milliseconds), "steps": STEPS * ROUNDS}
            print(json.dumps(found))
            if options.json is not None:
                options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
