"""RNN, LSTM, GRU and their cells: torch.nn's own modules, with forward through `interfuse.ops.rnn`.

They are subclasses, so that signatures, parameters, initialisation, state_dict, repr and isinstance are
torch's own. `run_module` runs any torch.nn.RNNBase; `run_cell` any of torch's cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from interfuse.ops import _rnn_eager as eager
from interfuse.ops.rnn import run_long
from interfuse.torch_state import (
    SingleLevelFunction,
    apply,
    current_parameters,
    is_autocast_active,
    is_plain_eager,
    is_tracing,
    let_compile_see_recurrent_modules,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from interfuse.ops._rnn_checks import State

_CELLS = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}

Sequence = TypeVar("Sequence", Tensor, PackedSequence)


def run_module(
    module: nn.RNNBase,
    input: Sequence,  # noqa: A002
    hx: State | None = None,
    lengths: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
    table: Tensor | None = None,
    padding_idx: int | None = None,
    weights: list[Tensor] | None = None,
) -> tuple[Sequence, State]:
    """The module's forward, by `interfuse.ops.rnn`. With a table the input holds ids of its rows; weights may
    stand in the place of the module's own."""
    if weights is None:
        weights = current_parameters(module, module._flat_weights_names)  # noqa: SLF001
    if isinstance(input, PackedSequence):
        return _run_packed(module, input, hx, lengths, weights, (padding_idx, weight_dtype), table)
    if type(hx) is list:
        hx = tuple(hx)
    kind = _CELLS[module.mode]
    arguments = (kind, module.bidirectional, module.batch_first, padding_idx, weight_dtype, None)
    dropout = module.dropout if module.training and module.num_layers > 1 else 0.0
    if not dropout and not torch.compiler.is_dynamo_compiling():
        result = eager.run(
            input, weights, hx, lengths, table, arguments, lambda: _check(module, input, hx, weights, table)
        )
        if result is not None:
            return result
    _check(module, input, hx, weights, table)
    return run_long(input, weights, hx, lengths, table, arguments, dropout)


def _run_packed(
    module: nn.RNNBase,
    packed: PackedSequence,
    hx: Any,
    lengths: Tensor | None,
    weights: list[Tensor],
    options: tuple[int | None, torch.dtype | None],
    table: Tensor | None,
) -> tuple[PackedSequence, State]:
    """As a padded batch with lengths, in the packed order, which is by falling length."""
    if lengths is not None:
        raise ValueError(
            f"{type(module).__name__}: a PackedSequence knows its own lengths; got the argument lengths too."
        )
    data, batch_sizes, order, back = packed
    dims = 2 if table is None else 1
    if data.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {data.dim()}")
    rows = _rows(data, batch_sizes)
    if rows is None:
        x, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
    else:
        lengths = rows.lengths
        padded = apply(_Gather, data, rows.back, rows.there)
        x = padded.unflatten(0, (batch_sizes.shape[0], lengths.shape[0]))
    lstm = module.mode == "LSTM"
    if hx is not None and order is not None:
        hx = tuple(t.index_select(1, order) for t in hx) if lstm else hx.index_select(1, order)
    _check(module, x, hx, weights, table, batch_first=False)
    padding_idx, weight_dtype = options
    arguments = (_CELLS[module.mode], module.bidirectional, False, padding_idx, weight_dtype, None)
    dropout = module.dropout if module.training and module.num_layers > 1 else 0.0
    result = None if dropout or rows is None else eager.run(x, weights, hx, lengths, table, arguments)
    y, state = result or run_long(x, weights, hx, lengths, table, arguments, dropout)
    if back is not None:
        states = tuple(t.index_select(1, back) for t in (state if isinstance(state, tuple) else (state,)))
        state = (states[0], states[1]) if lstm else states[0]
    if rows is None:
        packed_y = pack_padded_sequence(y, lengths).data
    else:
        packed_y = apply(_Gather, y.flatten(0, 1), rows.there, rows.back)
    return PackedSequence(packed_y, batch_sizes, order, back), state


class _Rows(NamedTuple):
    """Which rows of (steps * batch) the packed rows are; for each of those its packed row (for padding the
    first, which nothing reads there); how long the sequences are."""

    there: Tensor
    back: Tensor
    lengths: Tensor


def _rows(data: Tensor, batch_sizes: Tensor) -> _Rows | None:
    """None where torch's own functions, which go step by step, are to pad and pack."""
    if torch.compiler.is_compiling() or not is_plain_eager() or type(data) is not Tensor or not data.is_cpu:
        return None
    if data.dtype is torch.float64 or not batch_sizes.numel():  # the reference computes with the padding
        return None
    sizes = batch_sizes.unsqueeze(1)
    each = torch.arange(int(batch_sizes[0]))
    filled = each < sizes
    there = filled.flatten().nonzero().squeeze(1)
    if there.shape[0] != data.shape[0]:
        return None
    back = torch.where(filled, sizes.cumsum(0) - sizes + each, 0).flatten()
    return _Rows(there, back, filled.sum(0))


