"""Weights of Keras models: files that keras itself writes, and files as TensorFlow's Keras 2 wrote them."""

from __future__ import annotations

import io
import json
import os
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import interfuse
from interfuse import models
from interfuse.models.keras import KerasLayer, convert

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

pytestmark = [
    pytest.mark.filterwarnings("default"),  # keras's own
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
h5py = pytest.importorskip("h5py", reason="load_keras reads files with h5py; it is not installed.")

AGREE = 1e-5  # of probabilities and of values of about that size
DRAW = np.random.default_rng(0)
FIRST = DRAW.bit_generator.state  # of every test, whatever ran before it


def array(*shape: int) -> np.ndarray:
    return DRAW.normal(size=shape).astype(np.float32) * 0.3


@pytest.fixture(autouse=True)
def _drawn_anew() -> None:
    DRAW.bit_generator.state = FIRST


@pytest.fixture(scope="module")
def keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras", reason="keras writes the files; it is not installed.")


@pytest.fixture
def layers(keras: Any) -> Any:
    keras.backend.clear_session()  # names of layers start anew
    keras.utils.set_random_seed(0)
    return keras.layers


def drawn(theirs: Any) -> Any:
    """With weights that are not what a new model has: biases are zeros there, and variances ones."""
    for weights in theirs.weights:
        values = array(*weights.shape)
        weights.assign(np.abs(values) + 0.5 if "variance" in weights.name else values)
    return theirs


def difference(
    theirs: Any, path: pathlib.Path, ours: nn.Module, *inputs: np.ndarray, channels_last: bool = False
) -> float:
    """Between Keras's output and that of our model after load_keras; pictures have the channels last, and
    what else has them there is told."""
    theirs.save(path)
    models.load_keras(path, ours)
    right = theirs.predict(list(inputs) if len(inputs) > 1 else inputs[0], verbose=0)
    given = [torch.tensor(x) for x in inputs]
    given = [x.movedim(-1, 1).contiguous() if x.dim() > 3 or channels_last else x for x in given]
    with torch.no_grad():
        found = ours.predict(*given) if hasattr(ours, "predict") else ours.eval()(*given)
    assert found.shape == right.shape
    return float(abs(found.numpy() - right).max())


# --- the documented models ---------------------------------------------------------------------------------


def keras_image(L: Any, x: Any, spatial: int, channels: tuple[int, ...], width: int) -> Any:
    conv, pool = (L.Conv2D, L.MaxPooling2D) if spatial == 2 else (L.Conv3D, L.MaxPooling3D)
    for n in channels:
        x = pool(2)(conv(n, 3, activation="relu")(x))
    return L.Dense(width, activation="relu")(L.Flatten()(x))


def keras_sequence(L: Any, x: Any, cell: str, hidden: int) -> Any:
    layer = {"rnn": L.SimpleRNN, "lstm": L.LSTM, "gru": L.GRU}[cell]
    return layer(hidden)(layer(hidden, return_sequences=True)(x))


@pytest.mark.parametrize("ending", [".keras", ".h5"])
@pytest.mark.parametrize("name", ["cnn", "cnn3d", "rnn", "lstm"])
def test_the_documented_models_at_their_documented_sizes(
    name: str, ending: str, keras: Any, layers: Any, tmp_path: pathlib.Path
) -> None:
    L = layers
    if name in ("cnn", "cnn3d"):
        shape = (26, 22, 3) if name == "cnn" else (22, 23, 24, 3)
        given = keras.Input(shape)
        last = keras_image(L, given, len(shape) - 1, (32, 64, 128), 512)
        x = array(2, *shape)
        ours: nn.Module = getattr(models, name)((3, *shape[:-1]), 5)
    else:
        given = keras.Input((None,), dtype="int32") if name == "rnn" else keras.Input((None, 40))
        last = keras_sequence(L, L.Embedding(300, 64)(given) if name == "rnn" else given, "lstm", 128)
        x = DRAW.integers(0, 300, (2, 9)) if name == "rnn" else array(2, 9, 40)
        ours = models.rnn((None,), 5, vocabulary=300) if name == "rnn" else models.lstm((None, 40), 5)
    theirs = keras.Model(given, L.Dense(5, activation="softmax")(last))
    for bias in (weights for weights in theirs.weights if len(weights.shape) == 1):
        bias.assign(array(*bias.shape))
    assert difference(theirs, tmp_path / f"model{ending}", ours, x) < AGREE


SMALL: dict[str, Any] = {"hidden": 12, "channels": (4, 6, 8), "width": 16}


def fusion(spatial: int, cell: str, kind: str) -> nn.Module:
    if spatial == 2:
        return models.image_text_fusion(
            (3, 24, 26), 5, vocabulary=30, embedding=6, cell=cell, layers=kind, **SMALL
        )
    return models.video_audio_fusion((3, 22, 24, 23), 5, audio_features=5, cell=cell, layers=kind, **SMALL)


def keras_fusion(keras: Any, spatial: int, cell: str) -> tuple[Any, list[np.ndarray]]:
    L = keras.layers
    sizes = (24, 26) if spatial == 2 else (22, 24, 23)
    seen = keras.Input((*sizes, 3))
    read = keras.Input((None,), dtype="int32") if spatial == 2 else keras.Input((None, 5))
    embedded = L.Embedding(30, 6)(read) if spatial == 2 else read
    image = keras_image(L, seen, spatial, (4, 6, 8), 16)
    joined = L.Concatenate()([image, keras_sequence(L, embedded, cell, 12)])
    hidden = L.Dropout(0.4)(L.Dense(16, activation="relu")(joined))
    inputs = [array(2, *sizes, 3), DRAW.integers(0, 30, (2, 7)) if spatial == 2 else array(2, 7, 5)]
    return drawn(keras.Model([seen, read], L.Dense(5, activation="softmax")(hidden))), inputs


@pytest.mark.parametrize("ending", [".keras", ".h5"])
@pytest.mark.parametrize(
    ("spatial", "cell", "kind"),
    [
        (2, "lstm", "fused"),
        (2, "gru", "torch"),
        (2, "rnn", "fused"),
        (3, "lstm", "torch"),
        (3, "gru", "fused"),
    ],
)
def test_fusion_models(
    spatial: int, cell: str, kind: str, ending: str, keras: Any, layers: Any, tmp_path: pathlib.Path
) -> None:
    theirs, inputs = keras_fusion(keras, spatial, cell)
    assert difference(theirs, tmp_path / f"model{ending}", fusion(spatial, cell, kind), *inputs) < AGREE


# --- other models, in plain torch --------------------------------------------------------------------------


class Tagger(nn.Module):
    """Both directions over tokens, normalised, a label for each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.rnn = nn.GRU(6, 5, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(10, eps=1e-3)
        self.head = nn.Linear(10, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.softmax(self.head(self.norm(self.rnn(self.embedding(ids))[0])), -1)


class TwoPictures(nn.Module):
    """Flattened pictures of two sizes and numbers beside them, in one dense layer; no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, bias=False)
        self.other = nn.Conv2d(1, 5, 2, stride=2, bias=False)
        self.head = nn.Linear(4 * 6 * 5 + 2 + 5 * 3 * 4, 3, bias=False)

    def forward(self, a: Tensor, numbers: Tensor, b: Tensor) -> Tensor:
        a, b = torch.tanh(self.one(a)).flatten(1), self.other(b).flatten(1)
        return self.head(torch.cat([a, numbers, b], 1))


