"""Weights of Keras models: the layouts by hand, in NumPy as Keras computes, and with keras itself where it is
installed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tolerance import MODEL, error

from interfuse import models
from interfuse.models.keras import KerasLayer, convert

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

    from torch import nn

DRAW = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return DRAW.normal(size=shape).astype(np.float32) * 0.3


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# --- what Keras's layers compute ---------------------------------------------------------------------------


def conv_pool(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Conv2D with ReLU and MaxPooling2D on (batch, height, width, channels)."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
    y = np.maximum(np.einsum("bhwcij,ijco->bhwo", windows, kernel) + bias, 0)
    rows, columns = y.shape[1] // 2, y.shape[2] // 2
    y = y[:, : 2 * rows, : 2 * columns].reshape(len(y), rows, 2, columns, 2, -1)
    return y.max((2, 4))


def lstm(x: np.ndarray, kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """All of an LSTM's states; the gates are i, f, c, o."""
    h = c = np.zeros((len(x), recurrent.shape[0]))
    out = []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ kernel + h @ recurrent + bias, 4, 1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out, 1)


def gru(x: np.ndarray, kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """With reset_after; the gates are z, r, h, and the biases the input's and the state's."""
    h = np.zeros((len(x), recurrent.shape[0]))
    out = []
    for t in range(x.shape[1]):
        given = np.split(x[:, t] @ kernel + bias[0], 3, 1)
        kept = np.split(h @ recurrent + bias[1], 3, 1)
        z, r = sigmoid(given[0] + kept[0]), sigmoid(given[1] + kept[1])
        h = z * h + (1 - z) * np.tanh(given[2] + r * kept[2])
        out.append(h)
    return np.stack(out, 1)


def softmax(x: np.ndarray) -> np.ndarray:
    exp = np.exp(x - x.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def dense(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return x @ kernel + bias


def test_images_are_read_channels_last_and_flattened_row_by_row() -> None:
    weights = [(array(3, 3, 3, 4), array(4)), (array(3, 3, 4, 6), array(6))]
    hidden, classes = (array(3 * 5 * 6, 16), array(16)), (array(16, 5), array(5))
    x = array(2, 18, 26, 3)
    y = x
    for pair in weights:
        y = conv_pool(y, *pair)
    assert y.shape == (2, 3, 5, 6)
    y = softmax(dense(np.maximum(dense(y.reshape(2, -1), *hidden), 0), *classes))
    model = models.cnn((3, 18, 26), 5, channels=(4, 6), width=16)
    convs = [KerasLayer("Conv2D", f"conv{i}", pair) for i, pair in enumerate(weights)]
    convert([*convs, KerasLayer("Dense", "hidden", hidden), KerasLayer("Dense", "classes", classes)], model)
    assert error(model.predict(torch.tensor(x).permute(0, 3, 1, 2)), torch.tensor(y)) < MODEL


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("layers", ["fused", "torch"])
def test_gates_are_put_into_torchs_order(cell: str, layers: str) -> None:
    gates, bias = (4, (4 * 7,)) if cell == "lstm" else (3, (2, 3 * 7))
    stack = [(array(5, gates * 7), array(7, gates * 7), array(*bias)),
             (array(7, gates * 7), array(7, gates * 7), array(*bias))]  # fmt: skip
    classes = (array(7, 3), array(3))
    table = array(11, 5)
    ids = DRAW.integers(0, 11, (4, 6))
    y = table[ids]
    for weights in stack:
        y = {"lstm": lstm, "gru": gru}[cell](y, *weights)
    model = models.rnn((6,), 3, vocabulary=11, embedding=5, hidden=7, cell=cell, layers=layers)
    given = [KerasLayer(cell.upper(), f"{cell}{i}", weights) for i, weights in enumerate(stack)]
    convert(
        [KerasLayer("Embedding", "table", [table]), *given, KerasLayer("Dense", "classes", classes)], model
    )
    found = model.predict(torch.tensor(ids))
    assert error(found, torch.tensor(softmax(dense(y[:, -1], *classes)))) < MODEL


def a_layer(kind: str, *shapes: tuple[int, ...], **config: Any) -> KerasLayer:
    return KerasLayer(kind, "it", [array(*shape) for shape in shapes], config)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([a_layer("BatchNormalization", (3,))], "it is a BatchNormalization, whose weights have no place"),
        ([a_layer("LSTM", (5, 28), (7, 28), (28,))], r"1 lstm layers \(it\), and this one has 0 \(none\)"),
        ([a_layer("GRU", (5, 21), (7, 21), (21,), reset_after=False), a_layer("Dense", (7, 3), (3,))],
         "it has reset_after=False; the layers here compute True"),
        ([a_layer("GRU", (6, 21), (7, 21), (2, 21)), a_layer("Dense", (7, 3), (3,))],
         r"weights of shape \(21, 6\), where \(21, 5\) is wanted"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_is_changed(layers: list[KerasLayer], sentence: str) -> None:
    model = models.lstm((None, 5), 3, hidden=7, num_layers=1, cell="gru")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=sentence):
        convert(layers, model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


# --- keras itself ------------------------------------------------------------------------------------------


def keras_image(keras: Any, x: Any, spatial: int) -> Any:
    conv = keras.layers.Conv2D if spatial == 2 else keras.layers.Conv3D
    pool = keras.layers.MaxPooling2D if spatial == 2 else keras.layers.MaxPooling3D
    for channels in (4, 6, 8):
        x = pool(2)(conv(channels, 3, activation="relu")(x))
    return keras.layers.Dense(16, activation="relu")(keras.layers.Flatten()(x))


def keras_sequence(keras: Any, x: Any, cell: str) -> Any:
    layer = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU}[cell]
    return layer(12)(layer(12, return_sequences=True)(x))


def keras_fusion(keras: Any, spatial: int, cell: str) -> Any:
    sizes = (24, 26) if spatial == 2 else (22, 24, 23)
    seen = keras.Input((*sizes, 3))
    read = keras.Input((None,), dtype="int32") if spatial == 2 else keras.Input((None, 5))
    embedded = keras.layers.Embedding(30, 6)(read) if spatial == 2 else read
    joined = keras.layers.Concatenate()(
        [keras_image(keras, seen, spatial), keras_sequence(keras, embedded, cell)]
    )
    hidden = keras.layers.Dense(16, activation="relu")(joined)
    return keras.Model([seen, read], keras.layers.Dense(5, activation="softmax")(hidden))


SMALL: dict[str, Any] = {"hidden": 12, "channels": (4, 6, 8), "width": 16}
OURS: dict[int, Callable[[str], nn.Module]] = {
    2: lambda cell: models.image_text_fusion((3, 24, 26), 5, vocabulary=30, embedding=6, cell=cell, **SMALL),
    3: lambda cell: models.video_audio_fusion((3, 22, 24, 23), 5, audio_features=5, cell=cell, **SMALL),
}


@pytest.mark.filterwarnings("default")  # keras's own
@pytest.mark.parametrize("ending", [".keras", ".h5"])
@pytest.mark.parametrize(("spatial", "cell"), [(2, "lstm"), (2, "gru"), (3, "lstm")])
def test_predictions_are_those_of_keras(
    spatial: int, cell: str, ending: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "KERAS_BACKEND" not in os.environ:
        monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="keras reads its own files; it is not installed.")
    theirs = keras_fusion(keras, spatial, cell)
    for weights in theirs.weights:  # biases too, which start as zeros
        weights.assign(array(*weights.shape))
    theirs.save(tmp_path / f"model{ending}")
    model = models.load_keras(tmp_path / f"model{ending}", OURS[spatial](cell))
    seen = array(2, 24, 26, 3) if spatial == 2 else array(2, 22, 24, 23, 3)
    read = DRAW.integers(0, 30, (2, 7)) if spatial == 2 else array(2, 7, 5)
    right = theirs.predict([seen, read], verbose=0)
    found = model.predict(torch.tensor(seen).movedim(-1, 1), torch.tensor(read))
    assert abs(found.numpy() - right).max() < 1e-5


def test_without_keras_a_sentence_says_so(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "keras", None)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    with pytest.raises(ImportError, match="load_keras reads files with keras"):
        models.load_keras(tmp_path / "model.keras", OURS[2]("lstm"))
