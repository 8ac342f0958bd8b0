"""How far a training run has come: what is saved beside its output, and which options a resumed run must share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from msgspec import UNSET
from torch import Tensor, nn

from qat.base import own_json
from qat.base.console import say, warn
from qat.base.errors import UserError, one_line
from qat.base.schema.leaves import Count, Extent, Number
from qat.base.schema.sidecars import CheckpointFigures, EpochEntry
from qat.checkpoint import load_state, save_state
from qat.compute.processes import Processes
from qat.training.interrupts import state_path
from qat.training.trainer import FitState

# Options that may change when a run is resumed: they do not affect the result.
_FREE_ON_RESUME = ("output", "resume", "workers", "save_seconds", "debug", "device", "data_root", "log_folder")


@dataclass
class Progress:
    """How far a run has come; it is saved, so that the run can be resumed."""

    phase: Literal["float", "qat"] = "float"
    figures: dict[str, Any] = field(default_factory=dict)
    fit: FitState = field(default_factory=FitState)
    model: dict[str, Tensor] = field(default_factory=dict)
    training: dict[str, Tensor] = field(default_factory=dict)
    """What Fit.tensors returned: the state of the optimizer, the moving average."""
    teacher: dict[str, Tensor] = field(default_factory=dict)
    """The float network that distillation follows."""


def resumable(options: Mapping[str, Any], processes: Processes) -> dict[str, Any]:
    """The options that a resumed run must share, as they come back from JSON."""
    shared = {name: value for name, value in options.items() if name not in _FREE_ON_RESUME}
    shared["processes"] = processes.world_size
    found: dict[str, Any] = json.loads(json.dumps(shared, default=str))
    return found


def save_progress(
    output: Path,
    reached: Progress,
    model: nn.Module,
    fit: FitState,
    training: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> None:
    """Saves what ``read_progress`` reads.

    Args:
        output: what the run writes; the state is one file beside it.
        reached: phase, figures and teacher.
        model: the network in training.
        fit: how far the phase has come.
        training: what Fit.tensors returned.
        options: what ``resumable`` returned.
    """
    parts = {"model": model.state_dict(), "best": fit.best_weights, "training": training, "teacher": reached.teacher}
    tensors = {f"{part}.{name}": value for part, entries in parts.items() for name, value in entries.items()}
    details: dict[str, Any] = {"phase": reached.phase, "figures": reached.figures, "fit": fit.numbers()}
    details |= {"options": options, "threads": torch.get_num_threads()}
    save_state(state_path(output), tensors, details)


def read_progress(output: Path, options: Mapping[str, Any]) -> Progress:
    """The saved state of a run. Raises UserError when there is none, or when it had other ``options``."""
    path = state_path(output)
    if not path.exists():
        raise UserError(f"nothing to resume: there is no {path}; start without --resume, or correct --output")
    tensors, details = load_state(path)
    try:
        saved = own_json.typed(details, _Saved)
    except own_json.JsonError as fault:
        raise UserError(f"{path} lacks or misstates an entry ({one_line(fault)}): start without --resume") from fault
    then = saved.options
    differing = [f"{name} was {then.get(name)}, now {now}" for name, now in options.items() if then.get(name) != now]
    if differing:
        raise UserError(
            f"cannot resume with other options: {'; '.join(differing)}; give the options of the stopped run"
        )
    threads, now = details.get("threads"), torch.get_num_threads()
    if threads not in (None, now):
        warn(
            f"the stopped run computed with {threads} threads, this one has {now}: the last bits of the result may "
            f"differ; OMP_NUM_THREADS={threads} keeps them"
        )
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "training": {}, "teacher": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if part not in parts:
            raise UserError(f"{path} has a tensor {key!r}, which no run saves: start without --resume")
        parts[part][name] = tensor
    numbers = vars(saved.fit) | {"history": list(details["fit"]["history"])}
    state = FitState(**numbers, best_weights=parts["best"])
    say(f"resuming {saved.phase} training at epoch {state.epoch + 1}, step {state.step}")
    figures = dict(details["figures"])
    return Progress(saved.phase, figures, state, parts["model"], parts["training"], parts["teacher"])


@dataclass(frozen=True)
class _SavedFit:
    """FitState without tensors."""

    epoch: Count
    step: Count
    loss_sum: Number
    best_epoch: Extent
    best_top1: Number
    best_loss: Number
    history: tuple[EpochEntry, ...]


@dataclass(frozen=True)
class _Saved:
    """What a state says beside its tensors."""

    phase: Literal["float", "qat"]
    figures: CheckpointFigures
    fit: _SavedFit
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if self.phase == "qat" and UNSET in (self.figures.float, self.figures.ptq):
            raise ValueError("figures of float and ptq are missing, and the phase is qat")
