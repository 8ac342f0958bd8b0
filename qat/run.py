"""One training run: float training -> post-training quantization -> quantization-aware training -> checkpoint.

Each of the four splits has one use: weights learn on train, activation ranges come from calibration, epochs are chosen
on validation, and what is reported is measured on test.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from qat.base.artifact import check_writable
from qat.base.console import console_of_process, say, table
from qat.base.errors import UserError
from qat.base.number_format import BITS
from qat.checkpoint import load_state, save_checkpoint, save_state
from qat.compute.device import Compute
from qat.compute.processes import Processes, process_group
from qat.data.batches import batch_count
from qat.data.splits import Data, load_data
from qat.evaluate import Accuracy, evaluate
from qat.fake_quantize.low_bit import check_bits, simulate_bits
from qat.fake_quantize.prepare import prepare
from qat.fake_quantize.weight_ranges import fix_saved_ranges, learn_ranges
from qat.graph.network import Network
from qat.graph.tracing import trace
from qat.models import ModelSpec, build_model, load_weights
from qat.post_training import check_percentile, origin, photographs, placed, quantized, say_data, say_next
from qat.training.log import TrainingLog
from qat.training.loss import CrossEntropy, Distillation, stage_ends
from qat.training.recipe import Recipe
from qat.training.trainer import Fit, FitState

if TYPE_CHECKING:
    from qat.options import TrainOptions

# Options that may differ between a run and its resumption: they do not change the result.
_FREE_ON_RESUME = ("output", "resume", "workers", "save_seconds", "debug", "device", "data_root", "log_folder")


@dataclass
class Progress:
    """What a run has reached; saved, so that it can be resumed."""

    phase: Literal["float", "qat"] = "float"
    figures: dict[str, Any] = field(default_factory=dict)
    fit: FitState = field(default_factory=FitState)
    model: dict[str, Tensor] = field(default_factory=dict)
    training: dict[str, Tensor] = field(default_factory=dict)
    """What Fit.tensors gave: optimizer, moving average."""
    teacher: dict[str, Tensor] = field(default_factory=dict)
    """The float network that distillation follows."""


def run(options: TrainOptions) -> int:
    """The run that ``options`` describe, new or resumed. Raises UserError for what the user can mend."""
    compute = Compute.from_options(options.device, options.amp, options.compile)
    with process_group(compute.device) as processes, console_of_process(processes.is_main, f"process {processes.rank}"):
        return _run(options, replace(compute, processes=processes))


def _run(options: TrainOptions, compute: Compute) -> int:
    check_writable(options.output)
    recipes = _recipes(options)
    if not (0 <= options.distill <= 1 and options.distill_temperature > 0 and options.distill_features >= 0):
        raise UserError(
            "--distill must be between 0 and 1, --distill-temperature above 0, --distill-features at least 0"
        )
    check_percentile(options)
    check_bits(options.bits)
    torch.set_flush_denormal(True)  # gradients fall into denormals in small networks, which are ten times as slow
    compute.processes.share_of(options.batch_size)
    reached = _resumed(options, compute.processes) if options.resume else Progress()
    with compute.processes.first_of_machine_before_others():  # it may download
        data = load_data(
            options.data,
            options.image_size,
            options.seed,
            options.calibration_images,
            options.data_root,
            photographs(options),
        )
    say_data(data)
    data = data.on(compute.device)
    torch.manual_seed(options.seed)
    spec = ModelSpec(options.model, len(data.class_names))
    model = build_model(spec)
    ranges: dict[str, Tensor] = {}
    if options.weights is not None:
        line, ranges = load_weights(model, options.weights)
        say(line)
    if ranges and options.float_epochs:
        raise UserError(
            "the weights come with ranges of activations, which float training would invalidate: give --float-epochs 0"
        )
    # What cannot be quantized, or not as asked for, is refused now, not after hours of float training.
    network, placement = placed(options, model, data, len(data.class_names))
    trainer = _Trainer(options, data, compute, reached)
    try:
        if reached.phase == "float":
            model = trainer.fit("float", compute.place(model), recipes["float"])
            reached.figures["float"] = trainer.test("float", model)
            if options.distill or options.distill_features:
                reached.teacher = copy.deepcopy(model).state_dict()
            prepared = quantized(model, placement, ranges, data, options, compute, options.bits)
            reached.figures["ptq"] = trainer.test("post-training quantization", prepared)
            if options.learn_ranges:
                learn_ranges(prepared)
            reached.phase, reached.fit = "qat", FitState()
            trainer.save(prepared, FitState(), {})
        else:
            prepared = prepare(model, placement)
            simulate_bits(prepared, options.bits)
            fix_saved_ranges(prepared, reached.model)
            if options.learn_ranges:
                learn_ranges(prepared)
        steps = options.qat_epochs * batch_count(
            data.train, options.batch_size, training=True, processes=compute.processes
        )
        objective = _distillation(options, compute, spec, network, reached.teacher, steps)
        prepared = trainer.fit("qat", compute.place(prepared), recipes["qat"], objective)
        reached.figures["qat"] = trainer.test("quantization-aware training", prepared)
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(_how_to_resume(options, compute.processes)) from None
    trainer.log.close()
    details = {
        **origin(options, data),
        "bits": options.bits,
        "recipes": {phase: vars(recipe) for phase, recipe in recipes.items()},
        "processes": compute.processes.world_size,
    }
    if not compute.processes.is_main:
        return 0
    save_checkpoint(
        options.output,
        prepared,
        spec,
        data.preprocessing,
        data.class_names,
        reached.figures,
        details,
        options.seed,
    )
    _state_path(options).unlink(missing_ok=True)
    _say_result(options.output, options.bits, reached.figures)
    return 0


class _Trainer:
    """Binds what all phases share: options, data, device, and the state that is saved."""

    def __init__(self, options: TrainOptions, data: Data, compute: Compute, reached: Progress) -> None:
        self.options, self.data, self.compute, self.reached = options, data, compute, reached
        self.log = TrainingLog(options.log_folder if compute.processes.is_main else None, resumed=options.resume)

    def fit(self, phase: str, model: Any, recipe: Recipe, objective: CrossEntropy | None = None) -> Any:
        """Trains ``model``, from where the run was stopped if it was in this phase."""
        if self.reached.model:
            model.load_state_dict(self.reached.model)
        fit = Fit(phase, model, self.data, recipe, self.compute, self.options.workers, self.log, objective)
        fit.resume(self.reached.fit, self.reached.training)
        self.reached.fit = fit.run(lambda: self.save(model, fit.state, fit.tensors()), self.options.save_seconds)
        self.reached.figures[f"{phase}_history"] = self.reached.fit.history
        self.reached.model, self.reached.training = {}, {}
        return model

    def test(self, what: str, model: nn.Module) -> dict[str, float]:
        """Accuracy on the test split, as it is recorded."""
        measured: Accuracy = evaluate(
            model, self.data.test, self.options.batch_size, self.compute, self.options.workers
        )
        say(f"{what}: {measured} test images right")
        return measured.test_figures()

    def save(self, model: nn.Module, state: FitState, training: Mapping[str, Tensor]) -> None:
        """Saves the training state under a name of its own beside the output; one process does it for all."""
        if not self.compute.processes.is_main:
            return
        parts = {"model": model.state_dict(), "best": state.best_weights, "training": training}
        parts |= {"teacher": self.reached.teacher}
        tensors = {f"{part}.{name}": value for part, entries in parts.items() for name, value in entries.items()}
        details = {
            "phase": self.reached.phase,
            "figures": self.reached.figures,
            "fit": state.numbers(),
            "options": _recorded(self.options, self.compute.processes),
        }
        save_state(_state_path(self.options), tensors, details)


def _resumed(options: TrainOptions, processes: Processes) -> Progress:
    path = _state_path(options)
    if not path.exists():
        raise UserError(f"nothing to resume: there is no {path}; start without --resume, or correct --output")
    tensors, details = load_state(path)
    then, now = details["options"], _recorded(options, processes)
    differing = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
    if differing:
        raise UserError(
            f"cannot resume with other options: {'; '.join(differing)}; give the options of the stopped run"
        )
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "training": {}, "teacher": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    state = replace(FitState(**details["fit"]), best_weights=parts["best"])
    say(f"resuming {details['phase']} training at epoch {state.epoch + 1}, step {state.step}")
    return Progress(
        details["phase"], dict(details["figures"]), state, parts["model"], parts["training"], parts["teacher"]
    )


def _recorded(options: TrainOptions, processes: Processes) -> dict[str, Any]:
    """The options that a resumed run must share, as JSON gives them back."""
    recorded = {name: value for name, value in vars(options).items() if name not in _FREE_ON_RESUME}
    recorded["processes"] = processes.world_size
    found: dict[str, Any] = json.loads(json.dumps(recorded, default=str))
    return found


def _state_path(options: TrainOptions) -> Path:
    return options.output.with_name(options.output.name + ".state")


def _how_to_resume(options: TrainOptions, processes: Processes) -> str:
    if not _state_path(options).exists():
        return "nothing was saved yet; nothing half-written was left behind"
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    start = "python -m" if processes.world_size == 1 else f"torchrun --nproc-per-node {processes.world_size} -m"
    return f"saved; continue with: {start} qat.train {shlex.join([*arguments, '--resume'])}"


def _recipes(options: TrainOptions) -> dict[str, Recipe]:
    common: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("batch_size", "accumulate", "weight_decay", "label_smoothing", "clip_norm", "ema", "seed")
    }
    mixing: dict[str, Any] = {"mixup": options.mixup, "cutmix": options.cutmix}
    qat: dict[str, Any] = {"schedule": options.qat_schedule, "freeze_norms_after": options.freeze_norms_after}
    qat |= {"ranges_lr": options.ranges_lr, "progressive": options.progressive}
    return {
        "float": Recipe(
            epochs=options.float_epochs, lr=options.float_lr, schedule=options.float_schedule, **common, **mixing
        ),
        "qat": Recipe(epochs=options.qat_epochs, lr=options.qat_lr, **qat, **common, **mixing),
    }


def _distillation(
    options: TrainOptions,
    compute: Compute,
    spec: ModelSpec,
    network: Network,
    weights: Mapping[str, Tensor],
    steps: int,
) -> Distillation | None:
    if not weights:
        return None
    teacher = build_model(spec)
    teacher.load_state_dict(weights)
    return Distillation(
        trace(compute.place(teacher)),
        compute,
        options.label_smoothing,
        options.distill,
        options.distill_temperature,
        options.distill_features,
        stage_ends(network),
        compute.processes.share_of(options.batch_size),
        steps,
    )


def _say_result(output: Path, bits: int, figures: dict[str, Any]) -> None:
    kind = f"INT{bits}"
    rows = [
        (label, f"{figures[key]['test_top1']:.2f} %", f"{figures[key]['test_loss']:.4f}")
        for key, label in (("float", "float"), ("ptq", f"{kind}, post-training"), ("qat", f"{kind}, trained (QAT)"))
    ]
    images = figures["float"]["test_images"]
    table(f"Accuracy on the test split ({images} images)", ("network", "top-1", "loss"), rows)
    if bits == BITS:
        say_next(output)
    else:
        say(f"wrote {output}, a simulation of {bits} bits, which cannot be exported")