def mixed_up_cnn(L: Any) -> list[Any]:
    """As people write them: normalisation and activations apart, dropout, padding, depthwise, pools."""
    return [
        L.Conv2D(6, 3, padding="same", use_bias=False), L.BatchNormalization(), L.ReLU(), L.MaxPooling2D(),
        L.Dropout(0.2), L.DepthwiseConv2D(3, depth_multiplier=2, padding="same"),
        L.LeakyReLU(negative_slope=0.2),
        L.Conv2D(8, 1, strides=2, activation="swish"), L.Conv2D(8, 3, dilation_rate=2, groups=2),
        L.AveragePooling2D(2, padding="same"), L.Flatten(), L.BatchNormalization(epsilon=1e-5, scale=False),
        L.Dense(9, activation="gelu"), L.Dense(3),
    ]  # fmt: skip


def test_a_cnn_as_people_write_them(keras: Any, layers: Any, tmp_path: pathlib.Path) -> None:
    theirs = drawn(keras.Sequential([keras.Input((28, 32, 3)), *mixed_up_cnn(layers)]))
    for ending in (".keras", ".h5"):
        ours = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, eps=1e-3), nn.ReLU(),
            nn.MaxPool2d(2), nn.Dropout(0.2), nn.Conv2d(6, 12, 3, padding="same", groups=6),
            nn.LeakyReLU(0.2),
            nn.Conv2d(12, 8, 1, stride=2), nn.SiLU(), nn.Conv2d(8, 8, 3, dilation=2, groups=2),
            nn.AvgPool2d(2, ceil_mode=True), nn.Flatten(), nn.BatchNorm1d(32),
            nn.Linear(32, 9), nn.GELU(), nn.Linear(9, 3),
        )  # fmt: skip
        assert difference(theirs, tmp_path / f"model{ending}", ours, array(2, 28, 32, 3)) < AGREE
        interfuse.optimize(ours)  # and so it is still the same
        assert difference(theirs, tmp_path / f"model{ending}", ours, array(2, 28, 32, 3)) < AGREE


