"""No wrong network, ever: networks with random branches are traced right, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat.base.errors import UserError
from qat.graph.tracing import trace

SHAPE = (4, 6, 6)
Step = tuple[str, int]


class Branching(nn.Module):
    """Applies ``steps`` to [N, 4, 6, 6], each a branch on something else, and then a classifier."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps, self.kept, self.calls = steps, {}, 0
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in steps)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, scale: float | None = None, *, flip: bool = False) -> Tensor:
        for index, (kind, number) in enumerate(self.steps):
            x = self.convs[index](x)
            x = BRANCHES[kind](self, x, number, scale, flip)
        return self.head(self.norm(x).mean((2, 3)))


def by_default(model: Branching, x: Tensor, number: int, scale: float | None, flip: bool) -> Tensor:
    x = x * (number + 2) if scale is None else x * scale
    return x.flip(3) if flip else x


def by_type(model: Branching, x: Tensor, number: int, scale: float | None, flip: bool) -> Tensor:
    checks = (isinstance(x, Tensor), torch.is_tensor(x), type(x) is Tensor, isinstance(x, (list, tuple)))
    return x.sin() if checks[number % 4] else x.exp()


def by_mode(model: Branching, x: Tensor, number: int, scale: float | None, flip: bool) -> Tensor:
    if model.training:
        return F.dropout(x, 0.3) if number % 2 else x + number
    return x if number % 3 else x.abs()


def by_size(model: Branching, x: Tensor, number: int, scale: float | None, flip: bool) -> Tensor:
    extent = x.shape[number % 4]
    return x * 2 if extent % 2 == 0 else -x


def by_state(model: Branching, x: Tensor, number: int, scale: float | None, flip: bool) -> Tensor:
    if number % 3 == 0:
        model.calls += 1
        return x if model.calls % 2 else -x
    if number not in model.kept:
        model.kept[number] = torch.arange(x.shape[-1]) * float(number)
    return x + model.kept[number]


def by_statistics(model: Branching, x: Tensor, number: int, scale: float | None, flip: bool) -> Tensor:
    if model.training and number % 2:
        with torch.no_grad():
            model.seen += 1
    return x + model.seen if number % 3 else x


def by_values(model: Branching, x: Tensor, number: int, scale: float | None, flip: bool) -> Tensor:
    return x if number % 4 or x.mean() > 0 else -x


def by_gradient(model: Branching, x: Tensor, number: int, scale: float | None, flip: bool) -> Tensor:
    if number % 2:
        with torch.no_grad():
            return x * 2
    return x.detach() + x if torch.is_grad_enabled() else x * 2


BRANCHES: dict[str, Callable[..., Tensor]] = {
    branch.__name__: branch
    for branch in (by_default, by_type, by_mode, by_size, by_state, by_statistics, by_values, by_gradient)
}
networks = st.lists(st.tuples(st.sampled_from(sorted(BRANCHES)), st.integers(0, 11)), min_size=1, max_size=4)


def check(steps: list[Step]) -> None:
    torch.manual_seed(0)
    model = Branching(steps)
    try:
        traced = trace(model, SHAPE)
    except UserError:
        return
    for training in (False, True):
        if training and traced.meta["evaluation_only"]:
            continue
        ours, theirs = (copy.deepcopy(one).train(training) for one in (traced, model))
        x = torch.randn(3, *SHAPE)
        answers = []
        for one in (ours, theirs):
            torch.manual_seed(1)
            answers.append(one(x.clone()))
        torch.testing.assert_close(*answers, equal_nan=True)
        if training:
            for answer in answers:
                if answer.requires_grad:
                    answer.square().sum().backward()
            gradients = dict(ours.named_parameters())
            for name, parameter in theirs.named_parameters():
                mine = gradients[name].grad if name in gradients else None
                assert (mine is None) == (parameter.grad is None), name
                if mine is not None:
                    torch.testing.assert_close(mine, parameter.grad, equal_nan=True)
            moved = dict(ours.named_buffers())
            for name, buffer in theirs.named_buffers():
                if name in moved:
                    torch.testing.assert_close(moved[name], buffer, equal_nan=True)


SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=12, derandomize=True, **SETTINGS)
@given(networks)
def test_a_few_branching_networks(steps: list[Step]) -> None:
    check(steps)


@pytest.mark.slow
@settings(max_examples=150, **SETTINGS)
@given(networks)
def test_branching_networks(steps: list[Step]) -> None:
    check(steps)
