"""torch's own database of module inputs (common_modules), run with interfuse's recurrent modules."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.testing._internal.common_utils import freeze_rng_state, noncontiguous_like

import interfuse.nn as inn

# Importing torch's database forbids setting torch.backends' flags in the whole process; other tests set them.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),  # torch's own
]

OURS = {nn.RNN: inn.RNN, nn.LSTM: inn.LSTM, nn.GRU: inn.GRU,
        nn.RNNCell: inn.RNNCell, nn.LSTMCell: inn.LSTMCell, nn.GRUCell: inn.GRUCell}  # fmt: skip
INFOS = [info for info in module_db if info.module_cls in OURS]
DTYPES = [torch.float32, torch.float64]
every_module = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def inputs_of(info: Any, dtype: torch.dtype, training: bool, grad: bool) -> list[Any]:
    torch.manual_seed(0)
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=grad, training=training)


def modules_of(info: Any, sample: Any, dtype: torch.dtype, training: bool) -> tuple[Any, Any]:
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    theirs = info.module_cls(*args, **kwargs, dtype=dtype).train(training)
    ours = OURS[info.module_cls](*args, **kwargs, dtype=dtype).train(training)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def samples(dtype: torch.dtype, info: Any, grad: bool = False) -> Iterator[tuple[Any, Any, Any]]:
    """Each of the database's inputs, with torch's module and ours, in training and in evaluation."""
    count = 0
    for training in (True, False):
        for sample in inputs_of(info, dtype, training, grad):
            if sample.forward_input is None:
                continue
            count += 1
            yield sample, *modules_of(info, sample, dtype, training)
    assert count >= 2, f"the database has no inputs for {info.name}"


def call(module: Any, sample: Any) -> Any:
    with freeze_rng_state():
        return module(*sample.forward_input.args, **sample.forward_input.kwargs)


def leaves_of(tree: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def test_the_database_holds_all_six() -> None:
    assert {info.module_cls for info in INFOS} == set(OURS)


@every_dtype
@every_module
def test_forward_and_reference(info: Any, dtype: torch.dtype) -> None:
    for sample, theirs, ours in samples(dtype, info):
        found = call(ours, sample)
        torch.testing.assert_close(found, call(theirs, sample))
        if sample.reference_fn is not None:
            given = sample.forward_input
            torch.testing.assert_close(found, sample.reference_fn(ours, *given.args, **given.kwargs))


@every_dtype
@every_module
def test_gradients_and_no_writing_to_inputs(info: Any, dtype: torch.dtype) -> None:
    for sample, theirs, ours in samples(dtype, info, grad=True):
        given = [t for t in leaves_of(sample.forward_input.args) if t.requires_grad]
        before = [t.detach().clone() for t in given]
        gradients = []
        for module in (theirs, ours):
            results = leaves_of(call(module, sample))
            leaves = [*given, *module.parameters()]
            gradients.append(torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results]))
        torch.testing.assert_close(gradients[1], gradients[0])
        assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


@every_dtype
@every_module
def test_inputs_that_are_not_contiguous(info: Any, dtype: torch.dtype) -> None:
    for sample, _, ours in samples(dtype, info):
        expected = call(ours, sample)
        strided = torch.utils._pytree.tree_map_only(
            torch.Tensor, noncontiguous_like, sample.forward_input.args
        )
        torch.testing.assert_close(ours(*strided), expected, rtol=0, atol=0)


@every_module
def test_gradcheck(info: Any) -> None:
    for sample, _, ours in samples(torch.float64, info, grad=True):
        flat, spec = torch.utils._pytree.tree_flatten(sample.forward_input.args)
        places = [i for i, t in enumerate(flat) if isinstance(t, torch.Tensor) and t.is_floating_point()]

        def run(
            *tensors: Any, flat: Any = flat, spec: Any = spec, places: Any = places, ours: Any = ours
        ) -> Any:
            args, names = list(flat), [name for name, _ in ours.named_parameters()]
            for place, t in zip(places, tensors, strict=False):
                args[place] = t
            weights = dict(zip(names, tensors[len(places) :], strict=True))
            return tuple(leaves_of(torch.func.functional_call(ours, weights, tuple(spec.unflatten(args)))))

        inputs = (*(flat[i] for i in places), *ours.parameters())
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@every_module
def test_pickle_and_copy(info: Any) -> None:
    for sample, _, ours in samples(torch.float32, info):
        expected = call(ours, sample)
        for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            torch.testing.assert_close(call(again, sample), expected, rtol=0, atol=0)


@every_module
def test_errors(info: Any) -> None:
    torch.manual_seed(0)
    errors = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=False
    )
    assert errors
    for error in errors:
        sample = error.module_error_input
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        kind = OURS[info.module_cls]
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                kind(*args, **kwargs)
            continue
        with pytest.raises(error.error_type, match=error.error_regex):
            call(kind(*args, **kwargs), sample)
