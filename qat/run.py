"""One training run: float training -> post-training quantization -> quantization-aware training -> checkpoint.

Each of the four splits has one use: weights are trained on train, activation ranges come from calibration, the best
epoch is chosen on validation, and reported accuracies are measured on test.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from qat.base.artifact import check_writable
from qat.base.console import console_of_process, say, table
from qat.base.errors import UserError
from qat.base.number_format import BITS
from qat.calibration.settings import CalibrationSettings
from qat.checkpoint import load_state, save_checkpoint, save_state
from qat.compute.device import Compute
from qat.compute.processes import Processes, process_group
from qat.data.batches import batch_count
from qat.data.request import ImageRequest
from qat.data.splits import Data, load_data
from qat.evaluate import Accuracy, evaluate
from qat.fake_quantize.low_bit import check_bits, simulate_bits
from qat.fake_quantize.prepare import prepare
from qat.fake_quantize.weight_ranges import fix_saved_ranges
from qat.fake_quantize.weight_ranges import learn_ranges as make_ranges_learn
from qat.graph.tracing import network_of, trace
from qat.models import ModelSpec, build_model, spec_for
from qat.post_training import (
    choose_placement,
    input_preset,
    prepare_and_calibrate,
    record_of_images,
    record_of_ranges,
    say_data,
    say_next,
)
from qat.rules.kernel_profile import KernelProfile
from qat.training.log import TrainingLog
from qat.training.loss import CrossEntropy, Distillation, stage_ends
from qat.training.recipe import DistillationSettings, Recipe
from qat.training.trainer import Fit, FitState
from qat.weights import load_weights

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


def train(
    model: str,
    images: ImageRequest,
    output: Path,
    *,
    weights: str | None = None,
    float_recipe: Recipe,
    qat_recipe: Recipe,
    calibration: CalibrationSettings,
    distillation: DistillationSettings,
    keep_float: Iterable[str] = (),
    profile: KernelProfile | None = None,
    bits: int = BITS,
    learn_ranges: bool = False,
    compute: Compute,
    log_folder: Path | None = None,
    resume: bool = False,
    save_seconds: float = 60.0,
    recorded: Mapping[str, Any],
) -> None:
    """Trains, quantizes and fine-tunes a network and writes its checkpoint, or resumes a stopped run.

    Args:
        model: the name of a model, as qat.models.ModelSpec takes it.
        images: labelled images, and their splits and batches.
        output: the checkpoint; the training state is kept beside it until the run is finished.
        weights: torchvision's name of them, or a file; None: random weights.
        float_recipe: how the float network is trained.
        qat_recipe: how it is fine-tuned with fake quantization.
        calibration: how ranges are chosen.
        distillation: how the fine-tuning follows the float network.
        keep_float: patterns of what stays in float.
        profile: what deploy.kernels measured on a GPU; None for what was measured on an H200.
        bits: of weights and activations; fewer than 8 are a simulation.
        learn_ranges: whether the fine-tuning learns ranges too.
        compute: device, types and compilation; the processes that torchrun started are added here.
        log_folder: folder for figures as training proceeds.
        resume: continue from the saved state.
        save_seconds: seconds between two saves of the state.
        recorded: all options by name; a resumed run is checked against those of the stopped run.

    Raises:
        UserError: for every mistake that the user can correct.
        KeyboardInterrupt: the run was stopped; the message says how to continue.
    """
    with (
        process_group(compute.device) as processes,
        console_of_process(processes.is_main, f"process {processes.rank}"),
    ):
        compute = replace(compute, processes=processes)
        check_writable(output)
        check_bits(bits)
        processes.share_of(images.batch_size)
        run = _Run(images, output, compute, log_folder, save_seconds, _resumable(recorded, processes), resume)
        try:
            run.train(
                model,
                weights,
                (float_recipe, qat_recipe),
                calibration,
                distillation,
                tuple(keep_float),
                profile,
                bits,
                learn_ranges,
            )
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)(_how_to_resume(output, processes)) from None


class _Run:
    """What all phases share: images, device, and the saved state."""

    def __init__(
        self,
        images: ImageRequest,
        output: Path,
        compute: Compute,
        log_folder: Path | None,
        save_seconds: float,
        recorded: dict[str, Any],
        resume: bool,
    ) -> None:
        self.images, self.output, self.compute, self.save_seconds = images, output, compute, save_seconds
        self.recorded = recorded
        self.reached = _read_state(output, recorded) if resume else Progress()
        self.log = TrainingLog(log_folder if compute.processes.is_main else None, resumed=resume)
        self.data: Data

    def train(
        self,
        name: str,
        weights: str | None,
        recipes: tuple[Recipe, Recipe],
        calibration: CalibrationSettings,
        distillation: DistillationSettings,
        keep_float: tuple[str, ...],
        profile: KernelProfile | None,
        bits: int,
        learn_ranges: bool,
    ) -> None:
        """Runs all phases that are left and writes the checkpoint."""
        torch.set_flush_denormal(True)  # gradients of small networks become denormal, which is ten times as slow
        compute, reached, images, (float_recipe, qat_recipe) = self.compute, self.reached, self.images, recipes
        learn_ranges = learn_ranges and qat_recipe.epochs > 0  # else nothing learns them
        self._load_images(name, weights)
        spec = spec_for(name, len(self.data.class_names), images.channels)
        model, ranges = self._float_model(spec, weights, float_recipe)
        # A network that cannot be quantized as asked is refused now, not after hours of float training.
        model, placement = choose_placement(
            compute.place(model), name, self.data, spec.num_classes, keep_float, profile, training=True
        )
        prepared: fx.GraphModule
        if reached.phase == "float":
            self.fit("float", model, float_recipe)
            reached.figures["float"] = self.test("float", model)
            prepared = prepare_and_calibrate(model, placement, ranges, self.data, images, calibration, compute, bits)
            if distillation.needs_teacher:
                reached.teacher = copy.deepcopy(model).state_dict()
            reached.figures["ptq"] = self.test("post-training quantization", prepared)
            if learn_ranges:
                make_ranges_learn(prepared)
            reached.phase, reached.fit = "qat", FitState()
            self.save(prepared, FitState(), {})
        else:
            prepared = prepare(model, placement, input_shape=self.data.preprocessing.input_shape, training=True)
            simulate_bits(prepared, bits)
            fix_saved_ranges(prepared, reached.model)
            if learn_ranges:
                make_ranges_learn(prepared)
        compute.place(prepared)
        self.fit("qat", prepared, qat_recipe, self._distillation(model, qat_recipe, distillation))
        if qat_recipe.epochs:
            reached.figures["qat"] = self.test("quantization-aware training", prepared)
        self.log.close()
        if not compute.processes.is_main:
            return
        details = {
            **record_of_images(images, self.data, calibration),
            **record_of_ranges(prepared, ranges),
            "bits": bits,
            "recipes": {"float": vars(float_recipe), "qat": vars(qat_recipe)},
            "processes": compute.processes.world_size,
        }
        preprocessing, class_names = self.data.preprocessing, self.data.class_names
        save_checkpoint(self.output, prepared, spec, preprocessing, class_names, reached.figures, details, images.seed)
        _state_path(self.output).unlink(missing_ok=True)
        _say_result(self.output, bits, reached.figures)

    def _load_images(self, name: str, weights: str | None) -> None:
        images, preset = self.images, input_preset(name, weights, self.images)
        with self.compute.processes.first_of_machine_before_others():  # this may download
            data = load_data(
                images.source, images.image_size, images.seed, images.calibration_images, images.root, preset
            )
        say_data(data)
        self.data = data.on(self.compute.device)

    def _float_model(self, spec: ModelSpec, weights: str | None, recipe: Recipe) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model to start from, and the activation ranges that came with its weights."""
        torch.manual_seed(self.images.seed)
        model = build_model(spec)
        ranges: dict[str, Tensor] = {}
        if weights is not None:
            line, ranges = load_weights(model, weights)
            say(line)
        if ranges and recipe.epochs:
            raise UserError(
                "the weights come with activation ranges, which float training would invalidate: give --float-epochs 0"
            )
        return model, ranges

    def _distillation(self, model: nn.Module, recipe: Recipe, settings: DistillationSettings) -> Distillation | None:
        """The loss that follows the float network; None without distillation."""
        if not self.reached.teacher:
            return None
        teacher, processes = trace(model, self.data.preprocessing.input_shape), self.compute.processes
        teacher.load_state_dict(self.reached.teacher)
        batches = batch_count(self.data.train, recipe.batch_size, training=True, processes=processes)
        return Distillation(
            teacher,
            self.compute,
            recipe.label_smoothing,
            settings,
            stage_ends(network_of(teacher)),
            images=processes.share_of(recipe.batch_size),
            steps=recipe.epochs * batches,
        )

    def fit(self, phase: str, model: nn.Module, recipe: Recipe, loss: CrossEntropy | None = None) -> nn.Module:
        """Trains ``model``; continues where the run was stopped, if that was in this phase."""
        if self.reached.model:
            model.load_state_dict(self.reached.model)
        fit = Fit(phase, model, self.data, recipe, self.compute, self.images.workers, self.log, loss)
        fit.resume(self.reached.fit, self.reached.training)
        self.reached.fit = fit.run(lambda: self.save(model, fit.state, fit.tensors()), self.save_seconds)
        self.reached.figures[f"{phase}_history"] = self.reached.fit.history
        self.reached.model, self.reached.training = {}, {}
        return model

    def test(self, what: str, model: nn.Module) -> dict[str, float]:
        """Accuracy on the test split, as the checkpoint records it."""
        measured: Accuracy = evaluate(model, self.data.test, self.images.batch_size, self.compute, self.images.workers)
        say(f"{what}: {measured} test images right")
        return measured.test_figures()

    def save(self, model: nn.Module, state: FitState, training: Mapping[str, Tensor]) -> None:
        """Saves the training state in its own file beside the output; only the main process does so."""
        if not self.compute.processes.is_main:
            return
        parts = {"model": model.state_dict(), "best": state.best_weights, "training": training}
        parts |= {"teacher": self.reached.teacher}
        tensors = {f"{part}.{name}": value for part, entries in parts.items() for name, value in entries.items()}
        details = {
            "phase": self.reached.phase,
            "figures": self.reached.figures,
            "fit": state.numbers(),
            "options": self.recorded,
        }
        save_state(_state_path(self.output), tensors, details)


