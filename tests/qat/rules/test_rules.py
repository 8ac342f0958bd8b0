"""Tiny networks, node by node: what is quantized, by which rule, and that nothing else is."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from first_layer import input_of
from torch import Tensor, nn

from qat.base.errors import UserError
from qat.graph.tracing import TracedModel, network_of, trace
from qat.rules.place import place
from qat.rules.placement import Placement


def traced(model: nn.Module) -> TracedModel:
    return trace(model, input_of(model))


def placement(model: nn.Module) -> Placement:
    return place(network_of(traced(model)))


def reads(model: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """tensor -> [(who reads it quantized, by which rule)]"""
    return {t.tensor: [(read.reader, read.rule) for read in t.reads] for t in placement(model).tensors}


def conv(inputs: int = 16, outputs: int = 16, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """relu(body(x) + skip(x)), where ``add`` says how the sum is written."""

    def __init__(self, body: nn.Module, skip: nn.Module, add=lambda a, b: a + b):
        super().__init__()
        self.stem, self.body, self.skip, self.add, self.head = conv(), body, skip, add, conv()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.add(self.body(x), self.skip(x))))


def test_a_chain_quantizes_only_the_inputs_of_convolutions():
    model = nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 32), nn.LeakyReLU())
    assert reads(model) == {"input_1": [("_0_0", "weighted_input")], "_1": [("_2_0", "weighted_input")]}
    assert [w.quantized for w in placement(model).weights] == [True, True]


@pytest.mark.parametrize("add", [lambda a, b: a + b, torch.add, lambda a, b: b + a, lambda a, b: a.add_(b)])
def test_identity_skip_is_quantized_and_shares_the_quantizer_of_the_convolution_input(add):
    model = Residual(conv(), nn.Identity(), add)
    found = reads(model)
    add_name = placement(model).decisions_about("add")[0].op
    assert found == {
        "x": [("stem_0", "weighted_input")],
        "relu": [("body_0", "weighted_input"), (add_name, "residual_add")],
        "relu_1": [("head_0", "weighted_input")],
    }


class PlainSkip(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.body, self.head = conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = self.body(x) + x
        return self.head(x)


def test_skip_and_convolution_input_are_one_tensor_with_one_quantizer():
    found = reads(PlainSkip())
    assert found["relu"] == [("body_0", "weighted_input"), ("add", "residual_add")]
    assert found == {
        "x": [("first_0", "weighted_input")],
        "relu": [("body_0", "weighted_input"), ("add", "residual_add")],
        "add": [("head_0", "weighted_input")],
    }


def test_of_two_convolution_branches_the_shorter_is_quantized():
    body = nn.Sequential(conv(), nn.ReLU(), conv())
    for model, shorter in (
        (Residual(body, conv(kernel=1)), "skip_1"),
        (Residual(conv(kernel=1), body), "body_1"),
    ):
        (decision,) = placement(model).decisions_about("add")
        assert (decision.quantized, decision.rule) == (True, "residual_add_of_convolutions")
        assert reads(model)[shorter] == [("add", "residual_add_of_convolutions")]


def test_an_add_that_no_convolution_can_take_in_works_on_codes():
    model = Residual(nn.Sequential(conv(), nn.ReLU()), nn.Identity())
    (decision,) = placement(model).decisions_about("add")
    assert (decision.quantized, decision.rule) == (True, "unfused_add")
    assert reads(model) == {
        "x": [("stem_0", "weighted_input")],
        "relu": [("body_0_0", "weighted_input"), ("add", "unfused_add")],
        "body_1": [("add", "unfused_add")],
        "relu_1": [("head_0", "weighted_input")],
    }


def test_an_add_that_nobody_reads_quantized_stays_float():
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu() + x.sigmoid()

    (decision,) = placement(Last()).decisions
    assert (decision.quantized, decision.rule) == (False, "unfused_add")
    assert decision.reason == "nothing after it reads INT8"


def test_max_pool_adds_nothing_and_average_pool_is_quantized_before_a_quantized_layer():
    model = nn.Sequential(
        conv(3, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        conv(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    assert reads(model) == {
        "input_1": [("_0_0", "weighted_input")],
        "_2": [("_3_0", "weighted_input")],
        "_4": [("_5", "pool_input")],
        "_6": [("_7", "weighted_input")],
    }


def test_an_average_pool_before_nothing_quantized_stays_float():
    assert "_1" not in reads(nn.Sequential(conv(3, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.inner, self.head = conv(), conv(), conv(), conv(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        nested = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], dim=1)
        return self.head(torch.cat([nested, F.relu(self.inner(x))], dim=1))


def test_nested_concats_share_one_scale():
    tensors = {t.tensor: t for t in placement(Concat()).tensors}
    assert {name: t.quantizer for name, t in tensors.items()} == {
        "x": "x",
        "relu": "cat_1",
        "relu_1": "cat_1",
        "cat": "cat_1",
        "relu_2": "cat_1",
        "cat_1": "cat_1",
    }
    assert [read.rule for read in tensors["relu"].reads] == ["shared_concat_scale"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "kernel", "quantized"),
    [
        (3, 64, 1, 7, True),  # the first layer of a ResNet
        (3, 10, 1, 3, False),  # few channels, neither a multiple of 8
        (32, 10, 1, 1, True),
        (32, 32, 32, 3, True),  # depthwise
        (38, 38, 38, 3, True),  # depthwise, a multiple of 2
        (37, 37, 37, 3, False),
        (32, 32, 4, 1, False),  # grouped 1x1
        (96, 96, 2, 3, False),  # 48 channels in a group, and the network's input cannot be padded
        (48, 48, 4, 3, False),
        (40, 40, 20, 3, False),  # 2
        (32, 96, 4, 3, False),  # 8 -> 24
        (40, 40, 10, 3, True),  # 4
        (64, 64, 2, 3, True),
        (32, 64, 2, 3, True),
        (32, 96, 32, 3, True),  # depthwise with a multiplier
    ],
)
def test_small_channel_rules(inputs, outputs, groups, kernel, quantized):
    layer = nn.Conv2d(inputs, outputs, kernel, groups=groups)
    decision, _ = placement(nn.Sequential(layer, nn.ReLU(), nn.Conv2d(outputs, 16, 1))).weights
    assert decision.quantized is quantized
    assert bool(decision.reason) is not quantized


@pytest.mark.parametrize(
    ("name", "adds", "projections"), [("resnet18", 8, 3), ("resnet50", 16, 4), ("resnet101", 33, 4)]
)
def test_resnets(name, adds, projections):
    found = placement(torchvision.models.get_model(name))
    rules = [decision.rule for decision in found.decisions_about("add")]
    assert len(rules) == adds
    assert rules.count("residual_add_of_convolutions") == projections
    assert set(rules) == {"residual_add", "residual_add_of_convolutions"}
    assert all(decision.quantized for decision in found.weights)
    readers = {read.reader: tensor for tensor in found.tensors for read in tensor.reads if "residual" in read.rule}
    assert len(readers) == adds  # exactly one quantized input each
    for decision in found.decisions_about("add"):
        tensor = readers[decision.op]
        if decision.rule == "residual_add_of_convolutions":
            assert "downsample" in tensor.tensor
            assert len(tensor.reads) == 1
        else:  # the skip tensor already feeds a convolution: one quantizer for both
            assert [read.rule for read in tensor.reads] == ["weighted_input", "residual_add"]


def test_no_model_or_class_name_appears_in_the_rules():
    from commands import ROOT

    text = "".join(path.read_text() for path in (ROOT / "qat" / "rules").glob("*.py")).lower()
    for word in (
        "resnet",
        "bottleneck",
        "basicblock",
        "densenet",
        "mobilenet",
        "downsample",
        "torchvision",
        "timm",
    ):
        assert word not in text


def test_placement_survives_json():
    import json

    found = placement(torchvision.models.resnet18())
    assert Placement.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_the_quantizer_stands_before_dropout_which_scales_values_up_in_training():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    assert reads(model) == {"input_1": [("_0", "weighted_input")], "_1": [("_2", "weighted_input")]}


def test_stochastic_depth_does_not_hide_the_convolution_from_the_addition():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body, self.depth = conv(), conv(), torchvision.ops.StochasticDepth(0.2, "row")

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            return self.depth(self.body(x)) + x

    (decision,) = placement(Block()).decisions_about("add")
    assert decision.rule == "residual_add"
    assert reads(Block())["relu"] == [("body_0", "weighted_input"), (decision.op, "residual_add")]


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(8, 24, 3, 2, padding=1, output_padding=1)]
)
def test_a_transposed_convolution_with_an_int8_kernel_is_quantized(layer):
    found = placement(nn.Sequential(layer))
    assert [(d.quantized, d.rule) for d in found.weights] == [(True, "weighted_input")]
    assert [(tensor.tensor, [read.reader for read in tensor.reads]) for tensor in found.tensors] == [
        ("input_1", ["_0"])
    ]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            nn.ConvTranspose2d(16, 16, 4, 2),
            "like transposed convolution, 64 -> 64, 4x4, stride 2, scales by input: refused in INT8 (NVIDIA H200",
        ),
        (nn.ConvTranspose2d(16, 16, 3), "extent 3x3, stride 1x1"),
        (nn.ConvTranspose2d(16, 16, 2, (2, 1)), "extent 2x2, stride 2x1"),
        (nn.ConvTranspose1d(16, 16, 2, 2), "extent 2, stride 2"),
        (nn.ConvTranspose2d(16, 16, 2, 2, groups=2), "grouped"),
        (nn.ConvTranspose2d(16, 12, 2, 2), "16 -> 12 channels: both must be multiples of 8"),
    ],
)
def test_other_transposed_convolutions_stay_float(layer, reason):
    found = place(
        network_of(trace(nn.Sequential(layer), (16, 8) if isinstance(layer, nn.ConvTranspose1d) else (16, 8, 8)))
    )
    ((quantized, rule, shown),) = [(d.quantized, d.rule, d.reason) for d in found.weights]
    assert (quantized, rule) == (False, "transposed_convolution")
    assert reason in shown
    assert found.tensors == ()


class Upward(nn.Module):
    """What a level of a U-Net does on the way up: the skip, and the level below, doubled in size, joined."""

    def __init__(self, join):
        super().__init__()
        self.skip, self.below, self.join, self.head = conv(), conv(), join, conv(16 * (1 + (join is torch.cat)))
        self.up = nn.ConvTranspose2d(16, 16, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        below = self.up(F.relu(self.below(F.max_pool2d(x, 2))))
        joined = (self.skip(x), below)
        return self.head(torch.cat(joined, 1) if self.join is torch.cat else self.join(*joined))


def test_a_transposed_convolution_writes_the_codes_that_a_concatenation_reads():
    found = reads(Upward(torch.cat))
    assert found["relu"] == [("up", "weighted_input")]
    assert found["up"] == found["skip_1"] == [("cat", "shared_concat_scale")]
    assert found["cat"] == [("head_0", "weighted_input")]


def test_no_sum_fuses_into_a_transposed_convolution():
    found = reads(Upward(torch.add))
    assert found["up"] == [("add", "residual_add")]
    assert "skip_1" not in found


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized at every call."""

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.weight.mean((1, 2, 3), True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / deviation, self.bias, self.stride, self.padding)


