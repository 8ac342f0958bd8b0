"""Checks what an engine or an ONNX file answers: accuracy, mAP or mIoU, and agreement with PyTorch and ONNX Runtime.

    python -m deploy.evaluate runs/model.engine
    python -m deploy.evaluate runs/model.engine --data path/to/folder
    python -m deploy.evaluate runs/yolo/model.onnx --data set.yaml

An ONNX file runs in ONNX Runtime and needs no GPU. Without --data the images are those of the reference file that
python -m export.onnx wrote beside the ONNX file, with PyTorch's answers. Then neither torch nor the data set is needed.
Boxes (set.yaml as Ultralytics has it, or COCO's instances.json) give mAP, masks (a folder with images/ and masks/, or
PASCAL VOC's) give mIoU. Exit code 4 means that the engine disagrees with one of them. If that is ONNX Runtime, the
engine is built again with tensors inside the network as outputs, until the first layer that differs is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qat.base.artifact import write_result
from qat.base.console import Command, run_command, say
from qat.base.exit_codes import DISAGREES, DONE
from qat.base.outputs import READS, READS_IMAGES, WRITES_TEXT
from qat.base.writing import check_writable


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Command):
    """The options of ``python -m deploy.evaluate``."""

    engine: Annotated[Path, tyro.conf.Positional, READS]
    """The engine that python -m deploy.build wrote, or an ONNX file of python -m export.onnx."""
    data: Annotated[str | None, READS_IMAGES] = None
    """Images: of a classifier as for qat.train (needs torch), whose test split is used; of others set.yaml,
    instances.json, or a folder of images, with masks or without. By default the reference file."""
    data_root: Annotated[Path, READS] = Path("data")
    """Where the data sets of torchvision are."""
    images: int | None = None
    """The largest number of images to use."""
    onnx: Annotated[Path | None, READS] = None
    """The ONNX file to compare the engine with; by default the one that it was built from."""
    decoder: Annotated[str | None, READS] = None
    """What makes boxes of a detector's outputs, path/file.py:function: it takes the outputs of one image by name and
    (height, width) of the input, and returns boxes [n, 4] as left, top, right, bottom in pixels of the input, scores
    [n] and classes [n] from 0 on. Built in for Ultralytics (--decode) and torchvision's detectors of one stage."""
    least_score: float | None = None
    """Boxes with less are dropped; by default 0.001, of torchvision's detectors their own."""
    most_overlap: float | None = None
    """Of two boxes of a class with more intersection over union one stays; by default 0.7, of torchvision their own."""
    most_boxes: int | None = None
    """Boxes of an image that count; by default 300, of torchvision's detectors their own, of --decoder 100."""
    pytorch: bool = True
    """Whether PyTorch's mAP or mIoU is measured too, INT8 and float, where torch and the checkpoint are at hand."""
    least_agreement: float = 99.0
    """Share of images, in percent, on which the engine must choose the class that ONNX Runtime and PyTorch choose; of
    integers, the share of equal ones."""
    least_sqnr: float = 20.0
    """In the search for the first differing layer, a tensor differs below this signal-to-noise ratio, in dB. So does
    the output of a network without class names."""
    layers: bool = False
    """Compare the tensors inside with ONNX Runtime's too. One more engine is built, which has them as outputs."""
    json: Annotated[Path | None, WRITES_TEXT] = None
    """File for the results, as JSON; - is the standard output."""
    trust: bool = False
    """Load the engine even if it is not the file that its sidecar was written for."""
    trust_code: bool = False
    """Run the code and read the images that the sidecar names, though it was not made by you on this machine."""


def main(options: EvaluateOptions) -> int:
    """Evaluates. Returns 0, or 4 when the engine disagrees with ONNX Runtime or PyTorch."""
    from deploy.decoders import Limits
    from deploy.evaluation import evaluate_file

    if options.json:
        check_writable(options.json)
    evaluation = evaluate_file(
        options.engine,
        data=options.data,
        data_root=options.data_root,
        images=options.images,
        onnx=options.onnx,
        decoder=options.decoder,
        limits=Limits(options.least_score, options.most_overlap, options.most_boxes),
        pytorch=options.pytorch,
        least_agreement=options.least_agreement,
        least_sqnr=options.least_sqnr,
        layers=options.layers,
        trust=options.trust,
        trust_code=options.trust_code,
    )
    if options.json:
        write_result(options.json, evaluation.to_json())
        say(f"wrote {options.json}")
    return DONE if evaluation.agrees else DISAGREES


def cli() -> None:
    """The console script ``deploy-evaluate``."""
    run_command(main, EvaluateOptions, supervised=True)


if __name__ == "__main__":
    cli()
