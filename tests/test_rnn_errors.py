"""What rnn refuses, and the sentence that says what was given, what is allowed and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from interfuse.ops.rnn import rnn

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@dataclass
class Call:
    """A good call of a small LSTM, of which a test changes something."""

    x: Any = field(default_factory=lambda: torch.randn(5, 3, 4))
    weights: Any = field(default_factory=lambda: list(nn.LSTM(4, 7, 2).parameters()))
    hx: Any = None
    options: dict[str, Any] = field(default_factory=lambda: {"cell": "lstm"})

    def change(self, i: int, weight: Any) -> Call:
        self.weights[i] = weight
        return self

    def run(self) -> Any:
        return rnn(self.x, self.weights, self.hx, **self.options)


def with_options(**options: Any) -> Call:
    return Call(options={"cell": "lstm", **options})


def with_table(ids: Any = None, table: Any = None, **options: Any) -> Call:
    ids = torch.zeros(5, 3, dtype=torch.int64) if ids is None else ids
    return Call(
        x=ids, options={"cell": "lstm", "table": torch.randn(9, 4) if table is None else table, **options}
    )


def states(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


def gru(*args: Any, **kwargs: Any) -> list[Any]:
    return list(nn.GRU(*args, **kwargs).parameters())


REFUSED = {
    "cell": (
        lambda: with_options(cell="elman"),
        "cell must be one of rnn_tanh, rnn_relu, lstm, gru; got 'elman'",
    ),
    "input-dims": (
        lambda: Call(x=torch.randn(4)),
        r"must have 3 dimensions, or 2 without a batch; got \(4,\)",
    ),
    "input-size": (
        lambda: Call(x=torch.randn(5, 3, 6)),
        r"takes an input of size 4; the input's shape is \(5, 3, 6\)",
    ),
    "no-steps": (lambda: Call(x=torch.randn(0, 3, 4)), r"at least one step; its shape is \(0, 3, 4\)"),
    "input-dtype": (
        lambda: Call(x=torch.randn(5, 3, 4).double()),
        "must have one dtype; .* the input is torch.float64",
    ),
    "input-device": (
        lambda: Call(x=torch.empty(5, 3, 4, device="meta")),
        "one device; .* cpu and the input on meta",
    ),
    "input-sparse": (
        lambda: Call(x=torch.randn(5, 3, 4).to_sparse()),
        "the input must be a dense tensor; got layout",
    ),
    "weight-sparse": (
        lambda: Call().change(1, torch.randn(28, 7).to_sparse()),
        "weight_hh_l0 must be a dense tensor",
    ),
    "int-weights": (
        lambda: Call(weights=[w.long() for w in Call().weights]),
        "dtype must be float32, bfloat16, ",
    ),
    "weight-dtype": (lambda: Call().change(5, torch.randn(28, 7).half()), "weight_hh_l1 is torch.float16"),
    "weight-rows": (
        lambda: Call().change(0, torch.randn(27, 4)),
        r"4 \* hidden_size rows, for its gates; got 27",
    ),
    "weight-hidden": (
        lambda: Call().change(1, torch.randn(28, 9)),
        "needs 7 columns, or fewer with a projection",
    ),
    "weight-hidden-gru": (
        lambda: Call(weights=[torch.randn(21, 4), torch.randn(21, 5)], options={"cell": "gru"}),
        "weight_hh_l0 needs 7 columns, after",
    ),
    "weight-second": (
        lambda: Call().change(4, torch.randn(28, 9)),
        r"weight_ih_l1 must have shape \(28, 7\), .* \(28, 9\)",
    ),
    "bias": (lambda: Call().change(3, torch.randn(21)), r"bias_hh_l0 must have shape \(28,\)"),
    "weights-count": (lambda: Call(weights=Call().weights[:5]), "each layer has 4 weights .* got 5 tensors"),
    "weights-directions": (
        lambda: Call(weights=Call().weights[:4], options={"cell": "lstm", "bidirectional": True}),
        r"each layer has 8 weights \(2 directions, with biases, without projections\); got 4",
    ),
    "weights-none": (lambda: Call(weights=[]), "must be torch's flat weights, .* got 0 tensors"),
    "state-batch": (
        lambda: Call(hx=states(2, 4, 7)),
        r"h0 must have shape \(2, 3, 7\): layers \* directions, batch",
    ),
    "state-size": (
        lambda: Call(hx=(torch.zeros(2, 3, 7), torch.zeros(2, 3, 6))),
        r"c0 must have shape \(2, 3, 7\)",
    ),
    "state-dtype": (lambda: Call(hx=states(2, 3, 7, dtype=torch.float64)), "and h0 is torch.float64"),
    "state-unbatched": (
        lambda: Call(x=torch.randn(5, 4), hx=states(2, 1, 7)),
        "h0 must have 2 dimensions for an input",
    ),
    "lengths-dtype": (
        lambda: with_options(lengths=torch.tensor([1, 2, 3], dtype=torch.int32)),
        "lengths must be an int64",
    ),
    "lengths-count": (
        lambda: with_options(lengths=torch.tensor([1, 2])),
        r"each of the 3 sequences, .* shape \(2,\)",
    ),
    "lengths-long": (
        lambda: with_options(lengths=torch.tensor([1, 6, 3])),
        "length of sequence 1 is 6; allowed is 0 to 5",
    ),
    "lengths-negative": (
        lambda: with_options(lengths=torch.tensor([1, 2, -3])),
        "length of sequence 2 is -3",
    ),
    "ids-dtype": (
        lambda: with_table(torch.zeros(5, 3)),
        r"int64 token ids of shape \(steps, batch\); got torch.float32",
    ),
    "ids-dims": (
        lambda: with_table(torch.zeros(5, 3, 1, dtype=torch.int64)),
        "must have 2 dimensions, or 1 without",
    ),
    "ids-range": (
        lambda: with_table(torch.full((5, 3), 9)),
        "token id 9 .*is outside the embedding's 9 rows",
    ),
    "ids-negative": (lambda: with_table(torch.full((5, 3), -1)), "token id -1 "),
    "table-size": (
        lambda: with_table(table=torch.randn(9, 5)),
        "the table must have at least one row and 4 columns",
    ),
    "table-empty": (
        lambda: with_table(table=torch.randn(0, 4)),
        r"at least one row and 4 columns, .* got \(0, 4\)",
    ),
    "table-dtype": (lambda: with_table(table=torch.randn(9, 4).double()), "and the table is torch.float64"),
    "padding-range": (lambda: with_table(padding_idx=9), "must be a row of the table's 9, or None; got 9"),
    "padding-negative": (lambda: with_table(padding_idx=-10), "must be a row of the table's 9; got -10"),
    "padding-alone": (lambda: with_options(padding_idx=1), "and there is no table; got 1"),
    "rounding": (
        lambda: with_options(weight_dtype=torch.float16),
        "weight_dtype must be None or torch.bfloat16",
    ),
    "backend": (lambda: with_options(backend=3), "backend must be a name or None; got 3"),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_sentence(name: str, backend: str, grad: bool) -> None:
    call, sentence = REFUSED[name][0](), REFUSED[name][1]
    if backend:
        call.options.setdefault("backend", backend)
    for _ in range(2):  # a refusal is not remembered as a success
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=sentence):
            call.run()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Call(x=[1.0]), "input must be a torch tensor; got list"),
        (lambda: Call(weights=torch.randn(4, 4)), "weights must be a list of tensors; got Tensor"),
        (
            lambda: Call(weights=[torch.randn(28, 4), None]),
            r"weights\[1\] must be a torch tensor; got NoneType",
        ),
        (
            lambda: Call(hx=torch.zeros(2, 3, 7)),
            r"initial state of cell 'lstm' is a pair \(h0, c0\); got Tensor",
        ),
        (lambda: Call(hx=(torch.zeros(2, 3, 7),)), "is a pair"),
        (lambda: Call(hx=(torch.zeros(2, 3, 7), 0)), r"hx\[1\] must be a torch tensor; got int"),
        (
            lambda: Call(weights=gru(4, 7), hx=states(1, 3, 7), options={"cell": "gru"}),
            "is one tensor; got tuple",
        ),
        (lambda: with_options(lengths=[1, 2, 3]), "lengths must be a torch tensor; got list"),
    ],
)
def test_what_is_no_tensor(call: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        call().run()


def test_a_good_call_is_good() -> None:
    assert Call().run()[0].shape == (5, 3, 7)
    assert with_table().run()[0].shape == (5, 3, 7)


def backward_arguments() -> list[Any]:
    weights = [w.detach() for w in Call().weights]
    x = torch.randn(5, 3, 4)
    rest = ("lstm", False, False, -1, "", "")
    y, _, cn, reserve = torch.ops.interfuse.rnn.default(x, None, None, None, None, weights, *rest, True)
    mask = [True] * (3 + len(weights))
    return [
        torch.randn_like(y),
        None,
        torch.randn_like(cn),
        x,
        None,
        None,
        None,
        None,
        weights,
        None,
        reserve,
        *rest,
        mask,
    ]


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (0, torch.randn(5, 3, 8), r"grad_y must have shape \(5, 3, 7\)"),
        (0, torch.randn(5, 3, 7).double(), "grad_y must have shape .* got .*float64"),
        (1, torch.randn(2, 3, 8), r"grad_hn must have shape \(2, 3, 7\)"),
        (2, torch.randn(1, 3, 7), r"grad_cn must have shape \(2, 3, 7\)"),
        (10, torch.randn(7), r"reserve must have shape \(15, \d+\), .* returned with save=True"),
        (17, [True, True], "one entry for the input, h0, c0 and each weight, 11 in all; got 2"),
        (3, torch.randn(5, 4, 4), "must have shape"),
    ],
)
def test_the_backward_op_checks_what_it_reads(place: int, value: Any, sentence: str) -> None:
    arguments = backward_arguments()
    assert torch.ops.interfuse.rnn_backward.default(*arguments)[0].shape == (5, 3, 4)
    arguments[place] = value
    with pytest.raises(ValueError, match=sentence):
        torch.ops.interfuse.rnn_backward.default(*arguments)


def test_a_gradient_of_a_cell_state_that_is_not() -> None:
    weights = [w.detach() for w in gru(4, 7)]
    x, rest = torch.randn(5, 3, 4), ("gru", False, False, -1, "", "")
    reserve = torch.ops.interfuse.rnn.default(x, None, None, None, None, weights, *rest, True)[3]
    with pytest.raises(ValueError, match="'gru' has no cell state"):
        torch.ops.interfuse.rnn_backward.default(
            None, None, torch.randn(1, 3, 7), x, None, None, None, None, weights, None, reserve, *rest,
            [True] * 7)  # fmt: skip
