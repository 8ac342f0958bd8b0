"""What the quantization of each operation costs; this is the work of python -m qat.sensitivity.

Three figures for each operation: the error of its output, the loss when only it is quantized, and the loss when only it
stays in float. To measure them, a prepared network is run with any subset of its operations quantized. The subsets
share the network's modules, so no weights are copied.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qat.base.artifact import write_result
from qat.base.console import progress, say, table
from qat.base.errors import UserError
from qat.base.number_format import BITS
from qat.base.sqnr import sqnr_db
from qat.checkpoint import has_labels, load_checkpoint, training_data
from qat.compute.device import Compute
from qat.compute.precision import exact_float32
from qat.data.batches import first_batches
from qat.evaluate import Accuracy, accuracy
from qat.fake_quantize.prepare import WEIGHT_QUANTIZERS, placement_of, weights_and_quantizers
from qat.fake_quantize.quantizer import ActivationQuantizer
from qat.graph.data_movement import movers_before
from qat.graph.inner_outputs import with_inner_outputs
from qat.graph.network import Network, Op
from qat.graph.tracing import network_of

_BATCH = 64
_OUTPUT_IMAGES = 8  # images on which outputs are compared


@dataclass(frozen=True)
class Cost:
    """What the quantization of one operation costs.

    ``sqnr_db``: SQNR of the output when only this operation is quantized, against its float output; None if they are
    equal. ``loss_alone``: the loss of the float network with only this operation quantized. ``loss_without``: the loss
    of the quantized network with only this operation in float. ``multiply_adds``: its share of the network's
    multiply-adds, from 0 to 1.
    """

    op: str
    label: str
    kind: str
    sqnr_db: float | None
    loss_alone: float
    loss_without: float
    multiply_adds: float


class PartlyQuantized:
    """A prepared network that can be measured with any subset of its operations in INT8."""

    def __init__(self, prepared: fx.GraphModule, network: Network, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """``network``: the neutral view of ``prepared``; ``batches``: normalized images [N, C, H, W], labels [N]."""
        self.prepared, self.network, self.batches = prepared.eval(), network, list(batches)
        self.ops = tuple(decision.op for decision in placement_of(prepared).decisions if decision.quantized)
        self.all = frozenset(self.ops)
        self._nodes = {node.name: node for node in prepared.graph.nodes}

    def measure(self, quantized: frozenset[str]) -> Accuracy:
        """Accuracy of the network with only the operations ``quantized`` in INT8."""
        with self._only(quantized) as model:
            return accuracy(model, self.batches)

    def costs(self) -> Iterator[Cost]:
        """The cost of every quantized operation, in the order of the network."""
        total = sum(map(multiply_adds, self.network)) or 1
        for name in self.ops:
            op = self.network[name]
            alone, without = self.measure(frozenset({name})), self.measure(self.all - {name})
            share = multiply_adds(op) / total
            yield Cost(name, op.label, op.kind, self.sqnr_db(name), alone.loss, without.loss, share)

    def sqnr_db(self, op: str) -> float | None:
        """SQNR of the output of ``op`` when only ``op`` is quantized; None if the output does not change."""
        x = self.batches[0][0][:_OUTPUT_IMAGES]
        outputs = []
        with torch.no_grad():
            for quantized in ((), (op,)):
                with self._only(frozenset(quantized)) as model:
                    outputs.append(with_inner_outputs(model, [op])(x)[1][0].double())
        noise = float((outputs[1] - outputs[0]).square().sum())
        return sqnr_db(float(outputs[0].square().sum()), noise)

    def keep_float(self, costs: Iterable[Cost], least_top1: float) -> list[tuple[Cost, Accuracy]]:
        """Operations to keep in float for an accuracy of ``least_top1`` percent, those that gain most first.

        Each comes with the accuracy of the network when it and all before it are in float. [] if none has to be kept.
        """
        kept: list[tuple[Cost, Accuracy]] = []
        found, left = self.measure(self.all), self.all
        for cost in sorted(costs, key=lambda cost: cost.loss_without):
            if found.top1 >= least_top1:
                break
            left -= {cost.op}
            found = self.measure(left)
            kept.append((cost, found))
        return kept

    @contextmanager
    def _only(self, quantized: frozenset[str]) -> Iterator[fx.GraphModule]:
        """The network with only ``quantized`` operations in INT8. Modules are shared, so use one at a time."""
        readers = {reader for op in quantized for reader in self._readers(op)}
        owners = {self._owner(op) for op in quantized}
        weights = list(weights_and_quantizers(self.prepared))
        for path, _, quantizer in weights:
            quantizer.enabled = path in owners
        try:
            yield self._network_reading(readers)
        finally:
            for _, _, quantizer in weights:
                quantizer.enabled = True

    def _readers(self, op: str) -> set[str]:
        """``op`` and the data movement in front of it: the operations whose reads must be quantized for ``op``."""
        return {op, *movers_before(self.network, self.network[op])}

    def _owner(self, op: str) -> str:
        """The path under which ``weights_and_quantizers`` lists the weight of ``op``."""
        node = self._nodes[op]
        return f"{node.target}.weight_quantizer" if node.op == "call_module" else f"{WEIGHT_QUANTIZERS}.{op}"

    def _network_reading(self, readers: set[str]) -> fx.GraphModule:
        """A network with the same modules in which only ``readers`` read through quantizers."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.prepared.graph, copied))
        for node, copy in copied.items():
            if node.op == "call_module" and isinstance(
                self.prepared.get_submodule(str(node.target)), ActivationQuantizer
            ):
                source = copied[node.all_input_nodes[0]]
                for reader in list(copy.users):
                    if reader.name not in readers:
                        reader.replace_input_with(copy, source)
        return fx.GraphModule(self.prepared, graph)


