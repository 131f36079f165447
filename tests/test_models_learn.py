"""The models learn the tasks that need every modality, and no modality alone is any use there."""

from __future__ import annotations

import pathlib
import re
import tempfile
from typing import TYPE_CHECKING, Any

import pytest
import torch

from interfuse import data, models, train

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

pytestmark = pytest.mark.slow

TRAINING, HELD_OUT = 800, 200
VOCABULARY, EMBEDDING, FEATURES, HIDDEN = 32, 16, 8, 32
CHANNELS = (8, 16, 16)
WIDTH = 64
SMALL: dict[str, Any] = {"hidden": HIDDEN, "num_layers": 1, "channels": CHANNELS, "width": WIDTH}
TEXT = {"vocabulary": VOCABULARY, "embedding": EMBEDDING}

ENOUGH = 0.95
# Guessing among two gets half of the held-out samples right, give or take four standard deviations.
CHANCE = 0.5 + 4 * (0.25 / HELD_OUT) ** 0.5


def image_text() -> tuple[data.Samples, data.Samples]:
    return data.image_text(TRAINING + HELD_OUT, vocabulary=VOCABULARY, seed=1).split(TRAINING)


def video_audio() -> tuple[data.Samples, data.Samples]:
    return data.video_audio(300 + HELD_OUT, features=FEATURES, seed=1).split(300)


def three(metadata: bool = False) -> tuple[data.Samples, data.Samples]:
    made = data.image_text_audio(
        2 * TRAINING + HELD_OUT, vocabulary=VOCABULARY, features=FEATURES, metadata=metadata, seed=1
    )
    return made.split(2 * TRAINING)


def encoders() -> list[Any]:
    return [
        models.ConvEncoder((3, 24, 24), CHANNELS, WIDTH),
        models.SequenceEncoder(EMBEDDING, HIDDEN, 1, VOCABULARY),
    ]


def learn(
    make: Callable[[], nn.Module], both: tuple[data.Samples, data.Samples], **settings: Any
) -> tuple[nn.Module, float]:
    """The trained model and its accuracy on samples that it has not seen."""
    torch.manual_seed(0)
    model = make()
    train.fit(model, both[0], **{"epochs": 6, "learning_rate": 3e-3, **settings})
    found = train.evaluate(model, both[1])
    assert found.accuracy is not None
    return model, found.accuracy


LEARNERS: dict[str, Callable[[], nn.Module]] = {
    "early": lambda: models.image_text_fusion((3, 24, 24), 2, **TEXT, **SMALL),
    "attention": lambda: models.image_text_fusion((3, 24, 24), 2, **TEXT, **SMALL, fusion="attention"),
    "hierarchical": lambda: models.HierarchicalAttentionNetwork(encoders(), 2, 32),
    "transformer": lambda: models.CrossModalTransformer(encoders(), 2, 32, heads=2, depth=1),
}


