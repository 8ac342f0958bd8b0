"""From implicit INT8 to an explicit network: the same scales as Q/DQ nodes, both engines, and whether to move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.builder import open_network
from deploy.candidate_engines import CandidateEngines
from deploy.candidates import Candidate
from deploy.engine_table import EngineTable, Questions, measure_engines
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings
from export.file_form import quantized_path
from qat.base.artifact import sha256_of, write_result
from qat.base.calibration_cache import check_cache
from qat.base.console import say
from qat.base.errors import UserError
from qat.base.interval import interval_of_share
from qat.base.onnx_structure import check_structure
from qat.base.writing import check_writable

FLOAT, FP16, IMPLICIT, EXPLICIT = "FP32", "FP16", "implicit INT8", "explicit INT8"


@dataclass(frozen=True)
class Migration:
    """What was measured, and what it says.

    Attributes:
        table: FP32, FP16, implicit and explicit INT8.
        explicit: the Q/DQ file.
        as_accurate: whether the explicit engine keeps as many answers as the implicit one, within what can be told from
            so many images.
        verdict: one sentence.
    """

    table: EngineTable
    explicit: Path
    as_accurate: bool
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """As the file of results has it."""
        found = {"explicit": self.explicit.name, "as_accurate": self.as_accurate, "verdict": self.verdict}
        return found | self.table.to_json()


def migrate_engine(
    model: Path,
    cache: Path,
    *,
    explicit: Path | None = None,
    data: str | None = None,
    images: int = 5000,
    batches: Sequence[int] = (1, 32),
    folder: Path | None = None,
    repeat: int = 1,
    runs: int = 200,
    output: Path | None = None,
) -> Migration:
    """Takes an implicit INT8 network over, and compares both engines in accuracy and speed.

    Args:
        model: the float ONNX file.
        cache: the calibration cache that its engine was built with.
        explicit: the Q/DQ file; None to make it from ``model`` and ``cache`` as export.quantize does, with torch.
        data: images to compare on, as deploy.build takes them to calibrate; None for the reference file.
        images: how many of them, at most.
        batches: fixed batch sizes.
        folder: keeps the engines; by default engines/ beside the model.
        repeat: how often each engine is built; the fastest is kept.
        runs: how many timed inferences each engine has, at least.
        output: a file for the results, as JSON.

    Raises UserError when this TensorRT has no implicit INT8, and as builds and export.quantize do.
    """
    if not batches or min(*batches, images, runs) < 1:
        raise UserError("--batches, --images and --runs must be at least 1")
    for path in (model, cache, *([explicit] if explicit else [])):
        if not path.is_file():
            raise UserError(f"no file {path}: check the path")
        if path != cache:
            check_structure(path)
    if output:
        check_writable(output)
    check_cache(cache, sha256_of(model))
    toolkit = find_toolkit("tensorrt")
    toolkit.typing("int8")
    with open_network(toolkit, model, BuildSettings()) as network:
        questions = Questions.of_model(model, data, images, network.inputs)
    explicit = explicit or _quantized(model, cache)
    if toolkit.typing() == "strong":
        say("the explicit network is strongly typed: what is not quantized is FP32 there, FP16 in the implicit one")
    engines = CandidateEngines(toolkit, folder or model.with_name("engines"), repeat)
    candidates = [
        Candidate(FLOAT, model, "fp32"),
        Candidate(FP16, model, "fp16"),
        Candidate(IMPLICIT, model, "int8", ranges=cache),
        Candidate(EXPLICIT, explicit),
    ]
    table = measure_engines(engines, candidates, batches, questions, runs)
    table.show()
    as_accurate, verdict = judge(table)
    say(verdict)
    found = Migration(table, explicit, as_accurate, verdict)
    if output:
        write_result(output, found.to_json())
        say(f"wrote {output}")
    return found


def judge(table: EngineTable) -> tuple[bool, str]:
    """Whether the explicit engine is as accurate as the implicit one, and one sentence about accuracy and speed.

    Accuracy counts where there are labels, else agreement with FP32. It is worse if it is below the interval of 95 %
    confidence of the implicit engine's.
    """
    count, labels, rows = len(table.questions.inputs), table.questions.labels, table.rows
    if labels is None:
        what, scores = "agrees with FP32", [rows[name].agreeing(rows[FLOAT]) for name in (EXPLICIT, IMPLICIT)]
    else:
        what, scores = "is right", [rows[name].right(labels) for name in (EXPLICIT, IMPLICIT)]
    as_accurate = scores[0] / count >= interval_of_share(scores[1], count)[0]
    shares = [f"{100 * score / count:.2f} %" for score in scores]
    accuracy = f"it {what} on {shares[0]} of {count} images, implicit INT8 on {shares[1]}"
    speeds, slower = [], False
    for batch, latency in rows[EXPLICIT].latency.items():
        old = rows[IMPLICIT].latency[batch]
        slower = slower or old.beats(latency)
        speeds.append(f"{old.median / latency.median:.2f} times as fast at batch {batch}")
    advice = "move to the explicit network"
    if not as_accurate:
        advice = "do not move yet: train with python -m qat.train, or calibrate again with export.quantize --data"
    elif slower:
        advice = "move for TensorRT's newer versions; deploy.benchmark shows which layers cost the time"
    return as_accurate, f"{advice}: {accuracy}, and is {', '.join(speeds)}"


def _quantized(model: Path, cache: Path) -> Path:
    """The Q/DQ file of a float file and the scales of its calibration cache."""
    try:
        from export.from_float_onnx import quantize_onnx
    except ImportError as error:
        raise UserError(
            f"writing the Q/DQ file needs another package ({error.name}): run python -m export.quantize {model} "
            f"--calibration-cache {cache} where torch is, and give its file as --explicit"
        ) from error
    path = quantized_path(model)
    quantize_onnx(model, path, calibration_cache=cache)
    return path
