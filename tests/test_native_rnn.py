"""The core's recurrent layers against torch's own in float64: every cell, forward and backward."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from interfuse import _native

MODULES = {"rnn_tanh": nn.RNN, "rnn_relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


@dataclass(frozen=True)
class Case:
    cell: str = "lstm"
    batch: int = 5
    steps: int = 9
    inputs: int = 6
    hidden: int = 20
    projection: int = 0
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = True
    ragged: bool = False
    states: bool = True
    threads: int = 2

    def module(self) -> nn.RNNBase:
        extra: dict[str, object] = {"nonlinearity": "relu"} if self.cell == "rnn_relu" else {}
        if self.projection:
            extra["proj_size"] = self.projection
        torch.manual_seed(0)
        module = MODULES[self.cell](
            self.inputs, self.hidden, self.layers, bias=self.bias, batch_first=self.batch_first,
            bidirectional=self.bidirectional, **extra)
        if self.cell == "rnn_relu":  # unbounded: keep the state from growing with the steps
            for p in module.parameters():
                p.data.mul_(0.5)
        return module

    @property
    def outputs(self) -> int:
        return self.projection or self.hidden

    @property
    def runs(self) -> int:
        return self.layers * (2 if self.bidirectional else 1)

    def lengths(self) -> Tensor | None:
        if not self.ragged:
            return None
        return torch.tensor([1 + (7 * i + 3) % self.steps for i in range(self.batch)])


CASES = [
    *(Case(cell=cell) for cell in MODULES),
    *(Case(cell=cell, hidden=33, layers=2, bidirectional=True, ragged=True, batch=13) for cell in MODULES),
    *(Case(cell=cell, batch=1, hidden=64, steps=40, states=False) for cell in MODULES),
    *(Case(cell=cell, hidden=1, inputs=1, batch=2, steps=1, threads=1) for cell in MODULES),
    Case(projection=7, layers=2, bidirectional=True, ragged=True),
    Case(projection=17, hidden=40, batch=3),
    Case(bias=False, batch_first=False, ragged=True, layers=3),
    Case(cell="gru", bias=False, batch_first=False, bidirectional=True),
    Case(batch=33, hidden=48, threads=3),
    Case(batch=50, steps=30, hidden=16, ragged=True, threads=3, bidirectional=True),
    Case(cell="gru", steps=300, batch=2, hidden=24),
    # Layers that run at the same time.
    *(Case(cell=cell, batch=1, hidden=130, layers=3, steps=11) for cell in MODULES),
    Case(batch=3, hidden=130, layers=4, steps=11, ragged=True, states=False),
    Case(batch=2, hidden=130, projection=70, layers=2),
]


def addresses(module: nn.RNNBase, tensors: dict[str, Tensor]) -> list[int]:
    suffixes = [f"_l{layer}{reverse}" for layer in range(module.num_layers)
                for reverse in (("", "_reverse") if module.bidirectional else ("",))]
    return [tensors[name + suffix].data_ptr() if name + suffix in tensors else 0
            for suffix in suffixes for name in WEIGHTS]


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


@dataclass
class Run:
    """One forward of the core, with all that its backward needs."""

    case: Case
    module: nn.RNNBase
    x: Tensor
    lengths: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    ids: Tensor | None = None

    def forward(self, save: bool, weight_dtype: str = "float32") -> tuple[Tensor, Tensor, Tensor]:
        case, source = self.case, self.x if self.ids is None else self.ids
        steps, batch = (1, 0) if case.batch_first else (0, 1)
        self.desc = _native.RnnDesc(
            case.cell, 2 if case.bidirectional else 1, case.bias, save, weight_dtype, case.batch_first,
            source.shape[batch], source.shape[steps], case.inputs, case.hidden, case.projection, case.layers,
            (source.stride(steps), source.stride(batch)), 0 if self.ids is None else self.x.shape[0])
        nan = float("nan")
        y = torch.full((*source.shape[:2], case.outputs * (2 if case.bidirectional else 1)), nan)
        hn = torch.full((case.runs, source.shape[batch], case.outputs), nan)
        cn = torch.full((case.runs, source.shape[batch], case.hidden), nan)
        self.reserve = torch.full((self.desc.reserve,), nan)
        _native.rnn_forward(
            self.desc, *self._inputs(), addresses(self.module, dict(self.module.named_parameters())),
            y.data_ptr(), hn.data_ptr(), cn.data_ptr(), self.reserve.data_ptr(), case.threads)
        return y, hn, cn

    def backward(self, grad_y: Tensor, grad_hn: Tensor, grad_cn: Tensor | None) -> dict[str, Tensor]:
        parameters = dict(self.module.named_parameters())
        shape = self.x.shape if self.ids is None else (*self.ids.shape, self.case.inputs)
        like = {"x": torch.empty(shape), "h0": grad_hn, **parameters}
        if grad_cn is not None:
            like["c0"] = grad_cn
        grads = {name: torch.full(t.shape, float("nan")) for name, t in like.items()}
        _native.rnn_backward(
            self.desc, *self._inputs(), addresses(self.module, parameters), pointer(self.reserve),
            grad_y.data_ptr(), grad_hn.data_ptr(), pointer(grad_cn), grads["x"].data_ptr(),
            grads["h0"].data_ptr(), pointer(grads.get("c0")), addresses(self.module, grads),
            self.case.threads)
        return grads

    def _inputs(self) -> tuple[int, ...]:
        return tuple(pointer(t) for t in (self.x, self.ids, self.lengths, self.h0, self.c0))


def run_of(case: Case) -> Run:
    module = case.module()
    shape = (case.batch, case.steps) if case.batch_first else (case.steps, case.batch)
    h0 = torch.randn(case.runs, case.batch, case.outputs) if case.states else None
    c0 = torch.randn(case.runs, case.batch, case.hidden) if case.states and case.cell == "lstm" else None
    return Run(case, module, torch.randn(*shape, case.inputs), case.lengths(), h0, c0)


@dataclass
class Truth:
    """torch's own result in float64, through packed sequences where lengths differ."""

    outputs: tuple[Tensor, ...]
    leaves: dict[str, Tensor]