class _Gather(SingleLevelFunction):
    """Rows of a tensor, each once but for those that nothing reads: the gradient is a choice of rows too."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        return t.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        there, back = ctx.saved_tensors
        return apply(_Gather, grad, back, there), None, None


def _check(
    module: nn.RNNBase,
    x: Tensor,
    hx: Any,
    weights: list[Tensor],
    table: Tensor | None,
    batch_first: bool | None = None,
) -> None:
    """What torch's modules check, in their words; the op checks the rest."""
    if not isinstance(x, Tensor) or is_tracing():  # in a jit trace sizes are tensors: the op checks alone
        return
    name, lstm = module.mode.split("_")[0], module.mode == "LSTM"
    kind = " tensor" if name == "RNN" else ""
    extra = 0 if table is None else 1
    dims = x.dim() + extra
    if dims not in (2, 3):
        raise ValueError(
            f"{name}: Expected input to be {2 - extra}D or {3 - extra}D, got {x.dim()}D{kind} instead"
        )
    if hx is not None:
        found = tuple(t.dim() for t in (hx if lstm else (hx,)))
        if any(d != dims for d in found):
            batched = "batched" if dims == 3 else "unbatched"
            both = "hx and cx" if lstm else "hx"
            got = f"({found[0]}-D, {found[-1]}-D) tensors" if lstm else f"{found[0]}-D tensor"
            raise RuntimeError(f"For {batched} {dims}-D input, {both} should also be {dims}-D but got {got}")
    if table is None:
        if x.dtype != weights[0].dtype and not is_autocast_active():
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weights[0].dtype}). "
                f"Convert input: input.to({weights[0].dtype}), or convert model: model.to({x.dtype})"
            )
        if x.shape[-1] != module.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {module.input_size}, got {x.shape[-1]}"
            )
    batch_first = module.batch_first if batch_first is None else batch_first
    batch, steps = (0, 1) if batch_first else (1, 0)
    if hx is not None:
        sizes = (
            (module.proj_size or module.hidden_size, module.hidden_size) if lstm else (module.hidden_size,)
        )
        for i, (t, size) in enumerate(zip(hx if lstm else (hx,), sizes, strict=False)):
            middle = (x.shape[batch],) if dims == 3 else ()
            runs = module.num_layers * (2 if module.bidirectional else 1)
            if tuple(t.shape) != (runs, *middle, size):
                expected = (runs, *(middle or (1,)), size)
                given = list(t.shape) if dims == 3 else [t.shape[0], 1, t.shape[1]]
                raise RuntimeError(f"Expected hidden{f'[{i}]' if lstm else ''} size {expected}, got {given}")
    if x.shape[steps if dims == 3 else 0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def run_cell(module: nn.RNNCellBase, kind: str, input: Tensor, hx: Any = None) -> Any:  # noqa: A002
    """One step of torch's cell module; its checks are in torch's words."""
    name, pair = type(module).__name__, kind == "lstm"
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    for i, t in enumerate(() if hx is None else hx if pair else (hx,)):
        if t.dim() not in (1, 2):
            what = f"hx[{i}]" if pair else "hidden"
            raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {t.dim()}D instead")
    if input.shape[-1] != module.input_size:
        raise RuntimeError(
            f"input has inconsistent input_size: got {input.shape[-1]} expected {module.input_size}"
        )
    batch = input.shape[0] if input.dim() == 2 else 1
    states = []
    for i, t in enumerate(() if hx is None else hx if pair else (hx,)):
        at = t if input.dim() == 2 else t.unsqueeze(0)
        if at.shape[0] != batch:
            raise RuntimeError(f"Input batch size {batch} doesn't match hidden{i} batch size {at.shape[0]}")
        if at.dim() != 2 or at.shape[1] != module.hidden_size:
            raise RuntimeError(
                f"hidden{i} has inconsistent hidden_size: got {at.shape[1]}, expected {module.hidden_size}"
            )
        states.append(at.unsqueeze(0))
    names = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ())]
    weights = current_parameters(module, names)
    unbatched = input.dim() == 1
    x = input.unsqueeze(0).unsqueeze(0) if unbatched else input.unsqueeze(0)  # one step
    state: Any = None if hx is None else (states[0], states[1]) if pair else states[0]
    arguments = (kind, False, False, None, None, None)
    result = None
    if not torch.compiler.is_dynamo_compiling():
        result = eager.run(x, weights, state, None, None, arguments)
    last = (result or run_long(x, weights, state, None, None, arguments))[1]
    if isinstance(last, tuple):
        h, c = last
        return (h[0, 0], c[0, 0]) if unbatched else (h[0], c[0])
    return last[0, 0] if unbatched else last[0]