@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_both_directions(ending: str, keras: Any, layers: Any, tmp_path: pathlib.Path) -> None:
    L = layers
    given = keras.Input((None,), dtype="int32")
    both = L.Bidirectional(L.GRU(5, return_sequences=True))(L.Embedding(20, 6)(given))
    tags = L.TimeDistributed(L.Dense(4, activation="softmax"))(L.LayerNormalization()(both))
    theirs = drawn(keras.Model(given, tags))
    assert difference(theirs, tmp_path / f"m{ending}", Tagger(), DRAW.integers(0, 20, (3, 7))) < AGREE


def test_masked_padding_is_a_length(keras: Any, layers: Any, tmp_path: pathlib.Path) -> None:
    L = layers
    theirs = keras.Sequential([
        keras.Input((None,), dtype="int32"), L.Embedding(30, 6, mask_zero=True), L.LSTM(7),
        L.Dense(5, activation="softmax"),
    ])  # fmt: skip
    theirs.save(tmp_path / "m.keras")
    ours: Any = models.load_keras(tmp_path / "m.keras", ours_text())
    ids, lengths = DRAW.integers(1, 30, (3, 8)), torch.tensor([8, 2, 5])
    ids[np.arange(8) >= lengths.numpy()[:, None]] = 0
    found = ours.predict(torch.tensor(ids), lengths=lengths)
    assert abs(found.numpy() - theirs.predict(ids, verbose=0)).max() < AGREE


def test_pictures_flattened_into_one_layer(keras: Any, layers: Any, tmp_path: pathlib.Path) -> None:
    L = layers
    a, numbers, b = keras.Input((8, 7, 3)), keras.Input((2,)), keras.Input((6, 8, 1))
    one = L.Flatten()(L.Conv2D(4, 3, activation="tanh", use_bias=False)(a))
    other = L.Flatten()(L.Conv2D(5, 2, strides=2, use_bias=False)(b))
    joined = L.Dropout(0.1)(L.Concatenate()([one, numbers, other]))
    theirs = keras.Model([a, numbers, b], L.Dense(3, use_bias=False)(joined))
    inputs = (array(2, 8, 7, 3), array(2, 2), array(2, 6, 8, 1))
    for ending in (".keras", ".h5"):
        assert difference(theirs, tmp_path / f"m{ending}", TwoPictures(), *inputs) < AGREE


