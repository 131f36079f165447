"""The training loop, its checkpoints and regimes, and the evaluation."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from interfuse import data, train
from interfuse.train import checkpoints, loop

if TYPE_CHECKING:
    import io

CHANNELS = 6


def samples(count: int = 60, seed: int = 0) -> data.Samples:
    """Points of two classes on either side of a plane."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, CHANNELS, generator=draw)
    return data.Samples((x,), (x[:, 0] + x[:, 1] > 0).long(), ("image",), 2, {})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([nn.Linear(CHANNELS, 8), nn.Linear(CHANNELS, 8)])
        self.dropout = nn.Dropout(0.3)  # so that the random state matters
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([encoder(x) for encoder in self.encoders], 1)
        return self.head(self.dropout(torch.relu(joined)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_learns_and_writes_down_how() -> None:
    model = net()
    history = train.fit(model, samples(400), samples(100, 1), epochs=6, learning_rate=0.02, batch=32)
    assert [e.epoch for e in history.epochs] == list(range(6))
    assert history.epochs[-1].loss < history.epochs[0].loss / 2
    last = history.epochs[-1]
    found = train.evaluate(model, samples(100, 1))
    assert last.accuracy == found.accuracy
    assert last.validation_loss == pytest.approx(found.loss)
    assert found.accuracy is not None
    assert found.accuracy > 0.9
    assert f"{last.accuracy:.1%}" in history.text()
    assert model.training


def test_every_epoch_sees_every_sample_once_in_an_order_of_its_own() -> None:
    seen: list[Tensor] = []

    def loss(model: nn.Module, part: data.Samples) -> Tensor:
        seen.append(part.labels)
        return train.cross_entropy(model, part)

    given = samples(10)
    given = data.Samples(given.inputs, torch.arange(10) % 2, given.names, 2, {})
    train.fit(net(), given, epochs=1, batch=4, loss=loss)
    assert [len(rows) for rows in seen] == [4, 4, 2]
    orders = [loop.order(10, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(torch.equal(o.sort().values, torch.arange(10)) for o in orders)
    assert len({tuple(o.tolist()) for o in orders}) == 4
    assert torch.equal(loop.order(10, 1, 1), orders[3])


@pytest.mark.parametrize("every", [None, 1, 3])
@pytest.mark.parametrize("regime", ["simultaneous", "mixed"])
def test_a_resumed_training_is_the_same_bit_by_bit(
    tmp_path: pathlib.Path, regime: str, every: int | None
) -> None:
    def noisy(model: nn.Module, part: data.Samples) -> Tensor:
        """With numbers of Python's and NumPy's, as augmentations draw them."""
        scale = 1.0 + 0.1 * random.random() + 0.1 * float(np.random.rand())  # noqa: NPY002
        return train.cross_entropy(model, part) * scale

    def fit(model: nn.Module, path: pathlib.Path, loss: Any = noisy) -> train.History:
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return train.fit(
            model, samples(), samples(30, 1), epochs=8, batch=16, optimizer=optimizer, scheduler=schedule,
            loss=loss, checkpoint=path, checkpoint_steps=every, regime=regime, patience=3)  # fmt: skip

    def run(path: pathlib.Path, stop_at: int | None) -> tuple[Tensor, train.History, int]:
        """Interrupted at step `stop_at`, if that is a number, and started again; with the steps since."""
        steps = 0

        def loss(model: nn.Module, part: data.Samples) -> Tensor:
            nonlocal steps
            steps += model.training
            if steps == stop_at:
                raise KeyboardInterrupt
            return noisy(model, part)

        for seed in (random.seed, np.random.seed):
            seed(1)
        if stop_at is not None:
            with pytest.raises(KeyboardInterrupt):
                fit(net(), path, loss)
            for seed in (torch.manual_seed, random.seed, np.random.seed):
                seed(99)  # another process has other random states
            steps, stop_at = 0, None
        model = net()
        history = fit(model, path, loss)
        return weights(model), history, steps

    whole, history, all_steps = run(tmp_path / "whole.pt", None)
    assert all_steps == 4 * len(history.epochs)
    resumed, again, steps = run(tmp_path / "resumed.pt", 24)  # within the sixth epoch
    assert steps == all_steps - {None: 20, 1: 23, 3: 23}[every]  # none was done twice that need not be
    assert torch.equal(whole, resumed)
    assert history == again
    model = net()
    assert fit(model, tmp_path / "whole.pt") == history  # nothing was left to do
    assert torch.equal(weights(model), whole)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "at.pt"
    train.fit(net(), samples(), epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match="it cannot go on from there"):
        train.fit(net(), samples(), epochs=2, checkpoint=path, seed=1)
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    with pytest.raises(ValueError, match="'scheduler': 'StepLR'}: it cannot go on from there"):
        train.fit(model, samples(), epochs=2, checkpoint=path, optimizer=optimizer, scheduler=schedule)
    descent = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="'optimizer': 'SGD'"):
        train.fit(model, samples(), checkpoint=path, optimizer=descent)
    model = net()
    model.head = nn.Linear(16, 3)
    before = weights(model)
    with pytest.raises(ValueError, match=r"is of another model: head\.weight is not the same there"):
        train.fit(model, samples(), epochs=2, checkpoint=path)
    assert torch.equal(weights(model), before)
    torch.save({"something": "else"}, path)
    with pytest.raises(ValueError, match="is no checkpoint of"):
        train.fit(net(), samples(), epochs=2, checkpoint=path)
    for garbage in (b"", b"no checkpoint", before.numpy().tobytes()):
        path.write_bytes(garbage)
        with pytest.raises(ValueError, match="it cannot be read"):
            train.fit(net(), samples(), epochs=2, checkpoint=path)


def test_a_crash_while_writing_leaves_the_checkpoint_before(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "at.pt"
    train.fit(net(), samples(), epochs=1, checkpoint=path)
    before = path.read_bytes()

    def half(whole: Any, file: io.BufferedWriter) -> None:
        file.write(b"half of a file")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        train.fit(net(), samples(), epochs=2, checkpoint=path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["at.pt"]
    monkeypatch.undo()
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    state = checkpoints.State(
        model, optimizer, None,
        {"samples": 60, "batch": 32, "regime": "simultaneous", "seed": 0, "optimizer": "Adam",
         "scheduler": None},
    )  # fmt: skip
    saved = checkpoints.load(path, state)
    assert saved is not None
    assert len(saved["epochs"]) == 1


KILLED = """
import os, pathlib, signal, sys
import torch
from test_train import net, samples, weights
from interfuse import train

path, save, calls = pathlib.Path(sys.argv[1]), torch.save, []


def half(whole, file):
    calls.append(1)
    if len(calls) == int(sys.argv[2]):
        save(whole, path.with_suffix(".whole"))
        file.write(path.with_suffix(".whole").read_bytes()[:3000])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(whole, file)


torch.save = half
model = net()
train.fit(model, samples(), epochs=3, batch=16, checkpoint=path, checkpoint_steps=1)
torch.save = save
torch.save(weights(model), path.with_suffix(".weights"))
"""


def test_killed_while_writing_it_goes_on_from_the_file_before(tmp_path: pathlib.Path) -> None:
    """Twice, and in processes of their own; the end has the bits of one that was left alone."""
    path = tmp_path / "at.pt"

    def start(stop_at: int) -> int:
        command = [sys.executable, "-c", KILLED, str(path), str(stop_at)]
        here = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent)}
        return subprocess.run(command, env=here, check=False, timeout=120).returncode

    assert start(7) == -signal.SIGKILL  # the third writing of the second epoch
    before = path.read_bytes()
    assert (tmp_path / "at.pt.part").stat().st_size == 3000
    assert torch.load(path, weights_only=True)["step"] == 2
    assert start(1) == -signal.SIGKILL  # and again, at the very first
    assert path.read_bytes() == before
    assert start(0) == 0
    assert not (tmp_path / "at.pt.part").exists()
    model = net()
    train.fit(model, samples(), epochs=3, batch=16)
    assert torch.equal(torch.load(tmp_path / "at.weights", weights_only=True), weights(model))


def test_early_stopping_takes_the_best_epochs_weights() -> None:
    model, kept = net(), {}

    def loss(model: nn.Module, part: data.Samples) -> Tensor:
        """Falls until the third epoch, then rises: what is left of the weights' norm at that moment."""
        if not model.training:
            epoch = len(kept)
            kept[epoch] = weights(model).clone()
            return torch.tensor(float(abs(epoch - 2)))
        return train.cross_entropy(model, part)

    history = train.fit(model, samples(), samples(20, 1), epochs=20, patience=2, loss=loss)
    assert history.stopped_early
    assert len(history.epochs) == 5
    assert history.best_epoch == 2
    assert torch.equal(weights(model), kept[2])


# --- regimes -----------------------------------------------------------------------------------------------


def changes(regime: str, epochs: int, parts: list[str] | None = None) -> list[set[str]]:
    """The parts whose parameters changed, epoch by epoch."""
    model = net()
    found: list[set[str]] = []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(model: nn.Module, part: data.Samples) -> Tensor:
        if not model.training:
            after = {name: p.detach().clone() for name, p in model.named_parameters()}
            found.append({n.rpartition(".")[0] for n in after if not torch.equal(before[n], after[n])})
            before.update(after)
        return train.cross_entropy(model, part)

    given = samples(32)
    train.fit(model, given, given, epochs=epochs, regime=regime, parts=parts, loss=loss)
    assert all(p.requires_grad for p in model.parameters())
    return found


ALL = {"encoders.0", "encoders.1", "head"}


def test_simultaneous_training_changes_everything_always() -> None:
    assert changes("simultaneous", 2) == [ALL, ALL]


def test_serial_training_changes_one_part_after_the_other() -> None:
    assert changes("serial", 6) == [{"encoders.0"}] * 2 + [{"encoders.1"}] * 2 + [{"head"}] * 2
    assert changes("serial", 2, ["head", "encoders"]) == [{"head"}, {"encoders.0", "encoders.1"}]


def test_mixed_training_is_serial_first_and_together_then() -> None:
    assert changes("mixed", 6) == [{"encoders.0"}, {"encoders.1"}, {"head"}, ALL, ALL, ALL]


def test_what_was_frozen_stays_frozen() -> None:
    model = net()
    model.encoders[0].requires_grad_(False)
    before = weights(model.encoders[0])
    train.fit(model, samples(32), epochs=6, regime="mixed")
    assert torch.equal(weights(model.encoders[0]), before)
    assert not any(p.requires_grad for p in model.encoders[0].parameters())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"regime": "parallel"}, "regime must be one of simultaneous, serial, mixed"),
        ({"regime": "serial", "epochs": 2}, "needs an epoch for each in its serial part, which has 2"),
        ({"regime": "mixed", "epochs": 5}, "which has 2 here"),
        ({"regime": "serial", "parts": ["tail"]}, "as encoders.0, encoders.1, head; got 'tail'"),
        ({"regime": "serial", "parts": ["dropout"]}, "'dropout' is frozen, or has none"),
        ({"epochs": 0}, "at least 1; got 0 and 32"),
        ({"patience": 2}, "needs validation"),
        ({"checkpoint_steps": 2}, "writings of the checkpoint: it needs one"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        train.fit(net(), samples(), **settings)


def test_there_must_be_samples() -> None:
    with pytest.raises(ValueError, match="at least one sample to learn from"):
        train.fit(net(), samples()[:0])
    with pytest.raises(TypeError, match=r"takes interfuse.data.Samples, .* got list"):
        train.fit(net(), [samples().inputs])
    with pytest.raises(ValueError, match="at least one; got"):
        train.retrieval_recall(torch.ones(0, 3), torch.ones(0, 3))


def test_a_loss_that_is_not_a_number_stops_the_training() -> None:
    given = samples()
    given.inputs[0][3] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss of epoch 0 is nan"):
        train.fit(net(), given, epochs=3)


# --- evaluation --------------------------------------------------------------------------------------------


def test_confusion_and_accuracy_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    taken = torch.tensor([0, 1, 1, 2, 2, 0])
    logits = nn.functional.one_hot(taken, 3).float()
    assert train.accuracy(logits, labels) == pytest.approx(4 / 6)
    assert train.confusion_matrix(logits, labels, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]
    with pytest.raises(ValueError, match="logits"):
        train.confusion_matrix(logits[None], labels, 3)


def test_evaluation_is_the_same_in_any_batch_and_leaves_the_modes() -> None:
    model, given = net(), samples(50)
    model.head.eval()
    whole, parts = train.evaluate(model, given), train.evaluate(model, given, batch=7)
    assert model.training
    assert not model.head.training
    assert whole.loss == pytest.approx(parts.loss)
    assert whole.confusion is not None
    assert torch.equal(whole.confusion, parts.confusion)
    assert int(whole.confusion.sum()) == 50
    text = whole.text()
    assert "taken for 1" in text
    assert f"accuracy {whole.accuracy:.1%}" in text


def test_retrieval_recall_by_hand() -> None:
    keys = torch.eye(4)
    queries = torch.tensor([[5.0, 1, 0, 0], [3, 2, 0, 0], [2, 3, 1, 0], [1, 1, 1, 1]])
    # The right key comes first, second, third, and among four that are equally near.
    assert train.retrieval_recall(queries, keys, (1, 2, 3, 4)) == {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}
    with pytest.raises(ValueError, match="two matrices of one shape"):
        train.retrieval_recall(queries, keys[:2])


def test_the_curve_is_a_picture(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the curve; it is not installed.")
    history = train.fit(net(), samples(), samples(20, 1), epochs=2)
    for name, given in (("one.png", history), ("two.png", {"a": history, "b": history})):
        assert train.plot(given, tmp_path / "new" / name) is None
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_sentence_says_so(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    reason = train.plot(train.History([]), tmp_path / "no.png")
    assert reason is not None
    assert "interfuse[bench]" in reason
