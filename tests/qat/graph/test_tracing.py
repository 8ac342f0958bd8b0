"""Every network is traced right or refused: the model that was given is the judge."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qat.base.errors import UserError
from qat.graph.outputs import leaves
from qat.graph.tracing import TracedModel, trace

SHAPE = (3, 8, 12)


def conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Body(nn.Module):
    """Two convolutions and a classifier; each test changes what happens between them."""

    def __init__(self, between: Callable[..., Any] = lambda model, x: x, end: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 8), conv(8, 16), nn.Linear(16, 5)
        self.between, self.end = between, end

    def forward(self, x: Tensor) -> Any:
        y = self.head(self.second(self.between(self, self.first(x))).mean((2, 3)))
        return y if self.end is None else self.end(self, y)


def same(model: nn.Module, traced: TracedModel, *x: Tensor) -> None:
    """In both modes, for batches of 1 to 3 of ``x``, they answer the same."""
    for training in (False, True):
        for count in (1, 2, 3) if not training else (3,):
            given = [one[:count] for one in x]
            torch.manual_seed(1)
            expected = copy.deepcopy(model).train(training)(*(one.clone() for one in given))
            torch.manual_seed(1)
            found = copy.deepcopy(traced).train(training)(*(one.clone() for one in given))
            assert type(found) is type(expected)
            torch.testing.assert_close(dict(leaves(found)), dict(leaves(expected)))


def images(count: int = 3) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(2))


# --- what is known while a model is traced


def odd_sides(model: Body, x: Tensor) -> Tensor:
    assert x.shape[1] == 8, "channels"
    height, width = x.shape[-2:]
    if height % 3 or width % 3:
        x = F.pad(x, (0, -width % 3, 0, -height % 3))
    return x


def parts(model: Body, x: Tensor) -> Tensor:
    pieces = list(x.chunk(2, 1))
    pieces.extend(piece * (1 + index) for index, piece in enumerate(x.split(4, 1)))
    return torch.cat([pieces[index] for index in range(x.shape[1] // 4 + 1)] + [x[:, :0]] + pieces[-1:], 1)[:, 8:]


def types(model: Body, x: Tensor) -> Tensor:
    if torch.is_tensor(x) and isinstance(x, Tensor) and not isinstance(x, (tuple, list)):
        x = x * 0.25
    if x.dtype == torch.float32 and x.is_floating_point() and x.dim() == 4 and len(x.shape) == 4:
        x = x + 1
    return x if x.device.type == "cpu" and not x.is_cuda else -x


def numbers(model: Body, x: Tensor) -> Tensor:
    size = (int(x.shape[2] * 2), round(x.size(3) * 1.5))
    x = F.interpolate(x, size=size) if size[0] > 8 else x
    grid = torch.arange(size[0], device=x.device, dtype=x.dtype)
    for row in range(x.shape[2] // 4):
        x = x + grid[row]
    return x * x.shape.numel() / (x.size(0) * x[0].numel())


def batch(model: Body, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    assert n == x.size(0)
    x = x.reshape(n * 2, c // 2, h, w).view(n, c, h, w)
    mask = torch.zeros(n, 1, h, w, device=x.device)
    mask = mask + torch.ones((n, 1, 1, 1))
    return torch.cat([x[:, :4], x[:, 4:] * mask, torch.full((n, 0, h, w), 2.0)], 1)


def writes(model: Body, x: Tensor) -> Tensor:
    mask = x.new_zeros((x.shape[2], x.shape[3]))
    mask[2:4, 1:5] = 1
    mask[0] = 2
    y = x * mask
    y[:, 1:3, ::2] = x[:, :2, ::2] + 1
    y[:, 0] += 1
    y[:, 5:, 1].zero_()
    return y


def swaps(model: Body, x: Tensor) -> Tensor:
    values, indices = x.max(1, keepdim=True)
    first, *rest = x.unbind(1)
    return x + values + torch.stack([*rest, first], 1) + (indices * 0 if isinstance(indices, Tensor) else 1)


def crops(model: Body, x: Tensor) -> Tensor:
    """Views of all of a tensor, which a change in place goes through, and one that reverses it."""
    x = torch.nn.functional.pad(x, (0, 1))
    height, width = x.shape[2:]
    x[..., :height, :width].view(x.shape).add_(1)
    y = x[:][:, :, 0:].reshape(-1, 8, height, width).flatten(1, 1).expand_as(x)
    return y + x[:, [*range(7, -1, -1)]] + torch.stack((x, y * 2), dim=-1).sum(-1)


@pytest.mark.parametrize(
    "between", [odd_sides, types, numbers, batch, writes, swaps, crops], ids=lambda one: one.__name__
)
def test_everything_but_the_batch_size_is_known(between):
    torch.manual_seed(0)
    model = Body(between)
    same(model, trace(model, SHAPE), images())


class Defaults(Body):
    def forward(  # type: ignore[override]
        self, x: Tensor, factor: float | None = None, *more: float, flip: bool = False, scale: float = 2.0, **other: Any
    ) -> Tensor:
        if factor is None:
            x = x * 8
        if flip or more or other:
            x = x.flip(3)
        return super().forward(x) * scale


def test_arguments_with_defaults_are_bound_to_them():
    torch.manual_seed(0)
    model = Defaults()
    same(model, trace(model, SHAPE), images())


@pytest.mark.parametrize(
    ("between", "what"),
    [
        (lambda model, x: x if x.sum() > 0 else -x, "branches on the values of a tensor"),
        (lambda model, x: x if x.shape[0] > 4 else -x, "branches on the batch size"),
        (lambda model, x: -x if x.shape[0] == 9 else x, "branches on the batch size"),
        (lambda model, x: -x if x.shape[0] % 2 == 0 else x, "branches on the batch size"),
        (lambda model, x: -x if x.shape[0] // 2 * 2 == x.shape[0] else x, "branches on the batch size"),
        (lambda model, x: torch.stack(list(x)), "asks for the batch size as a number"),
        (lambda model, x: x + sum(x[0] for _ in range(x.shape[0])), "asks for the batch size as a number"),
        (lambda model, x: x * float(x.mean()), "asks for the values of a tensor"),
        (lambda model, x: x * x.mean().item(), "DataDependent"),
    ],
)
def test_what_is_not_known_is_refused_with_its_line(between, what):
    with pytest.raises(
        UserError, match=rf"cannot be traced; it was stopped by .*test_tracing\.py:\d+: .*{what}"
    ) as error:
        trace(Body(between), SHAPE)
    assert "\n" not in str(error.value)


# --- modes


def with_dropout(model: Body, x: Tensor) -> Tensor:
    if model.training:
        x = F.dropout(x, 0.4)
    return F.dropout2d(x, 0.2, training=model.training)


def with_depth(model: Body, x: Tensor) -> Tensor:
    if not model.training:
        return x
    keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.7)
    return x + (x * 2) * keep.div_(0.7)


def with_noise(model: Body, x: Tensor) -> Tensor:
    x = x * 2
    if model.training:
        x = x + 0.1 * torch.randn_like(x) + torch.rand(1, 8, 1, 1)
    return x


@pytest.mark.parametrize("between", [with_dropout, with_depth, with_noise], ids=lambda one: one.__name__)
def test_what_only_training_does_follows_the_mode(between):
    torch.manual_seed(0)
    model = Body(between)
    traced = trace(model, SHAPE)
    assert traced.meta["evaluation_only"] == ""
    same(model, traced, images())


ENDS = {
    "softmax": lambda model, y: y if model.training else y.softmax(1),
    "sigmoid": lambda model, y: y.sigmoid() if not model.training else y,
    "both": lambda model, y: (y, y * 2) if model.training else y,
    "names": lambda model, y: {"logits": y, "other": y.exp()} if model.training else {"logits": y},
}


@pytest.mark.parametrize("end", ENDS)
def test_an_answer_that_depends_on_the_mode(end):
    torch.manual_seed(0)
    model = Body(end=ENDS[end])
    same(model, trace(model, SHAPE), images())


class Auxiliary(Body):
    """A head that only training has."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(384, 5))

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        y = self.head(self.second(x).mean((2, 3)))
        return (y, self.extra(x)) if self.training else y