def truth_of(run: Run) -> Truth:
    case = run.case
    module = case.module().double()
    module.load_state_dict({name: t.double() for name, t in run.module.state_dict().items()})
    leaves = {name: t.detach().double().requires_grad_()
              for name, t in (("x", run.x), ("h0", run.h0), ("c0", run.c0)) if t is not None}
    start = leaves.get("h0")
    if "c0" in leaves:
        start = (leaves["h0"], leaves["c0"])
    x = leaves["x"]
    if run.lengths is not None:
        x = nn.utils.rnn.pack_padded_sequence(x, run.lengths, case.batch_first, enforce_sorted=False)
    y, state = module(x, start)
    if run.lengths is not None:
        y, _ = nn.utils.rnn.pad_packed_sequence(y, case.batch_first, total_length=case.steps)
    outputs = (y, *state) if case.cell == "lstm" else (y, state)
    return Truth(outputs, {**leaves, **dict(module.named_parameters())})


def allowed(case: Case) -> float:
    """Rounding of each step's sums, carried on by later steps and layers, each contracting on average."""
    return 2.0**-23 * (case.hidden + case.inputs) ** 0.5 * (case.layers + case.steps**0.5) * 4


def assert_close(ours: Tensor, truth: Tensor, tolerance: float, name: str) -> None:
    assert not ours.isnan().any(), f"{name} was not written everywhere"
    # The terms of a sum are of order one; where they cancel, its error still follows their size, not its own.
    error = (ours.double() - truth).norm() / truth.norm().clamp(min=truth.numel() ** 0.5 / 4)
    assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.2e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case: Case) -> None:
    run = run_of(case)
    truth = truth_of(run)
    for save in (False, True):
        for name, ours, true in zip(("y", "hn", "cn"), run.forward(save), truth.outputs, strict=False):
            assert_close(ours, true, allowed(case), name)
    gradients = [torch.randn(t.shape) for t in truth.outputs]
    sum((t * g.double()).sum() for t, g in zip(truth.outputs, gradients, strict=True)).backward()
    first = run.backward(*gradients, *[None] * (3 - len(gradients)))
    for name, leaf in truth.leaves.items():
        # A gradient sums over all steps and rows what the forward's errors enter once.
        assert_close(first[name], leaf.grad, 4 * allowed(case), name)
    second = run.backward(*gradients, *[None] * (3 - len(gradients)))
    assert all(torch.equal(first[name], second[name]) for name in first), "a second backward differs"


