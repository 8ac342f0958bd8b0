"""One training run: float training -> post-training quantization -> quantization-aware training -> checkpoint.

Each of the four splits has one use: weights are trained on train, activation ranges come from calibration, the best
epoch is chosen on validation, and reported accuracies are measured on test.
"""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.base.console import console_of_process, say, table
from qat.base.errors import UserError
from qat.base.number_format import BITS
from qat.base.ranges_file import complete_distributions, ranges_path, write_distributions
from qat.base.writing import check_writable
from qat.calibration.distributions import distributions
from qat.calibration.histogram import HistogramObserver
from qat.calibration.settings import CalibrationSettings
from qat.checkpoint import save_checkpoint
from qat.compute.device import Compute
from qat.compute.precision import denormals_flushed
from qat.compute.processes import Processes, process_group
from qat.data.batches import batch_count
from qat.data.request import ImageRequest
from qat.data.splits import Data, load_data, say_data
from qat.evaluate import Accuracy, evaluate
from qat.fake_quantize.low_bit import check_bits, simulate_bits
from qat.fake_quantize.prepare import prepare
from qat.fake_quantize.weight_ranges import fix_saved_ranges
from qat.fake_quantize.weight_ranges import learn_ranges as make_ranges_learn
from qat.graph.tracing import TracedModel, network_of, trace
from qat.models import ModelSpec, build_model, options_for_size, spec_for
from qat.post_training import (
    choose_placement,
    prepare_and_calibrate,
    record_of_images,
    record_of_ranges,
    say_next,
)
from qat.rules.kernel_profile import KernelProfile
from qat.rules.placement import Placement
from qat.training.interrupts import state_path
from qat.training.log import TrainingLog
from qat.training.loss import CrossEntropy, Distillation, stage_ends
from qat.training.recipe import DistillationSettings, Recipe
from qat.training.run_state import Progress, read_progress, resumable, save_progress
from qat.training.trainer import Fit, FitState
from qat.weights import input_preset, load_weights


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
        output: the checkpoint; what calibration saw is written beside it (qat/base/ranges_file.py), and the training
            state is kept there until the run is finished.
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
        for path in (output, ranges_path(output)):
            check_writable(path)
        check_bits(bits)
        processes.share_of(images.batch_size)
        run = _Run(images, output, compute, log_folder, save_seconds, resumable(recorded, processes), resume)
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
        self.reached = read_progress(output, recorded) if resume else Progress()
        self.log = TrainingLog(log_folder if compute.processes.is_main else None, resumed=resume)
        self.data: Data

    @denormals_flushed()
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
        compute, reached, images, (float_recipe, qat_recipe) = self.compute, self.reached, self.images, recipes
        learn_ranges = learn_ranges and qat_recipe.epochs > 0  # else nothing learns them
        self._load_images(name, weights)
        options = options_for_size(name, self.data.preprocessing.height)
        spec = spec_for(name, len(self.data.class_names), images.channels, options)
        model, ranges = self._float_model(spec, weights, float_recipe)
        # A network that cannot be quantized as asked is refused now, not after hours of float training.
        model, placement = choose_placement(
            compute.place(model), name, self.data, spec.num_classes, keep_float, profile, training=True
        )
        prepared: fx.GraphModule
        float_recipe = float_recipe.suited_to(network_of(model))
        if reached.phase == "float":
            self.fit("float", model, float_recipe)
            reached.figures["float"] = self.test("float", model)
            prepared = self._calibrated(model, placement, ranges, calibration, bits)
            if distillation.needs_teacher:
                reached.teacher = copy.deepcopy(model).state_dict()
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
        written = save_checkpoint(
            self.output, prepared, spec, preprocessing, class_names, reached.figures, details, images.seed
        )
        complete_distributions(ranges_path(self.output), written.sha256)
        state_path(self.output).unlink(missing_ok=True)
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

    def _calibrated(
        self,
        model: TracedModel,
        placement: Placement,
        ranges: Mapping[str, Tensor],
        calibration: CalibrationSettings,
        bits: int,
    ) -> fx.GraphModule:
        """``model`` with quantizers and their ranges, tested; what calibration saw is written beside the output."""
        observers: dict[str, HistogramObserver] = {}
        prepared = prepare_and_calibrate(
            model, placement, ranges, self.data, self.images, calibration, self.compute, bits, observers.update
        )
        seen = distributions(prepared, observers, calibration, len(self.data.calibration))
        self.reached.figures["ptq"] = self.test("post-training quantization", prepared)
        if self.compute.processes.is_main:
            write_distributions(ranges_path(self.output), seen)
        return prepared

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
        if self.compute.processes.is_main:
            save_progress(self.output, self.reached, model, state, training, self.recorded)


def _how_to_resume(output: Path, processes: Processes) -> str:
    if not state_path(output).exists():
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
