"""Types of single layers: what --layer and --output-type say, which layers get it, and what the engine made of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deploy import builder
from deploy.build_log import BuildLog
from deploy.builder_errors import build_failure
from deploy.engine_layers import EngineLayer
from deploy.layer_types import LayerType, TypeRule, layers_as_built, set_types, type_rules
from deploy.settings import BuilderOptions, BuildSettings
from qat.base.errors import UserError

MODULE = SimpleNamespace(DataType=SimpleNamespace(FLOAT="float", HALF="half", BF16="bf16", INT8="int8"))


def named(name: str) -> Any:
    return SimpleNamespace(name=name)


class Layer:
    """With the attributes of TensorRT's ILayer that matter."""

    def __init__(self, name: str, kind: str = "CONVOLUTION", outputs: tuple[str, ...] = ("FLOAT",)) -> None:
        self.name, self.type, self.num_outputs = name, named(kind), len(outputs)
        self._outputs = outputs
        self.precision = ""
        self.output_types: dict[int, str] = {}

    def get_output(self, index: int) -> Any:
        return SimpleNamespace(dtype=named(self._outputs[index]))

    def set_output_type(self, index: int, data_type: str) -> None:
        assert self._outputs[index] not in ("INT32", "INT64", "BOOL"), "TensorRT refuses this"
        self.output_types[index] = data_type


def network_of(*layers: Layer) -> Any:
    return SimpleNamespace(num_layers=len(layers), get_layer=lambda index: layers[index])


def rules(precision: Any = "int8", layer: tuple[str, ...] = (), output_type: tuple[str, ...] = ()) -> Any:
    return type_rules(BuilderOptions(precision=precision, layer=layer, output_type=output_type))