ALONE: dict[str, Callable[[], nn.Module]] = {
    "image": lambda: models.cnn((3, 24, 24), 2, channels=CHANNELS, width=WIDTH),
    "text": lambda: models.rnn((None,), 2, **TEXT, hidden=HIDDEN, num_layers=1),
    "video": lambda: models.cnn3d((3, 22, 22, 22), 2, channels=CHANNELS, width=WIDTH),
    "audio": lambda: models.lstm((None, FEATURES), 2, hidden=HIDDEN, num_layers=1),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_image_and_text_together(name: str) -> None:
    assert learn(LEARNERS[name], image_text(), epochs=16)[1] >= ENOUGH


def test_video_and_audio_together() -> None:
    def make() -> nn.Module:
        return models.video_audio_fusion((3, 22, 22, 22), 2, audio_features=FEATURES, **SMALL)

    assert learn(make, video_audio(), batch=16)[1] >= ENOUGH


def test_three_modalities_together() -> None:
    def make() -> nn.Module:
        return models.TriModalFusion((3, 24, 24), 2, audio_features=FEATURES, positions=0, **TEXT, **SMALL)

    assert learn(make, three())[1] >= ENOUGH


def test_three_modalities_and_metadata_together() -> None:
    settings = {**SMALL, "width": 128}

    def make() -> nn.Module:
        return models.TriModalFusion((3, 24, 24), 2, audio_features=FEATURES, **TEXT, **settings)

    given = three(metadata=True)
    model, accuracy = learn(make, given, epochs=10, batch=16, learning_rate=1e-3)
    assert accuracy >= ENOUGH
    unseen = {name: value for name, value in given[1].named.items() if name != "semantics"}
    without = model.predict(*given[1].inputs, **unseen)
    assert train.accuracy(without, given[1].labels) <= CHANCE


@pytest.mark.parametrize(
    ("names", "make"),
    [
        *(((name,), ALONE[name]) for name in ("image", "text", "audio")),
        (("image", "text"), lambda: models.image_text_fusion((3, 24, 24), 2, **TEXT, **SMALL)),
    ],
)  # fmt: skip
def test_fewer_modalities_are_no_use(names: tuple[str, ...], make: Callable[[], nn.Module]) -> None:
    """Of three. A model of image and text is as lost without the audio as a model of one."""
    first, second = three()
    assert learn(make, (first.only(*names), second.only(*names)))[1] <= CHANCE


@pytest.mark.parametrize("name", ALONE)
def test_one_modality_of_two_is_no_use(name: str) -> None:
    of_image_text = name in ("image", "text")
    first, second = image_text() if of_image_text else video_audio()
    settings = {} if of_image_text else {"batch": 16}
    assert learn(ALONE[name], (first.only(name), second.only(name)), **settings)[1] <= CHANCE


def test_late_fusion_cannot_learn_what_needs_both() -> None:
    def make() -> nn.Module:
        return models.image_text_fusion((3, 24, 24), 2, **TEXT, **SMALL, fusion="late")

    assert learn(make, image_text())[1] <= CHANCE


def test_a_siamese_network_tells_and_finds_what_belongs_together() -> None:
    both = data.matching(TRAINING + HELD_OUT, kinds=2, vocabulary=VOCABULARY, seed=1).split(TRAINING)
    model, accuracy = learn(lambda: models.SiameseNetwork(encoders(), 32), both)
    assert accuracy >= ENOUGH
    (image, text), lengths = both[1].inputs, both[1].named["lengths"]
    same = both[1].labels == 1
    with torch.no_grad():
        asked = model.predict(image[same], text[same], lengths=lengths[same])
    assert float((asked.argmax(1) == 1).float().mean()) >= ENOUGH


@pytest.mark.parametrize("regime", ["serial", "mixed"])
def test_the_parts_may_learn_in_turn(regime: str) -> None:
    def make() -> nn.Module:
        return models.image_text_fusion((3, 24, 24), 2, **TEXT, **SMALL)

    assert learn(make, image_text(), epochs=12, regime=regime)[1] >= ENOUGH


def test_a_trained_image_encoder_helps_where_there_is_little_to_learn_from() -> None:
    """The encoder learned in one model, moved into another and frozen there."""
    first, _ = learn(LEARNERS["early"], image_text())
    few = image_text()[0].split(100)[0], image_text()[1]

    def make() -> nn.Module:
        model = LEARNERS["attention"]()
        models.transfer(first.encoders[0], model.encoders[0])
        models.transfer(first.encoders[1], model.encoders[1])
        models.freeze(model.encoders)
        return model

    assert learn(make, few, epochs=20)[1] >= ENOUGH
    assert learn(LEARNERS["attention"], few, epochs=20)[1] < ENOUGH


def test_captions_of_scenes() -> None:
    first, second = data.scenes(1000 + HELD_OUT, seed=1).split(1000)
    torch.manual_seed(0)
    model = models.MultimodalAutoencoder(
        (3, 32, 32), len(data.WORDS), embedding=EMBEDDING, hidden=64, channels=(16, 32, 32), width=WIDTH
    )

    def loss(model: Any, part: data.Samples) -> torch.Tensor:
        return model.loss(*part.inputs, part.labels)

    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
    train.fit(model, first, epochs=24, batch=16, optimizer=optimizer, scheduler=falling, loss=loss)
    for beams in (1, 3):
        written = model.generate(second.inputs[0], max_steps=second.labels.shape[1] - 1, beams=beams)
        assert float((written == second.labels).all(1).float().mean()) >= ENOUGH


def test_the_documents_examples_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path))
    text = (pathlib.Path(__file__).parent.parent / "docs/models.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 5
    exec("\n".join(examples), {})
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "curve.png"}