@pytest.mark.parametrize(
    "layer",
    [
        nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 24, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(16, 24, 3)),
        Standardized(16, 24, 3),
    ],
)
def test_a_weight_that_is_computed_from_parameters_is_quantized(layer):
    (decision,) = placement(nn.Sequential(layer, nn.ReLU())).weights
    assert (decision.quantized, decision.rule) == (True, "weighted_input")
    network = network_of(traced(nn.Sequential(layer)))
    (weight,) = (op.weight for op in network if op.weight is not None)
    assert (weight.in_channels, weight.out_channels, weight.kernel) == (16, 24, (3, 3))


class Gated(nn.Module):
    """A depthwise convolution, squeeze-and-excite, and a convolution that reads the product, or an activation of it."""

    def __init__(self, activation=nn.Identity):
        super().__init__()
        self.activation = activation()
        self.wide, self.squeeze, self.excite, self.head = conv(groups=16), conv(kernel=1), conv(kernel=1), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.wide(x))
        gate = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return self.head(self.activation(x * torch.sigmoid(self.excite(gate))))


def test_a_gate_and_what_it_multiplies_are_quantized():
    assert reads(Gated()) == {
        "x": [("wide_0", "weighted_input")],
        "relu": [("adaptive_avg_pool2d", "pool_input"), ("mul", "gate_product")],
        "adaptive_avg_pool2d": [("squeeze_0", "weighted_input")],
        "relu_1": [("excite_0", "weighted_input")],
        "sigmoid": [("mul", "gate_product")],
        "mul": [("head_0", "weighted_input")],
    }
    assert all(decision.quantized for decision in placement(Gated()).decisions)


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.SiLU])
def test_a_gate_whose_product_goes_through_an_activation_is_quantized_too(activation):
    found = placement(Gated(activation))
    assert all(decision.quantized for decision in found.decisions)
    assert {tensor.tensor for tensor in found.tensors} == {
        *("x", "relu", "adaptive_avg_pool2d", "relu_1", "sigmoid", "activation"),
    }


