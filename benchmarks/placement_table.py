"""Where each tool puts Q/DQ nodes, and what TensorRT-RTX makes of it: a line for each network and tool.

    python -m benchmarks.placement_table FOLDER [--json FILE]

FOLDER/NAME/*.onnx is what benchmarks/placement_models.py and benchmarks/modelopt_models.py wrote. Layers and bytes
are those of the builder's layer list for one image: they compare placements of one network and prove no speed, because
ahead of time convolutions are listed with float outputs and separate requantization.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from deploy.builder import build
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings, Profile
from export.linter import lint_model
from export.onnx_network import network_from_onnx
from export.read import read_onnx
from qat.base.errors import UserError
from qat.rules.place import place

TOOLS = ("ours", "modelopt_onnx", "modelopt_torch")


def measure(path: Path) -> dict[str, Any]:
    """One file: counts of its nodes, and of the layers that TensorRT-RTX makes of it."""
    model = read_onnx(path)
    operators = Counter(node.op_type for node in model.graph)
    findings = lint_model(model)
    entry: dict[str, Any] = {
        "network": path.parent.name,
        "tool": path.stem,
        "q": operators["QuantizeLinear"],
        "dq": operators["DequantizeLinear"],
        "errors": sum(finding.severity == "error" for finding in findings),
        "warnings": Counter(finding.rule for finding in findings if finding.severity == "warning"),
    }
    if path.stem == "ours":
        decisions = place(network_from_onnx(model).network).weights
        entry["float_because"] = Counter(decision.rule for decision in decisions if not decision.quantized)
    try:
        settings = BuildSettings(profiles=(Profile(1, 1, 1),), capabilities=("8.9",))
        audit = build(find_toolkit("tensorrt-rtx"), path, settings).audit
    except UserError as error:
        return entry | {"refused": str(error)}
    int8, weighted = (sum(counts) for counts in zip(*map(audit.count, ("convolution", "matrix product")), strict=True))
    written = sum(layer.output_bytes for layer in audit.layers)
    return entry | {"int8": int8, "weighted": weighted, "layers": len(audit.layers), "bytes": written}


def table(entries: list[dict[str, Any]]) -> str:
    """For people; ``why`` says of ours which rule kept layers in float, and of all what the lint warns of."""
    lines = [f"{'network':28} {'tool':15} {'INT8':>9} {'Q':>5} {'DQ':>5} {'layers':>7} {'MB/image':>9}  why"]
    for entry in entries:
        why = [f"{count} float: {rule}" for rule, count in entry.get("float_because", {}).items()]
        why += [f"{count} warnings: {rule}" for rule, count in entry["warnings"].items()]
        why += [f"{entry['errors']} errors"] if entry["errors"] else []
        start = f"{entry['network']:28} {entry['tool']:15}"
        if "refused" in entry:
            lines.append(f"{start} refused: {entry['refused'][:90]}")
            continue
        counts = f"{entry['int8']}/{entry['weighted']}"
        size = f"{entry['bytes'] / 1e6:9.1f}"
        lines.append(
            f"{start} {counts:>9} {entry['q']:5} {entry['dq']:5} {entry['layers']:7} {size}  {'; '.join(why)}".rstrip()
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    entries = []
    for folder in sorted(path for path in options.folder.iterdir() if path.is_dir()):
        entries += [measure(folder / f"{tool}.onnx") for tool in TOOLS if (folder / f"{tool}.onnx").exists()]
        print(table(entries[-3:]).partition("\n")[2], flush=True)
    if options.json:
        options.json.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    print("\n" + table(entries))


if __name__ == "__main__":
    main()