def multiply_adds(op: Op) -> int:
    """Multiply-adds of a convolution or linear layer for one image; 0 for any other operation."""
    if op.weight is None:
        return 0
    return op.elements * op.weight.in_channels // op.weight.groups * math.prod(op.weight.kernel)


def measure_sensitivity(
    path: Path,
    *,
    images: int,
    target_drop: float,
    show: int,
    output: Path | None,
    allow_changed_model: bool = False,
    trust_code: bool = False,
    compute: Compute,
) -> None:
    """Measures all operations of a checkpoint on its validation split, prints them, and suggests what to keep in float.

    Args:
        path: a checkpoint whose images have labels.
        images: largest number of images to measure on.
        target_drop: how many percentage points below the float network the quantized one may be.
        show: number of operations to print, the costliest first.
        output: a JSON file for all figures; None writes none.
        allow_changed_model: go on when the code of the checkpoint's model has changed since it was saved.
        trust_code: run the code and read the images that a stranger's checkpoint names (docs/trust.md).
        compute: the device.

    Raises:
        UserError: there are no labels, or the checkpoint or its images cannot be read.
    """
    checkpoint = load_checkpoint(path, allow_changed_model=allow_changed_model, trust_code=trust_code)
    if not has_labels(checkpoint):
        raise UserError(
            f"{path} was calibrated on images without labels, but losses need labels: run python -m qat.calibrate "
            "again with --data that has labels"
        )
    normalize = checkpoint.preprocessing.normalize
    batches = [
        (normalize(compute.images(x_NCHW)), labels.to(compute.device))
        for x_NCHW, labels in first_batches(training_data(checkpoint).validation, images, _BATCH)
    ]
    compute.place(checkpoint.model)
    network = network_of(checkpoint.model)
    measured = PartlyQuantized(checkpoint.model, network, batches)
    with exact_float32(), progress("measuring operations", len(measured.ops)) as task:
        unquantized, quantized = measured.measure(frozenset()), measured.measure(measured.all)
        costs = []
        for cost in measured.costs():
            costs.append(cost)
            task.advance()
        kept = measured.keep_float(costs, unquantized.top1 - target_drop)
    _print(costs, unquantized, quantized, show)
    _suggest(kept, unquantized, quantized, target_drop, checkpoint.sidecar.details.get("bits", BITS))
    if output is not None:
        content: dict[str, Any] = {
            "checkpoint": checkpoint.sidecar.sha256,
            "images": quantized.images,
            "float": _figures(unquantized),
            "quantized": _figures(quantized),
        }
        content |= {"operations": [asdict(cost) for cost in costs], "target_drop": target_drop}
        content["keep_float"] = [{"op": cost.op, "label": cost.label, **_figures(after)} for cost, after in kept]
        write_result(output, content)
        say(f"wrote {output}")


def _figures(measured: Accuracy) -> dict[str, float]:
    return {"loss": measured.loss, "top1": measured.top1}


def _print(costs: list[Cost], unquantized: Accuracy, quantized: Accuracy, show: int) -> None:
    before, after = (f"{one.top1:.2f} % (loss {one.loss:.4f})" for one in (unquantized, quantized))
    say(f"{quantized.images} images of the validation split: float {before}, quantized {after}")
    ranked = sorted(costs, key=lambda cost: cost.loss_without)
    rows = [
        (
            cost.label,
            "equal" if cost.sqnr_db is None else f"{cost.sqnr_db:.1f}",
            f"{cost.loss_alone - unquantized.loss:+.5f}",
            f"{cost.loss_without - quantized.loss:+.5f}",
            f"{100 * cost.multiply_adds:.1f} %",
        )
        for cost in ranked[:show]
    ]
    columns = ("operation", "SQNR, dB", "loss, only it quantized", "loss, only it float", "multiply-adds")
    table(f"Cost of quantization ({len(rows)} of {len(costs)} operations)", columns, rows)
    say("SQNR is that of the output. Losses are differences from the float network and from the quantized network.")


def _below(drop: float) -> str:
    return f"{abs(drop):.2f} points {'below' if drop >= 0 else 'above'}"


def _suggest(
    kept: list[tuple[Cost, Accuracy]], unquantized: Accuracy, quantized: Accuracy, target: float, bits: int
) -> None:
    images = quantized.images
    noise = f"one of {images} images is {100 / images:.2f} points"
    if not kept:
        drop = unquantized.top1 - quantized.top1
        say(f"the quantized network is {_below(drop)} the float one ({noise}): nothing has to stay in float")
        return
    drop = unquantized.top1 - kept[-1][1].top1
    share = sum(cost.multiply_adds for cost, _ in kept)
    reached = "which is enough" if drop <= target else "which is not enough: train longer, or look at the data"
    say(f"suggested: --keep-float {shlex.join(cost.label for cost, _ in kept)}")
    say(f"with these {len(kept)} in float the network is {_below(drop)} the float one, {reached} ({noise})")
    if bits == BITS:
        say(f"{100 * share:.1f} % of the multiply-adds then leave INT8: a GPU computes them at half the rate or less")
