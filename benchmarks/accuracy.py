"""What quantization costs in accuracy, and what training gives back, beside a float network trained as much longer.

    python -m benchmarks.accuracy float cifar10 --data cifar10.npz --seed 0 --folder runs/accuracy
    python -m benchmarks.accuracy qat cifar10 --data cifar10.npz --seed 0 --folder runs/accuracy
    python -m benchmarks.accuracy table runs/accuracy/*.jsonl

The second argument is a setting (SETTINGS), the first a group of rows (GROUPS) or 'table'. 'float' comes first: it
leaves the network that the others start from. Each group adds its rows to a file of its own, so that several can run at
once. All train in one loop, qat.training.trainer.Fit, on the same images in the same order. Epochs are chosen on the
validation split; top-1 is of the test split.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx, nn

from qat.base.choices import Calibrator
from qat.calibration.activation_ranges import observe, set_ranges
from qat.calibration.adaround import adaround
from qat.compute.device import Compute
from qat.compute.precision import exact_float32
from qat.compute.processes import SINGLE_PROCESS, Processes, process_group
from qat.data.batches import batch_count
from qat.data.splits import Data, load_data
from qat.evaluate import evaluate, inputs
from qat.fake_quantize.low_bit import simulate_bits
from qat.fake_quantize.prepare import prepare
from qat.fake_quantize.weight_ranges import learn_ranges
from qat.graph.tracing import network_of, trace
from qat.models import ModelSpec, build_model
from qat.training.loss import CrossEntropy, Distillation, stage_ends
from qat.training.recipe import DistillationSettings, Recipe
from qat.training.trainer import Fit

METHODS: tuple[Calibrator, ...] = ("max", "percentile", "mse", "entropy")


@dataclass(frozen=True)
class Setting:
    """A network, and how it is trained: first float, then the same in float again (the control) or quantized."""

    model: str
    pixels: int
    batch: int
    float_epochs: int
    float_lr: float
    qat_epochs: int
    qat_lr: float
    stress_epochs: int = 0
    stress_lr: float = 0.0
    label_smoothing: float = 0.1
    weight_decay: float = 0.05
    cutmix: float = 0.0
    """Of the float training."""
    adaround_steps: int = 1000
    compiled: bool = False

    def recipe(self, seed: int, epochs: int, lr: float, schedule: Any, **changes: Any) -> Recipe:
        """Of one phase."""
        common = {"batch_size": self.batch, "weight_decay": self.weight_decay, "label_smoothing": self.label_smoothing}
        return Recipe(epochs, lr, schedule, seed=seed, **(common | changes))


def _photographs(model: str) -> Setting:
    return Setting(model, pixels=128, batch=64, float_epochs=60, float_lr=2e-3, qat_epochs=6, qat_lr=1e-4)


SETTINGS = {
    "cifar10": Setting(
        "benchmarks/cifar_models.py:resnet50",
        pixels=32,
        batch=256,
        float_epochs=60,
        float_lr=2e-3,
        qat_epochs=5,
        qat_lr=4e-5,
        stress_epochs=10,
        stress_lr=1e-4,
        cutmix=1.0,
        label_smoothing=0.0,
        compiled=True,
    ),
    "cifar10-vit": Setting(
        "benchmarks/cifar_models.py:vit",
        pixels=32,
        batch=256,
        float_epochs=100,
        float_lr=1e-3,
        qat_epochs=5,
        qat_lr=2e-5,
        cutmix=1.0,
        compiled=True,
    ),
    "flowers-deit_tiny": replace(_photographs("benchmarks/cifar_models.py:deit"), float_lr=5e-4, qat_lr=2e-5),
    "flowers-resnet18": _photographs("resnet18"),
    "flowers-mobilenet_v2": _photographs("mobilenet_v2"),
    "flowers-mobilenet_v3_large": _photographs("mobilenet_v3_large"),
    "flowers-efficientnet_b0": _photographs("efficientnet_b0"),
}


class Rows:
    """One seed of one setting: trains, measures, and writes a line for each row."""

    def __init__(
        self, name: str, group: str, options: argparse.Namespace, processes: Processes = SINGLE_PROCESS
    ) -> None:
        self.name, self.setting, self.seed, self.workers = name, options.setting_used, options.seed, options.workers
        self.folder: Path = options.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / f"{name}-{group}-{self.seed}.jsonl"
        self.weights = self.folder / f"{name}-{self.seed}.safetensors"
        plain = Compute.from_options("auto")
        self.compute = replace(
            plain, compiled=self.setting.compiled and plain.device.type == "cuda", processes=processes
        )
        self.data: Data = load_data(options.data, self.setting.pixels, self.seed).on(self.compute.device)
        torch.manual_seed(self.seed)
        self.spec = ModelSpec(self.setting.model, len(self.data.class_names))
        self.model = build_model(self.spec)

    def float_network(self) -> nn.Module:
        """The trained float network, on the device."""
        model = build_model(self.spec)
        model.load_state_dict(safetensors.torch.load_file(self.weights))
        return self.compute.place(model)

    def quantized(self, bits: int = 8) -> tuple[fx.GraphModule, dict[str, Any]]:
        """The network with quantizers, and what they saw of the calibration images."""
        side = self.data.preprocessing
        prepared = prepare(self.float_network(), input_shape=(3, side.height, side.width))
        simulate_bits(prepared, bits)
        prepared = self.compute.place(prepared)
        with exact_float32():
            return prepared, observe(prepared, self.calibration_images(), processes=self.compute.processes)

    def calibration_images(self) -> Iterator[Tensor]:
        """Normalized, in batches."""
        return (x for x, _ in inputs(self.data.calibration, self.setting.batch, self.compute, self.workers))

    def train(self, model: nn.Module, recipe: Recipe, objective: CrossEntropy | None = None) -> nn.Module:
        """Trains ``model``; ModelOpt's quantizers cannot be compiled."""
        theirs = any(type(module).__module__.startswith("modelopt") for module in model.modules())
        compute = replace(self.compute, compiled=False) if theirs else self.compute
        Fit("qat", model, self.data, recipe, compute, self.workers, objective=objective).run(lambda: None, 1e9)
        return model

    def tuned(self, epochs: int = 0, lr: float = 0.0, **changes: Any) -> Recipe:
        """The recipe of what starts from the trained float network."""
        setting = self.setting
        return setting.recipe(self.seed, epochs or setting.qat_epochs, lr or setting.qat_lr, "cosine", **changes)

    def distillation(self, recipe: Recipe) -> Distillation:
        """The float network's answers as nine tenths of the loss, at temperature 4."""
        side = self.data.preprocessing
        teacher = trace(self.float_network(), (3, side.height, side.width))
        images = self.setting.batch
        steps = recipe.epochs * batch_count(self.data.train, images, training=True)
        smoothing = self.setting.label_smoothing
        points = stage_ends(network_of(teacher))
        return Distillation(teacher, self.compute, smoothing, DistillationSettings(0.9, 4.0), points, images, steps)

    @contextmanager
    def row(self, name: str) -> Iterator[Callable[..., None]]:
        """Calls what it gives with the network that the row measures."""
        start = time.perf_counter()

        def done(model: nn.Module, **more: Any) -> None:
            seconds = time.perf_counter() - start
            found = evaluate(model, self.data.test, 4 * self.setting.batch, self.compute, self.workers)
            if not self.compute.processes.is_main:
                return
            line = {"setting": self.name, "seed": self.seed, "row": name, "top1": found.top1, "loss": found.loss}
            line |= {"images": found.images, "seconds": round(seconds, 1), **more}
            with self.log.open("a", encoding="utf-8") as file:
                print(json.dumps(line), file=file)
            print(f"{self.name} seed {self.seed}: {name} {found} in {seconds:.0f} s", flush=True)

        yield done

    # --- groups of rows

    def float(self) -> None:
        """The float network, which is saved."""
        setting = self.setting
        with self.row("float") as done:
            recipe = setting.recipe(
                self.seed, setting.float_epochs, setting.float_lr, "one-cycle", cutmix=setting.cutmix
            )
            model = self.train(self.compute.place(self.model), recipe)
            safetensors.torch.save_file({name: t.contiguous() for name, t in model.state_dict().items()}, self.weights)
            done(model, recipe=asdict(recipe))

    def ptq(self) -> None:
        """Post-training quantization, by each calibrator, AdaRound and ModelOpt."""
        for method in METHODS:
            with self.row(f"PTQ, {method}") as done:
                prepared, observers = self.quantized()
                set_ranges(prepared, observers, method)
                done(prepared)
        with self.row("PTQ, AdaRound") as done:
            prepared, observers = self.quantized()
            set_ranges(prepared, observers, "mse")
            adaround(prepared, list(self.calibration_images()), self.setting.adaround_steps, seed=self.seed)
            done(prepared)
        if importlib.util.find_spec("modelopt"):
            with self.row("ModelOpt PTQ") as done:
                done(self.modelopt())

    def qat(self) -> None:
        """The same epochs in float and with quantizers, without and with each option."""
        with self.row("float control") as done:
            done(self.train(self.float_network(), self.tuned()), recipe=asdict(self.tuned()))
        recipe = self.tuned(ranges_lr=10.0)
        for name, learns, distills in (("QAT", 0, 0), ("QAT + distillation", 0, 1), ("QAT, LSQ", 1, 0)):
            with self.row(name) as done:
                done(self.trained(recipe, bool(learns), bool(distills)), recipe=asdict(recipe))

    def parallel(self) -> None:
        """Row QAT, trained by the processes of torchrun together."""
        recipe = self.tuned(ranges_lr=10.0)
        with self.row(f"QAT, {self.compute.processes.world_size} GPUs") as done:
            done(self.trained(recipe, False, False), recipe=asdict(recipe))

    def peer(self) -> None:
        """ModelOpt's network, trained as ours."""
        with self.row("ModelOpt QAT") as done:
            done(self.train(self.modelopt(), self.tuned()), recipe=asdict(self.tuned()))

    def four_bits(self) -> None:
        """Fewer bits, which no engine computes: what learned ranges and distillation give back."""
        self._stress(4, self.setting.stress_lr)

    def two_bits(self) -> None:
        """The same with four levels of a weight."""
        self._stress(2, 4 * self.setting.stress_lr)

    def _stress(self, bits: int, lr: float) -> None:
        with self.row(f"{bits} bits (simulated), PTQ, mse") as done:
            prepared, observers = self.quantized(bits)
            set_ranges(prepared, observers, "mse")
            done(prepared)
        recipe = self.tuned(self.setting.stress_epochs, lr, ranges_lr=1.0)
        with self.row(f"{bits} bits (simulated), QAT, LSQ, distilled") as done:
            done(self.trained(recipe, True, True, bits), recipe=asdict(recipe))

    def trained(self, recipe: Recipe, learns: bool, distills: bool, bits: int = 8) -> nn.Module:
        """The network after quantization-aware training from ranges of the least squared error."""
        prepared, observers = self.quantized(bits)
        set_ranges(prepared, observers, "mse")
        if learns:
            learn_ranges(prepared)
        return self.train(prepared, recipe, self.distillation(recipe) if distills else None)

    def modelopt(self) -> nn.Module:
        """ModelOpt's network, calibrated on the same images."""
        import modelopt.torch.quantization as mtq

        def forward(model: nn.Module) -> None:
            with torch.no_grad(), exact_float32():
                for x in self.calibration_images():
                    model(x)

        model: nn.Module = mtq.quantize(self.float_network().eval(), copy.deepcopy(mtq.INT8_DEFAULT_CFG), forward)
        return model