def test_nested_models_and_one_dimension(keras: Any, layers: Any, tmp_path: pathlib.Path) -> None:
    L = layers
    encoder = keras.Sequential(
        [L.Conv1D(4, 3, activation="relu"), L.MaxPooling1D(2), L.BatchNormalization()], name="encoder"
    )
    given = keras.Input((14, 5))
    inner = keras.Model(given, L.Flatten()(encoder(given)), name="inner")
    outer = keras.Input((14, 5))
    theirs = drawn(keras.Model(outer, L.Dense(3, activation="sigmoid")(inner(outer))))
    for ending in (".keras", ".h5"):
        ours = nn.Sequential(
            nn.Sequential(nn.Conv1d(5, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.BatchNorm1d(4, eps=1e-3)),
            nn.Flatten(), nn.Linear(24, 3), nn.Sigmoid(),
        )  # fmt: skip
        x = array(2, 14, 5)
        assert difference(theirs, tmp_path / f"m{ending}", ours, x, channels_last=True) < AGREE


# --- files of TensorFlow's Keras 2 -------------------------------------------------------------------------


def as_keras_2(node: Any) -> Any:
    """A config as Keras 2 wrote it: nodes as lists, older names, settings that Keras 3 has dropped."""
    if isinstance(node, list):
        return [as_keras_2(value) for value in node]
    if not isinstance(node, dict):
        return node
    if node.get("class_name") == "__keras_tensor__":
        return [*node["config"]["keras_history"], {}]
    made = {key: as_keras_2(value) for key, value in node.items() if key not in ("module", "registered_name")}
    if "inbound_nodes" in made:
        nodes = [one["args"] for one in made["inbound_nodes"]]
        made["inbound_nodes"] = [one[0] if isinstance(one[0][0], list) else one for one in nodes]
    if "batch_shape" in made:
        made["batch_input_shape"] = made.pop("batch_shape")
    if made.get("class_name") in ("LSTM", "GRU"):
        made["config"] |= {"time_major": False, "implementation": 2}
    if "dtype" in made:
        made["dtype"] = "float32"
    return made


def old_h5(theirs: Any, path: pathlib.Path) -> None:
    """The layout of Keras 2's .h5: bytes for names, "kernel:0", and long lists of names in parts."""
    with h5py.File(path, "w") as file:
        config = json.loads(theirs.to_json())
        file.attrs["model_config"] = json.dumps(as_keras_2(config)).encode()
        file.attrs["keras_version"], file.attrs["backend"] = b"2.4.0", b"tensorflow"
        group = file.create_group("model_weights")
        names = [layer.name.encode() for layer in theirs.layers]
        group.attrs["layer_names0"], group.attrs["layer_names1"] = names[:3], names[3:]
        for layer in theirs.layers:
            inner = group.create_group(layer.name)
            paths = [f"{w.path}:0" for w in layer.weights]
            half = len(paths) // 2
            if half:
                inner.attrs["weight_names0"] = [path.encode() for path in paths[:half]]
                inner.attrs["weight_names1"] = [path.encode() for path in paths[half:]]
            else:
                inner.attrs["weight_names"] = [path.encode() for path in paths]
            for name, weights in zip(paths, layer.get_weights(), strict=True):
                inner.create_dataset(name, data=weights)


def old_keras(theirs: Any, path: pathlib.Path) -> None:
    """The layout of the .keras files of 2.12 and 2.13, whose numbers of layers have gaps."""
    theirs.save(path)
    with zipfile.ZipFile(path) as archive:
        before = h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r")
    after = io.BytesIO()
    with h5py.File(after, "w") as file:
        groups = file.create_group("_layer_checkpoint_dependencies")
        for name in before["layers"]:
            stem, _, number = name.rpartition("_")
            place = 2 * int(number) if number.isdigit() else 0
            before.copy(f"layers/{name}", groups, f"{stem}_{place}" if place else name)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(as_keras_2(json.loads(theirs.to_json()))))
        archive.writestr("metadata.json", json.dumps({"keras_version": "2.13.1"}))
        archive.writestr("model.weights.h5", after.getvalue())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("write", [old_h5, old_keras])
