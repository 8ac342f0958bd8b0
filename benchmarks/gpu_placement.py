"""Speed of several placements of the same networks, each beside its FP16 engine, by deploy.benchmark.

    python -m benchmarks.gpu_placement FOLDER --output OUTPUT [--models NAME ...] [--batch 32] [--implicit]
        [--level 3] [--timing-iterations N] [--build-only] [--turns FOLDER]
    python -m benchmarks.gpu_placement --table FILE

FOLDER/NAME/ holds the ONNX files of one network: float32.onnx, of which the FP16 engine is built, ours.onnx, and one
for each other placement (benchmarks/placement_models.py writes ours; other tools' are put beside them). With --implicit
there is an engine of implicit INT8 too, with one range for all tensors, on which speed does not depend. Engines of one
network are measured interleaved. OUTPUT/NAME/ gets the engines, benchmark.json, and placement.jsonl with a line for
each engine, from which --table prints the table; with --build-only the engines alone. --level is the builder's
optimization level: at 3, TensorRT 8.6 compiles some thirty kernels for each activation that stands alone, and takes
more than 400 seconds for a YOLO. --timing-iterations: how often it times a kernel; several builders on one GPU need it.
Processes with the same --turns are stopped while one of them measures (benchmarks/gpu_turns.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu_turns import GpuTurns
from deploy.candidate_engines import CandidateEngines
from deploy.candidates import FP16, MODEL, CandidateSet
from deploy.comparison import Comparison, Workload
from deploy.installed import find_toolkit
from qat.base.errors import UserError

OURS, FLOAT = "ours", "float32"
_PLACEMENTS = {FP16: FLOAT, MODEL: OURS}  # their names in a benchmark


def compare(folder: Path, output: Path, options: argparse.Namespace, turns: GpuTurns) -> None:
    """Builds the engine of every ONNX file of ``folder`` and measures them against each other."""
    others = sorted(path for path in folder.glob("*.onnx") if path.stem not in _PLACEMENTS.values())
    toolkit = find_toolkit("tensorrt")
    candidates = CandidateSet.from_files(
        toolkit,
        folder / f"{OURS}.onnx",
        float32=folder / f"{FLOAT}.onnx",
        precisions=("fp16", "int8") if options.implicit else ("fp16",),
        peers=[(path.stem, path) for path in others],
    )
    engines = CandidateEngines(
        toolkit,
        output / "engines",
        optimization_level=options.level,
        timing_iterations=options.timing_iterations,
    )
    comparison = Comparison(engines, candidates, Workload(full_batches=(options.batch,)))
    if options.build_only:
        comparison.build()
        return
    with turns.alone():
        found = comparison.measure(output / "benchmark.json")
    _write(output, [{"model": folder.name, **entry} for entry in entries(found)])


def _write(output: Path, found: list[dict[str, Any]]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "placement.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in found), encoding="utf-8")


def entries(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One for each engine: its latency and what it is made of; other tools' that could not be built have an error."""
    builds = {build["name"]: build for build in found["builds"]}
    measured = []
    for latency in found["latency"]:
        name, build = latency["name"], builds[latency["name"]]
        entry = {"placement": _PLACEMENTS.get(name, name), **latency}
        entry |= {key: build[key] for key in ("seconds", "layers", "reformats")}
        entry["convolutions"] = {"int8": build["convolutions_int8"], "all": build["convolutions"]}
        if name == MODEL:
            entry["slower_in_int8"] = found["slower_in_int8"]
        del entry["name"]
        measured.append(entry)
    return measured + [{"placement": entry["name"], "error": entry["error"]} for entry in found["left_out"]]


def table(found: list[dict[str, Any]]) -> str:
    """The entries for people: a line for each engine, speed relative to its network's FP16 engine."""
    base = {entry["model"]: entry.get("median") for entry in found if entry["placement"] == FLOAT}
    lines = [f"{'network':22} {'placement':24} {'ms':>8} {'x FP16':>7} {'layers':>6} {'reform.':>7} {'INT8 conv':>10}"]
    for entry in found:
        if "median" not in entry:
            lines.append(f"{entry['model']:22} {entry['placement']:24} {entry.get('error', 'not measured')[:80]}")
            continue
        ratio = f"{base[entry['model']] / entry['median']:.3f}" if base.get(entry["model"]) else ""
        conv = f"{entry['convolutions']['int8']}/{entry['convolutions']['all']}"
        lines.append(
            f"{entry['model']:22} {entry['placement']:24} {entry['median']:8.4f} {ratio:>7} {entry['layers']:6} "
            f"{entry['reformats']:7} {conv:>10}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("placement"))
    parser.add_argument("--level", type=int, default=3)
    parser.add_argument("--timing-iterations", type=int)
    parser.add_argument("--implicit", action="store_true")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--turns", type=Path)
    options = parser.parse_args()
    if options.table is not None:
        print(table([json.loads(line) for line in options.table.read_text(encoding="utf-8").splitlines()]))
        return
    if options.folder is None:
        parser.error("a folder of ONNX files, or --table FILE")
    turns = GpuTurns(options.turns)
    for name in options.models or sorted(path.name for path in options.folder.iterdir() if path.is_dir()):
        try:
            compare(options.folder / name, options.output / name, options, turns)
        except UserError as error:  # a network that TensorRT refuses is a result, not the end
            print(f"{name}: {error}", flush=True)
            if not options.build_only:
                _write(options.output / name, [{"model": name, "placement": OURS, "error": str(error)}])


if __name__ == "__main__":
    main()