def _read_state(output: Path, now: Mapping[str, Any]) -> Progress:
    path = _state_path(output)
    if not path.exists():
        raise UserError(f"nothing to resume: there is no {path}; start without --resume, or correct --output")
    tensors, details = load_state(path)
    then = details["options"]
    differing = [f"{name} was {then.get(name)}, now {now[name]}" for name in now if then.get(name) != now[name]]
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


def _resumable(options: Mapping[str, Any], processes: Processes) -> dict[str, Any]:
    """The options that a resumed run must share, as they come back from JSON."""
    shared = {name: value for name, value in options.items() if name not in _FREE_ON_RESUME}
    shared["processes"] = processes.world_size
    found: dict[str, Any] = json.loads(json.dumps(shared, default=str))
    return found


def _state_path(output: Path) -> Path:
    return output.with_name(output.name + ".state")


def _how_to_resume(output: Path, processes: Processes) -> str:
    if not _state_path(output).exists():
        return "nothing was saved yet; no half-written file was left behind"
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    alone = processes.world_size == 1
    start = "python -m" if alone else f"torchrun --nproc-per-node {processes.world_size} -m"
    return f"saved; continue with: {start} qat.train {shlex.join([*arguments, '--resume'])}"


def _say_result(output: Path, bits: int, figures: dict[str, Any]) -> None:
    kind = f"INT{bits}"
    rows = [
        (label, f"{figures[key]['test_top1']:.2f} %", f"{figures[key]['test_loss']:.4f}")
        for key, label in (("float", "float"), ("ptq", f"{kind}, post-training"), ("qat", f"{kind}, trained (QAT)"))
        if key in figures
    ]
    images = figures["float"]["test_images"]
    table(f"Accuracy on the test split ({images} images)", ("network", "top-1", "loss"), rows)
    if bits == BITS:
        say_next(output)
    else:
        say(f"wrote {output}: a simulation of {bits} bits, which cannot be exported")
