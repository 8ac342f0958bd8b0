"""Speed of several placements of the same networks, each beside its FP16 engine, in one run.

    python -m benchmarks.gpu_placement FOLDER [--batch 32] [--models NAME ...] [--seconds N] [--output FILE]
    python -m benchmarks.gpu_placement --table FILE

FOLDER/NAME/ holds the ONNX files of one network: float32.onnx, of which the FP16 engine is built, and one file for each
placement (benchmarks/placement_models.py writes ours; other tools' are put beside them). Engines of one network are
measured interleaved. A network begins only within the first N seconds. Raw figures, with each layer's time, go to FILE,
from which --table prints the table again.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploy.builder import Built, build
from deploy.measure import latencies, layer_times
from deploy.runtime import Engine
from deploy.settings import BuildSettings, Profile
from deploy.trt import Toolkit, find_toolkit
from qat.artifact import UserError

FLOAT = "float32"


def compare(toolkit: Toolkit, folder: Path, batch: int, runs: int) -> list[dict[str, Any]]:
    """Builds and measures every ONNX file of ``folder``; the FP16 engine comes first."""
    files = sorted(folder.glob("*.onnx"), key=lambda path: (path.stem != FLOAT, path.stem))
    entries: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        engines = {}
        cache = b""
        for path in files:
            entry = entries[path.stem] = {"model": folder.name, "placement": path.stem, "batch": batch}
            precision: Any = "fp16" if path.stem == FLOAT else "explicit"
            settings = BuildSettings(profiles=(Profile(batch, batch, batch),), precision=precision)
            try:
                built = build(toolkit, path, settings, cache)
                cache = built.timing_cache_content or cache
                engines[path.stem] = stack.enter_context(Engine.of(built.plan, toolkit, settings))
                entry |= _counts(built)
            except (UserError, RuntimeError) as error:
                entry["error"] = str(error)
        for name, latency in latencies(engines, batch, runs).items() if engines else ():
            entries[name] |= latency.to_json()
        for name, engine in engines.items():
            entries[name]["layer_times"] = _layer_times(engine, batch)
    return list(entries.values())


def _counts(built: Built) -> dict[str, Any]:
    layers, weighted = built.audit.layers, built.audit.findings
    return {
        "build_seconds": round(built.seconds, 1),
        "layers": len(layers),
        "reformats": sum(layer.is_reformat for layer in layers),
        "quantizations": sum(layer.is_quantization for layer in layers),
        "convolutions": dict(zip(("int8", "all"), built.audit.count("convolution"), strict=True)),
        "float": [asdict(finding) for finding in weighted if finding.precision != "INT8"],
    }


def _layer_times(engine: Engine, batch: int) -> list[dict[str, Any]]:
    return [
        {"name": layer.name, "precision": layer.product_precision, "format": layer.short_format, "ms": milliseconds}
        for layer, milliseconds in layer_times(engine, batch, 20)
    ]


def table(entries: list[dict[str, Any]]) -> str:
    """The entries for people: a line for each engine, speed relative to its network's FP16 engine."""
    base = {entry["model"]: entry.get("median") for entry in entries if entry["placement"] == FLOAT}
    lines = [f"{'network':22} {'placement':24} {'ms':>8} {'x FP16':>7} {'layers':>6} {'reform.':>7} {'INT8 conv':>10}"]
    for entry in entries:
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
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--output", type=Path, default=Path("placement.jsonl"))
    options = parser.parse_args()
    if options.table is not None:
        print(table([json.loads(line) for line in options.table.read_text(encoding="utf-8").splitlines()]))
        return
    if options.folder is None:
        parser.error("a folder of ONNX files, or --table FILE")
    names = options.models or sorted(path.name for path in options.folder.iterdir() if path.is_dir())
    toolkit, entries, start = find_toolkit("tensorrt"), [], time.monotonic()
    with open(options.output, "w", encoding="utf-8") as file:
        for name in names:
            if time.monotonic() - start > options.seconds:
                print(f"{name}: not measured, out of time", flush=True)
                continue
            for entry in compare(toolkit, options.folder / name, options.batch, options.runs):
                entries.append(entry)
                print(json.dumps(entry), file=file, flush=True)
            print(table(entries[-9:]), flush=True)
    print(table(entries))


if __name__ == "__main__":
    main()