def refused(*given: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        type_rules(BuilderOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is said


@pytest.mark.parametrize(
    ("text", "pattern", "type"),
    [
        ("conv1*=fp32", "conv1*", "fp32"),
        ("/layer1/conv[12]/Conv=int8", "/layer1/conv[12]/Conv", "int8"),
        ("a=b=fp16", "a=b", "fp16"),
        ("==fp32", "=", "fp32"),
        ("two words=fp32", "two words", "fp32"),
    ],
)
def test_a_rule_is_a_pattern_and_a_type(text: str, pattern: str, type: str) -> None:
    for kind in ("precision", "output type"):
        assert TypeRule.parse(kind, text, BuilderOptions(precision="int8")) == TypeRule(kind, pattern, type)


@pytest.mark.parametrize("text", ["", "conv1", "=fp32", "conv1=", "conv1=fp8", "conv1=FP32", "fp32", "conv1=fp32 "])
@pytest.mark.parametrize("option", ["layer", "output_type"])
def test_what_is_no_rule_is_one_line(text: str, option: str) -> None:
    message = refused(precision="int8", **{option: (text,)})
    assert f"--{option.replace('_', '-')} {text!r}" in message
    assert "fp32, fp16, bf16, int8" in message


@pytest.mark.parametrize(
    ("precision", "allowed"),
    [
        ("explicit", {"fp32", "fp16", "int8"}),
        ("int8", {"fp32", "fp16", "int8"}),
        ("fp16", {"fp32", "fp16"}),
        ("bf16", {"fp32", "bf16"}),
        ("fp32", {"fp32"}),
        ("tf32", {"fp32"}),
    ],
)
def test_a_layer_gets_only_a_type_that_the_precision_allows(precision: Any, allowed: set[str]) -> None:
    for name in ("fp32", "fp16", "bf16", "int8"):
        text = f"conv={name}"
        if name in allowed:
            assert rules(precision, (text,)) == (TypeRule("precision", "conv", name),)
        else:
            message = refused(precision=precision, layer=(text,))
            assert f"--precision {precision} has no {name}: give {name}" in message


def test_strict_int8_allows_no_fp16_and_says_how_to() -> None:
    message = refused(precision="int8", strict=True, output_type=("conv=fp16",))
    assert "--output-type 'conv=fp16'" in message
    assert "leave out --strict" in message
    assert "--precision int8 has no fp16" not in message
    for name in ("fp32", "int8"):
        assert type_rules(BuilderOptions(precision="int8", strict=True, layer=(f"conv={name}",)))


# --- which layers


def test_patterns_choose_layers_and_the_last_that_matches_counts() -> None:
    layers = [Layer(name) for name in ("conv1", "conv2", "fc")]
    asked = set_types(
        rules(layer=("*=fp16", "conv*=fp32", "conv2=int8"), output_type=("conv?=fp16", "conv1=fp32")),
        network_of(*layers),
        MODULE,
    )
    assert [layer.precision for layer in layers] == ["float", "int8", "half"]
    assert [layer.output_types for layer in layers] == [{0: "float"}, {0: "half"}, {}]
    assert set(asked) == {
        LayerType("conv1", "precision", "fp32"),
        LayerType("conv2", "precision", "int8"),
        LayerType("fc", "precision", "fp16"),
        LayerType("conv1", "output type", "fp32"),
        LayerType("conv2", "output type", "fp16"),
    }
    assert set_types((), network_of(*layers), MODULE) == ()


def test_constants_and_shapes_never_get_a_type() -> None:
    layers = [
        Layer("conv1"),
        Layer("weight", "CONSTANT"),
        Layer("shape", "SHAPE", ("INT32",)),
        Layer("gather of shapes", "GATHER", ("INT64",)),
        Layer("quantize", "QUANTIZE", ("INT8",)),
        Layer("dequantize", "DEQUANTIZE"),
    ]
    set_types(rules(layer=("*=fp32",), output_type=("*=fp16",)), network_of(*layers), MODULE)
    assert [layer.precision for layer in layers] == ["float"] + [""] * 5
    assert [layer.output_types for layer in layers] == [{0: "half"}] + [{}] * 5
    for name in ("weight", "shape", "gather of shapes", "quantize", "dequantize"):
        with pytest.raises(UserError, match="matches none of the 1 layers"):
            set_types(rules(layer=(f"{name}=fp32",)), network_of(*layers), MODULE)


def test_only_the_floating_outputs_of_a_layer_get_a_type() -> None:
    split, top = Layer("split", "SLICE", ("FLOAT", "FLOAT")), Layer("top", "TOPK", ("FLOAT", "INT32"))
    set_types(rules(output_type=("*=fp16",)), network_of(split, top), MODULE)
    assert split.output_types == {0: "half", 1: "half"}
    assert top.output_types == {0: "half"}


@pytest.mark.parametrize("name", ["(Unnamed Layer* 3) [Shuffle]", "blocks[0]/conv", "what?"])
def test_a_name_with_signs_of_patterns_means_itself(name: str) -> None:
    layer = Layer(name)
    set_types(rules(layer=(f"{name}=fp32",)), network_of(layer, Layer("other")), MODULE)
    assert layer.precision == "float"


@pytest.mark.parametrize("option", ["layer", "output_type"])
def test_a_pattern_that_matches_nothing_is_refused_with_a_suggestion(option: str) -> None:
    network = network_of(Layer("conv1"), Layer("conv2"), Layer("fc"))
    with pytest.raises(UserError) as caught:
        set_types(rules(**{option: ("fc=fp32", "Conv_1=fp32")}), network, MODULE)
    message = str(caught.value)
    assert f"--{option.replace('_', '-')} 'Conv_1' matches none of the 3 layers (did you mean conv1" in message
    assert "\n" not in message


# --- what became of it


def engine_layer(name: str, types: str = "INT8", kind: str = "conv", **more: Any) -> EngineLayer:
    nodes = more.pop("onnx_nodes", tuple(name.split(" + ")))
    return EngineLayer(name, kind, (types,), (types,), (more.pop("outputs", types),), nodes, **more)


def found(kind: Any, layer: str, *layers: EngineLayer) -> str:
    (one,) = layers_as_built([LayerType(layer, kind, "fp32")], layers)
    assert (one.layer, one.kind, one.asked) == (layer, kind, "fp32")
    return one.found


def test_a_layer_has_the_precision_of_what_it_is_fused_into() -> None:
    layers = (
        engine_layer("conv1 + relu1", "FP32"),
        engine_layer("Reformatting CopyNode for Input Tensor 0 to conv2", "FP16", "Reformat", onnx_nodes=("conv2",)),
        engine_layer("conv2", "FP16", "Reformat"),
        engine_layer("conv2", "INT8"),
        engine_layer("__myl_Fc_myl0_1", "FP16", onnx_nodes=("fc1", "softmax")),
    )
    assert found("precision", "conv1", *layers) == "fp32"
    assert found("precision", "relu1", *layers) == "fp32"
    assert found("precision", "conv2", *layers) == "int8"
    assert found("precision", "fc1", *layers) == "fp16"
    assert found("precision", "gone", *layers) == ""


def test_a_layers_name_comes_before_what_other_layers_metadata_say() -> None:
    other = engine_layer("relu0", "FP16", onnx_nodes=("relu0", "conv1"))
    assert found("precision", "conv1", other, engine_layer("conv1", "INT8")) == "int8"


def test_an_output_type_is_known_only_of_the_last_of_the_fused() -> None:
    layers = (
        engine_layer("conv1 + relu1", "INT8", outputs="FP32"),
        engine_layer("fc", "INT8", outputs="FP16"),
        engine_layer("__myl_Fc_myl0_1", "FP16", onnx_nodes=("fc1", "softmax")),
    )
    assert found("output type", "relu1", *layers) == "fp32"
    assert found("output type", "conv1", *layers) == ""
    assert found("output type", "fc", *layers) == "fp16"
    assert found("output type", "softmax", *layers) == ""


@pytest.mark.parametrize("kind", ["precision", "output type"])
def test_a_type_that_the_engine_does_not_tell_is_not_known(kind: Any) -> None:
    assert found(kind, "conv1", engine_layer("conv1", "unknown")) == ""  # 8.6 hides it if the batch is dynamic
    assert found(kind, "conv1", EngineLayer("conv1", "unknown", (), (), (), ("conv1",))) == ""


def test_what_was_obeyed() -> None:
    def layer(found: str) -> LayerType:
        return LayerType("conv1", "precision", "fp32", found)

    assert [layer(found).obeyed for found in ("fp32", "int8", "")] == [True, False, None]
    assert str(layer("int8")) == "conv1: precision fp32 asked, int8"
    assert "not told" in str(layer(""))


def test_of_several_profiles_the_one_with_another_type_counts() -> None:
    asked = (LayerType("a", "precision", "fp32"),)
    fields = {"kind": "Convolution", "constants": (), "outputs": ("FP32",), "onnx_nodes": ("a",)}
    layers = [
        EngineLayer("a", inputs=("FP32",), **fields),
        EngineLayer("a [profile 1]", inputs=("FP16",), **fields),
    ]
    assert layers_as_built(asked, layers)[0].found == "fp16"
    assert layers_as_built(asked, layers[:1])[0].obeyed


def test_a_build_that_fails_with_types_of_layers_says_how_to_loosen_them() -> None:
    assert "--constraints prefer" in builder._remedy(BuildSettings(precision="int8", layer=("a=fp32",)))
    for settings in (BuildSettings(), BuildSettings(precision="int8", layer=("a=fp32",), constraints="prefer")):
        assert builder._remedy(settings) == "change the model there, or try the other --builder"


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            [
                "2: Assertion !n->candidateRequirements.empty() failed. No supported formats for /shares/Softmax",
                "2: [optimizer.cpp::getFormatRequirements::3158] Error Code 2: Internal Error (Assertion "
                "!n->candidateRequirements.empty() failed. No supported formats for /shares/Softmax)",
            ],
            "layer '/shares/Softmax' has no kernel of the type that it is to have",
        ),
        (
            [
                "9: [myelinBuilderUtils.cpp::getMyelinSupportType::1250] Error Code 9: Internal Error ((Unnamed Layer* "
                "3) [Shuffle] requires foreign node optimizations incompatible with int8 precision constraints.)"
            ],
            "layer '(Unnamed Layer* 3) [Shuffle]' has no kernel of the type that it is to have",
        ),
        (
            [
                "4: No non-int8 implementation of layer /logits/Gemm is supported. Please provide missing int8 scales "
                "to use available int8 implementation"
            ],
            "layer '/logits/Gemm' is to be INT8, and a tensor of it has no range: give it one",
        ),
    ],
)
def test_a_layer_that_the_builder_cannot_type_is_named(said: list[str], sentence: str) -> None:
    assert build_failure(BuildLog([("ERROR", text) for text in said])) == sentence
