"""What an engine's inputs are checked for, without a GPU: shapes, types, names, GPU arrays by their interface."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from deploy import cuda
from deploy.arrays import read_inputs, shape_for_batch, size_in_bytes
from qat.base.artifact import TensorSpec
from qat.base.errors import UserError

IMAGE = TensorSpec("image", (-1, 3, 4, 4), "float32")
MASK = TensorSpec("mask", (-1, 4), "uint8")


def on_gpu(shape=(2, 3, 4, 4), typestr="<f4", **changes):
    interface = {"shape": shape, "typestr": typestr, "data": (4096, False), "version": 3, **changes}
    return SimpleNamespace(__cuda_array_interface__=interface)


def refused(given, specs=(IMAGE,)) -> str:
    with pytest.raises(UserError) as caught:
        read_inputs(given, specs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_array_and_a_dict():
    array = np.zeros((2, 3, 4, 4), np.float32)
    for given in (array, {"image": array}):
        found = read_inputs(given, (IMAGE,))
        assert (found.batch, found.on_gpu) == (2, False)
        (only,) = found.arrays
        assert (only.address, only.size, only.stream) == (array.ctypes.data, array.nbytes, None)


def test_a_strided_array_is_made_contiguous_and_kept_alive():
    array = np.arange(2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3).transpose(0, 3, 1, 2)
    (found,) = read_inputs(array, (IMAGE,)).arrays
    assert found.address == found.owner.ctypes.data != array.ctypes.data
    assert np.array_equal(found.owner, array)


def test_several_inputs():
    image, mask = np.zeros((2, 3, 4, 4), np.float32), np.zeros((2, 4), np.uint8)
    found = read_inputs({"mask": mask, "image": image}, (IMAGE, MASK))
    assert [array.spec.name for array in found.arrays] == ["image", "mask"]
    assert "different batch sizes: image 2, mask 1" in refused({"mask": mask[:1], "image": image}, (IMAGE, MASK))
    assert "has the inputs image, mask; given: image" in refused(image, (IMAGE, MASK))
    mixed = {"mask": mask, "image": on_gpu()}
    assert "some inputs are on the host and some on the GPU" in refused(mixed, (IMAGE, MASK))


def test_arrays_on_the_gpu():
    found = read_inputs(on_gpu(stream=7), (IMAGE,))
    assert found.on_gpu
    assert (found.arrays[0].address, found.arrays[0].size, found.arrays[0].stream) == (4096, 2 * 3 * 16 * 4, 7)
    contiguous = on_gpu(strides=(192, 64, 16, 4))
    assert read_inputs(contiguous, (IMAGE,)).batch == 2
    assert read_inputs(on_gpu((1, 3, 4, 4), strides=(5, 64, 16, 4)), (IMAGE,)).batch == 1  # one image has no stride
    # without a stream it may be computed on the default one
    assert read_inputs(on_gpu(stream=None), (IMAGE,)).arrays[0].stream == cuda.LEGACY_STREAM


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 3, 4, 5), np.float32), "has shape [2, 3, 4, 5]; the engine takes [N, 3, 4, 4]"),
        (np.zeros((3, 4, 4), np.float32), "has shape [3, 4, 4]"),
        (np.zeros((), np.float32), "has shape []"),
        (np.zeros((2, 3, 4, 4)), "is float64; the engine takes float32"),
        ([[1.0]], "is a list: give a NumPy array"),
        ({"x": np.zeros((2, 3, 4, 4), np.float32)}, "has the inputs image; given: x"),
        (on_gpu((2, 3, 4, 8)), "has shape [2, 3, 4, 8]"),
        (on_gpu(typestr="<f2"), "is float16"),
        (on_gpu(strides=(192, 4, 48, 12)), "is not C-contiguous on the GPU"),
    ],
)
def test_what_does_not_fit_is_named(given, message):
    assert message in refused(given)


def test_sizes():
    assert shape_for_batch(IMAGE, 5) == (5, 3, 4, 4)
    assert shape_for_batch(TensorSpec("x", (8, 3), "int8"), 5) == (8, 3)
    assert size_in_bytes(IMAGE, 5) == 5 * 48 * 4