class Scaled(nn.Module):
    """A depthwise convolution whose output is scaled by constants before the next one reads it."""

    def __init__(self):
        super().__init__()
        self.wide, self.head, self.gain = conv(groups=16), conv(), nn.Parameter(torch.ones(1, 16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.wide(x) * 1.7) * self.gain + 0.5)


def test_a_product_or_sum_with_a_constant_is_an_activation():
    found = placement(Scaled())
    assert [(one.label, one.rule) for one in found.weights] == [
        ("wide.0", "weighted_input"),
        ("head.0", "weighted_input"),
    ]
    assert found.decisions_about("add", "multiply") == ()
    assert {tensor.tensor for tensor in found.tensors} == {"x", "add"}


def test_a_product_of_a_tensor_and_its_own_activation_is_an_activation():
    class Swish(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = conv(groups=16), conv()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head(x * torch.sigmoid(x))

    assert reads(Swish()) == {"x": [("first_0", "weighted_input")], "silu": [("head_0", "weighted_input")]}


def test_a_grouped_convolution_whose_output_is_read_in_float_stays_float_and_so_do_those_before_it():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = conv(groups=16), conv(groups=16), conv()

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(F.relu(self.first(x)))
            return self.head(x).mean((1, 2, 3)) + x.mean((1, 2, 3))

    found = placement(Deep())
    assert [(d.label, d.rule) for d in found.weights] == [
        ("first.0", "grouped_float_output"),
        ("second.0", "grouped_float_output"),
        ("head.0", "weighted_input"),
    ]
    assert reads(Deep()) == {"second_1": [("head_0", "weighted_input")]}


def test_an_activation_that_no_convolution_takes_in_reads_codes():
    model = nn.Sequential(conv(), nn.Hardswish(), conv(), nn.SiLU(), conv())
    assert reads(model) == {
        "input_1": [("_0_0", "weighted_input")],
        "_0_1": [("_1", "unfused_activation")],
        "_1": [("_2_0", "weighted_input")],
        "_3": [("_4_0", "weighted_input")],
    }


class Parted(nn.Module):
    """Two halves of a tensor go separate ways; ``float_half`` says whether one of them is read in float."""

    def __init__(self, float_half: bool = False):
        super().__init__()
        self.first, self.left, self.right, self.float_half = conv(), conv(8, 8), conv(8, 8), float_half

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.first(x)).chunk(2, dim=1)
        return self.left(left) + (torch.exp(right) if self.float_half else torch.exp(self.right(right)))


