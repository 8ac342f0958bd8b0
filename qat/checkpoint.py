"""Checkpoints: a quantized model as safetensors, and a sidecar with everything needed to build it again.

Nothing is ever unpickled: tensors are stored as safetensors, the rest as JSON. The sidecar holds the model's name, the
placement it was trained with, preprocessing, class names, data source and measured accuracies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, fx, nn

from qat.base import own_json
from qat.base.artifact import FORMAT_VERSION, Sidecar, TensorSpec, read_sidecar, sha256_of, write_artifact
from qat.base.console import warn
from qat.base.errors import UserError, one_line
from qat.base.number_format import BITS
from qat.base.regular_file import check_regular
from qat.base.trust import permit
from qat.base.writing import atomic_write
from qat.data.preprocessing import Preprocessing
from qat.data.splits import Data, load_data, load_unlabelled
from qat.fake_quantize.answers import answers_of, same_answers
from qat.fake_quantize.folded_norms import FOLDED_NORMS, fold_norm
from qat.fake_quantize.low_bit import simulate_bits
from qat.fake_quantize.prepare import activation_quantizers, placement_of, prepare
from qat.fake_quantize.weight_ranges import fix_saved_ranges
from qat.graph.inputs import Inputs
from qat.graph.network_record import network_to_json
from qat.graph.tracing import Shapes, network_of
from qat.models import ModelCode, ModelSpec, build_model, code_of, model_file
from qat.pretrained.named_models import loads_something
from qat.rules.place import RULES
from qat.rules.placement import Placement

_STATE = "training_state"  # entry of the file's header


@dataclass(frozen=True)
class Checkpoint:
    """A trained quantized model, ready to be exported."""

    path: Path
    model: fx.GraphModule
    sidecar: Sidecar
    image_preprocessing: Preprocessing | None
    """How images become inputs; None for a network that was saved without."""
    trust_code: bool = False
    """Whether the caller allowed what the sidecar names: docs/trust.md."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become inputs. Raises UserError when the checkpoint does not say."""
        if self.image_preprocessing is None:
            raise UserError(f"{self.path} was saved without preprocessing: give it to qat.save_checkpoint")
        return self.image_preprocessing

    @property
    def inputs(self) -> Inputs:
        """The shapes of the network's inputs, by the names of the model's arguments."""
        found: Inputs = self.model.meta["inputs"]
        return found

    def float_network(self) -> nn.Module | None:
        """The model that its own code builds, with the weights of the checkpoint, in evaluation; None without code."""
        if self.sidecar.details["model"] is None:
            return None
        network = _build_recorded(self.path, self.sidecar, self.trust_code).eval()
        for layer, norm in self.model.meta[FOLDED_NORMS].items():
            fold_norm(network, layer, norm)
        network.load_state_dict(self.model.state_dict(), strict=False)  # it has no quantizers
        return network


def save_checkpoint(
    path: str | Path,
    model: fx.GraphModule,
    spec: ModelSpec | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] = (),
    figures: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Sidecar:
    """Writes a prepared and calibrated model, trained or not, and its sidecar.

    Args:
        path: the checkpoint, a safetensors file; its sidecar is written beside it.
        model: a calibrated model that ``prepare`` returned.
        spec: how to build the float model again, without unpickling anything; None if the float model will be given
            to ``load_checkpoint``.
        preprocessing: how an image becomes the network's input [N, C, height, width], if that is its input.
        class_names: one for each of the network's logits [N, classes], if that is its output.
        figures: measurements such as accuracies; recorded as given.
        details: further facts such as the data source and the recipe; recorded as given.
        seed: recorded with the program versions.

    Returns the sidecar. Raises UserError when the files cannot be written, ``preprocessing`` does not fit the model, or
    the model is not calibrated.
    """
    names, inputs = tuple(class_names), model.meta["inputs"]
    if preprocessing is not None:
        _check_fits(preprocessing, inputs)
    ranges = {name: float(quantizer.amax.detach()) for name, quantizer in activation_quantizers(model).items()}
    if unknown := [name for name, amax in ranges.items() if math.isnan(amax)]:
        raise UserError(
            f"the model has no range for {len(unknown)} of {len(ranges)} tensors, first {unknown[0]}: calibrate it "
            "(qat.calibrate_ranges) before it is saved"
        )
    sidecar = Sidecar(
        kind="checkpoint",
        inputs=tuple(TensorSpec(name, (-1, *shape), "float32") for name, shape in inputs.shapes.items()),
        outputs=(TensorSpec("logits", (-1, len(names)), "float32"),) if names else (),
        preprocessing={} if preprocessing is None else asdict(preprocessing),
        class_names=names,
        figures=figures or {},
        details={
            "model": None if spec is None else asdict(spec),
            "placement": placement_of(model).to_json(),
            "network": network_to_json(network_of(model)),
            "rules": {name: rule.sentence for name, rule in RULES.items()},
            "amax": ranges,
            **(details or {}),
            "code": asdict(code) if spec is not None and (code := code_of(spec.name)) else None,
            "answers": answers_of(model),
            "trainable": not model.meta["evaluation_only"],
        },
    )
    return write_artifact(Path(path), sidecar, lambda file: save_tensors(file, model.state_dict()), seed=seed)


