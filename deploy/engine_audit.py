"""What an engine consists of: each layer with its precision, memory format, kernel, ONNX nodes and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.engine_layers import EngineLayer
from deploy.kernel_trace import Kernel
from deploy.loaded_engine import why_not_here
from deploy.measure import layer_times
from deploy.peaks import Peaks, measure_peaks
from deploy.precision_audit import PrecisionFinding
from deploy.runtime import Engine
from qat.base.artifact import read_sidecar
from qat.base.console import say, table
from qat.base.errors import UserError
from qat.base.number_format import INT8

NAME_WIDTH, TACTIC_WIDTH, FORMAT_WIDTH = 50, 44, 12
# Parts of the names of nodes that say little: weights, Q/DQ nodes and what the builder adds to a layer.
_MINOR_NODES = ("quantize", ".weight", ".bias", "(Unnamed Layer", "transpose_before_", "unsqueeze_node_after_")


@dataclass(frozen=True)
class EngineAudit:
    """All layers of an engine.

    Attributes:
        layers: the final layers in the engine's order.
        findings: the precision of every convolution and matrix product of the ONNX file.
        milliseconds: mean time of each layer; empty if the times were not measured.
        batch: the batch size that the times were measured at.
        runs: number of inferences that they are averaged over.
        why_not_measured: why the engine cannot be run here; empty if it was measured.
        kernels: all kernels of one inference when it was built, in their order, where another compiler handles parts of
            the network (deploy/compiled_parts.py).
        engine: SHA-256 of the engine file.
        peaks: what the GPU can do at most; None if it was not measured.
    """

    layers: tuple[EngineLayer, ...]
    findings: tuple[PrecisionFinding, ...]
    milliseconds: tuple[float, ...] = ()
    batch: int | None = None
    runs: int = 0
    why_not_measured: str = ""
    kernels: tuple[Kernel, ...] = ()
    engine: str = ""
    peaks: Peaks | None = None

    def totals(self) -> dict[str, dict[str, float]]:
        """Number of layers and their milliseconds by precision. Reformats and separate Q/DQ nodes are counted apart."""
        found: dict[str, dict[str, float]] = {}
        for index, layer in enumerate(self.layers):
            entry = found.setdefault(_group(layer), {"layers": 0, "milliseconds": 0.0})
            entry["layers"] += 1
            if self.milliseconds:
                entry["milliseconds"] += self.milliseconds[index]
        return found

    def to_json(self) -> dict[str, Any]:
        """As the file of ``python -m deploy.audit --json`` has it."""
        times: Sequence[float | None] = self.milliseconds or [None] * len(self.layers)
        return {
            "engine": self.engine,
            "peaks": asdict(self.peaks) if self.peaks else None,
            "batch": self.batch,
            "runs": self.runs,
            "totals": self.totals(),
            "layers": [
                asdict(layer) | {"precision": layer.product_precision, "milliseconds": time}
                for layer, time in zip(self.layers, times, strict=True)
            ],
            "findings": [asdict(finding) for finding in self.findings],
            "kernels": [asdict(kernel) for kernel in self.kernels],
        }


def audit_engine(
    engine: str | Path, *, batch: int | None = None, runs: int = 50, trust: bool = False, peaks: bool = False
) -> EngineAudit:
    """Lists the layers of an engine file and measures them with TensorRT's profiler.

    If the engine cannot be run on this machine, the layers are those that the build recorded, without times, and
    ``why_not_measured`` has the reason.

    Args:
        engine: the engine that ``build_engine`` wrote; its sidecar is beside it.
        batch: the batch size, in images, to measure at; by default the one that the engine is tuned for.
        runs: number of inferences that the times are averaged over.
        trust: accept the file even if it is not the one that the sidecar was written for.
        peaks: also measure what the GPU can do at most, for which two small engines are built.

    Raises UserError when the file is missing, truncated or another one than its sidecar's, and when the engine does not
    take the batch.

    Example::

        audit = audit_engine("model.engine")
        print(audit.totals())    # {"INT8": {"layers": 53, "milliseconds": 0.61}, ...}
    """
    path = Path(engine)
    if runs < 1:
        raise UserError(f"--runs {runs}: must be at least 1")
    sidecar = read_sidecar(path, "engine", trust=trust)
    findings = tuple(PrecisionFinding(**finding) for finding in sidecar.details["findings"])
    kernels = tuple(Kernel(**kernel) for kernel in sidecar.details.get("kernels", []))
    if reason := why_not_here(path, sidecar):
        recorded = tuple(map(EngineLayer.from_json, sidecar.details["layers"]))
        return EngineAudit(recorded, findings, why_not_measured=reason, kernels=kernels, engine=sidecar.sha256)
    with Engine.load(path, contexts=1, trust=trust) as loaded:
        batch = batch or loaded.profiles[0].opt
        times, toolkit = layer_times(loaded, batch, runs), loaded.toolkit
    layers, milliseconds = tuple(layer for layer, _ in times), tuple(spent for _, spent in times)
    found = measure_peaks(toolkit) if peaks else None
    return EngineAudit(layers, findings, milliseconds, batch, runs, kernels=kernels, engine=sidecar.sha256, peaks=found)


def print_engine_audit(audit: EngineAudit) -> None:
    """Prints all layers, the totals, and the layers that are not INT8 although they are declared so."""
    total = sum(audit.milliseconds)
    rows = []
    for index, layer in enumerate(audit.layers):
        time = f"{1000 * audit.milliseconds[index]:.1f}" if audit.milliseconds else "-"
        rows.append(
            (
                _shorten(_title(layer), NAME_WIDTH),
                layer.kind,
                layer.product_precision,
                _shorten(layer.short_format, FORMAT_WIDTH),
                _shorten(layer.tactic, TACTIC_WIDTH),
                time,
            )
        )
    title = "Layers" + (f" at batch {audit.batch}, mean of {audit.runs} runs" if audit.milliseconds else "")
    heads = ("ONNX nodes", "kind", "precision", "writes", "kernel", "us")
    table(title, heads, rows, details=("kernel", "kind", "writes"))
    summary = []
    for name, entry in audit.totals().items():
        spent = entry["milliseconds"]
        share = f"{spent:.3f} ms, {100 * spent / total:.1f} %" if total else "not measured"
        summary.append((name, f"{entry['layers']:.0f}", share))
    table("Total", ("precision", "layers", "time"), summary)
    _print_kernels(audit.kernels)
    declared = [finding for finding in audit.findings if finding.declared_int8]
    others = [finding for finding in declared if finding.precision != INT8.name]
    for finding in others:
        say(f"declared {INT8.name}, is {finding.precision}: {finding.operation} {finding.node}: {finding.cause}")
    count = f"{len(declared) - len(others)} of {len(declared)}"
    say(f"{count} layers that the ONNX file declares {INT8.name} are {INT8.name}")


def _print_kernels(kernels: Sequence[Kernel]) -> None:
    """Prints the kernels of one inference, those of a kind together, the longest first."""
    of_kind: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        of_kind.setdefault(kernel.short_name, []).append(kernel)
    rows = []
    for name, found in of_kind.items():
        multiplied = "attention" if found[0].is_attention else found[0].type if found[0].multiplies else ""
        spent = sum(kernel.microseconds for kernel in found)
        rows.append((spent, (_shorten(name, NAME_WIDTH), multiplied, str(len(found)), f"{spent:.1f}")))
    if rows:
        printed = [row for _, row in sorted(rows, key=lambda row: -row[0])]
        table("Kernels of one inference, when it was built", ("kernel", "multiplies", "count", "us"), printed)


def _group(layer: EngineLayer) -> str:
    if layer.is_reformat:
        return "reformat"
    return "Q/DQ alone" if layer.is_quantization else layer.product_precision


def _title(layer: EngineLayer) -> str:
    """The ONNX nodes of a layer. Minor ones are left out if there are others."""
    nodes = layer.onnx_nodes or (layer.name,)
    major = [node for node in nodes if not any(part in node for part in _MINOR_NODES)]
    return " + ".join(major or nodes)


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
