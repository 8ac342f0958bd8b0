"""What an engine's layers really run in: the real builder's log, and inspector JSON by its documentation."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from functools import partial

import pytest
from qdq_models import classifier, matrix_product

from deploy.build_log import BuildLog
from deploy.builder import build, parse_onnx
from deploy.engine_layers import EngineLayer, layers_from_inspector, layers_from_log
from deploy.installed import find_toolkit
from deploy.precision_audit import DeclaredLayer, audit_precision, declared_layers
from deploy.settings import BuildSettings
from qat.base.number_format import INT8

# Captured from TensorRT-RTX 1.7.1.116, verbose and DETAILED: a quantized convolution and its ReLU.
RTX_CONVOLUTION = (
    "Name: /conv/Conv_myl0_2, LayerType: correlation, Inputs: [ { Name: __mye200conv.1_7_myl0, Dimens"
    "ions: [-1,8,16,16], Strides: [2048,1,128,8], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NH"
    "WC) Channel major format }], Constants: [ { Name: __mye277dconst_myl0, Dimensions: [8,8,3,3], St"
    "rides: [72,1,24,8], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format "
    "}, { Name: __mye282dconst_myl0, Dimensions: [1,8,1,1], Strides: [8,1,8,8], StrideOrder: [3,0,2,1"
    "], Datatype: Float, Format: (NHWC) Channel major format }, { Name: __mye287dconst_myl0, Dimensio"
    "ns: [1,8,1,1], Strides: [8,1,8,8], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Chann"
    "el major format }], Outputs: [ { Name: __myln_k_arg__bb1_8_myl0, Dimensions: [-1,8,16,16], Strid"
    "es: [2048,1,128,8], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format"
    " }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: /conv/Conv]\x1f[ONNX Layer"
    ": /x_dq/DequantizeLinear]\x1f[ONNX Layer: /w_dq/DequantizeLinear]\n"
    "Name: __myl_MulRelu_myl0_3, LayerType: kgen, Inputs: [ { Name: __myln_k_arg__bb1_8_myl0, Dimensi"
    "ons: [-1,8,16,16], Strides: [2048,1,128,8], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NH"
    "WC) Channel major format }], Constants: [ { Name: __mye292_dconst_myl0, Dimensions: [1,8,1,1], S"
    "trides: [8,1,8,8], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format "
    "}], Outputs: [ { Name: relu, Dimensions: [-1,8,16,16], Strides: [2048,256,16,1], StrideOrder: [3"
    ",2,1,0], Datatype: Float, Format: (Linear) Row major linear format }], TacticName: __myl_MulRelu"
    "_0x5873551b51e204c5b5c0df5974eeac27, StreamId: 0, Metadata: [ONNX Layer: /relu/Relu]\n"
)

RTX_DEQUANTIZED_PRODUCT = (
    "Name: __myl_CastMulCastCastMulFc_myl0_2, LayerType: runtime_fusion, Inputs: [ { Name: __myln_k_a"
    "rg__bb1_4_myl0, Dimensions: [-1,16], Strides: [16,1], StrideOrder: [1,0], Datatype: Int8, Format"
    ": (Linear) Row major linear format }], Constants: [ { Name: __mye154_dconst_myl0, Dimensions: [1"
    "6,1], Strides: [1,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear for"
    "mat }, { Name: w_q_constantInt8_myl0, Dimensions: [16,10], Strides: [10,1], StrideOrder: [1,0], "
    "Datatype: Int8, Format: (Linear) Row major linear format }], Outputs: [ { Name: fc, Dimensions: "
    "[-1,10], Strides: [10,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear"
    " format }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: /w_dq/DequantizeLinear]\x1f[ONNX Laye"
    "r: /fc/MatMul]\x1f[ONNX Layer: /x_dq/DequantizeLinear]\n"
)


def declared(node: str, operation="convolution", kind="CONVOLUTION", float_inputs=(), axis=0, groups=1, channels=8):
    return DeclaredLayer(node, operation, kind, tuple(float_inputs), axis, groups, channels)


def test_log_lines_of_a_convolution_and_its_relu():
    text = "some chatter\nLayers:\n" + RTX_CONVOLUTION + "\nI/O Tensors:\n Name: input, IOMode: Input, DataType: Float"
    convolution, relu = layers_from_log(text)
    assert convolution == EngineLayer(
        name="/conv/Conv_myl0_2",
        kind="correlation",
        inputs=("INT8",),
        constants=("INT8", "FP32", "FP32"),
        outputs=("FP32",),
        onnx_nodes=("/conv/Conv", "/x_dq/DequantizeLinear", "/w_dq/DequantizeLinear"),
        format="(NHWC) Channel major format",
        tactic="__myelin_CASK_STUB",
    )
    assert relu.kind == "kgen"
    assert relu.onnx_nodes == ("/relu/Relu",)
    (finding,) = audit_precision([declared("/conv/Conv")], [convolution, relu]).findings
    assert finding.precision == "INT8"
    assert not finding.broken


def test_kernel_that_dequantizes_first_is_float_although_int8_goes_in():
    (layer,) = layers_from_log(RTX_DEQUANTIZED_PRODUCT)
    assert layer.inputs == ("INT8",)
    assert "INT8" in layer.constants
    product = declared("/fc/MatMul", "matrix product", "MATRIX_MULTIPLY", axis=0)
    (finding,) = audit_precision([replace(product, weight_scales=16)], [layer]).broken
    assert finding.precision == "FP32"
    assert "16 weight scales for 8 output channels; they must be on the output axis" in finding.cause
    for scales in (1, 8):
        (finding,) = audit_precision([replace(product, weight_scales=scales)], [layer]).broken
        assert "the builder chose to dequantize its weight and to multiply in float" in finding.cause


def test_causes_of_float_layers():
    def cause(layer, precision="FP32"):
        engine = [
            EngineLayer(layer.node + "_myl0_1", "correlation", (precision,), (precision,), ("FP32",), (layer.node,))
        ]
        (finding,) = audit_precision([layer], engine).findings
        return finding.cause

    assert "axis 1" in cause(declared("c", axis=1))
    assert "transposed" in cause(declared("c", kind="DECONVOLUTION"))
    assert "not a multiple of 8" in cause(declared("c", groups=12, channels=12))
    assert "it reads FP16" in cause(declared("c"), "FP16")
    assert cause(declared("c", float_inputs=["input 'x'"])) == "not declared INT8: no Q/DQ on input 'x'"


def test_layer_that_the_engine_does_not_list_is_unknown_and_broken():
    (finding,) = audit_precision([declared("/gone/Conv")], layers_from_log(RTX_CONVOLUTION)).findings
    assert finding.precision == "unknown"
    assert finding.broken
    assert "no engine layer has its name" in finding.cause


# Written after the documentation and ../shared/tensorrt.md, not captured: an inspector needs a GPU.
def test_old_inspector_with_control_characters_and_one_sentence_for_format_and_type():
    text = """{"Layers": [
      {"Name": "Reformatting CopyNode for Input Tensor 0 to w + QuantizeLinear_3 + Conv_9 + Relu_10",
       "LayerType": "Reformat",
       "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}],
       "Outputs": [{"Name": "x'", "Format/Datatype": "Four wide channel vectorized row major Int8 format"}]},
      {"Name": "w + QuantizeLinear_3 + Conv_9 + Relu_10", "LayerType": "CaskConvolution",
       "Inputs": [{"Name": "x'", "Format/Datatype": "Four wide channel vectorized row major Int8 format"}],
       "Outputs": [{"Name": "y", "Format/Datatype": "32 wide channel vectorized row major Int8 format"}],
       "Weights": {"Type": "Int8", "Count": 9408}, "Bias": {"Type": "Float", "Count": 64},
       "Metadata": "[ONNX Layer: Conv_9]\x1e[ONNX Layer: Relu_10]"},
      {"Name": "Conv_11", "LayerType": "CaskConvolution",
       "Inputs": [{"Name": "y", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
       "Outputs": [{"Name": "z", "Format/Datatype": "Row major linear FP32"}],
       "Weights": {"Type": "Half", "Count": 9408}}],
     "Bindings": ["x", "z"]}"""
    layers = layers_from_inspector(text)
    assert [layer.inputs for layer in layers] == [("FP32",), ("INT8",), ("FP16",)]
    assert layers[1].onnx_nodes == ("w", "QuantizeLinear_3", "Conv_9", "Relu_10")
    first, second = audit_precision([declared("Conv_9"), declared("Conv_11")], layers).findings
    assert first.precision == "INT8"
    assert (second.precision, second.broken) == ("FP16", True)


def test_new_inspector_with_type_apart_and_undetailed_layers():
    text = json.dumps(
        {
            "Layers": [
                {
                    "Name": "/conv/Conv_myl0_2",
                    "LayerType": "conv",
                    "Inputs": [{"Name": "a", "Datatype": "Int8", "Format": "(NHWC) Channel major format"}],
                    "Constants": [{"Name": "w", "Datatype": "Int8"}, {"Name": "s", "Datatype": "Float"}],
                    "Outputs": [{"Name": "b", "Datatype": "Int8"}],
                    "Metadata": "[ONNX Layer: /conv/Conv]\x1f[ONNX Layer: /relu[0]/Relu]",
                },
                "a layer without detail",
            ],
            "I/O Tensors": [],
        }
    )
    layers = layers_from_inspector(text)
    assert layers[0].onnx_nodes == ("/conv/Conv", "/relu[0]/Relu")
    assert layers[1].precision == "none"
    assert audit_precision([declared("/conv/Conv")], layers).count("convolution") == (1, 1)


def test_real_builder_quantized_classifier(tmp_path):
    result = _audit(classifier(tmp_path / "m.onnx"))
    assert [(f.node, f.declared_int8, f.precision) for f in result.findings] == [
        ("/conv/Conv", True, "INT8"),
        ("/fc/Gemm", True, "INT8"),
    ]
    assert result.broken == ()


def test_real_builder_float_fully_connected_layer_is_named(tmp_path):
    result = _audit(classifier(tmp_path / "m.onnx", quantize_fc=False))
    assert result.count("convolution") == (1, 1)
    assert result.count("matrix product") == (0, 1)
    fc = result.findings[1]
    assert (fc.precision, fc.declared_int8, fc.broken) == ("FP32", False, False)
    assert fc.cause.startswith("not declared INT8: no Q/DQ on input 'flat' and weights")


def test_real_builder_matrix_product_by_scale_axis(tmp_path):
    along_output = _audit(matrix_product(tmp_path / "a.onnx", axis=1))
    transposed = _audit(matrix_product(tmp_path / "b.onnx", axis=0, transpose=True))
    along_input = _audit(matrix_product(tmp_path / "c.onnx", axis=0))
    assert along_output.count("matrix product") == transposed.count("matrix product") == (1, 1)
    assert [finding.node for finding in along_input.broken] == ["/fc/MatMul"]


def _audit(model):
    return build(find_toolkit("tensorrt-rtx"), model, BuildSettings(capabilities=("8.9",))).audit


# Captured on an H200 from TensorRT 8.6.0 (an engine with a dynamic batch); entries that the audit does not read are
# left out.
TENSORRT_8_6 = """
{"Layers": [
{"Name": "x/quantize", "LayerType": "Reformat",
 "Inputs": [{"Name": "input", "Dimensions": [-1,3,32,32], "Format/Datatype": "N/A due to dynamic shapes"}],
 "Outputs": [{"Name": "x/quantize", "Dimensions": [-1,3,32,32], "Format/Datatype": "N/A due to dynamic shapes"}],
 "Metadata": ""},
{"Name": "conv1.weight + conv1 + relu + maxpool", "LayerType": "CaskConvActPool",
 "Inputs": [{"Name": "x/quantize", "Dimensions": [-1,3,32,32], "Format/Datatype": "N/A due to dynamic shapes"}],
 "Outputs": [{"Name": "maxpool/quantize", "Dimensions": [-1,64,8,8], "Format/Datatype": "N/A due to dynamic shapes"}],
 "ConvWeights": {"Type": "Int8", "Count": 9408}, "ConvBias": {"Type": "Float", "Count": 64},
 "ConvHasSparseWeights": 0, "Metadata": "[ONNX Layer: conv1][ONNX Layer: relu][ONNX Layer: maxpool]"},
{"Name": "layer1.0.conv3.weight + layer1.0.conv3 + layer1.0 + layer1.0.relu_2", "LayerType": "CaskConvolution",
 "Inputs": [{"Name": "layer1_0_relu_1/quantize", "Format/Datatype": "N/A due to dynamic shapes"},
            {"Name": "layer1_0_downsample_1/quantize", "Format/Datatype": "N/A due to dynamic shapes"}],
 "Outputs": [{"Name": "layer1_0_relu_2/quantize", "Format/Datatype": "N/A due to dynamic shapes"}],
 "Weights": {"Type": "Int8", "Count": 16384}, "HasSparseWeights": 0,
 "Metadata": "[ONNX Layer: layer1.0.conv3][ONNX Layer: layer1.0][ONNX Layer: layer1.0.relu_2]"},
{"Name": "fc.weight + transpose_before_fc + fc + fc.bias + (Unnamed Layer* 565) [ElementWise]",
 "LayerType": "CaskConvolution",
 "Inputs": [{"Name": "layer4_2_relu_2/quantize", "Format/Datatype": "N/A due to dynamic shapes"}],
 "Outputs": [{"Name": "(Unnamed Layer* 565) [ElementWise]_out_tensor",
              "Format/Datatype": "N/A due to dynamic shapes"}],
 "Weights": {"Type": "Float", "Count": 20480}, "Metadata": "[ONNX Layer: fc][ONNX Layer: fc]"}
], "Bindings": ["input", "logits"]}
"""


def test_tensorrt_8_6_hides_data_types_of_a_dynamic_batch_so_the_weights_decide():
    # The last layer's weights were Int8; Float stands here so that the test sees both answers.
    layers = layers_from_inspector(TENSORRT_8_6)
    declared = [
        DeclaredLayer("conv1", "convolution", "CONVOLUTION", (), 0, 1, 64),
        DeclaredLayer("layer1.0.conv3", "convolution", "CONVOLUTION", (), 0, 1, 256),
        DeclaredLayer("fc", "matrix product", "MATRIX_MULTIPLY", (), 0, 1, 0),
    ]
    found = audit_precision(declared, layers)
    assert [finding.precision for finding in found.findings] == ["INT8", "INT8", "FP32"]
    assert [finding.node for finding in found.broken] == ["fc"]


def test_a_part_that_was_handed_over_as_a_whole_is_found_by_its_ends():
    # Captured from TensorRT 8.6.0: a network of uint8 input, whose last layer Myelin computes in float.
    text = """{"Layers": [
      {"Name": "{ForeignNode[cast]}", "LayerType": "Myelin", "Inputs": [{"Format/Datatype": "Row major linear UInt8"}]},
      {"Name": "{ForeignNode[fc.weight...(Unnamed Layer* 625) [ElementWise]]}", "LayerType": "Myelin",
       "Inputs": [{"Name": "f", "Format/Datatype": "Row major linear FP32"}],
       "Outputs": [{"Name": "logits", "Format/Datatype": "Row major linear FP32"}]}]}"""
    product = dataclasses.replace(
        declared("fc", "matrix product", "MATRIX_MULTIPLY"), weight_path=("fc.weight/dequantize", "fc.weight")
    )
    first, second = audit_precision([product, declared("conv")], layers_from_inspector(text)).findings
    assert (first.precision, first.broken) == ("FP32", True)
    part = "{ForeignNode[fc.weight...(Unnamed Layer* 625) [ElementWise]]}"
    assert f"{part}, a part that another compiler handles" in first.cause
    assert second.precision == "unknown"


def test_the_path_of_weights_ends_at_their_constant(tmp_path):
    toolkit, log, settings = find_toolkit("tensorrt-rtx"), BuildLog(), BuildSettings()
    builder = toolkit.module.Builder(toolkit.logger(log))
    network = parse_onnx(toolkit, builder, classifier(tmp_path / "m.onnx"), log, settings)
    convolution, product = declared_layers(network, toolkit.module)
    assert convolution.weight_path[0] == "/w_dq/DequantizeLinear"
    assert convolution.weight_path[-1].startswith("w_q")
    assert product.weight_path[-1].startswith("fc_w_q")


def test_a_layer_that_is_float_in_one_profile_is_found():
    def layer(profile: str, precision: str) -> EngineLayer:
        return EngineLayer(f"conv + relu{profile}", "CaskConvolution", (precision,), (precision,), (), ("conv", "relu"))

    (finding,) = audit_precision([declared("conv")], [layer("", "INT8"), layer(" [profile 1]", "FP16")]).findings
    assert (finding.precision, finding.broken) == ("FP16", True)
    assert finding.cause.startswith("in profile 1: ")
    (finding,) = audit_precision([declared("conv")], [layer("", "INT8"), layer(" [profile 1]", "INT8")]).findings
    assert (finding.precision, finding.cause) == ("INT8", "")


def test_a_builder_without_a_kernel_breaks_nothing():
    layers = list(layers_from_log(RTX_CONVOLUTION))
    up = replace(declared("/gone/Conv"), kind="DECONVOLUTION")
    (finding,) = audit_precision([up], layers).broken
    assert finding.has_kernel
    found = audit_precision([up], layers, ("DECONVOLUTION",))
    assert found.broken == ()
    assert not found.findings[0].has_kernel


@pytest.mark.parametrize("mask", ["BOOL", "INT32"])
def test_the_mask_of_an_attention_is_not_what_it_multiplies(mask: str):
    """As TensorRT-RTX 1.7.1.116 lists an attention with a mask that is computed."""
    nodes, product = ("_gemm_mha_v2", "a.matmul", "a.matmul_1"), partial(declared, operation="matrix product")
    for found in (INT8.name, "FP32"):
        layer = EngineLayer("_gemm_mha_v2_myl0_68", "kgen", (mask, found, found, found), (mask,), (found,), nodes)
        audit = audit_precision([product("a.matmul"), product("a.matmul_1")], [layer])
        assert [finding.precision for finding in audit.findings] == [found, found]
    causes = {finding.cause for finding in audit.findings}
    assert causes == {f"it reads FP32: a layer between it and its DequantizeLinear is not {INT8.name}"}
