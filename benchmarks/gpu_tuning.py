"""deploy.tune on several networks, and against trying everything.

    python -m benchmarks.gpu_tuning FOLDER --output OUTPUT [--models NAME ...] [--minutes 5] [--batch 32]
        [--turns FOLDER]
    python -m benchmarks.gpu_tuning FOLDER --output OUTPUT --models NAME --exhaustive 6

FOLDER/NAME/ours.onnx are Q/DQ files (benchmarks/placement_models.py, benchmarks/random_networks.py). OUTPUT/NAME.json
is the tuned placement, with what was tried; OUTPUT/tuning.jsonl has a line for each network, and a table is printed.
With --exhaustive all combinations of so many layers, those that gain least in INT8, are measured, too. Processes with
the same --turns are stopped while one of them measures (benchmarks/gpu_turns.py).
Needs TensorRT, a GPU and onnx, and no torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_turns import GpuTurns
from deploy import tuning_bench
from deploy.installed import find_toolkit
from deploy.tuned_engine import tune_engine
from deploy.tuning_bench import EngineBench
from qat.base.console import table
from qat.base.errors import UserError, one_line


def tune(model: Path, output: Path, minutes: float, batch: int) -> dict[str, Any]:
    """The figures of one network."""
    start = time.monotonic()
    found = tune_engine(model, output, minutes=minutes, batch=batch).placement
    return {
        "network": model.parent.name,
        "fp16_ms": found.float_ms,
        "rules_ms": found.int8_ms,
        "tuned_ms": found.tuned_ms,
        "kept": len(found.keep_float),
        "layers": len(found.layers),
        "tried": len(found.trials),
        "minutes": round((time.monotonic() - start) / 60, 2),
    }


def exhaustive(model: Path, count: int, batch: int) -> dict[str, Any]:
    """The best of all combinations of the ``count`` layers that lose most in INT8, or gain least."""
    toolkit = find_toolkit("tensorrt")
    with tempfile.TemporaryDirectory() as folder:
        bench = EngineBench(toolkit, model, Path(folder), batch, 200)
        losses = bench.losses(frozenset())
        layers = sorted(losses, key=lambda label: -losses[label])[:count]
        sizes = range(1, len(layers) + 1)
        choices = [frozenset(chosen) for size in sizes for chosen in itertools.combinations(layers, size)]
        best, ratio = frozenset[str](), 1.0
        for kept in choices:
            found = bench.compare(frozenset(), kept)
            if found is not None and found[1].median / found[0].median < ratio:
                best, ratio = kept, found[1].median / found[0].median
        rules, _, last = bench.final(best)
    found_best = {"best_ms": round(last.median, 5), "best": sorted(best), "rules_ms": round(rules.median, 5)}
    return {"layers": layers, "combinations": len(choices), **found_best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--exhaustive", type=int, default=0)
    parser.add_argument("--turns", type=Path)
    options = parser.parse_args()
    turns = GpuTurns(options.turns)
    for measured in ("latencies_of_built", "layer_times"):
        setattr(tuning_bench, measured, turns.alone()(getattr(tuning_bench, measured)))
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.models or sorted(path.name for path in options.folder.iterdir() if path.is_dir()):
        model = options.folder / name / "ours.onnx"
        try:
            row = tune(model, options.output / f"{name}.json", options.minutes, options.batch)
            if options.exhaustive:
                row["exhaustive"] = exhaustive(model, options.exhaustive, options.batch)
        except UserError as error:  # a network that TensorRT refuses is a result, not the end
            row = {"network": name, "error": one_line(error)}
        rows.append(row)
        with open(options.output / "tuning.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    shown = []
    for row in rows:
        if "error" in row:
            shown.append((row["network"], row["error"][:60], *[""] * 6))
            continue
        fp16, rules, tuned = (row[key] for key in ("fp16_ms", "rules_ms", "tuned_ms"))
        times = (f"{fp16:.4f}", f"{rules:.4f}", f"{fp16 / rules:.3f}", f"{tuned:.4f}", f"{fp16 / tuned:.3f}")
        shown.append(
            (row["network"], *times, f"{row['kept']} of {row['layers']}", f"{row['tried']}, {row['minutes']} min")
        )
    heads = ("network", "FP16, ms", "rules", "times FP16", "tuned", "times FP16", "in float", "tried")
    table("Placement by rules and tuned", heads, shown)


if __name__ == "__main__":
    main()