def test_an_auxiliary_head_learns_and_is_not_answered_in_evaluation():
    torch.manual_seed(0)
    model = Auxiliary()
    traced = trace(model, SHAPE)
    same(model, traced, images())
    sum(one.sum() for one in traced.train()(images())).backward()
    assert all(parameter.grad is not None for parameter in traced.parameters())


def test_weights_that_only_evaluation_reads_leave_evaluation_alone():
    model = Body(end=lambda model, y: y if model.training else model.refine(y))
    model.refine = nn.Linear(5, 5)
    traced = trace(model, SHAPE)
    assert torch.equal(traced(images()), model.eval()(images()))
    with pytest.raises(UserError, match=r"cannot be trained: .*; it can be calibrated and exported"):
        traced.train()
    with pytest.raises(UserError, match=r"qat\.calibrate takes it"):
        trace(model, SHAPE, training=True)


# --- freezing


class Frozen(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.head(self.second(x).mean((2, 3)))

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.first[1].eval()
        return self


def test_what_is_frozen_stays_frozen():
    model = Frozen()
    model.second[0].weight.requires_grad_(False)
    traced = copy.deepcopy(trace(model, SHAPE))
    before = {name: tensor.clone() for name, tensor in traced.named_buffers()}
    traced.train()(images()).sum().backward()
    learns = {name for name, parameter in traced.named_parameters() if parameter.grad is not None}
    assert learns == {"second.1.weight", "second.1.bias", "head.weight", "head.bias"}
    moved = {name for name, tensor in traced.named_buffers() if not torch.equal(tensor, before[name])}
    assert moved == {f"second.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_are_traced_through(reentrant):
    def between(model: Body, x: Tensor) -> Any:
        return checkpoint(lambda y: y * 2 + model.first[0].weight.mean(), x, use_reentrant=reentrant)

    torch.manual_seed(0)
    model = Body(between)
    same(model, trace(model, SHAPE), images())


# --- inputs and outputs


@dataclasses.dataclass
class Answer:
    classes: Tensor
    maps: tuple[Tensor, Tensor]


@dataclasses.dataclass
class Mapped(OrderedDict):
    """Like an answer of transformers: a dataclass, and a dict of the fields that are not None."""

    loss: Tensor | None = None
    classes: Tensor | None = None
    maps: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self |= {key: value for key, value in vars(self).items() if value is not None}


class Two(Body):
    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor, hint: Tensor, *, shift: Tensor | None = None) -> Any:  # type: ignore[override]
        y = self.second(self.first(x) + hint + (0 if shift is None else shift[:, :, None, None]))
        return self.make(self.head(y.mean((2, 3))), (y, y.amax(1)))


@pytest.mark.parametrize(
    "make",
    [dict, Answer, partial(Mapped, None), lambda classes, maps: [classes, list(maps)]],
    ids=["dict", "class", "mapped", "list"],
)
def test_several_inputs_and_nested_answers(make):
    torch.manual_seed(0)
    model = Two((lambda classes, maps: {"classes": classes, "maps": maps}) if make is dict else make)
    traced = trace(model, {"x": SHAPE, "hint": (8, 8, 12)})
    x, hint = images(), torch.randn(3, 8, 8, 12)
    same(model, traced, x, hint)
    with_shift = trace(model, {"x": SHAPE, "hint": (8, 8, 12), "shift": (8,)}).eval()
    shift = torch.randn(3, 8)
    ours, theirs = (dict(leaves(one(x, hint=hint, shift=shift))) for one in (with_shift, model.eval()))
    torch.testing.assert_close(ours, theirs)
    assert len(ours) == 3
    same(model, trace(model, [SHAPE, (8, 8, 12)]), x, hint)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": SHAPE}, "Two.forward also needs hint"),
        ({"x": SHAPE, "hint": (8, 8, 12), "mask": (8,)}, "has no argument 'mask'"),
        ([SHAPE] * 4, "takes 3 inputs, and 4 shapes were given"),
        ((3, -1, 8), "positive extents without the batch"),
    ],
)
def test_inputs_that_do_not_fit(inputs, message):
    with pytest.raises(UserError, match=message):
        trace(Two(Answer), inputs)