GROUPS = {name: getattr(Rows, name) for name in ("float", "qat", "four_bits", "ptq", "peer", "parallel", "two_bits")}


def table(files: list[str]) -> None:
    """Mean and standard deviation over the seeds, in the order in which rows are first found."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in files:
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            found.setdefault(entry["setting"], {}).setdefault(entry["row"], []).append(entry)
    for setting, rows in found.items():
        images = {entry["images"] for entries in rows.values() for entry in entries}
        print(f"\n{setting}: {', '.join(map(str, images))} test images")
        print(f"  {'':40} {'top-1, %':>9} {'deviation':>9} {'seeds':>6} {'loss':>8} {'seconds':>8}")
        for name, entries in rows.items():
            top1, loss, seconds = ([entry[key] for entry in entries] for key in ("top1", "loss", "seconds"))
            spread = f"{statistics.stdev(top1):9.2f}" if len(top1) > 1 else f"{'-':>9}"
            means = f"{statistics.mean(loss):8.4f} {statistics.mean(seconds):8.0f}"
            print(f"  {name:40} {statistics.mean(top1):9.2f} {spread} {len(entries):6} {means}")


def main() -> None:
    if sys.argv[1:2] == ["table"]:
        table(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--change", nargs="*", default=[], metavar="NAME=VALUE", help="entries of the setting")
    options = parser.parse_args()
    changes = {name: json.loads(value) for name, _, value in (change.partition("=") for change in options.change)}
    options.setting_used = replace(SETTINGS[options.setting], **changes)
    with process_group(Compute.from_options("auto").device) as processes:
        GROUPS[options.group](Rows(options.setting, options.group, options, processes))


if __name__ == "__main__":
    main()
