"""The network as the page shows it: operations in blocks, each with all that is known about it.

A block is what the names of a network make one: ``layer1.0`` of ``layer1.0.conv1``, ``encoder_layer_3`` of
``encoder.layers.encoder_layer_3.mlp.0``. An operation that has no block of its own stands alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deploy.engine_layers import POINTWISE_KINDS, EngineLayer, node_names
from deploy.report_page.artifacts import Artifacts
from deploy.report_page.charts import clipped_by
from qat.base.number_format import BITS, INT8

State = Literal["int8", "float", "fp32", "broken", "moves"]
"""Of an operation: what it computes in; ``broken``: declared INT8 and not INT8; ``moves``: it only moves data."""

STATES: Mapping[State, str] = {
    "int8": INT8.name,
    "float": "float",
    "fp32": "FP32",
    "broken": f"declared {INT8.name}, is not",
    "moves": "moves data",
}
_NUMBERED = re.compile(r"\d$")
_INNER = re.compile(r"^\d+$|(block|layer|stage|unit)_?\d+$")
_SEVERAL = ("blocks", "layers", "stages", "units")
_KINDS = {"linear": "matrix product", "matmul": "matrix product", "add": "sum", "concat": "concatenation"}


@dataclass(frozen=True)
class Read:
    """A Q/DQ pair at an input: the tensor and its quantizer, the scale, how much is clipped, in percent, and noise."""

    tensor: str
    quantizer: str
    scale: float | None
    amax: float | None
    clipped: float | None
    sqnr_db: float | None
    rule: str


@dataclass(frozen=True)
class Layer:
    """One operation of the network.

    Attributes:
        name: its name in the network; ``label`` is its path in the module, which several may share.
        node: its name in the ONNX file: its label, numbered where several share it.
        kind: what it computes.
        block: the block that it belongs to; its own label if to none.
        state: what it computes in.
        precision: of the engine's kernel, such as ``INT8``; '' where the engine lists no such layer.
        rule, reason: why it is quantized or not.
        reads: its quantized inputs.
        milliseconds: its time in the engine; None where it was not measured.
        kernel: the engine's kernel.
        loss_saved: by how much the loss of the quantized network falls when only this is in float; None: not measured.
        sqnr_db: of its output when only this is quantized; None where it was not measured.
        slower: how much longer it takes in INT8 than in FP16, in words; None where it does not, or was not measured.
        parts: what the node became where the export split it.
        reformats: how many layers of the engine only change the type or the memory format of what it reads or writes.
        together: operations that the engine computes in the same layers, to which their time is not charged again.
    """

    name: str
    label: str
    node: str
    kind: str
    block: str
    state: State
    precision: str = ""
    rule: str = ""
    reason: str = ""
    reads: tuple[Read, ...] = ()
    milliseconds: float | None = None
    kernel: str = ""
    loss_saved: float | None = None
    sqnr_db: float | None = None
    slower: str | None = None
    together: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    reformats: int = 0

    @property
    def clipped(self) -> float | None:
        """The largest share of an input that its range clips, in percent."""
        return max((read.clipped for read in self.reads if read.clipped is not None), default=None)


@dataclass(frozen=True)
class Block:
    """Operations that belong together."""

    name: str
    layers: tuple[Layer, ...]

    @property
    def summary(self) -> str:
        """What it consists of: ``4 convolutions, 1 sum: all INT8``."""
        computing = [layer for layer in self.layers if layer.state != "moves"]
        kinds = Counter(layer.kind for layer in computing)
        what = ", ".join(_counted(count, kind) for kind, count in kinds.items())
        states = Counter(STATES[layer.state] for layer in computing)
        if not computing:
            return "only moves data"
        if len(states) < 2:
            return f"{what}: all {next(iter(states))}" if len(computing) > 1 else f"{what}: {next(iter(states), '')}"
        return f"{what}: " + ", ".join(f"{count} {state}" for state, count in states.items())

    @property
    def milliseconds(self) -> float | None:
        """Of all its layers; None where none was measured."""
        known = [layer.milliseconds for layer in self.layers if layer.milliseconds is not None]
        return sum(known) if known else None

    @property
    def worst(self) -> State:
        """The state that a reader should see first."""
        return min((layer.state for layer in self.layers), key=("broken", "fp32", "float", "int8", "moves").index)


def block_of(label: str) -> str:
    """The block of an operation, by its label; the label itself if it has none.

    It ends with a number. A second number belongs to it if it follows at once, or a word for several: ``blocks.4``; so
    does the name of a block or layer within: ``denselayer3``.
    """
    *above, _ = label.split(".")
    end = next((at for at, part in enumerate(above) if _NUMBERED.search(part)), None)
    if end is None:
        return ".".join(above) or label
    while True:
        further = end + 2 if above[end + 1 : end + 2] and above[end + 1] in _SEVERAL else end + 1
        if not (further < len(above) and _INNER.search(above[further])):
            return ".".join(above[: end + 1])
        end = further


def blocks_of(layers: Iterable[Layer]) -> tuple[Block, ...]:
    """Blocks in the order of the network."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.block, []).append(layer)
    return tuple(Block(name, tuple(inside)) for name, inside in found.items())