# --- models that are no networks


class Cached(Body):
    """Keeps what it made for the first image, as detectors keep anchors."""

    grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None or self.grid.shape[-1] != x.shape[-1]:
            self.grid = torch.linspace(-1, 1, x.shape[-1])
        return super().forward(x * self.grid)


def test_what_is_made_once_and_kept_is_right():
    torch.manual_seed(0)
    model = Cached()
    same(model, trace(model, SHAPE), images())
    model(torch.randn(3, 3, 8, 6))  # keeps another one
    same(model, trace(model, SHAPE), images())


class KeepsForEvaluation(Body):
    """Keeps what it computed from a parameter until it is trained again, as attention biases are kept."""

    kept: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.table, self.indices = nn.Parameter(torch.randn(8, 4)), torch.arange(8) % 4

    def train(self, mode: bool = True) -> KeepsForEvaluation:
        self.kept = None if mode else self.kept
        return super().train(mode)

    def bias(self) -> Tensor:
        if self.training:
            return self.table[:, self.indices].mean(1)
        if self.kept is None:
            self.kept = self.table[:, self.indices].mean(1)
        return self.kept

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.bias()[:, None, None]
        return self.head(self.second(x).mean((2, 3)))


def test_what_is_kept_for_evaluation_is_computed_from_the_weights():
    torch.manual_seed(0)
    model = KeepsForEvaluation().eval()
    with torch.no_grad():
        model(images())  # keeps it
    traced = trace(model, SHAPE)
    same(model, traced, images())
    with torch.no_grad():
        for each in (model, traced):
            each.get_parameter("table").add_(1)
    same(model.train(), traced, images())


