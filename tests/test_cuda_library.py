"""The CUDA C++ library: it loads anywhere, says what is missing, and on a GPU agrees with the reference."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from interfuse import _native

LIBRARY = Path(_native.__file__).parent / "libinterfuse_cuda.so"


class Spec(ctypes.Structure):
    """interfuse_conv_pool_spec of csrc/interfuse.h."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("channels_last", ctypes.c_int32),
        ("weight_channels_last", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("in_channels", ctypes.c_int64),
        ("out_channels", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        *(
            (name, ctypes.c_int64 * 3)
            for name in ("input", "kernel", "stride", "dilation", "padding_lo", "padding_hi")
        ),
        ("x_strides", ctypes.c_int64 * 5),
        ("activation", ctypes.c_int32),
        ("negative_slope", ctypes.c_float),
        ("pool", ctypes.c_int32),
        ("pool_size", ctypes.c_int64 * 3),
        ("pool_stride", ctypes.c_int64 * 3),
        ("pool_padding", ctypes.c_int64 * 3),
        ("ceil_mode", ctypes.c_int32),
        ("count_include_pad", ctypes.c_int32),
        ("precision", ctypes.c_int32),
        ("save", ctypes.c_int32),
    )


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if not LIBRARY.exists():
        pytest.skip("this build has no CUDA library: nvcc was not found when it was made")
    loaded = ctypes.CDLL(str(LIBRARY))
    loaded.interfuse_cuda_last_error.restype = ctypes.c_char_p
    return loaded


def block_spec(batch: int, channels: int, out_channels: int, height: int, width: int) -> Spec:
    """A 3x3 convolution with relu and 2x2 max pooling."""
    ones = (1, 1, 1)
    return Spec(
        batch=batch,
        in_channels=channels,
        out_channels=out_channels,
        groups=1,
        input=(1, height, width),
        kernel=(1, 3, 3),
        stride=ones,
        dilation=ones,
        activation=1,
        pool=1,
        pool_size=(1, 2, 2),
        pool_stride=(1, 2, 2),
        count_include_pad=1,
    )


def test_loads_and_counts_devices(library: ctypes.CDLL) -> None:
    assert library.interfuse_cuda_devices() == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_says_so(library: ctypes.CDLL) -> None:
    # Addresses that nothing reads: the call ends before a launch.
    address = ctypes.c_void_p(64)
    status = library.interfuse_cuda_conv_pool_forward(
        ctypes.byref(block_spec(1, 3, 4, 8, 8)), address, address, None, address, None, None, None
    )
    assert status == 1
    assert "no CUDA device" in library.interfuse_cuda_last_error().decode()


def test_checks_before_it_looks_for_a_device(library: ctypes.CDLL) -> None:
    spec = block_spec(1, 3, 4, 2, 2)
    address = ctypes.c_void_p(64)
    status = library.interfuse_cuda_conv_pool_forward(
        ctypes.byref(spec), address, address, None, address, None, None, None
    )
    assert status == 1
    assert "height" in library.interfuse_cuda_last_error().decode()


@pytest.mark.gpu
def test_agrees_with_the_reference(library: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).cuda() for shape in ((2, 5, 19, 70), (67, 5, 3, 3), (67,))
    )
    y = torch.full((2, 67, 8, 34), float("nan"), device="cuda")
    status = library.interfuse_cuda_conv_pool_forward(
        ctypes.byref(block_spec(2, 5, 67, 19, 70)),
        *(ctypes.c_void_p(t.data_ptr()) for t in (x, weight, bias, y)),
        None,
        None,
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
    )
    assert status == 0, library.interfuse_cuda_last_error().decode()
    truth = torch.nn.functional.max_pool2d(
        torch.relu(torch.nn.functional.conv2d(x.double(), weight.double(), bias.double())), 2
    )
    # Sums of 45 products in float32.
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