def shared(cls: Any, module: nn.Module, kind: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """A module of class cls that holds the very Parameters of a torch module of the given class."""
    if type(module) is not kind and type(module) is not cls:
        raise ValueError(
            f"{cls.__name__}.from_torch takes a torch.nn.{kind.__name__} and no subclass, whose forward "
            f"could differ; got {type(module).__module__}.{type(module).__qualname__}."
        )
    made = cls(*args, **kwargs, device="meta")
    for name in list(made._parameters):
        if name not in module._parameters:  # noqa: SLF001
            raise ValueError(
                f"{cls.__name__}.from_torch shares plain parameters, but {name} is computed from others. "
                "Fold them into one first (for example with parametrize.remove_parametrizations)."
            )
        setattr(made, name, module._parameters[name])  # noqa: SLF001
    if isinstance(made, nn.RNNBase) and isinstance(module, nn.RNNBase):
        made.dropout = module.dropout
        made._init_flat_weights()
    return made.train(module.training)


def _sequence_arguments(module: Any) -> dict[str, Any]:
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional")
    return {name: getattr(module, name) for name in names}


class _Visible(nn.RNNBase):
    """What torch.compile takes into its graph, unlike torch's own recurrent modules. `weight_dtype`, None or
    torch.bfloat16, is what inference rounds the recurrent weights to; the parameters stay as they are."""

    weight_dtype: torch.dtype | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        let_compile_see_recurrent_modules()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        let_compile_see_recurrent_modules()


def rounding_of(module: _Visible) -> torch.dtype | None:
    """What the weights of one of interfuse's modules are rounded to in the call at hand."""
    return None if torch.is_grad_enabled() else module.weight_dtype


class RNN(_Visible, nn.RNN):
    """torch.nn.RNN in one kernel. forward also takes `lengths`; see `interfuse.ops.rnn`."""

    @classmethod
    def from_torch(cls, rnn: nn.Module) -> Self:
        """The same layers, sharing the given module's Parameters."""
        return shared(cls, rnn, nn.RNN, **_sequence_arguments(rnn), nonlinearity=rnn.nonlinearity)

    def forward(  # type: ignore[override]
        self,
        input: Sequence,  # noqa: A002
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Sequence, State]:
        return run_module(self, input, hx, lengths, rounding_of(self))


class LSTM(_Visible, nn.LSTM):
    """torch.nn.LSTM in one kernel. forward also takes `lengths`; see `interfuse.ops.rnn`."""

    @classmethod
    def from_torch(cls, lstm: nn.Module) -> Self:
        """The same layers, sharing the given module's Parameters."""
        return shared(cls, lstm, nn.LSTM, **_sequence_arguments(lstm), proj_size=lstm.proj_size)

    def forward(  # type: ignore[override]
        self,
        input: Sequence,  # noqa: A002
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Sequence, State]:
        return run_module(self, input, hx, lengths, rounding_of(self))


class GRU(_Visible, nn.GRU):
    """torch.nn.GRU in one kernel. forward also takes `lengths`; see `interfuse.ops.rnn`."""

    @classmethod
    def from_torch(cls, gru: nn.Module) -> Self:
        """The same layers, sharing the given module's Parameters."""
        return shared(cls, gru, nn.GRU, **_sequence_arguments(gru))

    def forward(  # type: ignore[override]
        self,
        input: Sequence,  # noqa: A002
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Sequence, State]:
        return run_module(self, input, hx, lengths, rounding_of(self))


class RNNCell(nn.RNNCell):
    """torch.nn.RNNCell in one kernel."""

    @classmethod
    def from_torch(cls, cell: nn.Module) -> Self:
        """The same cell, sharing the given module's Parameters."""
        sizes = cell.input_size, cell.hidden_size, cell.bias
        return shared(cls, cell, nn.RNNCell, *sizes, nonlinearity=cell.nonlinearity)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # noqa: A002
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return run_cell(self, f"rnn_{self.nonlinearity}", input, hx)


class LSTMCell(nn.LSTMCell):
    """torch.nn.LSTMCell in one kernel."""

    @classmethod
    def from_torch(cls, cell: nn.Module) -> Self:
        """The same cell, sharing the given module's Parameters."""
        return shared(cls, cell, nn.LSTMCell, cell.input_size, cell.hidden_size, cell.bias)

    def forward(
        self,
        input: Tensor,  # noqa: A002
        hx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return run_cell(self, "lstm", input, hx)


class GRUCell(nn.GRUCell):
    """torch.nn.GRUCell in one kernel."""

    @classmethod
    def from_torch(cls, cell: nn.Module) -> Self:
        """The same cell, sharing the given module's Parameters."""
        return shared(cls, cell, nn.GRUCell, cell.input_size, cell.hidden_size, cell.bias)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # noqa: A002
        return run_cell(self, "gru", input, hx)
