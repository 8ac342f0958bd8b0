"""Does the engine answer what was trained? Its accuracy, and its agreement with PyTorch and with ONNX Runtime.

    python -m deploy.evaluate runs/model.engine
    python -m deploy.evaluate runs/model.engine --data path/to/folder

Without --data the images are those of the reference file that python -m export.onnx wrote beside the ONNX file, with
PyTorch's answers: then neither torch nor the data set is needed. Exit code 4 says that the engine disagrees with one of
them. Where that is ONNX Runtime, the engine is built again with tensors inside the network as outputs, until the first
layer that differs is found.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from deploy.reference import network_input, read_reference
from deploy.settings import BuildSettings
from qat.base.artifact import Sidecar, check_writable, read_parent, read_sidecar, write_json
from qat.base.console import Command, run_command, say, table, warn
from qat.base.errors import UserError
from qat.base.exit_codes import DISAGREES
from qat.base.text import decibels

if TYPE_CHECKING:
    from deploy.runtime import Engine

BISECT_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Command):
    """The options of ``python -m deploy.evaluate``."""

    engine: Annotated[Path, tyro.conf.Positional]
    """The engine that python -m deploy.build wrote."""
    data: str | None = None
    """Labelled images, as for qat.train (needs torch); their test split is used. By default the reference file."""
    data_root: Path = Path("data")
    """Where data sets of torchvision are."""
    images: int | None = None
    """Use so many images at most."""
    onnx: Path | None = None
    """Hold the engine against this ONNX file; by default the one that it was built from."""
    least_agreement: float = 99.0
    """Share of images, in percent, on which the engine must choose the class that ONNX Runtime and PyTorch choose."""
    least_sqnr: float = 20.0
    """What the search for the first differing layer takes for a difference: less signal to noise than this, in dB."""
    json: Path | None = None
    """File for the results, as JSON."""
    trust: bool = False
    """Load the engine even if it is not the file that its sidecar was written for."""


@dataclass(frozen=True)
class Answers:
    """What was asked and answered: ``labels`` [N], -1 where unknown; logits [N, classes] by who answered."""

    source: str
    labels: np.ndarray
    logits: dict[str, np.ndarray]

    def accuracy(self, who: str) -> float | None:
        """Top-1 in percent of the labelled images; None when there are none."""
        labelled = self.labels >= 0
        if not labelled.any():
            return None
        return float(100 * (self.logits[who].argmax(1) == self.labels)[labelled].mean())

    def agreement(self, one: str, other: str) -> float:
        """Share of images with the same top-1, in percent."""
        return float(100 * (self.logits[one].argmax(1) == self.logits[other].argmax(1)).mean())


def main(options: EvaluateOptions) -> int:
    """Evaluates. Returns 0, or 4 when the engine disagrees with ONNX Runtime or PyTorch."""
    if options.json:
        check_writable(options.json)
    if options.images is not None and options.images < 1:
        raise UserError(f"--images {options.images}: needed is 1 at least")
    sidecar = read_sidecar(options.engine, "engine", trust=options.trust)
    onnx_path, onnx = read_parent(options.engine, sidecar, "onnx")
    truth = options.onnx or onnx_path
    if not truth.is_file():
        raise UserError(f"no file {truth}: check the path of --onnx")
    answers, first = _answers(options, onnx_path, onnx, truth)
    _print(answers)
    result = {"engine": sidecar.sha256} | _to_json(answers)
    code = 0
    for who, share in result["agreement"].items():
        if share < options.least_agreement:
            code = DISAGREES
            warn(
                f"{who} choose the same class on {share:.2f} % of the images, needed are {options.least_agreement:g} %"
            )
    if not result["agreement"]:
        warn("there is nobody to compare with: neither ONNX Runtime nor answers of PyTorch")
    if result["agreement"].get("engine, ONNX Runtime", 100.0) < options.least_agreement:
        result["first_difference"] = _find_difference(options, sidecar, onnx_path, truth, first)
    if options.json:
        write_json(options.json, result)
        say(f"wrote {options.json}")
    return code


def engine_logits(engine: Engine, inputs: np.ndarray) -> np.ndarray:
    """[N, classes] for any N: in the largest batches that the engine takes, the last one padded where it must be."""
    size = engine.max_batch
    pieces = [inputs[start : start + size] for start in range(0, len(inputs), size)]
    counts = list(map(len, pieces))
    last = counts[-1]
    taken = min(max(last, profile.min) for profile in engine.profiles if profile.max >= last)
    pieces[-1] = np.concatenate([pieces[-1], np.zeros((taken - last, *inputs.shape[1:]), inputs.dtype)])
    outputs = engine.map(pieces)
    return np.concatenate([output[:count] for output, count in zip(outputs, counts, strict=True)])


def _answers(options: EvaluateOptions, onnx_path: Path, onnx: Sidecar, truth: Path) -> tuple[Answers, np.ndarray]:
    """Everybody's answers, and the first few images as the network takes them."""
    from deploy.runtime import Engine

    session = None
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        from export.session import session as make_session

        session = make_session(truth)
    else:
        warn("onnx and onnxruntime are not installed: agreement with ONNX Runtime is not measured")
    logits: dict[str, list[np.ndarray]] = {}
    labels: list[np.ndarray] = []
    first: np.ndarray | None = None
    source, batches = _images(options, onnx_path, onnx)
    with Engine.load(options.engine, trust=options.trust) as engine:
        for images, given_labels, pytorch in batches:
            inputs = network_input(images, onnx)
            first = inputs[:BISECT_IMAGES] if first is None else first
            labels.append(given_labels)
            logits.setdefault("engine", []).append(engine_logits(engine, inputs))
            if session is not None:
                answered = session.run(None, {session.get_inputs()[0].name: inputs})[0]
                logits.setdefault("ONNX Runtime", []).append(answered)
            if pytorch is not None:
                logits.setdefault("PyTorch", []).append(pytorch)
    assert first is not None, "no image"
    answers = {who: np.concatenate(parts) for who, parts in logits.items()}
    return Answers(source, np.concatenate(labels), answers), first


