"""Evaluates an engine or an ONNX file: classifiers by their classes, other networks by boxes, masks and outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from deploy.agreement import Evaluation, evaluate_classes
from deploy.decoders import Limits
from deploy.difference_search import compare_layers, find_difference
from deploy.reference import network_input
from deploy.task_evaluation import TaskEvaluation, evaluate_task, task_images
from deploy.who_answers import ENGINE, ONNX_RUNTIME, Judged
from qat.base.errors import UserError
from qat.data.annotated_sets import is_annotated

BISECT_IMAGES = 8


def evaluate_file(
    path: Path,
    *,
    data: str | None = None,
    data_root: Path = Path("data"),
    images: int | None = None,
    onnx: Path | None = None,
    decoder: str | None = None,
    limits: Limits | None = None,
    least_agreement: float = 99.0,
    least_sqnr: float = 20.0,
    pytorch: bool = True,
    layers: bool = False,
    trust: bool = False,
    trust_code: bool = False,
) -> Evaluation | TaskEvaluation:
    """Runs an engine or an ONNX file, and whoever else can answer, on the same images, and prints the figures.

    If an engine disagrees with ONNX Runtime, it is built again with tensors inside the network as outputs, until the
    first layer that differs is found.

    Args:
        path: an engine, whose sidecar and ONNX file are beside it, or an ONNX file, which runs in ONNX Runtime.
        data: a set with boxes or masks, a folder of images, or a data set as for qat.train, of which the test split is
            used; by default the reference file.
        data_root: where the data sets of torchvision are.
        images: the largest number of images to use.
        onnx: the ONNX file that ONNX Runtime runs; by default the one that the engine was built from.
        decoder: path/file.py:function, which makes boxes of the outputs; None for the built-in one.
        limits: which boxes count; None for what is usual.
        least_agreement: share of images, in percent, on which it must choose the class that the others choose; of
            outputs that are integers, the share of equal ones.
        least_sqnr: in the search, a tensor differs if its signal-to-noise ratio is below this, in dB. So does the
            output of a network that is not known to answer classes, because its sidecar has no class names.
        pytorch: run the checkpoint in PyTorch too, where both are at hand, of networks that answer no classes.
        layers: compare the tensors inside an engine too: one more is built, which has them as outputs.
        trust: load the file even if it is not the file that its sidecar was written for.
        trust_code: run code that the sidecars name, though a stranger made them (docs/trust.md).

    Raises UserError when a file is missing or does not belong to the others, when the engine cannot be run here, and
    when the images or their labels do not fit the network.
    """
    if images is not None and images < 1:
        raise UserError(f"--images {images}: must be at least 1")
    judged = Judged.read(path, onnx, trust)
    if layers and not judged.is_engine:
        raise UserError("--layers compares what is inside an engine: give an engine, or leave it out")
    if len(judged.onnx_sidecar.inputs) != 1:
        names = ", ".join(spec.name for spec in judged.onnx_sidecar.inputs)
        raise UserError(
            f"{path} takes {names}, and only networks of images alone are evaluated: compare it by yourself"
        )
    limits = limits or Limits()
    found: Evaluation | TaskEvaluation
    if judged.onnx_sidecar.class_names:
        if data is not None and is_annotated(data):
            raise UserError(f"{path} tells classes of whole images, and {data} has boxes or masks: give other --data")
        found, first = evaluate_classes(
            judged, data=data, data_root=data_root, images=images, least_agreement=least_agreement, trust=trust
        )
    else:
        asked = task_images(judged, data, images)
        found, first = evaluate_task(
            judged,
            asked,
            decoder=decoder,
            limits=limits,
            least_agreement=least_agreement,
            least_sqnr=least_sqnr,
            pytorch=pytorch and data is not None,
            trust=trust,
            trust_code=trust_code,
        )
    inputs = network_input(first[:BISECT_IMAGES], judged.onnx_sidecar)
    return _with_differences(judged, found, inputs, least_sqnr, layers)


def _with_differences(
    judged: Judged, found: Evaluation | TaskEvaluation, inputs: np.ndarray, least_sqnr: float, layers: bool
) -> Evaluation | TaskEvaluation:
    files = judged.sidecar, judged.model, judged.onnx
    if layers:
        found = dataclasses.replace(found, layers=compare_layers(*files, inputs))
    if f"{ENGINE}, {ONNX_RUNTIME}" not in found.disagreements:
        return found
    difference = find_difference(*files, inputs, least_sqnr)
    return dataclasses.replace(found, searched=True, first_difference=difference)