def load_checkpoint(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    allow_changed_model: bool = False,
    trust_code: bool = False,
) -> Checkpoint:
    """Builds the model of a checkpoint again, on the CPU, in evaluation mode.

    Args:
        path: the checkpoint.
        model: the float model it was prepared from, for a checkpoint that was saved without a ``spec``; it is not
            modified.
        allow_changed_model: go on, with a warning, when the code of the model has changed since the checkpoint was
            saved, so that the network answers something else.
        trust_code: run the code, and read the images, that the sidecar names, though it was not written by this user on
            this machine (docs/trust.md).

    Raises:
        NotTrustedError: the sidecar names code that was not allowed.
        UserError: the file or its sidecar is missing, truncated or of another version, does not fit the model, or
            answers something else than when it was saved.
    """
    path = Path(path)
    sidecar = read_sidecar(path, "checkpoint")
    try:
        placement = Placement.from_json(sidecar.details["placement"])
        preprocessing = Preprocessing.from_json(dict(sidecar.preprocessing)) if sidecar.preprocessing else None
        if model is None:
            model = _build_recorded(path, sidecar, trust_code)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the sidecar of {path} lacks or misstates {error}: train again") from error
    shapes = {spec.name: spec.shape[1:] for spec in sidecar.inputs}
    if not shapes:
        raise UserError(f"the sidecar of {path} lacks or misstates inputs: train again")
    given: Shapes = shapes if len(shapes) > 1 else next(iter(shapes.values()))
    prepared = prepare(model, placement, input_shape=given, training=sidecar.details.get("trainable", True))
    simulate_bits(prepared, sidecar.details.get("bits", BITS))
    tensors = load_tensors(path)
    fix_saved_ranges(prepared, tensors)
    try:
        prepared.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit model {_recorded_name(sidecar)} ({reason}): train again") from error
    _check_unchanged(path, sidecar, prepared, allow_changed_model)
    return Checkpoint(path, prepared.eval(), sidecar, preprocessing, trust_code)


def _check_unchanged(path: Path, sidecar: Sidecar, prepared: fx.GraphModule, allow: bool) -> None:
    """Compares the network's answers, and its code, with what the checkpoint records; an older one records neither."""
    recorded, code = sidecar.details.get("answers"), _code(sidecar)
    file = "" if code is None else str(model_file(sidecar.details["model"]["name"], code, path.parent))
    edited = code is not None and sha256_of(Path(file)) != code.sha256
    if recorded is None or same_answers(recorded, prepared):
        if edited:
            warn(f"{file} was edited since {path} was saved; the network still answers the same")
        return
    what = f"{file} was edited" if edited else "its model, or a library that builds it, has changed"
    found = f"the network of {path} answers something else than when it was saved: {what} since then"
    if not allow:
        raise UserError(
            f"{found}. Restore it, train again, or take the changed network with --allow-changed-model "
            "(allow_changed_model=True), which was never trained"
        )
    warn(f"{found}; going on with the changed network, which was never trained")


def _check_fits(preprocessing: Preprocessing, inputs: Inputs) -> None:
    made, shapes = preprocessing.input_shape, list(inputs.shapes.values())
    if shapes != [made]:
        raise UserError(
            f"preprocessing makes images of {list(made)}, and the model was prepared for "
            f"{' and '.join(str(list(shape)) for shape in shapes)}: correct one of them"
        )


def _build_recorded(path: Path, sidecar: Sidecar, trust_code: bool) -> nn.Module:
    recorded = sidecar.details["model"]
    if recorded is None:
        raise UserError(f"{path} does not record how to build its model: load it in Python and pass the float model")
    spec, code = ModelSpec(**recorded), _code(sidecar)
    if ".py:" in spec.name:
        file = model_file(spec.name, code, path.parent)
        digest = sha256_of(file)
        wants = f"run {spec.name.rpartition(':')[2]} of {file} (SHA-256 {digest})"
        given = code is not None and (code.sha256 == digest or Path(code.file) == file)  # else another file of its name
        permit(path, sidecar.sidecar_sha256, wants, trust_code=trust_code, own=given)
    elif wants := loads_something(spec.name, spec.kwargs):
        permit(path, sidecar.sidecar_sha256, wants, trust_code=trust_code)
    return build_model(spec, code, path.parent)