def _images(
    options: EvaluateOptions, onnx_path: Path, onnx: Sidecar
) -> tuple[str, Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]]:
    """Where images come from, and batches of (uint8 [N, H, W, 3], labels [N], PyTorch's logits where known)."""
    if options.data is None:
        reference = read_reference(onnx_path, onnx)
        count = min(len(reference.images), options.images or len(reference.images))

        def saved() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
            for start in range(0, count, 256):
                part = slice(start, min(start + 256, count))
                yield reference.images[part], reference.labels[part], reference.logits[part]

        return reference.source, saved()
    if importlib.util.find_spec("torch") is None:
        raise UserError("--data needs torch: install it, or leave --data out and use the reference file")
    return f"the test split of {options.data}", _loaded(options, onnx_path, onnx)


def _loaded(
    options: EvaluateOptions, onnx_path: Path, onnx: Sidecar
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    from qat.data.batches import batches
    from qat.data.preprocessing import ImagePreset
    from qat.data.splits import load_data

    assert options.data is not None
    try:
        details = read_parent(onnx_path, onnx, "checkpoint")[1].details
    except UserError as error:
        warn(f"the checkpoint is not at hand, so a test split that training carved out cannot be told: {error}")
        details = {"seed": 0, "calibration_images": 512}
    given = onnx.preprocessing
    preset = ImagePreset(given["height"], given["resize"], tuple(given["mean"]), tuple(given["std"]))
    seed, calibration_images = details["seed"], details["calibration_images"]
    data = load_data(options.data, given["height"], seed, calibration_images, options.data_root, preset)
    left = options.images
    for x_NCHW, labels in batches(data.test, 256, None):
        part = slice(0, left)
        yield x_NCHW[part].permute(0, 2, 3, 1).contiguous().numpy(), labels[part].numpy(), None
        if left is not None:
            left -= len(labels[part])
            if left <= 0:
                return


def _print(answers: Answers) -> None:
    rows = []
    for who in answers.logits:
        accuracy = answers.accuracy(who)
        same = "" if who == "engine" else f"{answers.agreement('engine', who):.2f} %"
        rows.append((who, "no labels" if accuracy is None else f"{accuracy:.2f} %", same))
    table(f"{len(answers.labels)} images: {answers.source}", ("who", "top-1", "same class as the engine"), rows)


def _to_json(answers: Answers) -> dict[str, Any]:
    others = [who for who in answers.logits if who != "engine"]
    return {
        "images": len(answers.labels),
        "source": answers.source,
        "top1": {who: answers.accuracy(who) for who in answers.logits},
        "agreement": {f"engine, {who}": answers.agreement("engine", who) for who in others},
    }


def _find_difference(
    options: EvaluateOptions, sidecar: Sidecar, model: Path, truth: Path, inputs: np.ndarray
) -> dict[str, Any] | None:
    from deploy.bisect import bisect
    from deploy.trt import find_toolkit

    say("looking for the first layer that differs from ONNX Runtime")

    def report(name: str, sqnr_db: float | None) -> None:
        say(f"  {name}: " + (decibels(sqnr_db)))

    settings = BuildSettings.from_json(sidecar.details["settings"])
    toolkit = find_toolkit(sidecar.details["builder"]["name"])
    found = bisect(toolkit, model, truth, inputs, settings, options.least_sqnr, report)
    if found is None:
        say(f"every tensor agrees to {options.least_sqnr:g} dB or better; raise --least-sqnr for smaller differences")
        return None
    say(f"the first layer that differs is {found.node}: its output {found.tensor} has {found.sqnr_db:.1f} dB")
    return {"node": found.node, "tensor": found.tensor, "sqnr_db": found.sqnr_db}


if __name__ == "__main__":
    run_command(main, EvaluateOptions)
