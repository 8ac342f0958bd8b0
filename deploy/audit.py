"""What an engine is made of: every layer with its precision, memory format, kernel, ONNX nodes and time.

    python -m deploy.audit runs/model.engine
    python -m deploy.audit runs/model.engine --json runs/audit.json

Times come from TensorRT's profiler, which runs layer by layer: their sum is more than the engine takes as a whole.
Where the engine cannot be loaded (no GPU, another GPU) the layers are those that the build recorded, without times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from deploy.layers import EngineLayer
from deploy.precision import PrecisionFinding
from qat.base.artifact import Sidecar, check_writable, read_sidecar, write_json
from qat.base.console import Command, run_command, say, table, warn
from qat.base.errors import UserError

NAME_WIDTH, TACTIC_WIDTH = 50, 44
_NOT_TELLING = ("quantize", ".weight", ".bias", "(Unnamed Layer", "transpose_before_", "unsqueeze_node_after_")


@dataclass(frozen=True, kw_only=True)
class AuditOptions(Command):
    """The options of ``python -m deploy.audit``."""

    engine: Annotated[Path, tyro.conf.Positional]
    """The engine that python -m deploy.build wrote."""
    json: Path | None = None
    """File for everything that is found, as JSON."""
    batch: int | None = None
    """Batch size that times are measured at; by default the one that the engine is tuned for."""
    runs: int = 50
    """Inferences that times are averaged over."""
    trust: bool = False
    """Load the engine even if it is not the file that its sidecar was written for."""


@dataclass(frozen=True)
class EngineAudit:
    """All layers in the engine's order; ``milliseconds`` are theirs, or empty where they were not measured."""

    layers: tuple[EngineLayer, ...]
    findings: tuple[PrecisionFinding, ...]
    milliseconds: tuple[float, ...] = ()
    batch: int | None = None
    runs: int = 0

    def totals(self) -> dict[str, dict[str, float]]:
        """Layers and milliseconds by precision; reformats and lone Q/DQ nodes apart."""
        found: dict[str, dict[str, float]] = {}
        for index, layer in enumerate(self.layers):
            entry = found.setdefault(_group(layer), {"layers": 0, "milliseconds": 0.0})
            entry["layers"] += 1
            if self.milliseconds:
                entry["milliseconds"] += self.milliseconds[index]
        return found

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        times: Sequence[float | None] = self.milliseconds or [None] * len(self.layers)
        return {
            "batch": self.batch,
            "runs": self.runs,
            "totals": self.totals(),
            "layers": [
                asdict(layer) | {"precision": layer.product_precision, "milliseconds": time}
                for layer, time in zip(self.layers, times, strict=True)
            ],
            "findings": [asdict(finding) for finding in self.findings],
        }


def main(options: AuditOptions) -> None:
    """Prints the audit, and writes it."""
    from deploy.runtime import why_not_here

    if options.json:
        check_writable(options.json)
    if options.runs < 1:
        raise UserError(f"--runs {options.runs}: needed is 1 at least")
    sidecar = read_sidecar(options.engine, "engine", trust=options.trust)
    if reason := why_not_here(options.engine, sidecar):
        warn(f"the engine cannot be run here, so its times are not measured: {reason}")
        found = recorded_audit(sidecar)
    else:
        found = audit_engine(options.engine, sidecar, options.batch, options.runs, trust=options.trust)
    _print(found)
    if options.json:
        write_json(options.json, found.to_json())
        say(f"wrote {options.json}")


def audit_engine(path: Path, sidecar: Sidecar, batch: int | None, runs: int, *, trust: bool = False) -> EngineAudit:
    """Loads an engine, lists its layers and measures them. Raises UserError when it cannot be loaded here."""
    from deploy.measure import layer_times
    from deploy.runtime import Engine

    with Engine.load(path, contexts=1, trust=trust) as engine:
        batch = batch or engine.profiles[0].opt
        times = layer_times(engine, batch, runs)
    layers, milliseconds = tuple(layer for layer, _ in times), tuple(spent for _, spent in times)
    return EngineAudit(layers, _findings(sidecar), milliseconds, batch, runs)


def recorded_audit(sidecar: Sidecar) -> EngineAudit:
    """What the build recorded of an engine."""
    return EngineAudit(tuple(map(EngineLayer.from_json, sidecar.details["layers"])), _findings(sidecar))


def _findings(sidecar: Sidecar) -> tuple[PrecisionFinding, ...]:
    return tuple(PrecisionFinding(**finding) for finding in sidecar.details["findings"])


def _group(layer: EngineLayer) -> str:
    if layer.is_reformat:
        return "reformat"
    return "Q/DQ alone" if layer.is_quantization else layer.product_precision


def _print(audit: EngineAudit) -> None:
    total = sum(audit.milliseconds)
    rows = []
    for index, layer in enumerate(audit.layers):
        time = f"{1000 * audit.milliseconds[index]:.1f}" if audit.milliseconds else "-"
        rows.append(
            (
                _short(_title(layer), NAME_WIDTH),
                layer.kind,
                layer.product_precision,
                _short(layer.short_format, 12),
                _short(layer.tactic, TACTIC_WIDTH),
                time,
            )
        )
    title = "Layers" + (f" at batch {audit.batch}, mean of {audit.runs} runs" if audit.milliseconds else "")
    table(title, ("ONNX nodes", "kind", "precision", "writes", "kernel", "us"), rows)
    summary = []
    for name, entry in audit.totals().items():
        spent = entry["milliseconds"]
        share = f"{spent:.3f} ms, {100 * spent / total:.1f} %" if total else "not measured"
        summary.append((name, f"{entry['layers']:.0f}", share))
    table("Total", ("precision", "layers", "time"), summary)
    broken = [finding for finding in audit.findings if finding.broken]
    for finding in broken:
        say(f"declared INT8, is {finding.precision}: {finding.operation} {finding.node}: {finding.cause}")
    declared = sum(finding.declared_int8 for finding in audit.findings)
    say(f"{declared - len(broken)} of {declared} layers that the ONNX declares INT8 are INT8")


def _title(layer: EngineLayer) -> str:
    """The ONNX nodes without those of the weights and the Q/DQ nodes that were fused, as far as others are left."""
    nodes = layer.onnx_nodes or (layer.name,)
    telling = [node for node in nodes if not any(word in node for word in _NOT_TELLING)]
    return " + ".join(telling or nodes)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


if __name__ == "__main__":
    run_command(main, AuditOptions)
