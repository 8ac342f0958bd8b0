"""Whether an engine answers what was trained: its accuracy, and its agreement with PyTorch and with ONNX Runtime.

The images are those of the reference file beside the ONNX file, with PyTorch's answers, or the test split of a data
set.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.bisect import Difference, bisect, every_difference
from deploy.installed import find_toolkit
from deploy.reference import network_input, read_reference
from deploy.runtime import Engine
from deploy.settings import BuildSettings
from qat.base.artifact import Sidecar, read_parent, read_sidecar
from qat.base.console import say, table, warn
from qat.base.errors import UserError
from qat.base.output_agreement import OutputAgreement
from qat.base.sqnr import worst_first
from qat.base.text import decibels

if TYPE_CHECKING:
    from deploy.trt import Toolkit

BISECT_IMAGES = 8
SHOWN = 10
BATCH = 256
ENGINE, ONNX_RUNTIME, PYTORCH = "engine", "ONNX Runtime", "PyTorch"

ImageBatch = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Images uint8 [N, H, W, 3], labels int64 [N], and PyTorch's answers float32 [N, values] if they are known."""


@dataclass(frozen=True)
class Answers:
    """What was asked and answered.

    Attributes:
        source: where the images come from.
        labels: int64 [N], -1 for an image without a label.
        logits: float32 [N, classes] by who answered: the engine, ONNX Runtime, PyTorch.
        classes: whether they are known to be logits; if not, they are any output [N, ...], and no class is counted.
    """

    source: str
    labels: np.ndarray
    logits: dict[str, np.ndarray]
    classes: bool = True

    def accuracy(self, who: str) -> float | None:
        """Top-1 accuracy in percent of the labelled images; None if there are none, or no classes."""
        labelled = self.labels >= 0
        if not labelled.any() or not self.classes:
            return None
        return float(100 * (self.logits[who].argmax(1) == self.labels)[labelled].mean())

    def agreement(self, one: str, other: str) -> float:
        """Share of images with the same top-1 class, in percent."""
        return float(100 * (self.logits[one].argmax(1) == self.logits[other].argmax(1)).mean())

    def agreements(self) -> dict[str, float]:
        """Agreement of the engine with each other one, in percent; {} if there are no classes."""
        others = [who for who in self.logits if who != ENGINE and self.classes]
        return {f"{ENGINE}, {who}": self.agreement(ENGINE, who) for who in others}

    def distances(self) -> dict[str, OutputAgreement]:
        """How far the engine's output is from that of each other one."""
        mine = self.logits[ENGINE]
        others = {who: answers for who, answers in self.logits.items() if who != ENGINE}
        return {f"{ENGINE}, {who}": OutputAgreement.measure("output", answers, mine) for who, answers in others.items()}

    def disagreements(self, least_agreement: float, least_sqnr: float) -> dict[str, str]:
        """The pairs that agree too little, each with what was measured and what is demanded.

        ``least_agreement``: in percent, of classes and of integers. ``least_sqnr``: in dB, of other values.
        """
        if self.classes:
            demand = f"must be at least {least_agreement:g} %"
            return {
                pair: f"choose the same class on {share:.2f} % of the images: {demand}"
                for pair, share in self.agreements().items()
                if share < least_agreement
            }
        demand = f"must be at least {least_sqnr:g} dB, or {least_agreement:g} % of integers"
        return {
            pair: f"agree too little ({found.measured}): {demand}"
            for pair, found in self.distances().items()
            if not found.reaches(least_sqnr, least_agreement)
        }


