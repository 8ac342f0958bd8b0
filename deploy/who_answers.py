"""Who answers in an evaluation: the engine, ONNX Runtime, and PyTorch where it and the checkpoint are at hand.

Each takes the same images and gives its outputs by name. The first is the one that is judged.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.reference import network_input
from deploy.runtime import Engine
from qat.base.artifact import Sidecar, TensorSpec, read_parent, read_sidecar
from qat.base.console import say, warn
from qat.base.errors import UserError

ENGINE, ONNX_RUNTIME, PYTORCH, FLOAT = "engine", "ONNX Runtime", "PyTorch", "PyTorch in float"
Answer = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Images uint8 [N, H, W, C] -> outputs [N, ...] by name."""


@dataclass(frozen=True)
class Judged:
    """The file that is evaluated.

    Attributes:
        path: an engine or an ONNX file.
        sidecar: that of the file.
        onnx: the ONNX file that ONNX Runtime runs.
        model: the ONNX file that the engine was built from; the file itself, if it is one.
        onnx_sidecar: that of ``model``.
    """

    path: Path
    sidecar: Sidecar
    onnx: Path
    model: Path
    onnx_sidecar: Sidecar

    @classmethod
    def read(cls, path: Path, onnx: Path | None, trust: bool) -> Judged:
        """Reads the sidecars. Raises UserError when a file is missing or is another one."""
        if path.suffix == ".onnx":
            if onnx is not None:
                raise UserError(f"{path} is an ONNX file itself: leave out --onnx")
            sidecar = read_sidecar(path, "onnx", trust=trust)
            return cls(path, sidecar, path, path, sidecar)
        sidecar = read_sidecar(path, "engine", trust=trust)
        model, onnx_sidecar = read_parent(path, sidecar, "onnx")
        found = onnx or model
        if not found.is_file():
            raise UserError(f"no file {found}: check the path of --onnx")
        return cls(path, sidecar, found, model, onnx_sidecar)

    @property
    def is_engine(self) -> bool:
        """Whether it is an engine; if not, it is an ONNX file."""
        return self.sidecar.kind == "engine"

    @property
    def identity(self) -> dict[str, str]:
        """What a file of results says it is about: the SHA-256 of the engine, or of the ONNX file."""
        return {self.sidecar.kind: self.sidecar.sha256}

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it answers."""
        return self.sidecar.outputs

    def checkpoint(self) -> tuple[Path, Sidecar] | None:
        """The checkpoint that the ONNX file was made from; None where it is not at hand."""
        try:
            return read_parent(self.model, self.onnx_sidecar, "checkpoint")
        except UserError:
            return None


@contextmanager
def who_answers(
    judged: Judged, *, pytorch: bool, trust: bool = False, trust_code: bool = False
) -> Iterator[dict[str, Answer]]:
    """Everybody who can answer, the judged one first; ``pytorch``: run the checkpoint too, where that is possible.

    ``trust_code``: run code that the checkpoint names, though a stranger made it.

    Raises UserError when the engine cannot be loaded, or ONNX Runtime cannot run the file that is judged.
    """
    with ExitStack() as stack:
        found: dict[str, Answer] = {}
        if judged.is_engine:
            engine = stack.enter_context(Engine.load(judged.path, trust=trust))
            names = [spec.name for spec in judged.outputs]
            found[ENGINE] = lambda images: engine_outputs(engine, network_input(images, judged.onnx_sidecar), names)
        in_onnx_runtime = _onnx_runtime(judged)
        if in_onnx_runtime is not None:
            found[ONNX_RUNTIME] = in_onnx_runtime
        if pytorch:
            found |= _pytorch(judged, trust_code)
        yield found


def engine_logits(engine: Engine, inputs: np.ndarray) -> np.ndarray:
    """The only output of an engine, [N, ...], of any number of inputs; see ``engine_outputs``."""
    (found,) = engine_outputs(engine, inputs, [""]).values()
    return found


def engine_outputs(engine: Engine, inputs: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """Runs any number of images, in the largest batches that the engine takes. The last batch is padded if necessary.

    ``inputs``: [N, ...] as the engine takes them; ``names``: of its outputs. Returns the outputs, [N, ...] each.
    """
    size = engine.max_batch
    pieces = [inputs[start : start + size] for start in range(0, len(inputs), size)]
    counts = list(map(len, pieces))
    last = counts[-1]
    padded = min(max(last, profile.min) for profile in engine.profiles if profile.max >= last)
    pieces[-1] = np.concatenate([pieces[-1], np.zeros((padded - last, *inputs.shape[1:]), inputs.dtype)])
    answers: list[Any] = [answer if isinstance(answer, dict) else {names[0]: answer} for answer in engine.map(pieces)]
    return {
        name: np.concatenate([answer[name][:count] for answer, count in zip(answers, counts, strict=True)])
        for name in names
    }


def _onnx_runtime(judged: Judged) -> Answer | None:
    """None, with a warning, where it cannot be asked for an engine's answers."""
    reason = ""
    if judged.onnx_sidecar.details.get("float_type") == "bfloat16":
        reason = "ONNX Runtime has no bfloat16"
    elif not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx")):
        reason = "onnx and onnxruntime are not installed"
    if reason and not judged.is_engine:
        raise UserError(f"{judged.path} cannot be evaluated: {reason}")
    if reason:
        warn(f"{reason}: agreement with it is not measured")
        return None
    from export.session import run, runs_in_onnx_runtime
    from export.session import session as make_session

    with runs_in_onnx_runtime(judged.onnx):
        session = make_session(judged.onnx)
    return lambda images: run(session, network_input(images, judged.onnx_sidecar))


def _pytorch(judged: Judged, trust_code: bool) -> dict[str, Answer]:
    """The checkpoint as it was exported and in float; {}, with the reason, where it cannot be asked."""
    checkpoint = judged.checkpoint()
    if checkpoint is None or not importlib.util.find_spec("torch"):
        lacking = "no checkpoint beside the ONNX file" if checkpoint is None else "torch is not installed"
        say(f"PyTorch is not asked: {lacking}")
        return {}
    from export.checkpoint_answers import answers_of_checkpoint

    details = judged.onnx_sidecar.details
    names = [spec.name for spec in judged.onnx_sidecar.outputs]
    try:
        precision = details.get("precision", "int8")
        exported, in_float = answers_of_checkpoint(checkpoint[0], names, precision, trust_code=trust_code)
    except UserError as error:  # its own code may be elsewhere; the file can be judged all the same
        warn(f"PyTorch is not asked: {error}")
        return {}
    return {PYTORCH: exported, FLOAT: in_float}
