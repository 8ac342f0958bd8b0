"""State dicts as people save them: what fits the model is found, under any key and prefix, and beside anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from qat.pretrained.state_dict import StateDict, find_state_dict


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


STATE: dict[str, Tensor] = network().state_dict()
AVERAGE: dict[str, Tensor] = network().state_dict()


def found_in(content: Any, own: dict[str, Tensor] = STATE) -> StateDict:
    found = find_state_dict(content, own.keys())
    assert found is not None
    return found[0]


def assert_is(found: StateDict, state: dict[str, Tensor]) -> None:
    assert found.tensors.keys() == state.keys()
    assert all(found.tensors[key] is state[key] for key in state)


def prefixed(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    "entry",
    ["", "state_dict", "model", "model_state_dict", "net", "params", "state_dict_ema", "ema", "model_ema", "mine"],
)
def test_entries(entry: str) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}
    content = {entry: STATE, "optimizer": optimizer, "epoch": 3, "best": torch.tensor(0.5)} if entry else STATE
    found = found_in(content)
    assert_is(found, STATE)
    assert (found.entry, found.prefix, found.ignored) == (entry, "", ())


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model."])
def test_prefixes(prefix: str) -> None:
    found = found_in({"state_dict": prefixed(prefix)})
    assert_is(found, STATE)
    assert found.prefix == prefix


def test_a_prefix_stays_where_it_is_the_models_own_or_not_everywhere() -> None:
    own = prefixed("model.")
    assert found_in(own, own).prefix == ""
    assert found_in(prefixed("module.", own), own).prefix == "module."
    mixed = prefixed("module.") | {"head.weight": torch.ones(1)}
    assert found_in(mixed).tensors.keys() == mixed.keys()


@pytest.mark.parametrize(
    ("content", "entry"),
    [
        ({"model": STATE, "model_ema": AVERAGE}, "model_ema"),
        ({"state_dict_ema": AVERAGE, "state_dict": STATE}, "state_dict_ema"),
        ({"model": STATE, "ema": {"module": AVERAGE, "updates": 3}}, "ema.module"),
        ({"params": STATE, "params_ema": AVERAGE}, "params_ema"),
        ({"net": STATE, "schema": prefixed("x.")}, "net"),
    ],
)
def test_a_moving_average_is_taken_before_the_weights_of_the_last_step(content: Any, entry: str) -> None:
    best, others = find_state_dict(content, STATE.keys()) or (StateDict({}), ())
    assert (best.entry, best.is_average) == (entry, "ema" in entry)
    assert_is(best, AVERAGE if best.is_average else STATE)
    assert others == tuple(key for key in content if content[key] is STATE and best.is_average)


def test_a_moving_average_without_statistics_does_not_fit_and_is_not_taken() -> None:
    parameters = {key: tensor for key, tensor in AVERAGE.items() if "running" not in key}
    assert_is(found_in({"ema": parameters, "model": STATE}), STATE)


def test_average_of_torch_has_a_prefix_and_a_count() -> None:
    state = AveragedModel(network()).state_dict()
    found = found_in(state)
    assert (found.prefix, found.ignored, found.tensors.keys()) == ("module.", ("n_averaged",), STATE.keys())


def test_counts_of_thop_are_ignored_unless_the_model_has_them() -> None:
    counts = {f"{path}{name}": torch.zeros(1) for path in ("", "0.", "1.") for name in ("total_ops", "total_params")}
    found = found_in(STATE | counts)
    assert_is(found, STATE)
    assert found.ignored == tuple(counts)
    assert found_in(STATE | counts, STATE | counts).ignored == ()
    with_prefix = prefixed("module.", STATE | counts) | {"total_ops": torch.zeros(1)}
    assert_is(found_in(with_prefix), STATE)


def test_numbers_and_texts_beside_the_tensors_are_left_out() -> None:
    assert_is(found_in({**STATE, "epoch": 3, "arch": "net", "extra": None}), STATE)


def test_of_several_networks_the_one_that_fits_is_taken() -> None:
    assert found_in({"generator": prefixed("g."), "critic": STATE}).entry == "critic"
    other = nn.Linear(2, 3).state_dict()
    assert found_in({"model": other, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}).entry == "model"


def test_nothing_is_found_where_there_are_no_tensors() -> None:
    cyclic: dict[str, Any] = {"epoch": 3}
    cyclic["self"] = cyclic
    for content in ({}, [], None, {"model": None, "epoch": 1}, cyclic):
        assert find_state_dict(content, STATE.keys()) is None


def test_names_of_nothing_but_prefixes() -> None:
    found = find_state_dict({"net." * 3000 + "weight": torch.ones(3)}, ("weight",))
    assert found is not None
    assert found[0].misfits(("weight",)) == 2