def test_files_of_keras_2(
    write: Callable[[Any, Any], None], cell: str, keras: Any, layers: Any, tmp_path: pathlib.Path
) -> None:
    theirs, inputs = keras_fusion(keras, 2, cell)
    path = tmp_path / ("old.h5" if write is old_h5 else "old.keras")
    write(theirs, path)
    if cell == "lstm":
        with pytest.raises(Exception, match=r"time_major|deserialize"):  # hence not by keras
            keras.saving.load_model(path, compile=False)
    ours: Any = models.load_keras(path, fusion(2, cell, "fused"))
    seen, read = (torch.tensor(x) for x in inputs)
    found = ours.predict(seen.movedim(-1, 1), read)
    assert abs(found.numpy() - theirs.predict(inputs, verbose=0)).max() < AGREE


# --- what is refused ---------------------------------------------------------------------------------------


def text_model(L: Any, *middle: Any, last: str = "softmax") -> list[Any]:
    return [L.Embedding(30, 6), *middle, L.Dense(5, activation=last)]


def picture_model(L: Any, first: Any = None, pool: Any = None, hidden: str = "relu") -> list[Any]:
    pools = [pool or L.MaxPooling2D(2), L.MaxPooling2D(2)]
    convs = [first or L.Conv2D(4, 3, activation="relu"), L.Conv2D(6, 3, activation="relu")]
    return [convs[0], pools[0], convs[1], pools[1], L.Flatten(), L.Dense(16, activation=hidden), L.Dense(5)]


def ours_text(cell: str = "lstm") -> nn.Module:
    return models.rnn((None,), 5, vocabulary=30, embedding=6, hidden=7, num_layers=1, cell=cell)


def ours_picture() -> nn.Module:
    return models.cnn((3, 16, 16), 5, channels=(4, 6), width=16)