def layers_of(artifacts: Artifacts) -> tuple[Layer, ...]:
    """All operations that a rule decided about, or that the engine lists as a product, in the order of the network."""
    return tuple(_Layers(artifacts).all())


class _Layers:
    """What the artifacts say about operations, by their labels."""

    def __init__(self, artifacts: Artifacts) -> None:
        self.engine = artifacts.engine.details if artifacts.engine else {}
        source = artifacts.checkpoint or (
            artifacts.onnx if artifacts.onnx and "placement" in artifacts.onnx.details else None
        )
        self.details: Mapping[str, Any] = source.details if source else {}
        self.placement = self.details.get("placement", {"decisions": [], "tensors": [], "weights": []})
        self.findings = {finding["node"]: finding for finding in self.engine.get("findings", [])}
        self.engine_layers = self._engine_layers(artifacts)
        self.times = self._times(artifacts)
        self.reformats = self._reformats(artifacts)
        self.costs = {
            one.get("op", one["label"]): one for one in artifacts.results.get("sensitivity", {}).get("operations", [])
        }
        self.quantized_loss = artifacts.results.get("sensitivity", {}).get("quantized", {}).get("loss")
        self.slower = {
            one["node"]: f"{1000 * (one['int8'] - one['fp16']):.1f} us slower than in FP16 at batch {one['batch']}"
            for one in artifacts.results.get("benchmark", {}).get("slower_in_int8", [])
        }
        self.seen = (
            {one.quantizer: one for one in artifacts.distributions.activations} if artifacts.distributions else {}
        )
        self.high = 2 ** (int(self.details.get("bits", BITS)) - 1) - 1
        self.labels = {op["name"]: op["label"] for op in self.details.get("network", [])}

    def all(self) -> Iterator[Layer]:
        """Every decision of the placement; then what the engine has beyond them."""
        reads: dict[str, list[Read]] = {}
        for tensor in self.placement["tensors"]:
            for read in tensor["reads"]:
                reads.setdefault(read["reader"], []).append(self._read(tensor, read["rule"]))
        labels: Counter[str] = Counter()
        seen: set[str] = set()
        for decision in self.placement["decisions"]:
            node = _numbered(str(decision["label"]), labels)  # a layer that export split has parts .0, .1, .2
            parts = [other for other in self.findings if other.rpartition(".")[0] == node and node not in self.findings]
            seen |= {node, *parts}
            yield self._layer(decision, tuple(reads.pop(decision["op"], ())), node, parts)
        for reader, quantized in reads.items():  # what moves data from one quantizer to several readers
            label = self.labels.get(reader, reader)
            node = _numbered(label, labels)
            yield Layer(reader, label, node, "data movement", block_of(label), "moves", reads=tuple(quantized))
        for node, finding in self.findings.items():
            if node not in seen:
                yield self._layer({"op": node, "label": node, "kind": finding["operation"]}, (), node, ())

    def _layer(self, decision: Mapping[str, Any], reads: tuple[Read, ...], node: str, parts: Sequence[str]) -> Layer:
        """The layer of a decision, which is ``node`` in the file. If its parts differ, the worst of them is shown."""
        label, nodes = str(decision["label"]), parts or (node,)
        worst = min(nodes, key=lambda one: self.findings.get(one, {}).get("precision") == INT8.name)
        finding, listed = self.findings.get(worst, {}), self.engine_layers.get(worst, {})
        cost = self.costs.get(str(decision["op"]), {})
        times = [self.times[one] for one in nodes if one in self.times]
        quantized = bool(decision.get("quantized", finding.get("declared_int8", False)))
        precision = finding.get("precision") or ("" if quantized else listed.get("precision", ""))
        broken = finding.get("declared_int8", False) and precision != INT8.name and finding.get("has_kernel", True)
        state: State = "broken" if broken else "int8" if quantized else "fp32" if precision == "FP32" else "float"
        saved = self.quantized_loss - cost["loss_without"] if cost and self.quantized_loss is not None else None
        reason = finding.get("cause", "") if broken or not decision.get("reason") else decision["reason"]
        return Layer(
            name=str(decision["op"]),
            label=label,
            node=node,
            kind=_KINDS.get(str(decision.get("kind")), str(decision.get("kind", "")).replace("_", " ")),
            block=block_of(label),
            state=state,
            precision=precision,
            rule=decision.get("rule", ""),
            reason=reason,
            reads=reads,
            milliseconds=sum(times) if times else None,
            kernel=listed.get("tactic", ""),
            together=tuple(other for other in listed.get("nodes", ()) if other not in nodes),
            parts=tuple(parts),
            loss_saved=saved,
            sqnr_db=cost.get("sqnr_db"),
            slower=next((self.slower[one] for one in nodes if one in self.slower), None),
            reformats=sum(self.reformats[one] for one in nodes),
        )

    def _read(self, tensor: Mapping[str, Any], rule: str) -> Read:
        quantizer = tensor["quantizer"]
        amax, seen = self.details.get("amax", {}).get(quantizer), self.seen.get(quantizer)
        choice = next((one for one in seen.choices if _equal(one.amax, amax)), None) if seen else None
        return Read(
            tensor=tensor["tensor"],
            quantizer=quantizer,
            scale=None if amax is None else amax / self.high,
            amax=amax,
            clipped=choice.clipped if choice else clipped_by(seen, amax) if seen and amax is not None else None,
            sqnr_db=choice.sqnr_db if choice else None,
            rule=rule,
        )

    def _engine_layers(self, artifacts: Artifacts) -> dict[str, dict[str, Any]]:
        """The engine's layer that computes each ONNX node; of several the one with a product, else the first."""
        found: dict[str, dict[str, Any]] = {}
        for entry in self._listed(artifacts):
            layer = EngineLayer.from_json(entry)
            product = layer.kind.lower() not in POINTWISE_KINDS and not layer.is_reformat
            nodes = [node for node in layer.own_nodes or layer.onnx_nodes if node in layer.onnx_nodes]
            for node in layer.onnx_nodes:
                known = found.get(node)
                if known is None or (product and not known["product"]):
                    found[node] = {**entry, "precision": layer.product_precision, "product": product, "nodes": nodes}
        return found

    def _times(self, artifacts: Artifacts) -> dict[str, float]:
        """Milliseconds of each operation. A layer of the engine is charged once: to the first product that it names."""
        labels = {decision["label"] for decision in self.placement["decisions"]} | self.findings.keys()
        found: dict[str, float] = {}
        for entry in self._listed(artifacts):
            if entry.get("milliseconds") is None:
                continue
            known = [node for node in entry["onnx_nodes"] if node in labels]
            owner = next((node for node in known if node in self.findings), next(iter(known), None))
            if owner is not None:
                found[owner] = found.get(owner, 0.0) + entry["milliseconds"]
        return found

    def _reformats(self, artifacts: Artifacts) -> Counter[str]:
        """How many reformats the engine has at each product. Their names tell: ... to NODE [+ NODE ...]."""
        found: Counter[str] = Counter()
        for entry in self._listed(artifacts):
            layer = EngineLayer.from_json(entry)
            if layer.is_reformat:
                found.update(set(node_names(layer.name.rpartition(" to ")[2])) & self.findings.keys())
        return found

    def _listed(self, artifacts: Artifacts) -> Sequence[Mapping[str, Any]]:
        """The engine's layers: measured ones where there is an audit."""
        measured: Sequence[Mapping[str, Any]] = artifacts.results.get("audit", {}).get("layers", [])
        return measured or self.engine.get("layers", [])


def _numbered(label: str, seen: Counter[str]) -> str:
    """The name of the next node of ``label`` in the ONNX file, which numbers those of one label: matmul, matmul_1."""
    count = seen[label]
    seen[label] += 1
    return f"{label}_{count}" if count else label


def _equal(one: float, other: float | None) -> bool:
    """Whether two ranges are the same, one of which has five digits."""
    return other is not None and math.isclose(one, other, rel_tol=1e-4)


def _counted(count: int, kind: str) -> str:
    plural = kind if count == 1 else f"{kind}es" if kind.endswith("x") else f"{kind}s"
    return f"{count} {plural}"
