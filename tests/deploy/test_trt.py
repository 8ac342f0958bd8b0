"""Finding the installed builder, and what the rest of deploy/ is told about it. All on the real TensorRT-RTX."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from qdq_models import convolution

from deploy.build_log import BuildLog
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings
from deploy.tensor_types import numpy_name
from qat.base.errors import UserError


@pytest.fixture(scope="module")
def toolkit():
    return find_toolkit("tensorrt-rtx")


def test_rtx_is_found_and_described(toolkit):
    assert toolkit.name == "tensorrt-rtx"
    assert toolkit.title == f"TensorRT-RTX {toolkit.version}"
    assert toolkit.typing() == "strong"
    assert toolkit.reports_progress
    assert {"8.6", "8.9", "12.0"} <= set(toolkit.compute_capabilities())
    assert numpy_name(toolkit.module.DataType.FLOAT) == "float32"
    assert numpy_name(toolkit.module.DataType.INT8) == "int8"


def test_finding_rtx_imports_no_torch_and_no_onnxruntime():
    code = (
        "import sys; from deploy.installed import find_toolkit; find_toolkit('tensorrt-rtx'); "
        "heavy = ('torch', 'onnx', 'onnxruntime', 'onnxruntime_ep_nv_tensorrt_rtx'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_builder_usable_says_what_was_tried_and_what_to_install():
    # An interpreter without site-packages of the builders: find_spec finds nothing there.
    code = (
        "import importlib.util as u; from deploy.installed import find_toolkit, UserError; "
        "u.find_spec = lambda name, package=None: None\n"
        "try: find_toolkit('auto')\nexcept UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert "tensorrt (the package tensorrt is not installed)" in line
    assert "tensorrt-rtx (the package tensorrt_rtx_bindings is not installed)" in line
    assert "pip install tensorrt-rtx-cu13-bindings onnxruntime-ep-nv-tensorrt-rtx-cu13" in line
    assert "NVIDIA GPU" in line


MYELIN = (
    "2: [graphOptimizer.cpp::convertMyelinWeightsToFp32::7903] Error Code 2: Internal Error "
    "(Assertion params.weights.type() != DataType::kINT8 failed. )"
)
SIBLINGS = (
    "2: [graphOptimizer.cpp::chooseHigherPrecision::7079] Error Code 2: Internal Error "
    "(Assertion dt1 == DataType::kFLOAT || dt1 == DataType::kHALF failed. )"
)


@pytest.mark.parametrize("text", [MYELIN, SIBLINGS])
def test_a_refusal_of_int8_weights_is_told_from_other_failures(toolkit, text):
    assert toolkit.refuses_int8_weights(BuildLog([("ERROR", text)]))
    assert not toolkit.refuses_int8_weights(BuildLog([("ERROR", "2: no tactic"), ("VERBOSE", text)]))


def test_unknown_compute_capability_names_the_supported_ones(toolkit):
    builder = toolkit.module.Builder(toolkit.logger(BuildLog()))
    with pytest.raises(UserError, match=r"capability '9.0': choose from 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"):
        toolkit.create_config(builder, BuildSettings(capabilities=("8.6", "9.0")))


def test_progress_rises_to_the_end_and_ctrl_c_cancels(toolkit, tmp_path):
    def build(report):
        log = BuildLog()
        builder = toolkit.module.Builder(toolkit.logger(log))
        network = toolkit.create_network(builder)
        parser = toolkit.module.OnnxParser(network, toolkit.logger(log))
        assert parser.parse_from_file(str(convolution(tmp_path / "m.onnx", batch=1)))
        config = toolkit.create_config(builder, BuildSettings(capabilities=("8.9",)))
        with toolkit.report_progress(config, report):
            return builder.build_serialized_network(network, config)

    seen: list[float] = []
    assert build(lambda fraction, phase: seen.append(fraction)) is not None
    assert max(seen) > 0.8
    assert all(0 <= fraction <= 1 for fraction in seen)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="nothing was written"):
        build(lambda fraction, phase: signal.raise_signal(signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is before


def test_code_that_the_builder_calls_back_can_end_after_ctrl_c(toolkit):
    config = toolkit.create_config(toolkit.module.Builder(toolkit.logger(BuildLog())), BuildSettings())
    reporting = toolkit.report_progress(config, lambda fraction, phase: None)
    raise_if_interrupted = reporting.__enter__()
    raise_if_interrupted()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="nothing was written"):
        raise_if_interrupted()
    with pytest.raises(KeyboardInterrupt, match="nothing was written"):
        reporting.__exit__(None, None, None)


def test_weights_memory_is_the_last_one_logged():
    log = BuildLog([("INFO", "Total Weights Memory: 12 bytes"), ("INFO", "Total Weights Memory: 25663624 bytes")])
    assert log.weights_bytes() == 25663624
    assert BuildLog([("INFO", "Total Activation Memory: 5 bytes")]).weights_bytes() is None