def test_one_quantizer_stands_before_a_split_that_is_read_quantized_throughout():
    assert reads(Parted()) == {
        "x": [("first_0", "weighted_input")],
        "relu": [("chunk", "one_quantizer")],
        "exp": [("add", "residual_add")],
    }
    half = reads(Parted(float_half=True))
    assert "relu" not in half
    assert half["getitem"] == [("left_0", "weighted_input")]


def test_a_max_pool_beside_a_convolution_shares_its_quantizer():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.left, self.right = conv(), conv(), conv()

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            return self.left(x), self.right(F.max_pool2d(x, 3, 1, 1))

    assert reads(Branches())["relu"] == [("left_0", "weighted_input"), ("max_pool2d", "one_quantizer")]
    tensors = {t.tensor: t for t in placement(Branches()).tensors}
    assert tensors["max_pool2d"].quantizer == tensors["relu"].quantizer  # and again behind the pool, with one scale


def test_functional_layers_with_constant_weights():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(16, 16, 3, 3)), nn.Parameter(torch.randn(16))
            self.matrix, self.projection = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(F.conv2d(x, self.weight, self.bias, padding=1)).mean((2, 3))
            return torch.relu_(F.linear(x, self.matrix)) @ self.projection

    assert reads(Functional()) == {
        "x": [("conv2d", "weighted_input")],
        "relu": [("mean", "pool_input")],
        "mean": [("linear", "weighted_input")],
        "relu_": [("matmul", "weighted_input")],
    }


