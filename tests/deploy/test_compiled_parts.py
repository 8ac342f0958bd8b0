"""Kernels of parts that another compiler handles: what they are called, what they prove, how they are recorded.

The names of kernels are those that TensorRT 8.6.0 ran on an H200 for timm's vit_small_patch16_224 at batch 32, in INT8
and in FP16, and for torchvision's convnext_tiny.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from deploy import compiled_parts, cuda
from deploy.compiled_parts import describe, look_into_parts, settle
from deploy.engine_audit import EngineAudit, print_engine_audit
from deploy.engine_layers import EngineLayer
from deploy.installed import find_toolkit
from deploy.kernel_trace import Kernel, recorded_kernels
from deploy.precision_audit import DeclaredLayer, PrecisionAudit, audit_precision
from deploy.settings import BuildSettings
from qat.base.errors import UserError

CONV = "sm80_xmma_fprop_implicit_gemm_indexed_wo_smem_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x32x64_stage1"
GEMM = (
    "sm90_xmma_gemm_{}_f32_tn_n_tilesize256x128x64_cgasize1x2x1_warpgroupsize2x1x1_beta0_execute_segment_k_off_kernel"
)
CODES, FLOATS, HALF = (GEMM.format(types) for types in ("i8i8_i8i32", "i8f32_i8i32", "f16f16_f16f32"))
GELU = CODES.replace("beta0", "gelu_erf_beta0")
NORM = "__myl_bb0_58_AddMeaSubMulMeaAddSqrDivMulMulAddMulMinMaxRouCas"
INT8_BLOCK = ["__myl_bb0_71_Res", CODES, "mha9", *["__myl_bb0_74_Mov"] * 3, FLOATS, NORM, GELU, FLOATS, NORM]
FP16_BLOCK = [
    HALF,
    "__myl_bb0_74_TraSliSliResTraSliResMovResMovResMov",
    "mha8",
    HALF,
    "__myl_bb0_67_ResTraResAddCasMeaSub",
    "__myl_bb0_72_ResMulMeaAddSqrDivMulCasMulAdd",
    HALF,
    "__myl_bb0_71_DivCasErfCasAddMulMul",
    HALF,
    "__myl_bb0_70_AddCasMeaSub",
]
LAYERS = ("qkv.0", "qkv.1", "qkv.2", "matmul", "matmul_1", "proj", "fc1", "fc2")


def kernels(*names: str) -> list[Kernel]:
    return [Kernel(name, 1.0 + index) for index, name in enumerate(names)]


def vit(*, float_layers: Sequence[str] = ()) -> PrecisionAudit:
    """The audit of a transformer of two blocks, as 8.6 lists it: a convolution, and one layer for all the rest."""
    names = [f"blocks.{index}.{layer}" for index in range(2) for layer in LAYERS]
    missing = dict.fromkeys(float_layers, ("weights 'w'",)) | {"patch": ("input 'x'",)}
    declared = [
        DeclaredLayer(
            name,
            "convolution" if name == "patch" else "matrix product",
            "CONVOLUTION" if name == "patch" else "MATRIX_MULTIPLY",
            missing.get(name, ()),
            None,
            1,
            384,
        )
        for name in ("patch", *names, "head")
    ]
    part = "{ForeignNode[blocks.0.qkv.0.weight/float...head]}"
    layers = [
        EngineLayer("patch", "CaskConvolution", ("FP16",), ("FP16",), ("FP16",), ("patch",), tactic=CONV),
        EngineLayer(part, "Myelin", ("FP32",), (), ("FP32",), ()),
    ]
    return audit_precision(declared, layers)


def of_parts(audit: PrecisionAudit) -> set[str]:
    return {finding.precision for finding in audit.findings if finding.node != "patch"}


@pytest.mark.parametrize(
    ("name", "type_", "writes_codes", "is_attention"),
    [
        (CONV, "FP16", False, False),
        (CODES, "INT8", True, False),
        (FLOATS, "INT8", False, False),
        (GELU, "INT8", True, False),
        (HALF, "FP16", False, False),
        ("mha11", "unknown", False, True),
        ("sm50_xmma_convolution_trt_depthwiseFP32NHWC4_fp32nhwcx4_fp32nhwcx4_fp32kcrs", "FP32", False, False),
        ("sm50_xmma_fprop_conv3d_c1_k1_f16f16_f16_f16_ndhwcktrsc_ndhwc_tilesize64x16", "FP16", False, False),
        ("sm50_xmma_cublas_smallN_NN_f32f32_f32_f32_nn_n_thread_count256", "FP32", False, False),
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8f16_i8i32_f32_nchw_vect_c_32kcrs", "INT8", False, False),
        ("ampere_gemm_of_a_new_kind", "unknown", False, False),
    ],
)
def test_what_a_kernel_multiplies(name: str, type_: str, writes_codes: bool, is_attention: bool) -> None:
    kernel = Kernel(name, 1.0)
    assert kernel.multiplies
    assert (kernel.type, kernel.writes_codes, kernel.is_attention) == (type_, writes_codes, is_attention)


@pytest.mark.parametrize(
    ("name", "writes_codes", "only_moves"),
    [
        (NORM, True, False),
        ("__myl_bb0_43_ResTraResTraSliResMulMulMinMaxRouCasResMov", True, False),
        ("__myl_bb0_71_DivCasErfCasAddMulMul", False, False),
        ("__myl_bb0_74_Mov", False, True),
        ("__myl_bb0_96_SliResTraResMov", False, True),
        ("_ZN6cuInt816ncqhw4ToNc32hw32EPK5char4PS0_", False, False),
    ],
)
def test_kernels_that_do_not_multiply(name: str, writes_codes: bool, only_moves: bool) -> None:
    kernel = Kernel(name, 1.0)
    assert (kernel.multiplies, kernel.writes_codes, kernel.only_moves) == (False, writes_codes, only_moves)


def test_names_without_what_differs_between_kernels_of_a_kind() -> None:
    names = [Kernel(name, 1.0).short_name for name in (NORM, "mha11", FLOATS)]
    assert names == [NORM.replace("bb0_58_", ""), "mha", "sm90_xmma_gemm_i8f32_i8i32_f32_tn_n"]


def test_without_its_kernels_a_part_is_unknown() -> None:
    audit = vit()
    assert [finding.in_part for finding in audit.findings] == [False, *[True] * 17]
    assert len(audit.broken) == 17


def test_if_all_kernels_that_multiply_are_int8_so_are_all_layers() -> None:
    audit = settle(vit(), kernels(CONV + "_execute_kernel_trt", *INT8_BLOCK, *INT8_BLOCK, FLOATS))
    assert audit.broken == ()
    assert of_parts(audit) == {"INT8"}
    assert {finding.cause for finding in audit.findings if finding.node != "patch"} == {""}
    assert audit.findings[0].precision == "FP16"  # of the layer that the engine lists by itself
    assert describe(audit) == (
        "parts that another compiler handles: 11 kernels multiply (11 INT8), 2 of them whole attentions"
    )


@pytest.mark.parametrize(
    "second",
    [FP16_BLOCK, [*INT8_BLOCK[:1], HALF, "mha9", *INT8_BLOCK[3:]], [*INT8_BLOCK[:-2], "gemm_of_a_new_kind", NORM]],
)
def test_a_kernel_that_multiplies_in_float_leaves_it_open_which_layer_does(second: list[str]) -> None:
    audit = settle(vit(), kernels(CONV, *INT8_BLOCK, *second, FLOATS))
    assert len(audit.broken) == 17
    assert of_parts(audit) == {"unknown"}
    assert "of the 11 kernels of its part that multiply are not INT8, such as" in audit.broken[0].cause
    assert audit.broken[0].cause.endswith("which layer each computes is not told")


def test_kernels_in_float_are_taken_for_layers_that_are_declared_float() -> None:
    float_layers = ("blocks.1.matmul", "blocks.1.matmul_1")
    halves = [*INT8_BLOCK[:2], HALF, "__myl_bb0_3_Max", HALF, *INT8_BLOCK[6:]]
    audit = settle(vit(float_layers=float_layers), kernels(CONV, *INT8_BLOCK, *halves, FLOATS))
    assert audit.broken == ()
    assert {one.node for one in audit.findings if one.precision != "INT8"} == {"patch", *float_layers}
    assert len(settle(vit(), kernels(CONV, *INT8_BLOCK, *halves, FLOATS)).broken) == 17


def test_a_part_without_any_kernel_that_multiplies_proves_nothing() -> None:
    assert len(settle(vit(), kernels(CONV, NORM, NORM)).broken) == 17


def test_what_is_listed_by_itself_is_not_counted_as_a_part() -> None:
    audit = settle(vit(), kernels(CONV, CONV, *INT8_BLOCK, *INT8_BLOCK, FLOATS))  # a second one is the part's
    assert len(audit.broken) == 17


class Cupti(ModuleType):
    """NVIDIA's package, on a GPU that runs the kernels in ``runs``: (kind, start, end, name) in nanoseconds."""

    ActivityKind = SimpleNamespace(CONCURRENT_KERNEL=10)

    def __init__(self, runs: Sequence[tuple[int, int, int, str]], error: str = "") -> None:
        super().__init__("cupti")
        self.cupti, self.runs, self.error, self.enabled = self, runs, error, list[int]()

    def activity_register_callbacks(self, requested: Any, completed: Any) -> None:
        if self.error:
            raise RuntimeError(self.error)
        assert requested()[0] > 0
        self.completed = completed

    def activity_enable(self, kind: int) -> None:
        self.enabled.append(kind)

    def activity_disable(self, kind: int) -> None:
        self.enabled.remove(kind)

    def activity_flush_all(self, flag: int) -> None:
        self.completed([SimpleNamespace(kind=k, start=s, end=e, name=n) for k, s, e, n in self.runs])


