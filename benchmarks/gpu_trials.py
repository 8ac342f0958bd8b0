"""What each knob gives for the most images a second: inputs, batch sizes, contexts, the builder's options.

    python -m benchmarks.gpu_trials FOLDER [--seconds N]

FOLDER is what benchmarks/gpu_models.py wrote. Each trial builds an engine of ResNet50, which takes half a minute; a
trial begins only within the first N seconds. The table is printed at the end, raw figures are in FOLDER/trials.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.builder import build
from deploy.installed import find_toolkit
from deploy.measure import latencies, throughput
from deploy.runtime import Engine
from deploy.settings import BuildSettings, Profile
from qat.base.errors import UserError

FLOAT, INT8 = "resnet50.onnx", "resnet50_int8-nchw.onnx"
FLOAT_PADDED, INT8_PADDED = "resnet50.padded.onnx", "resnet50_int8-nchw.padded.onnx"  # with zero channels


@dataclass(frozen=True)
class Trial:
    """One engine: what is special about it, its file and batch, and how it is built and run."""

    name: str
    file: str
    batch: int
    contexts: tuple[int, ...] = (1, 2)
    settings: dict[str, Any] = field(default_factory=dict)


TRIALS = (
    *(Trial("defaults", file, batch) for batch in (32, 128) for file in (FLOAT, INT8)),
    *(Trial("zero channels", FLOAT_PADDED, batch) for batch in (1, 32, 128)),
    *(Trial("2 further streams", FLOAT, batch, settings={"aux_streams": 2}) for batch in (32, 128)),
    *(Trial("no further streams", FLOAT, batch, settings={"aux_streams": 0}) for batch in (32, 128)),
    Trial("level 5", FLOAT, 32, settings={"optimization_level": 5, "timing_iterations": 8}),
    Trial("no JIT kernels", FLOAT, 32, settings={"tactic_sources": ("EDGE_MASK_CONVOLUTIONS",)}),
    *(Trial("defaults", INT8, batch, (1, 2, 3)) for batch in (512, 2048)),
    Trial("zero channels", INT8_PADDED, 2048, (1, 2, 3)),
    Trial("defaults", FLOAT, 2048, (1, 2, 3)),
)


def run(folder: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Measures trial after trial; one that fails says why."""
    toolkit = find_toolkit("tensorrt")
    start = time.monotonic()
    for trial in TRIALS:
        if time.monotonic() - start > seconds:
            return
        entry: dict[str, Any] = {"name": trial.name, "file": trial.file, "batch": trial.batch, **trial.settings}
        settings = BuildSettings(profiles=(Profile(*[trial.batch] * 3),), **trial.settings)
        try:
            plan = build(toolkit, folder / trial.file, settings).plan
            with Engine.from_plan(plan, toolkit, settings) as engine:
                entry |= latencies({"": engine}, trial.batch)[""].to_json()
            for contexts in trial.contexts:
                with Engine.from_plan(plan, toolkit, settings, contexts=contexts) as engine:
                    entry[f"contexts_{contexts}"] = round(throughput(engine, trial.batch))
        except (UserError, RuntimeError) as error:
            entry["error"] = str(error)
        yield entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=900)
    options = parser.parse_args()
    rows = []
    with open(options.folder / "trials.jsonl", "w", encoding="utf-8") as file:
        for entry in run(options.folder, options.seconds):
            print(json.dumps(entry), file=file, flush=True)
            images = ", ".join(f"{entry[key]:,}" for key in entry if key.startswith("contexts_"))
            median = f"{entry['median']:8.4f} ms" if "median" in entry else entry.get("error", "")
            rows.append(f"{entry['file']:32} batch {entry['batch']:5} {entry['name']:20} {median}   {images}")
            print(rows[-1], flush=True)
    print("\n".join(["", "images a second with 1, 2, ... contexts in the last column", *rows]))


if __name__ == "__main__":
    main()
