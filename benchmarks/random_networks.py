"""Networks that no file of this repository names, chosen by a seed from timm's registry, as ONNX files to be measured.

    python -m benchmarks.random_networks --seed 1                       # prints ten names
    python -m benchmarks.random_networks --seed 1 --folder FOLDER       # FOLDER/NAME/{ours,float32}.onnx

Convolutional networks (most of their weights are in convolutions) of at most 60 million parameters, one for each family
of timm, at 224 pixels, weights at random, calibrated on random images. A network that is refused is printed with the
reason, and counts. benchmarks/gpu_placement.py measures the files beside FP16 and other tools'
(benchmarks/modelopt_models.py).
"""

from __future__ import annotations

import argparse
import random
import warnings
from pathlib import Path

import onnx_ir as ir
import timm
import torch
from torch import nn

from export.emit import emit
from export.fold import fold, fold_float
from qat.base.errors import UserError, one_line
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import prepare

PIXELS, MOST_PARAMETERS, LEAST_SHARE = 224, 60e6, 0.7


def choose(seed: int, count: int) -> list[str]:
    """``count`` names, one of each family, that no file of the repository holds."""
    text = "\n".join(path.read_text(errors="ignore") for path in _files())
    chance = random.Random(seed)
    families = sorted(timm.list_modules())
    chance.shuffle(families)
    found: list[str] = []
    for family in families:
        names = [name for name in timm.list_models(module=family) if name not in text]
        chance.shuffle(names)
        name = next((one for one in names[:10] if _is_convolutional(one)), None)
        if name is not None:
            found.append(name)
        if len(found) == count:
            break
    return found


def _files() -> list[Path]:
    root = Path(__file__).parent.parent
    kinds = ("*.py", "*.md", "*.txt", "*.json", "*.jsonl", "*.sh")
    return [path for kind in kinds for path in root.rglob(kind) if ".venv" not in path.parts]


def _is_convolutional(name: str) -> bool:
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except Exception:  # timm's constructors raise what they like
        return False
    if model.default_cfg.get("fixed_input_size") and model.default_cfg["input_size"][-1] != PIXELS:
        return False
    whole = sum(weight.numel() for weight in model.parameters())
    inside = sum(one.weight.numel() for one in model.modules() if isinstance(one, nn.Conv2d))
    return whole <= MOST_PARAMETERS and inside >= LEAST_SHARE * whole


def write(name: str, folder: Path) -> None:
    """Writes both files of a network. Raises UserError when it is refused."""
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(4, 3, PIXELS, PIXELS)
    prepared = prepare(model, input_shape=x.shape[1:])
    with torch.no_grad():
        calibrate_ranges(prepared, [x], "max")
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(emit(fold(prepared)[0], x[:2], {}), folder / "ours.onnx")
    ir.save(emit(fold_float(prepared), x[:2], {}), folder / "float32.onnx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in choose(options.seed, options.count):
        if options.folder is None:
            print(name)
            continue
        try:
            write(name, options.folder / name)
            print(name, flush=True)
        except UserError as error:
            print(f"{name}: refused: {one_line(error)}", flush=True)


if __name__ == "__main__":
    main()
