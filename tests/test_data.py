"""Generated data: the same for the same seed, undecidable without every modality, and as they say."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest
import torch

from interfuse import data
from interfuse.data import parts, tasks

if TYPE_CHECKING:
    from collections.abc import Callable

MAKERS: dict[str, Callable[..., data.Samples]] = {
    "image_text": data.image_text,
    "video_audio": data.video_audio,
    "image_text_audio": data.image_text_audio,
    "metadata": lambda n, **given: data.image_text_audio(n, metadata=True, **given),
    "matching": data.matching,
    "scenes": data.scenes,
}


def tensors(samples: data.Samples) -> list[torch.Tensor]:
    named = [t for value in samples.named.values() for t in (value if isinstance(value, tuple) else (value,))]
    return [*samples.inputs, samples.labels, *named]


@pytest.mark.parametrize("name", MAKERS)
def test_the_seed_decides_everything_and_nothing_else_does(name: str) -> None:
    torch.manual_seed(1)
    first = tensors(MAKERS[name](5, seed=3))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other = tensors(MAKERS[name](5, seed=3)), tensors(MAKERS[name](5, seed=4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("name", ["image_text", "video_audio", "image_text_audio", "metadata"])
def test_no_modality_tells_anything_about_the_label(
    name: str, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers that the modalities show, in place of what shows them: of any set that leaves one out, each
    label is as frequent under every value as it is over all."""
    shown: list[torch.Tensor] = []

    def watched(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(kind: torch.Tensor, *args: Any, **named: Any) -> Any:
            shown.append(kind)
            return make(kind, *args, **named)

        return made

    for part in ("pictures", "sentences", "sounds", "films"):
        monkeypatch.setattr(parts, part, watched(getattr(parts, part)))
    count = 6000
    small = {} if name in ("image_text", "image_text_audio", "metadata") else {"frames": 1}
    samples = MAKERS[name](count, classes=classes, size=1, **small)
    if name == "metadata":
        category = samples.named["semantics"]
        assert isinstance(category, torch.Tensor)
        shown.append(category)
    assert torch.equal(torch.stack(shown).sum(0) % classes, samples.labels)
    for known in combinations(shown, len(shown) - 1):
        for value in torch.cartesian_prod(*[torch.arange(classes)] * len(known)).view(-1, len(known)):
            rows = (torch.stack(known, 1) == value).all(1)
            share = torch.bincount(samples.labels[rows], minlength=classes) / rows.sum()
            # Four standard deviations of a share of so many draws.
            assert (share - 1 / classes).abs().max() < 4 * (0.25 / float(rows.sum())) ** 0.5


def test_sentences_hold_a_word_of_their_kind_and_of_no_other() -> None:
    kind = torch.arange(3).repeat(50)
    ids, lengths = parts.sentences(kind, 3, 9, 20, torch.Generator().manual_seed(0))
    assert lengths.min() >= 1
    assert lengths.max() <= 9
    real = torch.arange(9) < lengths[:, None]
    assert not ids[~real].any()
    assert ids[real].min() >= 1
    for i in range(3):
        words = ((ids - 1) // parts.WORDS_A_KIND == i) & real & (ids > 0)
        assert torch.equal(words.any(1), kind == i)


def test_a_film_shows_its_kind_only_while_it_moves() -> None:
    kinds = torch.arange(4)
    film = parts.films(kinds, parts.FRAMES_A_TURN + 1, 10, torch.Generator().manual_seed(0), noise=0.0)
    for i, (step, axis) in enumerate([(1, 2), (-1, 2), (1, 1), (-1, 1)]):
        before, after = film[i, :, 0], film[i, :, 1]
        inner = (slice(None), slice(1, -1), slice(1, -1))
        along, against = ((after - before.roll(step * way, axis))[inner].norm() for way in (1, -1))
        assert along < against / 2
    torch.testing.assert_close(film[:, :, 0], film[:, :, parts.FRAMES_A_TURN], rtol=0, atol=1e-4)
    assert film[:2].std(3).max() < 1e-5  # the same along every column: across is the only direction
    assert film[2:].std(4).max() < 1e-5


def test_only_keeps_the_inputs_asked_for_and_their_lengths() -> None:
    samples = data.image_text_audio(4)
    text, audio = samples.named["lengths"]
    assert samples.only("image").named == {}
    assert torch.equal(samples.only("audio").named["lengths"], audio)
    assert torch.equal(samples.only("image", "text").named["lengths"], text)
    both = samples.only("audio", "text")
    assert both.inputs[0] is samples.inputs[2]
    assert both.named["lengths"] == (audio, text)
    with pytest.raises(ValueError, match="there are the inputs image, text, audio; got smell"):
        samples.only("smell")


def test_rows_of_samples_are_rows_of_everything_in_them() -> None:
    samples = data.image_text_audio(6, metadata=True)
    first, rest = samples.split(2)
    assert (len(first), len(rest)) == (2, 4)
    for whole, part in zip(tensors(samples), tensors(rest), strict=True):
        assert torch.equal(whole[2:], part)
    with pytest.raises(ValueError, match="at least one on each side; got 6"):
        samples.split(6)


def test_captions_say_what_is_drawn() -> None:
    samples = data.scenes(60, noise=0.0)
    for image, ids in zip(samples.inputs[0], samples.labels, strict=True):
        words = data.sentence(ids).split()
        assert words[0] == words[4] == "a"
        first, second = image.split(16, 2 if words[3] == "beside" else 1)
        for half, colour, shape in ((first, *words[1:3]), (second, *words[5:7])):
            channel = ["red", "green", "blue"].index(colour)
            assert half.flatten(1).sum(1).argmax() == channel
            drawn = half[channel] > 0
            rows, columns = int(drawn.any(1).sum()), int(drawn.any(0).sum())
            assert (rows < columns) == (shape == "bar")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: data.image_text(0), "samples must be at least 1"),
        (lambda: data.image_text(5, classes=tasks.MOST + 1), "classes must be from 2 to 4"),
        (lambda: data.image_text(5, vocabulary=7), "a vocabulary of more than 7; got 7"),
        (lambda: data.video_audio(5, classes=4, features=3), "at least as many features; got 3"),
        (lambda: data.scenes(5, size=8), "a size of 16"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