def test_products_of_activations_stay_float():
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.transpose(-1, -2)

    (decision,) = placement(Product()).decisions
    assert (decision.quantized, decision.rule) == (False, "product_of_activations")


def test_a_weight_that_two_calls_share_is_quantized_for_both_or_neither():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.relu(self.conv(x)))

    assert [d.quantized for d in placement(Shared()).weights] == [True, True]
    found = place(network_of(traced(Shared())), ["conv_1"])
    assert [(d.quantized, d.rule) for d in found.weights] == [(False, "shared_weight"), (False, "kept_float")]


def test_keep_float_takes_modules_functions_and_tensors():
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())
    network = network_of(traced(model))
    assert [d.quantized for d in place(network, ["2"]).weights] == [True, False, True]
    assert [d.quantized for d in place(network, ["[02].*"]).weights] == [False, False, True]
    found = place(network, ["_3"])  # the tensor that the second ReLU makes
    assert [d.quantized for d in found.weights] == [True, True, False]
    assert found.keep_float == ("_3",)
    with pytest.raises(UserError, match=r"--keep-float clasifier matches none of the \d+ operations"):
        place(network, ["clasifier"])


def test_additions_that_broadcast_or_double_take_no_convolution():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.pooled = conv(), conv(kernel=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return y + self.pooled(F.adaptive_avg_pool2d(x, 1))

    found = place(network_of(trace(Broadcast(), (16, 8, 8))))
    assert [(d.quantized, d.rule) for d in found.decisions_about("add")] == [(False, "unfused_add")]

    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = conv()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return x + x

    assert [d.quantized for d in placement(Double()).decisions_about("add")] == [False]


def test_a_concatenation_of_a_tensor_with_itself_and_one_that_feeds_an_addition():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = conv(), conv(), conv(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            x = torch.cat([x, x], 1)
            return self.head(x) + x

    found = placement(Joined())
    assert {t.tensor: t.quantizer for t in found.tensors} == {"x": "x", "relu": "cat", "cat": "cat"}
    assert reads(Joined())["cat"] == [("head_0", "weighted_input"), ("add", "residual_add")]


def test_a_normalization_beside_convolutions_reads_their_codes():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body, self.norm, self.head = conv(), conv(), nn.BatchNorm2d(16), conv()

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            return self.head(self.body(x) + self.norm(x))

    assert reads(Branches()) == {
        "x": [("first_0", "weighted_input")],
        "relu": [("body_0", "weighted_input"), ("norm", "unfused_norm")],
        "norm": [("add", "residual_add")],
        "add": [("head_0", "weighted_input")],
    }

    class ReadInFloat(Branches):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            return torch.sigmoid(self.body(x)) * self.norm(x)

    assert reads(ReadInFloat())["relu"] == [("body_0", "weighted_input"), ("norm", "norm_of_codes")]
    (decision,) = placement(ReadInFloat()).decisions_about("batch_norm")
    assert (decision.op, decision.quantized, decision.rule) == ("norm", True, "norm_of_codes")
    kept = place(network_of(traced(ReadInFloat())), keep_float=["norm"])
    assert all(read.reader != "norm" for tensor in kept.tensors for read in tensor.reads)


def test_a_normalization_that_stands_alone_reads_codes_where_it_writes_them():
    alone = nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(16), nn.ReLU(), conv())
    assert reads(alone) == {
        "input_1": [("_0_0", "weighted_input")],
        "_1": [("_2", "unfused_norm")],
        "_3": [("_4_0", "weighted_input")],
    }
    (decision,) = placement(alone).decisions_about("batch_norm")
    assert (decision.op, decision.quantized, decision.rule) == ("_2", True, "unfused_norm")
    read_in_float = nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(16), nn.Sigmoid())
    assert "_1" not in reads(read_in_float)
    (decision,) = placement(read_in_float).decisions_about("batch_norm")
    assert (decision.quantized, decision.reason) == (False, "nothing after it reads INT8")
    folded = nn.Sequential(conv(), nn.ReLU(), conv())  # conv() ends in a normalization
    assert not placement(folded).decisions_about("batch_norm")
    for name in ("_1", "_2", "2"):  # its input, itself, its module
        (decision,) = place(network_of(traced(alone)), keep_float=[name]).decisions_about("batch_norm")
        assert (decision.quantized, decision.rule) == (False, "kept_float")
    behind_dropout = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Dropout(), nn.BatchNorm2d(16), nn.ReLU(), conv())
    assert not placement(behind_dropout).decisions_about("batch_norm")  # dropout is not exported, so it folds