REFUSED: dict[str, tuple[Callable[[Any], list[Any]], Callable[[], nn.Module], str]] = {
    "cell": (lambda L: text_model(L, L.GRU(7)), ours_text, r"1 lstm layers|0 lstm layers \(none\)"),
    "reset_after": (lambda L: text_model(L, L.GRU(7, reset_after=False)), lambda: ours_text("gru"),
                    "gru has reset_after=False; encoder.recurrent.rnn computes True"),
    "gate": (lambda L: text_model(L, L.LSTM(7, recurrent_activation="hard_sigmoid")), ours_text,
             "recurrent_activation='hard_sigmoid'"),
    "backwards": (lambda L: text_model(L, L.LSTM(7, go_backwards=True)), ours_text, "go_backwards=True"),
    "directions": (lambda L: text_model(L, L.Bidirectional(L.LSTM(7))), ours_text, "directions=2"),
    "sum": (lambda L: text_model(L, L.Bidirectional(L.LSTM(7), merge_mode="sum")), ours_text, "'sum'"),
    "relu": (lambda L: text_model(L, L.SimpleRNN(7, activation="relu")), lambda: ours_text("rnn"),
             "activation='relu'; encoder.recurrent.rnn computes 'tanh'"),
    "size": (lambda L: text_model(L, L.LSTM(8)), ours_text, r"of shape \(32, 6\), where \(28, 6\) is wanted"),
    "mean": (lambda L: text_model(L, L.LSTM(7, return_sequences=True), L.GlobalAveragePooling1D()), ours_text,
             "is a GlobalAveragePooling1D, which this model does not compute"),
    "sigmoid": (lambda L: text_model(L, L.LSTM(7), last="sigmoid"), ours_text, "there is sigmoid; behind"),
    "unknown": (lambda L: [L.Conv2DTranspose(4, 3), *picture_model(L)], ours_picture,
                "is a Conv2DTranspose, whose weights"),
    "rescaling": (lambda L: [L.Rescaling(1 / 255), *picture_model(L)], ours_picture, "is a Rescaling, which"),
    "average": (lambda L: picture_model(L, pool=L.AveragePooling2D(2)), ours_picture,
                "relu, average pool of 2x2 by 2x2; behind .* relu, max pool of 2x2 by 2x2"),
    "same": (lambda L: picture_model(L, L.Conv2D(4, 3, padding="same", activation="relu")), ours_picture,
             "padding='same'; encoder.blocks.0.0 computes 'valid'"),
    "strides": (lambda L: picture_model(L, L.Conv2D(4, 3, strides=2, activation="relu"), L.MaxPooling2D(1)),
                ours_picture, r"strides=\(2, 2\)"),
    "tanh": (lambda L: picture_model(L, hidden="tanh"), ours_picture,
             "there is tanh; behind .* there is relu"),
    "linear": (lambda L: picture_model(L, L.Conv2D(4, 3)), ours_picture, "there is max pool"),
    "more": (lambda L: [L.Conv2D(3, 1, activation="relu"), *picture_model(L)], ours_picture,
             "has 3 conv layers"),
    "reshaped": (lambda L: [*picture_model(L)[:4], L.Reshape((-1,)), *picture_model(L)[5:]],
                 lambda: nn.Sequential(*ours_picture().encoder.children(), nn.Linear(16, 5)),
                 "a Reshape: what it makes of channels"),
    "no bias": (picture_model, lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)),
        "has a bias, and the module for it was made without one"),
    "softmax": (lambda L: picture_model(L, hidden="softmax"), ours_picture, "behind .* there is relu"),
    "epsilon": (lambda L: [L.Conv2D(4, 3), L.BatchNormalization()],
                lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
                "epsilon=0.001; 1 computes 1e-05"),
    "left": (lambda L: [L.Dense(4)], lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU()),
             "has nothing for 1.weight: its outputs would not be Keras's"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(
    name: str, keras: Any, layers: Any, tmp_path: pathlib.Path
) -> None:
    make, ours, sentence = REFUSED[name]
    made = make(layers)
    given = (
        keras.Input((None,), dtype="int32")
        if type(made[0]).__name__ == "Embedding"
        else keras.Input((16, 16, 3))
    )
    keras.Sequential([given, *made]).save(tmp_path / "it.keras")
    model = ours()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        models.load_keras(tmp_path / "it.keras", model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_files_that_are_no_models(keras: Any, layers: Any, tmp_path: pathlib.Path) -> None:
    theirs = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    theirs.save_weights(tmp_path / "only.weights.h5")
    (tmp_path / "text.keras").write_text("no model")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "a")

    @keras.saving.register_keras_serializable()
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x: Any) -> Any:
            return self.dense(x)

        def get_config(self) -> dict[str, Any]:
            return {}

    own = Own()
    own(np.zeros((1, 3), np.float32))
    own.save(tmp_path / "own.keras")
    for name, error, sentence in [
        ("only.weights.h5", ValueError, "holds weights and no model"),
        ("text.keras", ValueError, "neither a .keras nor an .h5 file"),
        ("other.zip", ValueError, "is no .keras file: config.json"),
        ("none.keras", FileNotFoundError, "There is no file"),
        ("own.keras", ValueError, "holds a Own, a class of its own"),
    ]:
        with pytest.raises(error, match=sentence):
            models.load_keras(tmp_path / name, nn.Linear(3, 2))


def test_two_pictures_of_unknown_size_are_refused() -> None:
    """As of an .h5 file of Keras 2, which does not tell the sizes."""
    layers = [
        KerasLayer("InputLayer", "in", config={"batch_input_shape": [None, 8, 8, 3]}),
        *(KerasLayer("Flatten", name, sources=("in",)) for name in ("a", "b")),
        KerasLayer("Concatenate", "both", sources=("a", "b")),
        KerasLayer("Dense", "it", [array(384, 2), array(2)], sources=("both",)),
    ]
    with pytest.raises(ValueError, match="reads 2 inputs whose sizes the file does not tell"):
        convert(layers, nn.Linear(384, 2))


def test_without_h5py_a_sentence_says_so(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match="load_keras reads files with h5py"):
        models.load_keras(tmp_path / "model.keras", nn.Linear(1, 1))
