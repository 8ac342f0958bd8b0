"""What the quantization of each operation costs: which to keep in float, and how much accuracy that gives back.

    python -m qat.sensitivity runs/model.qat
    python -m qat.sensitivity runs/model.qat --images 512 --target-drop 0.2 --json sensitivity.json

Takes a checkpoint of python -m qat.train, or one that python -m qat.calibrate made of labelled images, and measures on
its validation split, never on the test split. The operations that it suggests are what --keep-float of both takes.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from qat.base.artifact import check_writable, write_json
from qat.base.console import Command, progress, run_command, say, table
from qat.base.errors import UserError
from qat.base.number_format import BITS

if TYPE_CHECKING:
    from torch import Tensor

    from qat.checkpoint import Checkpoint
    from qat.compute.device import Compute
    from qat.costs import Cost
    from qat.evaluate import Accuracy

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(Command):
    """The options of ``python -m qat.sensitivity``."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """The checkpoint that python -m qat.train or qat.calibrate wrote."""
    images: int = 256
    """Images of the validation split to measure on, at most."""
    target_drop: float = 0.5
    """Points of accuracy that the quantized network may lie below the float one."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a GPU where there is one."""
    json: Path | None = None
    """Also write all figures here."""
    show: int = 20
    """Operations that are printed, the costliest first; the file of --json has all."""


def main(options: SensitivityOptions) -> None:
    """Measures and prints. Torch is imported here, so that --help answers at once."""
    from qat.checkpoint import has_labels, load_checkpoint
    from qat.compute.device import Compute
    from qat.compute.precision import exact_float32
    from qat.costs import PartlyQuantized
    from qat.graph.tracing import network_of
    from qat.models import ModelSpec, build_model

    if options.images < 1:
        raise UserError(f"--images {options.images}: at least 1 is needed")
    if not options.target_drop >= 0:
        raise UserError(f"--target-drop {options.target_drop}: points of accuracy, at least 0, are needed")
    if options.show < 0:
        raise UserError(f"--show {options.show} is no number of operations: give 0 or more")
    if options.json is not None:
        check_writable(options.json)
    checkpoint = load_checkpoint(options.checkpoint)
    if not has_labels(checkpoint):
        raise UserError(
            f"{options.checkpoint} was calibrated on images without labels, and losses need labels: run python -m "
            "qat.calibrate again with --data that has them"
        )
    compute = Compute.from_options(options.device, "float32", compiled=False)
    batches = _batches(options, checkpoint, compute)
    compute.place(checkpoint.model)
    size = checkpoint.preprocessing
    spec = ModelSpec(**checkpoint.sidecar.details["model"])
    network = network_of(build_model(spec), (3, size.height, size.width))
    measured = PartlyQuantized(checkpoint.model, network, batches)
    with exact_float32(), progress("measuring operations", len(measured.ops)) as task:
        unquantized, quantized = measured.measure(frozenset()), measured.measure(measured.all)
        costs = []
        for cost in measured.costs():
            costs.append(cost)
            task.advance()
        kept = measured.keep_float(costs, unquantized.top1 - options.target_drop)
    _print(costs, unquantized, quantized, options.show)
    _suggest(kept, unquantized, quantized, options.target_drop, checkpoint.sidecar.details.get("bits", BITS))
    if options.json is not None:
        content = {"images": quantized.images, "float": _figures(unquantized), "quantized": _figures(quantized)}
        content |= {"operations": [asdict(cost) for cost in costs], "target_drop": options.target_drop}
        content["keep_float"] = [{"op": cost.op, "label": cost.label, **_figures(after)} for cost, after in kept]
        write_json(options.json, content)
        say(f"wrote {options.json}")


def _batches(options: SensitivityOptions, checkpoint: Checkpoint, compute: Compute) -> list[tuple[Tensor, Tensor]]:
    from qat.checkpoint import training_data
    from qat.data.batches import batches

    found, left = [], options.images
    for x_NCHW, labels in batches(training_data(checkpoint).validation, _BATCH, None):
        x = checkpoint.preprocessing.normalize(compute.images(x_NCHW[:left]))
        found.append((x, labels[:left].to(compute.device)))
        left -= len(x)
        if left <= 0:
            break
    return found


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
    columns = ("operation", "SQNR, dB", "loss, it alone quantized", "loss, it alone float", "multiply-adds")
    table(f"Cost of quantization ({len(rows)} of {len(costs)} operations)", columns, rows)
    say("SQNR: of its output. Losses: against the float network, and against the quantized one.")


def _below(drop: float) -> str:
    return f"{abs(drop):.2f} points {'below' if drop >= 0 else 'above'}"


def _suggest(
    kept: list[tuple[Cost, Accuracy]], unquantized: Accuracy, quantized: Accuracy, target: float, bits: int
) -> None:
    images = quantized.images
    noise = f"one of {images} images is {100 / images:.2f} points"
    if not kept:
        drop = unquantized.top1 - quantized.top1
        say(f"the quantized network is {_below(drop)} the float one, {noise}: nothing has to stay in float")
        return
    drop = unquantized.top1 - kept[-1][1].top1
    share = sum(cost.multiply_adds for cost, _ in kept)
    reached = "which is enough" if drop <= target else "which is not enough: train longer, or look at the data"
    say(f"suggested: --keep-float {shlex.join(cost.label for cost, _ in kept)}")
    say(f"with these {len(kept)} in float the network is {_below(drop)} the float one, {reached} ({noise})")
    if bits == BITS:
        say(f"{100 * share:.1f} % of the multiply-adds leave INT8 then: a GPU computes those at half the rate or less")


if __name__ == "__main__":
    run_command(main, SensitivityOptions)
