"""Traces a float model, in both modes, and proves that the trace computes what the model does."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import fx, nn

from qat.base.errors import UserError
from qat.graph.fx_network import network_from_fx
from qat.graph.inputs import Inputs, inputs_of
from qat.graph.modes import ModesDifferError, merge_modes
from qat.graph.network import Network
from qat.graph.proof import NotProvedError, Reference
from qat.graph.rewrites import rewrite, stop_gradients
from qat.graph.torch_patches import without_autocast
from qat.graph.tracer import Tracer

Shapes = Inputs | Sequence[int] | Mapping[str, Sequence[int]] | Sequence[Sequence[int]]
"""Shapes of inputs without the batch: of the only one, of several by argument name, or of several in their order."""


class NotPickledError(UserError, TypeError):
    """A TypeError too, as Python's own error is: libraries that ask whether something can be pickled expect it."""


class TracedModel(fx.GraphModule):
    """A model whose operations are known.

    ``meta`` holds "inputs" (qat.graph.inputs.Inputs); "evaluation_only", why it cannot be trained, '' if it can;
    "frozen", the modules that training leaves in evaluation; and "network", its neutral view.
    """

    def train(self, mode: bool = True) -> TracedModel:
        """Sets the mode. Raises UserError for training when only what evaluation computes is known."""
        if mode and (reason := self.meta.get("evaluation_only")):
            raise UserError(reason)
        super().train(mode)
        for path in self.meta.get("frozen", ()) if mode else ():
            self.get_submodule(path).eval()
        return self

    def __reduce__(self) -> NoReturn:
        """Unpickling code is a risk, and pickling leaves out what placement knows."""
        raise NotPickledError("a traced model cannot be pickled: save it with qat.save_checkpoint, or its state_dict()")


@without_autocast()
def trace(model: nn.Module, inputs: Shapes, *, training: bool | None = None) -> TracedModel:
    """A traced copy of ``model``, in the same mode and usable in both modes; proved to compute the same.

    Args:
        model: a float model, which is not changed. What this function returned is copied, with its present weights.
        inputs: the shapes of its inputs without the batch; a trace is valid for these and for any batch size.
        training: whether the result must be trainable. None: if it can be; otherwise it stays in evaluation, and its
            ``train()`` raises UserError that says why. False: only what evaluation computes.

    Raises:
        UserError: the model does not take such inputs, or cannot be traced; or the trace, run beside the model on the
            same random inputs, answers something else.
    """
    given = inputs_of(model, inputs)
    if isinstance(model, TracedModel) and model.meta["inputs"].shapes == given.shapes:
        return _again(model, training)
    reference = Reference(model, given)
    # Some models drop in train() what they keep for evaluation, which was computed from weights that training changes.
    evaluated = _traced(copy.deepcopy(model).train().eval(), given)
    result, reason = evaluated, "it was traced for evaluation alone"
    if training is not False:
        try:
            result, reason = _trainable(model, given, evaluated, reference), ""
        except (ModesDifferError, NotProvedError) as error:
            reason = str(error)
        if reason and training:
            raise UserError(f"this model cannot be trained here: {reason}; python -m qat.calibrate takes it")
    if reason:
        reason = f"this model cannot be trained: {reason}; it can be calibrated and exported"
    result.meta["evaluation_only"] = reason
    _prove(lambda: reference.prove_evaluation(result))
    result.meta["network"] = network_from_fx(result)
    return result.train(model.training and not reason)


def _again(traced: TracedModel, training: bool | None) -> TracedModel:
    """A copy of what was traced and proved before."""
    if training and (reason := traced.meta["evaluation_only"]):
        raise UserError(reason)
    return copy.deepcopy(traced)


def _trainable(model: nn.Module, given: Inputs, evaluated: TracedModel, reference: Reference) -> TracedModel:
    """The trace in training mode, which also knows ``evaluated``. Raises ModesDifferError or NotProvedError."""
    root = copy.deepcopy(model).train()
    frozen = [path for path, module in root.named_modules() if not module.training]
    try:
        trained = _traced(root, given)
    except UserError as error:
        raise ModesDifferError(f"in training, {error}") from error
    merge_modes(trained, evaluated.graph)
    stop_gradients(trained)
    trained.recompile()
    trained.meta["frozen"] = [path for path in frozen if path in dict(trained.named_modules())]
    reference.prove_training(trained)
    return trained


def _traced(root: nn.Module, given: Inputs) -> TracedModel:
    traced = TracedModel(root, Tracer().trace_for(root, given), type(root).__name__)
    traced.meta["inputs"] = given
    rewrite(traced)
    traced.recompile()
    return traced


def _prove(check: Any) -> None:
    try:
        check()
    except NotProvedError as error:
        raise UserError(
            f"{error}: its code branches on something that is not one of its inputs; "
            "pass that to the constructor instead"
        ) from error


def network_of(traced: fx.GraphModule) -> Network:
    """The neutral view, in evaluation, of what ``trace`` returned, or of the float network of a prepared model."""
    network: Network = traced.meta["network"]
    return network