@pytest.mark.parametrize("cell", MODULES)
def test_lengths_of_zero_keep_the_start(cell: str) -> None:
    case = Case(cell=cell, batch=3)
    run = replace(run_of(case), lengths=torch.tensor([0, 4, 9]))
    y, hn, _ = run.forward(save=True)
    assert torch.equal(hn[:, 0], run.h0[:, 0])
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    gradients = run.backward(torch.randn_like(y), grad_hn := torch.randn_like(hn),
                             torch.randn(hn.shape) if cell == "lstm" else None)
    assert torch.equal(gradients["h0"][:, 0], grad_hn[:, 0])
    assert torch.equal(gradients["x"][0], torch.zeros_like(gradients["x"][0]))


def test_nan_stays_in_its_row() -> None:
    run = run_of(Case(batch=7, hidden=24, layers=2))
    clean = run.forward(save=False)[0]
    run.x[3, 2, 0] = float("nan")
    y = run.forward(save=False)[0]
    assert y[3, 2:].isnan().all()
    others = [i for i in range(7) if i != 3]
    assert torch.equal(y[others], clean[others])


def test_token_ids_choose_rows_of_the_table() -> None:
    case = Case(batch=4, ragged=True)
    table, ids = torch.randn(11, case.inputs), torch.randint(0, 11, (case.batch, case.steps))
    looked_up = replace(run_of(case), x=table, ids=ids)
    plain = replace(looked_up, x=table[ids], ids=None)
    for ours, expected in zip(looked_up.forward(save=True), plain.forward(save=True), strict=True):
        assert torch.equal(ours, expected)
    gradients = [torch.randn(4, 9, 20), torch.randn(1, 4, 20), torch.randn(1, 4, 20)]
    theirs = plain.backward(*gradients)
    assert all(torch.equal(grad, theirs[name]) for name, grad in looked_up.backward(*gradients).items())


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", MODULES)
def test_few_token_ids_are_looked_up_as_gates(cell: str, bidirectional: bool) -> None:
    """Inference keeps what each token gives to the gates, and sees each change of what that was made from."""
    case = Case(cell=cell, batch=4, layers=2, ragged=True, bidirectional=bidirectional)
    table, ids = torch.randn(11, case.inputs), torch.randint(0, 11, (case.batch, case.steps))
    looked_up = replace(run_of(case), x=table, ids=ids)
    module, outputs = looked_up.module, []
    changes = (table, module.weight_ih_l0, module.bias_ih_l0, module.weight_hh_l0)
    for changed in (None, *changes):
        if changed is not None:
            changed.data[0].add_(0.1)
        outputs.append(looked_up.forward(save=False)[0])
        plain = replace(looked_up, x=table[ids], ids=None)
        assert_close(outputs[-1], truth_of(plain).outputs[0], allowed(case), "y")
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(outputs))


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("layers", [1, 3])
def test_bfloat16_weights_round_the_recurrent_weights_only(layers: int, batch: int) -> None:
    case = Case(batch=batch, hidden=130, steps=20, layers=layers)
    run = run_of(case)
    half = run.forward(save=False, weight_dtype="bfloat16")[0]
    for name, p in run.module.named_parameters():
        if name.startswith("weight_hh"):
            p.data = p.data.bfloat16().float()
    assert_close(half, truth_of(run).outputs[0], allowed(case), "y")


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_repeats_bit_for_bit(threads: int, batch: int) -> None:
    run = run_of(Case(batch=batch, hidden=96, layers=2, threads=threads))
    first = run.forward(save=False)
    assert all(torch.equal(a, b) for a, b in zip(first, run.forward(save=False), strict=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"cell": "elman"}, "cell is 'elman'; allowed are 'rnn_tanh', 'rnn_relu', 'lstm', 'gru'"),
        ({"proj_size": 20}, "proj_size is 20; allowed is 0 to 19"),
        ({"cell": "gru", "proj_size": 3}, "only the LSTM has projections"),
        ({"directions": 3}, "directions is 3; allowed is 1 to 2"),
        ({"save": True, "weight_dtype": "bfloat16"}, "bfloat16 weights are for inference"),
        ({"steps": 1 << 30, "batch": 1 << 30}, "too large together"),
    ],
)
def test_refuses_with_a_sentence(change: dict[str, object], sentence: str) -> None:
    arguments = {
        "cell": "lstm", "directions": 1, "bias": True, "save": False, "weight_dtype": "float32",
        "batch_first": True, "batch": 2, "steps": 3, "input_size": 4, "hidden_size": 20, "proj_size": 0,
        "layers": 1, "x_strides": (4, 12), "vocabulary": 0}
    with pytest.raises(ValueError, match=sentence):
        _native.RnnDesc(**{**arguments, **change})