def test_kernels_are_recorded_in_the_order_in_which_they_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    cupti = Cupti([(10, 5000, 9000, "second"), (10, 1000, 2500, "first"), (1, 0, 1, "a copy")])
    monkeypatch.setitem(sys.modules, "cupti", cupti)
    with recorded_kernels() as found:
        assert cupti.enabled == [10]
        assert found == []
    assert found == [Kernel("first", 1.5), Kernel("second", 4.0)]
    assert cupti.enabled == []


def test_without_cupti_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupti", None)
    with pytest.raises(UserError, match=r"CUPTI cannot be loaded .*: pip install cupti-python"), recorded_kernels():
        pass
    monkeypatch.setitem(sys.modules, "cupti", Cupti([], "CUPTI_ERROR_NOT_COMPATIBLE"))
    with (
        pytest.raises(UserError, match="does not work with this driver: CUPTI_ERROR_NOT_COMPATIBLE"),
        recorded_kernels(),
    ):
        pass


def test_a_build_looks_into_parts_where_a_gpu_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit, audit = find_toolkit("tensorrt-rtx"), vit()
    assert look_into_parts(audit, b"", toolkit, BuildSettings()) is audit
    toolkit = dataclasses.replace(toolkit, device=cuda.Device("A GPU", "8.9", "1", "1", 1.0))
    monkeypatch.setattr(compiled_parts, "_kernels", lambda *_: kernels(CONV, *INT8_BLOCK, *INT8_BLOCK, FLOATS))
    assert look_into_parts(audit, b"", toolkit, BuildSettings()).broken == ()

    def refuse(*_: object) -> None:
        raise UserError("CUPTI cannot be loaded: pip install cupti-python")

    monkeypatch.setattr(compiled_parts, "_kernels", refuse)
    found = look_into_parts(audit, b"", toolkit, BuildSettings())
    assert len(found.broken) == 17
    assert found.broken[0].cause.endswith("; CUPTI cannot be loaded: pip install cupti-python")


def test_the_kernels_are_shown_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    audit = settle(vit(), kernels(CONV, *INT8_BLOCK, *INT8_BLOCK, FLOATS))
    shown = EngineAudit(audit.layers, audit.findings, kernels=audit.kernels)
    print_engine_audit(shown)
    printed = capsys.readouterr().out
    assert "Kernels of one inference" in printed
    assert "17 of 17 layers that the ONNX file declares INT8 are INT8" in printed
    rows = [line.split("│") for line in printed.splitlines() if "attention" in line]
    assert [cell.strip() for cell in rows[0][1:4]] == ["mha", "attention", "2"]
    kept = shown.to_json()["kernels"]
    assert [Kernel(**one) for one in kept] == list(audit.kernels)