def _code(sidecar: Sidecar) -> ModelCode | None:
    recorded = sidecar.details.get("code")
    return None if recorded is None else ModelCode(**recorded)


def _recorded_name(sidecar: Sidecar) -> str:
    recorded = sidecar.details["model"]
    return "as given" if recorded is None else repr(recorded["name"])


def training_data(checkpoint: Checkpoint) -> Data:
    """The splits the checkpoint was trained and measured on.

    Raises NotTrustedError when a stranger's sidecar names a folder or a download that was not allowed, and UserError
    when the images cannot be loaded.
    """
    details = checkpoint.sidecar.details
    if "data" not in details:
        raise UserError(
            f"{checkpoint.path} does not record which images it was trained on: it was saved from Python; "
            "give a checkpoint of python -m qat.train or qat.calibrate"
        )
    data = details["data"]
    chosen = (data["image_size"], details["seed"], details["calibration_images"])
    preset = checkpoint.preprocessing.preset
    _permit_data(checkpoint, data["source"], data["root"])
    if has_labels(checkpoint):
        found = load_data(data["source"], *chosen, Path(data["root"]), preset)
    else:
        found = load_unlabelled(Path(data["source"]).expanduser(), *chosen, preset)
    then = {name: size for name, size in details["splits"].items() if size}
    if found.sizes != then:
        sizes = " to ".join(", ".join(f"{name} {size}" for name, size in one.items()) for one in (then, found.sizes))
        warn(
            f"{data['source']} has changed since training ({sizes} images): its splits may differ from those used then"
        )
    return found


def _permit_data(checkpoint: Checkpoint, source: str, root: str) -> None:
    """Asks for what is read from elsewhere. What is not there is not asked for: loading it says so."""
    if source.startswith("torchvision:"):
        wants = f"read {source} in {Path(root).expanduser().resolve()}, or download it"
    elif source == "digits" or not Path(source).expanduser().exists():
        return
    else:
        wants = f"read the images of {Path(source).expanduser().resolve()}"
    permit(checkpoint.path, checkpoint.sidecar.sidecar_sha256, wants, trust_code=checkpoint.trust_code)


def has_labels(checkpoint: Checkpoint) -> bool:
    """Whether ``training_data`` has labels, so that an accuracy can be measured on it."""
    recorded = checkpoint.sidecar.details.get("data", {"labelled": False})
    return bool(recorded.get("labelled", True))  # older checkpoints do not record it


def save_state(path: Path, tensors: Mapping[str, Tensor], details: Mapping[str, Any]) -> None:
    """Writes the state of a training run, so that it can be resumed.

    It is one file without a sidecar: two files cannot be renamed in one step, and a run that was killed between the two
    could not be resumed.
    """
    text = json.dumps({"format": FORMAT_VERSION, **details}, allow_nan=False)
    with atomic_write(path) as temporary:
        save_tensors(temporary, tensors, {_STATE: text})


def load_state(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The tensors and details that ``save_state`` wrote. Raises UserError when they are missing or damaged."""
    tensors = load_tensors(path)
    with safetensors.safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_STATE, "{}")
    try:
        details = own_json.parse(text)
        version = details.pop("format", None)
    except (own_json.JsonError, AttributeError, TypeError) as fault:
        raise UserError(f"{path} is no training state ({one_line(fault)}): start without --resume") from fault
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} is a training state of format version {version!r:.20}, but this program reads {FORMAT_VERSION}: "
            "start without --resume"
        )
    return tensors, details


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as safetensors, detached and contiguous; ``metadata`` goes into the file's header."""
    # clone: safetensors refuses tensors that share memory, such as tied weights
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(plain, path, dict(metadata or {}))
    except safetensors.SafetensorError as error:  # wraps the operating system's errors
        number = _os_error_number(str(error))
        if number is None:
            raise
        raise OSError(number, str(error)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads safetensors. Raises UserError when the file is truncated or not a safetensors file."""
    check_regular(path)
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a safetensors file, or is truncated ({error}): make it again") from error


def _os_error_number(message: str) -> int | None:
    """28 for 'I/O error: No space left on device (os error 28)'."""
    _, found, rest = message.partition("(os error ")
    return int(rest.partition(")")[0]) if found else None