def test_a_dense_block_is_quantized_with_one_scale():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(16, 16, 1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(16 * count) for count in (1, 2, 3))
            self.convs = nn.ModuleList(nn.Conv2d(16 * count, 16, 1) for count in (1, 2, 3))

        def forward(self, x: Tensor) -> Tensor:
            features = [self.first(x)]
            for norm, conv in zip(self.norms, self.convs, strict=True):
                features.append(conv(F.relu(norm(torch.cat(features, 1)))))
            return features[-1]

    found = placement(Dense())
    shared = {tensor.tensor for tensor in found.tensors if tensor.quantizer == "cat_2"}
    assert shared == {"first", "convs_0", "convs_1", "cat_1", "cat_2"}
    assert [(d.quantized, d.rule) for d in found.decisions_about("batch_norm")] == 3 * [(True, "unfused_norm")]


@pytest.mark.parametrize(
    ("move", "rule"),
    [
        (lambda x: x.to(torch.float32), "residual_add"),
        (lambda x: x.to(device="cpu"), "residual_add"),
        (lambda x: x.to(torch.int32), "integers"),
    ],
)
def test_conversion_between_floats_moves_data(move, rule):
    class Converted(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.next = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.next(self.conv(x) + move(x))

    found = place(network_of(trace(Converted(), (16, 8, 8))))
    (add,) = found.decisions_about("add")
    assert (add.quantized, add.rule) == (rule == "residual_add", rule)
    assert [tensor.tensor for tensor in found.tensors] == ["x", "add"]


def test_looking_up_in_a_table_moves_no_data():
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.rand(10, 16))
            self.fc = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.table[x.argmax(1)])

    found = place(network_of(trace(Lookup(), (10,))))
    assert [tensor.tensor for tensor in found.tensors] == ["getitem"]


class Decodes(nn.Module):
    """A detector's head whose box sides are expectations over 16 bins, by a convolution or a linear layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.head, self.decode = nn.Conv2d(16, 64, 1), layer

    def forward(self, x: Tensor) -> Tensor:
        shares = self.head(x).flatten(2).unflatten(1, (4, 16)).transpose(2, 1).softmax(1)  # [N, 16, 4, cells]
        return self.decode(shares if isinstance(self.decode, nn.Conv2d) else shares.transpose(1, 3))


@pytest.mark.parametrize("layer", [nn.Conv2d(16, 1, 1, bias=False), nn.Linear(16, 1)])
def test_a_layer_that_reads_a_softmax_stays_in_float(layer: nn.Module):
    found = {weight.op: weight for weight in placement(Decodes(layer)).weights}
    assert [found[name].quantized for name in ("head", "decode")] == [True, False]
    assert (found["decode"].rule, found["decode"].reason) == ("weighs_softmax", "it weighs the output of a softmax")


def test_a_layer_of_several_outputs_is_no_decoder():
    """Such as those of talking heads, or of attention with external memory."""
    found = {weight.op: weight for weight in placement(Decodes(nn.Conv2d(16, 8, 1))).weights}
    assert found["decode"].quantized


def test_what_eight_bits_would_cost_such_a_layer():
    shares = (1.5 * torch.randn(100_000, 16, generator=torch.Generator().manual_seed(0))).softmax(1)
    scale = shares.max() / 127
    moved = ((shares / scale).round() * scale - shares) @ torch.arange(16.0)
    assert float(moved.std()) == pytest.approx(0.08, abs=0.005)
