"""Finds the model's state dict in what a weights file holds.

Training scripts save it under some key, beside the optimizer's state, and often a moving average (EMA) of the weights
too. Wrappers put a prefix before every name. Of all that is in the file, what fits the model's names is taken; where
several fit, in this order:

1. an EMA, because it is what people evaluate: an entry with 'ema' in its name (model_ema, state_dict_ema, ema.module);
2. an entry with a usual name (state_dict, model, net, params, ...);
3. any other entry.

If nothing fits, the one that misses least is taken, and the caller refuses it. Entries that are no weights of the
model, such as the counts that thop leaves, are ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qat.calibration.pytorch_quantization import is_quantizer_entry

_USUAL = {"state_dict", "model", "model_state_dict", "model_state", "net", "network", "net_state_dict", "params"}
_USUAL |= {"weights", "module", "state", "model_dict", "model_weights"}
_PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.", "ema_model.")
_COUNTS = ("total_ops", "total_params")  # of thop, in every module
_AVERAGED = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
_DEEPEST = 4  # levels of nesting
_MOST_PREFIXES = 8  # before one name


@dataclass(frozen=True)
class StateDict:
    """A state dict that was found in a file.

    ``tensors``: by the model's names, and those of quantizers of pytorch-quantization. ``entry``: where it stood in the
    file, '' for the whole file. ``prefix``: what was removed from every name. ``ignored``: names that were left out.
    """

    tensors: dict[str, Tensor]
    entry: str = ""
    prefix: str = ""
    ignored: tuple[str, ...] = ()

    @property
    def is_average(self) -> bool:
        """Whether it is a moving average of weights."""
        return any("ema" in part.lower().split("_") for part in self.entry.split("."))

    @property
    def is_usual(self) -> bool:
        """Whether its place in the file says that it is a model's weights."""
        return not self.entry or self.is_average or self.entry.split(".")[-1] in _USUAL

    def misfits(self, own: Collection[str]) -> int:
        """How many names are missing or unexpected in a model with the names ``own``."""
        found = dict.fromkeys(key for key in self.tensors if not is_quantizer_entry(key))
        missing, unexpected = misfitting_names(own, found)
        return len(missing) + len(unexpected)


def misfitting_names(own: Collection[str], found: Collection[str]) -> tuple[list[str], list[str]]:
    """Names of ``own`` that are missing in ``found``, and unexpected ones; old files lack num_batches_tracked."""
    missing = [key for key in own if key not in found and not key.endswith("num_batches_tracked")]
    return missing, [key for key in found if key not in own]


def find_state_dict(
    content: Any, own: Collection[str], without: tuple[str, ...] = ()
) -> tuple[StateDict, tuple[str, ...]] | None:
    """The state dict that fits a model best, and the entries of others that fit it too; None if there are no tensors.

    Args:
        content: what the file holds.
        own: the names in the model's state dict.
        without: beginnings of names that are ignored where the model lacks them, such as auxiliary heads.
    """
    candidates = [
        _without_ignored(candidate, own, without)
        for entry, tensors in _dicts_of_tensors(content)
        for candidate in _without_prefixes(StateDict(tensors, entry))
    ]
    if not candidates:
        return None
    best = min(candidates, key=lambda candidate: _order(candidate, own))
    fitting = (other.entry for other in candidates if other.entry != best.entry and not other.misfits(own))
    return best, tuple(dict.fromkeys(fitting))


def _order(candidate: StateDict, own: Collection[str]) -> tuple[Any, ...]:
    misfits = candidate.misfits(own)
    return misfits > 0 and not candidate.is_usual, misfits, not candidate.is_average, not candidate.is_usual


def _dicts_of_tensors(content: Any, entry: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The innermost dicts that hold tensors, each with its place, such as 'ema.module'."""
    if not isinstance(content, Mapping) or len(entry) > _DEEPEST:
        return
    inner = [found for key, value in content.items() for found in _dicts_of_tensors(value, (*entry, str(key)))]
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if inner:
        yield from inner
    elif tensors:
        yield ".".join(entry), tensors


def _without_prefixes(found: StateDict) -> Iterator[StateDict]:
    """The state dict as it is, and without each prefix that all its names have, one after the other."""
    yield found
    if found.prefix.count(".") >= _MOST_PREFIXES:
        return
    names = [key for key in found.tensors if key != _AVERAGED and key.rpartition(".")[2] not in _COUNTS]
    for prefix in _PREFIXES:
        if names and all(key.startswith(prefix) for key in names):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in found.tensors.items()}
            yield from _without_prefixes(StateDict(tensors, found.entry, found.prefix + prefix))


def _without_ignored(found: StateDict, own: Collection[str], without: tuple[str, ...]) -> StateDict:
    ignored = {key for key in found.tensors if key not in own and _is_ignored(key, without)}
    tensors = {key: tensor for key, tensor in found.tensors.items() if key not in ignored}
    return StateDict(tensors, found.entry, found.prefix, tuple(key for key in found.tensors if key in ignored))


def _is_ignored(key: str, without: tuple[str, ...]) -> bool:
    return key == _AVERAGED or key.rpartition(".")[2] in _COUNTS or key.startswith(without)
