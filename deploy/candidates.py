"""What a benchmark compares: the model, its variants, its float engines, and other tools' ONNX files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.settings import CalibrationSettings
from qat.base.choices import EnginePrecision
from qat.base.console import warn
from qat.base.errors import UserError
from qat.base.number_format import INT8

if TYPE_CHECKING:
    from deploy.trt import Toolkit

MODEL = f"{INT8.name} (QAT)"
POST_TRAINING = f"{INT8.name} (post-training)"
FP16, IMPLICIT = "FP16", f"implicit {INT8.name}"
# The float engines, and implicit INT8, by the precision that they are built with.
BASELINE_NAMES: Mapping[EnginePrecision, str] = {"fp32": "FP32", "tf32": "TF32", "fp16": FP16, "int8": IMPLICIT}

NamedFile = tuple[str, Path]
"""The name of a candidate, and its ONNX file."""


@dataclass(frozen=True)
class Candidate:
    """One engine for each batch size.

    Attributes:
        name: what tables call it.
        model: its ONNX file.
        precision: what it is built with.
        calibration, ranges: for implicit INT8, a calibrator and a file of ranges by hand; without both, every tensor
            has the same range, and the engine only shows how fast implicit INT8 is.
    """

    name: str
    model: Path
    precision: EnginePrecision = "explicit"
    calibration: CalibrationSettings | None = None
    ranges: Path | None = None

    @property
    def file_name(self) -> str:
        """The name, with a dash in place of every character that is not a letter or a digit."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


@dataclass(frozen=True)
class CandidateSet:
    """All candidates of a benchmark. Raises UserError when two of them have the same file name.

    Attributes:
        model: the Q/DQ ONNX file in question.
        baselines: its float engines, implicit INT8, and the model quantized without training.
        variants: the model exported in other ways.
        peers: ONNX files of other tools. One that TensorRT refuses is left out.
        inputs: the model with other input types, of which only the throughput is measured.
    """

    model: Candidate
    baselines: tuple[Candidate, ...] = ()
    variants: tuple[Candidate, ...] = ()
    peers: tuple[Candidate, ...] = ()
    inputs: tuple[Candidate, ...] = ()

    @classmethod
    def from_files(
        cls,
        toolkit: Toolkit,
        model: Path,
        *,
        float32: Path | None = None,
        float16: Path | None = None,
        precisions: Sequence[EnginePrecision] = tuple(BASELINE_NAMES),
        post_training: Path | None = None,
        variants: Sequence[NamedFile] = (),
        peers: Sequence[NamedFile] = (),
        inputs: Sequence[NamedFile] = (),
    ) -> CandidateSet:
        """The candidates of a benchmark, from ONNX files.

        Args:
            toolkit: the builder. What it cannot build is left out with a warning.
            model: the Q/DQ file.
            float32, float16: the model in float; by default MODEL.float32.onnx and MODEL.float16.onnx.
            precisions: the float engines to compare with: ``fp32``, ``tf32``, ``fp16``, ``int8`` (implicit).
            post_training: the model quantized without training.
            variants, peers, inputs: name and file of each of these candidates.

        Raises UserError when the float32 file is missing, and when two candidates have the same file name.
        """
        float32 = float32 or model.with_suffix(".float32.onnx")
        float16 = float16 or model.with_suffix(".float16.onnx")
        baselines = _float_candidates(toolkit, precisions, float32, float16)
        if post_training:
            baselines.append(Candidate(POST_TRAINING, post_training))
        return cls(
            model=Candidate(MODEL, model),
            baselines=tuple(baselines),
            variants=tuple(Candidate(f"{MODEL}, {name}", path) for name, path in variants),
            peers=tuple(Candidate(name, path) for name, path in peers),
            inputs=tuple(Candidate(name, path) for name, path in inputs),
        )

    def __post_init__(self) -> None:
        names = [candidate.file_name for candidate in self.all()]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(
                f"several engines would be called {', '.join(doubled)}: give each of --variants, --peers and --inputs "
                "another name"
            )

    def all(self) -> tuple[Candidate, ...]:
        """Every candidate once."""
        return tuple(dict.fromkeys((*self.baselines, *self.own(), *self.peers, *self.inputs)))

    def own(self) -> tuple[Candidate, ...]:
        """The model and its variants."""
        return (self.model, *self.variants)

    def to_compare(self, full: bool) -> list[Candidate]:
        """What is compared at one batch size: all, or only the model, its variants, FP16 and implicit INT8."""
        if full:
            return [*self.baselines, *self.own(), *self.peers]
        return [*(one for one in self.baselines if one.name in (FP16, IMPLICIT)), *self.own()]

    def to_measure_alone(self) -> list[Candidate]:
        """The candidates whose throughput is measured."""
        return [*self.own(), *self.inputs]


def parse_named_file(text: str) -> NamedFile:
    """Name and file from NAME=FILE. Raises UserError when it is not of this form or the file is missing."""
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise UserError(f"{text!r}: give NAME=FILE")
    if not Path(file).is_file():
        raise UserError(f"no file {file} for {name}: check the path")
    return name, Path(file)


def _float_candidates(
    toolkit: Toolkit, precisions: Iterable[EnginePrecision], float32: Path, float16: Path
) -> list[Candidate]:
    """The float engines of a model, and implicit INT8, as far as ``toolkit`` can build them.

    A version with only strongly typed networks builds FP16 from the float16 file, if there is one.
    """
    candidates = []
    for precision in precisions:
        name, model, built_as = BASELINE_NAMES[precision], float32, precision
        try:
            toolkit.typing(precision)
        except UserError as error:
            if precision != "fp16" or not float16.is_file():
                remedy = (
                    "; python -m export.onnx CHECKPOINT --precision float16 makes it" if precision == "fp16" else ""
                )
                warn(f"{name} is left out: {error}{remedy}")
                continue
            model, built_as = float16, "explicit"
        if not model.is_file():
            raise UserError(
                f"no file {model} for {name}: make it with python -m export.onnx CHECKPOINT "
                "--precision float32, or leave the float engines out with an empty --precisions"
            )
        candidates.append(Candidate(name, model, built_as))
    return candidates
