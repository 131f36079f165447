"""ConvPool1d, ConvPool2d, ConvPool3d: torch.nn.ConvNd's parameters, and what a module must survive."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import tolerance
import torch
from torch import nn

import interfuse
from interfuse.nn import ConvPool1d, ConvPool2d, ConvPool3d

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

FUSED = {1: ConvPool1d, 2: ConvPool2d, 3: ConvPool3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def block() -> ConvPool2d:
    torch.manual_seed(0)
    return ConvPool2d(3, 8, 3, padding=1, activation="relu", pool="max")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_initialised_as_torchs(count: int, bias: bool) -> None:
    torch.manual_seed(3)
    theirs = CONVS[count](4, 6, 3, groups=2, bias=bias)
    torch.manual_seed(3)
    ours = FUSED[count](4, 6, 3, groups=2, bias=bias, activation="relu")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    )
    torch.manual_seed(3)
    ours.reset_parameters()
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    )
    theirs.load_state_dict(ours.state_dict())


ACTIVATIONS = (
    None,
    "relu",
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.3),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Identity(),
)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_from_torch(count: int, activation: Any) -> None:
    conv = CONVS[count](3, 5, 3, padding=1, dilation=1, stride=1)
    pool = MAX_POOLS[count](3, 2, 1, ceil_mode=True)
    fused = FUSED[count].from_torch(conv, activation, pool)
    assert fused.weight is conv.weight
    assert fused.bias is conv.bias
    x = torch.randn(2, 3, *[10] * count)
    act = nn.ReLU() if activation == "relu" else activation or nn.Identity()
    double = copy.deepcopy(conv).double()
    assert tolerance.error(fused(x), pool(act(double(x.double())))) <= tolerance.FLOAT32_DEFAULT


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "arguments",
    [{"kernel_size": 2}, {"kernel_size": 3, "stride": 1, "padding": 1, "count_include_pad": False}],
    ids=str,
)
def test_from_torch_with_average_pooling(count: int, arguments: dict[str, Any]) -> None:
    conv = CONVS[count](4, 6, 2, groups=2, padding=1, bias=False)
    pool = AVG_POOLS[count](**arguments)
    fused = FUSED[count].from_torch(conv, "tanh", pool)
    assert fused.bias is None
    x = torch.randn(2, 4, *[9] * count)
    truth = pool(torch.tanh(copy.deepcopy(conv).double()(x.double())))
    assert tolerance.error(fused(x), truth) <= tolerance.FLOAT32_DEFAULT


def test_from_torch_keeps_mode_dtype_and_names() -> None:
    conv = nn.Conv2d(3, 4, 3, padding_mode="reflect", padding=1, dtype=torch.bfloat16).eval()
    fused = ConvPool2d.from_torch(conv, "relu", "max")
    assert not fused.training
    assert fused.weight.dtype == torch.bfloat16
    assert (fused.pool_size, fused.padding_mode) == ((2, 2), "reflect")


class Other(nn.Conv2d):
    pass


REFUSED = {
    "another dimension": (nn.Conv1d(1, 1, 1), None, None, "takes a torch.nn.Conv2d and no subclass"),
    "a subclass": (Other(1, 1, 1), None, None, "takes a torch.nn.Conv2d and no subclass"),
    "a transposed convolution": (nn.ConvTranspose2d(1, 1, 1), None, None, "takes a torch.nn.Conv2d"),
    "another activation": (nn.Conv2d(1, 1, 1), nn.Mish(), None, "the activation must be ReLU"),
    "a softmax": (nn.Conv2d(1, 1, 1), nn.Softmax(1), None, "the activation must be ReLU"),
    "another pool": (nn.Conv2d(1, 1, 1), None, nn.AdaptiveMaxPool2d(1), "the pool must be MaxPool2d"),
    "a pool of another dimension": (nn.Conv2d(1, 1, 1), None, nn.MaxPool1d(2), "followed by a 2-d pool"),
    "indices": (nn.Conv2d(1, 1, 1), None, nn.MaxPool2d(2, return_indices=True), "returns two tensors"),
    "dilated windows": (
        nn.Conv2d(1, 1, 1),
        None,
        nn.MaxPool2d(2, dilation=2),
        "got a MaxPool with dilation 2",
    ),
    "a divisor": (nn.Conv2d(1, 1, 1), None, nn.AvgPool2d(2, divisor_override=3), "got divisor_override=3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_from_torch_refuses(name: str) -> None:
    conv, activation, pool, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        ConvPool2d.from_torch(conv, activation, pool)


def test_repr() -> None:
    assert repr(block()) == (
        "ConvPool2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), activation='relu', pool='max', "
        "pool_size=(2, 2))"
    )
    module = ConvPool1d(
        4,
        4,
        3,
        2,
        "valid",
        2,
        2,
        False,
        "circular",
        activation="leaky_relu",
        pool="avg",
        pool_size=3,
        pool_stride=2,
        pool_padding=1,
        ceil_mode=True,
        count_include_pad=False,
    )
    assert repr(module) == (
        "ConvPool1d(4, 4, kernel_size=(3,), stride=(2,), padding='valid', dilation=(2,), groups=2, "
        "padding_mode='circular', bias=False, activation='leaky_relu', negative_slope=0.01, pool='avg', "
        "pool_size=(3,), pool_stride=(2,), pool_padding=(1,), ceil_mode=True, count_include_pad=False)"
    )


def test_deepcopy_and_pickle() -> None:
    module, x = block(), torch.randn(2, 3, 9, 8)
    y = module(x)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.weight is not module.weight
        assert torch.equal(copied(x), y)
        assert repr(copied) == repr(module)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = ConvPool2d(3, 8, 3, padding=1, activation="relu", pool="max")
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh(x), y)


def test_dtype_and_memory_format() -> None:
    module, x = block(), torch.randn(2, 3, 9, 8)
    y = module(x)
    assert module.double()(x.double()).dtype == torch.float64
    module = block().bfloat16()
    assert (
        tolerance.error(module(x.bfloat16()), y) <= 4 * tolerance.BFLOAT16
    )  # inputs and weights were rounded too
    module = block().to(memory_format=torch.channels_last)
    again = module(x.contiguous(memory_format=torch.channels_last))
    assert again.is_contiguous(memory_format=torch.channels_last)
    assert tolerance.error(again, y) <= tolerance.FLOAT32_DEFAULT


def test_meta_device_and_later_memory() -> None:
    module = ConvPool3d(2, 4, 3, device="meta", activation="relu", pool="max")
    assert module(torch.empty(1, 2, 9, 9, 9, device="meta")).shape == (1, 4, 3, 3, 3)
    module.to_empty(device="cpu").reset_parameters()
    assert bool(module(torch.randn(1, 2, 9, 9, 9)).isfinite().all())


def test_changed_attributes_and_parameters_take_effect() -> None:
    """Nothing computed for an earlier call outlives what it was computed from."""
    module, x = block().requires_grad_(False), torch.randn(2, 3, 12, 12)
    module(x)
    module.stride = (2, 2)
    assert module(x).shape == (2, 8, 3, 3)
    module.stride, module.activation = (1, 1), "none"
    plain = module(x)
    truth = nn.functional.max_pool2d(
        nn.functional.conv2d(x.double(), module.weight.double(), module.bias.double(), padding=1), 2
    )
    assert tolerance.error(plain, truth) <= tolerance.FLOAT32_DEFAULT
    for change in (
        lambda: module.weight.mul_(2.0),
        lambda: module.weight.data.mul_(2.0),
        lambda: module.weight.numpy().__imul__(2.0),
        lambda: setattr(module.weight, "data", module.weight * 2.0),
    ):
        before = module(x) - module.bias[:, None, None]
        change()
        after = module(x) - module.bias[:, None, None]
        assert tolerance.error(after, 2.0 * before.double()) <= tolerance.FLOAT32_DEFAULT


def test_parametrized_and_hooked() -> None:
    module, x = block(), torch.randn(2, 3, 9, 8)
    plain = module(x)
    seen: list[int] = []
    module.register_forward_hook(lambda *_: seen.append(1))
    normed = nn.utils.parametrizations.weight_norm(module)
    y = normed(x)
    assert tolerance.error(y, plain) <= tolerance.FLOAT32_DEFAULT
    y.sum().backward()
    assert normed.parametrizations.weight.original0.grad is not None
    assert seen == [1]


def test_trains_as_torch_does() -> None:
    """Five steps of the same optimizer on the same data end at the same parameters."""
    fused, x = block(), torch.randn(4, 3, 10, 10)
    conv = nn.Conv2d(3, 8, 3, padding=1, dtype=torch.float64)
    conv.load_state_dict(fused.state_dict())
    theirs = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2))
    for model, data in ((fused, x), (theirs, x.double())):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            (model(data) - 0.5).square().mean().backward()
            optimizer.step()
    for ours, truth in zip(fused.parameters(), theirs.parameters(), strict=True):
        assert tolerance.error(ours, truth) <= tolerance.FLOAT32_GRADIENT


@pytest.mark.parametrize("precision", ["default", "highest"])
def test_precision_switch(precision: str) -> None:
    interfuse.set_precision(precision)
    assert interfuse.get_precision() == precision
    with interfuse.precision("highest"):
        assert interfuse.get_precision() == "highest"
    assert interfuse.get_precision() == precision
    with pytest.raises(ValueError, match="The precision must be one of default, highest; got 'low'"):
        interfuse.set_precision("low")