class Counts(Body):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x if self.calls < 4 else -x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Counts(), "changes its calls at every call"),
        (Body(lambda model, x: x + torch.rand(1)), "draws random numbers in evaluation"),
        (Body(lambda model, x: F.dropout(x)), "draws random numbers in evaluation"),
        (Body(end=lambda model, y: None), "answers NoneType: it must answer a tensor"),
        (
            Body(end=lambda model, y: y.sum(0)),
            r"answers a tensor of shape \[5\]: its first dimension must be the batch",
        ),
        (Body(end=lambda model, y: y.mean()), r"answers a tensor of shape \[\]"),
        (
            Body(end=lambda model, y: 1 / 0),
            r"does not take one image of 3x8x12: .*test_tracing\.py:\d+: .*ZeroDivisionError",
        ),
        (Body(lambda model, x: x + torch.zeros(1, device="meta")), "does not take one image of 3x8x12: .*test_tracing"),
        (Body(lambda model, x: x[:, :3]), r"expected input.* to have 8 channels"),
    ],
)
def test_one_line_for_what_is_no_network(model, message):
    with pytest.raises(UserError, match=message) as error:
        trace(model, SHAPE)
    assert "\n" not in str(error.value)


def test_a_mask_that_is_made_of_sizes_alone_may_be_read_with_values():
    """As transformers' DETR does: a mask of ones of the image's size, resized, looked up."""

    def masked(model: nn.Module, x: Tensor) -> Tensor:
        mask = torch.ones((x.shape[0], x.shape[2], x.shape[3]), device=x.device).flatten(1).to(torch.bool)
        rows = torch.arange(x.shape[0], device=x.device)[:, None] + 0 * x.flatten(1)[:, :1].long()
        return x * mask[rows, :1].reshape(-1, 1, 1, 1)

    model = Body(masked)
    same(model, trace(model, SHAPE), images())


def test_an_input_that_is_changed_in_place_is_refused():
    class Changes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    with pytest.raises(UserError, match="changes its input x in place"):
        trace(Changes(), SHAPE)