@dataclass(frozen=True)
class Evaluation:
    """The answers of an engine, and whether it agrees with the others.

    Attributes:
        engine: SHA-256 of the engine file.
        answers: those of the engine and of the others.
        least_agreement: share of images, in percent, on which the others must choose the same class.
        searched: whether the first difference from ONNX Runtime was searched.
        first_difference: the first tensor that differs, if it was searched and found.
        least_sqnr: of a network without classes, what the others' output must agree to, in dB.
        layers: every compared tensor against ONNX Runtime, if that was asked for.
    """

    engine: str
    answers: Answers
    least_agreement: float
    searched: bool = False
    first_difference: Difference | None = None
    least_sqnr: float = 20.0
    layers: tuple[Difference, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether the engine agrees with all others well enough."""
        return not self.answers.disagreements(self.least_agreement, self.least_sqnr)

    def to_json(self) -> dict[str, Any]:
        """As the file of ``python -m deploy.evaluate --json`` has it."""
        answers, found = self.answers, self.first_difference
        result: dict[str, Any] = {
            "engine": self.engine,
            "images": len(answers.labels),
            "source": answers.source,
            "top1": {who: answers.accuracy(who) for who in answers.logits},
            "agreement": answers.agreements(),
        }
        if not answers.classes:
            result["outputs"] = {
                pair: {"sqnr_db": found.sqnr_db, "equal_percent": found.equal_percent}
                for pair, found in answers.distances().items()
            }
        if self.searched:
            result["first_difference"] = found and dataclasses.asdict(found)
        if self.layers:
            result["layers"] = [dataclasses.asdict(layer) for layer in self.layers]
        return result


def evaluate_engine(
    engine: Path,
    *,
    data: str | None = None,
    data_root: Path = Path("data"),
    images: int | None = None,
    onnx: Path | None = None,
    least_agreement: float = 99.0,
    least_sqnr: float = 20.0,
    layers: bool = False,
    trust: bool = False,
) -> Evaluation:
    """Runs an engine, ONNX Runtime and, if its answers are known, PyTorch on the same images, and prints the figures.

    If the engine disagrees with ONNX Runtime, it is built again with tensors inside the network as outputs, until the
    first layer that differs is found.

    Args:
        engine: the engine file; its sidecar and its ONNX file are beside it.
        data: a data set as for qat.train, of which the test split is used; by default the reference file.
        data_root: where the data sets of torchvision are.
        images: the largest number of images to use.
        onnx: the ONNX file that ONNX Runtime runs; by default the one that the engine was built from.
        least_agreement: share of images, in percent, on which the engine must choose the class that the others choose.
        least_sqnr: in the search, a tensor differs if its signal-to-noise ratio is below this, in dB. So does the
            output of a network that is not known to answer classes, because its sidecar has no class names.
        layers: compare the tensors inside too: one more engine is built, which has them as outputs.
        trust: load the engine even if it is not the file that its sidecar was written for.

    Raises UserError when a file is missing or does not belong to the engine, and when the engine cannot be run here.
    """
    if images is not None and images < 1:
        raise UserError(f"--images {images}: must be at least 1")
    sidecar = read_sidecar(engine, "engine", trust=trust)
    model, onnx_sidecar = read_parent(engine, sidecar, "onnx")
    if len(sidecar.outputs) > 1:
        names = ", ".join(spec.name for spec in sidecar.outputs)
        raise UserError(
            f"{engine} has {len(sidecar.outputs)} outputs ({names}), and only networks with one are evaluated: run it "
            "by deploy.Engine, and compare them there"
        )
    reference_model = onnx or model
    if not reference_model.is_file():
        raise UserError(f"no file {reference_model}: check the path of --onnx")
    if data is None:
        source, batches = reference_batches(model, onnx_sidecar, images)
    else:
        source, batches = data_set_batches(model, onnx_sidecar, data, data_root, images)
    with Engine.load(engine, trust=trust) as loaded:
        answers, first_inputs = _collect_answers(loaded, source, batches, onnx_sidecar, reference_model)
    disagreements = answers.disagreements(least_agreement, least_sqnr)
    _print_answers(answers, disagreements)
    evaluation = Evaluation(sidecar.sha256, answers, least_agreement, least_sqnr=least_sqnr)
    if layers:
        compared = _every_difference(sidecar, model, reference_model, first_inputs)
        evaluation = dataclasses.replace(evaluation, layers=compared)
    if f"{ENGINE}, {ONNX_RUNTIME}" not in disagreements:
        return evaluation
    difference = _find_difference(sidecar, model, reference_model, first_inputs, least_sqnr)
    return dataclasses.replace(evaluation, searched=True, first_difference=difference)


def engine_logits(engine: Engine, inputs: np.ndarray) -> np.ndarray:
    """Runs any number of images, in the largest batches that the engine takes. The last batch is padded if necessary.

    ``inputs``: [N, ...] as the engine takes them. Returns its only output, [N, ...].
    """
    size = engine.max_batch
    pieces = [inputs[start : start + size] for start in range(0, len(inputs), size)]
    counts = list(map(len, pieces))
    last = counts[-1]
    padded = min(max(last, profile.min) for profile in engine.profiles if profile.max >= last)
    pieces[-1] = np.concatenate([pieces[-1], np.zeros((padded - last, *inputs.shape[1:]), inputs.dtype)])
    outputs = engine.map(pieces)
    return np.concatenate([output[:count] for output, count in zip(outputs, counts, strict=True)])


def reference_batches(model: Path, sidecar: Sidecar, images: int | None) -> tuple[str, Iterator[ImageBatch]]:
    """The source of the reference file beside the ONNX file ``model``, and its images, at most ``images`` of them."""
    reference = read_reference(model, sidecar)
    count = min(len(reference.images), images or len(reference.images))

    def batches() -> Iterator[ImageBatch]:
        for start in range(0, count, BATCH):
            part = slice(start, min(start + BATCH, count))
            yield reference.images[part], reference.labels[part], reference.logits[part]

    return reference.source, batches()


def data_set_batches(
    model: Path, sidecar: Sidecar, data: str, data_root: Path, images: int | None
) -> tuple[str, Iterator[ImageBatch]]:
    """The source of a data set's test split, and its images, at most ``images`` of them. Needs torch."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("--data needs torch: install it, or leave --data out and use the reference file")
    return f"the test split of {data}", _test_split(model, sidecar, data, data_root, images)


def _test_split(model: Path, sidecar: Sidecar, data: str, data_root: Path, images: int | None) -> Iterator[ImageBatch]:
    from qat.data.batches import first_batches
    from qat.data.preprocessing import ImagePreset
    from qat.data.splits import load_data

    try:
        details = read_parent(model, sidecar, "checkpoint")[1].details
    except UserError as error:
        warn(f"without the checkpoint, a test split that training made itself cannot be made again: {error}")
        details = {"seed": 0, "calibration_images": 512}
    given = sidecar.preprocessing
    preset = ImagePreset.of_sidecar(given)
    seed, calibration_images = details["seed"], details["calibration_images"]
    data_set = load_data(data, given["height"], seed, calibration_images, data_root, preset)
    count = len(data_set.test) if images is None else images
    for x_NCHW, labels in first_batches(data_set.test, count, BATCH):
        yield x_NCHW.permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy(), None


def _collect_answers(
    engine: Engine, source: str, batches: Iterator[ImageBatch], sidecar: Sidecar, reference_model: Path
) -> tuple[Answers, np.ndarray]:
    """The answers of all, and the first few images as the network takes them."""
    session = None
    if sidecar.details.get("float_type") == "bfloat16":
        warn("ONNX Runtime has no bfloat16: agreement with it is not measured")
    elif importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        from export.session import runs_in_onnx_runtime
        from export.session import session as make_session

        with runs_in_onnx_runtime(reference_model):
            session = make_session(reference_model)
    else:
        warn("onnx and onnxruntime are not installed: agreement with ONNX Runtime is not measured")
    logits: dict[str, list[np.ndarray]] = {}
    labels: list[np.ndarray] = []
    first_inputs: np.ndarray | None = None
    for images, given_labels, pytorch in batches:
        inputs = network_input(images, sidecar)
        first_inputs = inputs[:BISECT_IMAGES] if first_inputs is None else first_inputs
        labels.append(given_labels)
        logits.setdefault(ENGINE, []).append(engine_logits(engine, inputs))
        if session is not None:
            answered = session.run(None, {session.get_inputs()[0].name: inputs})[0]
            logits.setdefault(ONNX_RUNTIME, []).append(answered)
        if pytorch is not None:
            logits.setdefault(PYTORCH, []).append(pytorch)
    assert first_inputs is not None, "no image"
    by_who = {who: np.concatenate(parts) for who, parts in logits.items()}
    return Answers(source, np.concatenate(labels), by_who, bool(sidecar.class_names)), first_inputs


def _print_answers(answers: Answers, disagreements: dict[str, str]) -> None:
    title = f"{len(answers.labels)} images: {answers.source}"
    if answers.classes:
        rows = []
        for who in answers.logits:
            accuracy = answers.accuracy(who)
            same = "" if who == ENGINE else f"{answers.agreement(ENGINE, who):.2f} %"
            rows.append((who, "no labels" if accuracy is None else f"{accuracy:.2f} %", same))
        table(title, ("who", "top-1", "same class as the engine"), rows)
    else:
        table(title, ("who", "output"), [(pair, found.measured) for pair, found in answers.distances().items()])
    for pair, said in disagreements.items():
        warn(f"{pair} {said}")
    if len(answers.logits) == 1:
        warn("there is nothing to compare the engine with: neither ONNX Runtime nor answers of PyTorch")


def _built_with(sidecar: Sidecar) -> tuple[Toolkit, BuildSettings]:
    """The builder of an engine, and its settings."""
    return find_toolkit(sidecar.details["builder"]["name"]), BuildSettings.from_json(sidecar.details["settings"])


def _every_difference(
    sidecar: Sidecar, model: Path, reference_model: Path, inputs: np.ndarray
) -> tuple[Difference, ...]:
    say("comparing the tensors inside with ONNX Runtime's")
    toolkit, settings = _built_with(sidecar)
    found = every_difference(toolkit, model, reference_model, inputs, settings)
    worst = sorted(found, key=lambda one: worst_first(one.sqnr_db))[:SHOWN]
    title = f"{len(found)} tensors inside, the {len(worst)} that differ most"
    table(title, ("tensor", "SQNR"), [(one.tensor, decibels(one.sqnr_db)) for one in worst])
    return found


def _find_difference(
    sidecar: Sidecar, model: Path, reference_model: Path, inputs: np.ndarray, least_sqnr: float
) -> Difference | None:
    say("searching the first layer that differs from ONNX Runtime")

    def report(name: str, sqnr_db: float | None) -> None:
        say(f"  {name}: {decibels(sqnr_db)}")

    toolkit, settings = _built_with(sidecar)
    found = bisect(toolkit, model, reference_model, inputs, settings, least_sqnr, report)
    if found is None:
        say(f"every tensor agrees to {least_sqnr:g} dB or better; raise --least-sqnr to find smaller differences")
    else:
        say(f"the first layer that differs is {found.node}: its output {found.tensor} has {found.sqnr_db:.1f} dB")
    return found