def test_lengths_and_ids_out_of_range_are_refused() -> None:
    run = run_of(Case(batch=2))
    run.lengths = torch.tensor([3, 10])
    with pytest.raises(ValueError, match="the length of sequence 1 is 10; allowed is 0 to 9"):
        run.forward(save=False)
    looked_up = replace(run_of(Case(batch=2)), x=torch.randn(5, 6), ids=torch.full((2, 9), 5))
    with pytest.raises(ValueError, match="token id 5 at step 0 of sequence 0 is outside the embedding"):
        looked_up.forward(save=False)


def writes() -> dict[str, object]:
    """Ways to change a weight in place; a version counter notices the first two only."""

    def step(p: nn.Parameter) -> None:
        p.grad = torch.ones_like(p)
        torch.optim.SGD([p], lr=0.5).step()

    return {
        "in place": lambda p: p.detach().add_(0.5),
        "optimizer": step,
        "data": lambda p: p.data.add_(0.5),
        "one element": lambda p: p.data.view(-1)[-1:].add_(0.5),
        "numpy": lambda p: p.detach().numpy().__iadd__(0.5),
    }


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("write", writes())
def test_a_changed_weight_is_seen(write: str, name: str) -> None:
    run = run_of(Case(batch=3, projection=7, layers=2))
    before = run.forward(save=False)[0]
    with torch.no_grad() if write == "in place" else torch.enable_grad():
        writes()[write](run.module.get_parameter(f"{name}_l1"))
    after = run.forward(save=False)[0]
    assert not torch.equal(after, before)
    assert_close(after, truth_of(run).outputs[0], allowed(run.case), "y")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("cell", MODULES)
def test_rows_dealt_out_to_threads(cell: str, threads: int) -> None:
    """From four rows a thread on, each thread takes sequences of its own; backward may have fewer threads."""
    run = run_of(Case(cell=cell, batch=14, steps=13, hidden=24, layers=2, ragged=True, threads=threads))
    truth = truth_of(run)
    for name, ours, true in zip(("y", "hn", "cn"), run.forward(save=True), truth.outputs, strict=False):
        assert_close(ours, true, allowed(run.case), name)
    gradients = [torch.randn(t.shape) for t in truth.outputs]
    sum((t * g.double()).sum() for t, g in zip(truth.outputs, gradients, strict=True)).backward()
    for fewer in (threads, 1):
        run.case = replace(run.case, threads=fewer)
        ours = run.backward(*gradients, *[None] * (3 - len(gradients)))
        for name, leaf in truth.leaves.items():
            assert_close(ours[name], leaf.grad, 4 * allowed(run.case), name)


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_weights_beyond_the_cache(batch: int, threads: int, weight_dtype: str) -> None:
    run = run_of(Case(batch=batch, steps=4, hidden=520, threads=threads))
    y = run.forward(save=False, weight_dtype=weight_dtype)[0]
    if weight_dtype == "bfloat16":
        run.module.weight_hh_l0.data = run.module.weight_hh_l0.data.bfloat16().float()
    assert_close(y, truth_of(run).outputs[0], allowed(run.case), "y")


@pytest.mark.parametrize("batch", [1, 8])
def test_long_sequences(batch: int) -> None:
    run = run_of(Case(batch=batch, steps=2000, hidden=16))
    assert_close(run.forward(save=False)[0], truth_of(run).outputs[0], allowed(run.case), "y")


@pytest.mark.parametrize("cell", MODULES)
def test_empty_batches_and_sequences(cell: str) -> None:
    run = run_of(Case(cell=cell, batch=0))
    y, hn, cn = run.forward(save=True)
    assert y.numel() == hn.numel() == 0
    gradients = run.backward(y, hn, cn if cell == "lstm" else None)
    assert all(not gradients[name].any() for name, _ in run.module.named_parameters())
    run = run_of(Case(cell=cell, batch=3, steps=0))
    y, hn, cn = run.forward(save=True)
    assert torch.equal(hn, run.h0)
    gradients = run.backward(y, hn, cn if cell == "lstm" else None)
    assert torch.equal(gradients["h0"], hn)
    assert all(not gradients[name].any() for name, _ in run.module.named_parameters())


def test_a_reserve_that_no_forward_wrote_is_refused() -> None:
    run = run_of(Case(batch=2))
    y, hn, cn = run.forward(save=True)
    run.reserve.zero_()
    with pytest.raises(ValueError, match="a reserve that no forward of this plan has written"):
        run.backward(y, hn, cn)