def test_a_branch_that_the_trace_cannot_see_is_refused():
    """What a trace cannot ask, the comparison with the model finds."""
    model = Body(lambda model, x: x * 3 if type(x) is Tensor else x)
    with pytest.raises(UserError, match=r"answers something else than the model: by .* of its norm"):
        trace(model, SHAPE)


def test_a_branch_behind_a_weight_that_is_zero_is_compared_too():
    model = Body(lambda model, x: x + model.gate * (x.exp() if type(x) is Tensor else x.sin()))
    model.gate = nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match="answers something else than the model"):
        trace(model, SHAPE)
    assert not model.gate.any()


def test_answers_that_cannot_be_compared_are_said(capsys: pytest.CaptureFixture[str]):
    trace(Body(end=lambda model, y: y * torch.inf - torch.inf), SHAPE)
    assert "its trace could not be compared" in " ".join(capsys.readouterr().err.split())


def test_the_model_is_left_alone():
    model = torchvision.models.resnet18(num_classes=3).train()
    before = copy.deepcopy(model.state_dict())
    traced = trace(model, (3, 32, 32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in traced.state_dict().items())
    assert all(parameter.grad is None for parameter in (*model.parameters(), *traced.parameters()))
    assert all(module.training for module in (*model.modules(), *traced.modules()))


def test_hooks_of_the_model_are_part_of_it():
    torch.manual_seed(0)
    model = Body()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    model.register_forward_hook(lambda module, args, answer: answer + 1)
    same(model, trace(model, SHAPE), images())


def test_a_traced_model_is_not_pickled():
    with pytest.raises(UserError, match=r"cannot be pickled: save it with qat\.save_checkpoint"):
        pickle.dumps(trace(Body(), SHAPE))
    with pytest.raises(TypeError):  # what Python raises for anything else that cannot be pickled
        pickle.dumps(trace(Body(), SHAPE))


def test_views_of_a_whole_tensor_hide_nothing_from_the_rules():
    def whole(model: Body, x: Tensor) -> Tensor:
        return x[..., : x.shape[2], :].view(x.shape).squeeze(1)

    graph = trace(Body(whole), SHAPE).graph
    assert not [node for node in graph.nodes if "getitem" in node.name or node.name in ("view", "squeeze")]


class Twice(nn.Module):
    """An activation that is no module of torch."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(2 * x)


@pytest.mark.parametrize("activation", [nn.ReLU, Twice])
def test_the_activation_inside_a_normalization_of_timm_is_an_operation_of_its_own(activation):
    torch.manual_seed(0)
    model = Body(lambda model, x: model.norm(x))
    model.norm = timm.layers.BatchNormAct2d(8, act_layer=activation, drop_layer=nn.Dropout)
    traced = trace(model, SHAPE)
    same(model, traced, images())
    assert type(traced.get_submodule("norm")) is nn.BatchNorm2d
    (after,) = (node for node in traced.graph.nodes if node.target in (F.gelu, "norm.act"))
    assert after.target == (F.gelu if activation is Twice else "norm.act")


# --- attention


class Attends(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.patches, self.head = kind, nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=kind != "second")
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.layer is not None:
            x = self.layer(x)
        elif self.kind == "cross":
            x = self.attention(x[:, :2], x, x * 2, need_weights=False)[0]
        elif self.kind == "weights":
            y, weights = self.attention(x, x, x)
            x = y + weights.sum(-1, keepdim=True)
        elif self.kind == "mask":
            x = self.attention(x, x, x, attn_mask=torch.ones(6, 6).triu(1).bool(), need_weights=False)[0]
        elif self.kind == "second":
            x = self.attention(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].transpose(0, 1)
        else:
            x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


@pytest.mark.parametrize("kind", ["plain", "cross", "weights", "mask", "second", "layer"])
def test_multi_head_attention_is_traced_through(kind):
    torch.manual_seed(0)
    model = Attends(kind).eval()
    traced = trace(model, SHAPE)
    torch.testing.assert_close(traced(images()), model(images()))
    assert sum(str(node.target).endswith("weight") for node in traced.graph.find_nodes(op="get_attr")) >= 2
    learns = copy.deepcopy(traced).train()
    learns(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in learns.parameters())
