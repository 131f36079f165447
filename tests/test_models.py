"""The documented models against their twins in plain torch: outputs, gradients, state_dicts, refusals."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tolerance import MODEL, MODEL_GRADIENT, error
from torch import Tensor, nn

import interfuse
from interfuse import models

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

CHANNELS = (4, 6, 8)
SMALL: dict[str, Any] = {"hidden": 12, "channels": CHANNELS, "width": 16}
BATCH = 3
LEAST = 1e-4  # of the whole gradient's norm: what a parameter's counts as, if it has less


def ids(steps: int = 7) -> Tensor:
    return torch.randint(1, 30, (BATCH, steps))


def image(size: int = 24) -> Tensor:
    return torch.randn(BATCH, 3, size, size)


def video() -> Tensor:
    return torch.randn(BATCH, 3, 22, 24, 23)


def audio(steps: int = 9) -> Tensor:
    return torch.randn(BATCH, steps, 5)


def lengths(most: int = 7) -> Tensor:
    return torch.tensor([most, 1, most // 2])


def encoders(layers: str) -> list[nn.Module]:
    return [
        models.ConvEncoder((3, 40, 40), CHANNELS, 16, layers),
        models.SequenceEncoder(6, 12, 2, 30, "gru", layers),
        models.SequenceEncoder(5, 12, 1, None, "rnn", layers),
    ]


@dataclass(frozen=True)
class Entry:
    make: Callable[[str], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    named: Callable[[], dict[str, Any]] = field(default=dict)


def text_model(layers: str, **settings: Any) -> nn.Module:
    return models.image_text_fusion(
        (3, 24, 24), 5, vocabulary=30, embedding=6, **SMALL, layers=layers, **settings
    )


def tri_modal(layers: str, **settings: Any) -> nn.Module:
    return models.TriModalFusion(
        (3, 24, 24), 5, vocabulary=30, embedding=6, audio_features=5, **SMALL, layers=layers, **settings
    )


def metadata() -> dict[str, Any]:
    return {
        "position": torch.randn(BATCH, 2),
        "semantics": torch.tensor([1, 0, 15]),
        "time": torch.tensor([0.0, 0.3, 0.9]),
        "lengths": (lengths(), None),
    }


def autoencoder(layers: str) -> nn.Module:
    return models.MultimodalAutoencoder((3, 24, 24), 30, embedding=6, num_layers=2, layers=layers, **SMALL)


ENTRIES = {
    "cnn": Entry(lambda at: models.cnn((3, 26, 22), 5, channels=CHANNELS, width=16, layers=at),
                 lambda: (torch.randn(BATCH, 3, 26, 22),)),
    "cnn3d": Entry(lambda at: models.cnn3d((3, 22, 24, 23), 5, channels=CHANNELS, width=16, layers=at),
                   lambda: (video(),)),
    "rnn": Entry(lambda at: models.rnn((None,), 5, vocabulary=30, embedding=6, hidden=12, layers=at),
                 lambda: (ids(),), lambda: {"lengths": lengths()}),
    "lstm": Entry(lambda at: models.lstm((None, 5), 5, hidden=12, layers=at), lambda: (audio(),),
                  lambda: {"lengths": lengths(9)}),
    "image_text_fusion": Entry(text_model, lambda: (image(), ids()), lambda: {"lengths": lengths()}),
    "image_text_late": Entry(lambda at: text_model(at, fusion="late"), lambda: (image(), ids())),
    "image_text_attention": Entry(lambda at: text_model(at, fusion="attention"), lambda: (image(), ids())),
    "video_audio_fusion": Entry(
        lambda at: models.video_audio_fusion((3, 22, 24, 23), 5, audio_features=5, **SMALL, layers=at),
        lambda: (video(), audio()), lambda: {"lengths": lengths(9)}),
    "three": Entry(lambda at: models.Fusion(encoders(at), 5, "early", 16, at),
                   lambda: (image(40), ids(), audio()), lambda: {"lengths": (lengths(), lengths(9))}),
    "siamese": Entry(lambda at: models.SiameseNetwork(encoders(at)[:2], 16, at), lambda: (image(40), ids())),
    "hierarchical": Entry(lambda at: models.HierarchicalAttentionNetwork(encoders(at), 5, 16, at),
                          lambda: (image(40), ids(), audio()), lambda: {"lengths": (lengths(), lengths(9))}),
    "transformer": Entry(lambda at: models.CrossModalTransformer(encoders(at), 5, 16, 2, 2, at),
                         lambda: (image(40), ids(), audio()), lambda: {"lengths": (lengths(), lengths(9))}),
    "tri_modal": Entry(tri_modal, lambda: (image(), ids(), audio()), metadata),
    "tri_modal_attention": Entry(lambda at: tri_modal(at, fusion="attention"),
                                 lambda: (image(), ids(), audio())),
    "autoencoder": Entry(autoencoder, lambda: (image(), ids()),
                         lambda: {"text": ids(5), "lengths": lengths(5)}),
    "captioner": Entry(autoencoder, lambda: (image(), ids())),
}  # fmt: skip


def in_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return tuple(map(in_double, value)) if isinstance(value, tuple) else value


def twins(entry: Entry) -> tuple[nn.Module, nn.Module]:
    """The model and its twin in torch, in float64, with the same weights."""
    torch.manual_seed(0)
    ours, theirs = entry.make("fused"), entry.make("torch").double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", ENTRIES)
def test_outputs_and_gradients_are_the_twins(name: str) -> None:
    entry = ENTRIES[name]
    ours, theirs = twins(entry)
    inputs, named = entry.inputs(), entry.named()
    y = ours(*inputs, **named)
    truth = theirs(*in_double(inputs), **{key: in_double(value) for key, value in named.items()})
    assert error(y, truth) < MODEL
    with torch.no_grad():
        assert error(ours(*inputs, **named), truth) < MODEL
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (truth * weight.double()).sum().backward()
    found, right = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert found.keys() == right.keys()
    whole = torch.cat([p.grad.flatten() for p in right.values() if p.grad is not None]).norm()
    for key, parameter in found.items():
        if right[key].grad is None:
            assert parameter.grad is None, key
            continue
        truth = right[key].grad
        # Some gradients are nothing but what cancelling terms leave: softmax does not see a key's bias.
        size = max(truth.norm(), LEAST * whole)
        assert (parameter.grad.double() - truth).norm() < MODEL_GRADIENT * size, key


@pytest.mark.parametrize("name", ["image_text_fusion", "transformer", "autoencoder"])
def test_state_dicts_move_both_ways(name: str) -> None:
    ours, theirs = twins(ENTRIES[name])
    again = ENTRIES[name].make("fused").double()
    again.load_state_dict(theirs.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key].to(value.dtype), value), key


def test_the_twin_is_made_of_torchs_own_modules_alone() -> None:
    for entry in ENTRIES.values():
        for module in entry.make("torch").modules():
            assert not type(module).__module__.startswith("interfuse.nn")


def test_optimize_makes_the_twin_as_fused_as_the_model() -> None:
    twin = interfuse.optimize(ENTRIES["image_text_fusion"].make("torch"))
    fused = {row.site for row in interfuse.explain(twin).rows if row.fused}
    assert {"encoders.0.blocks.0.0", "encoders.0.blocks.2.0", "encoders.1.recurrent.rnn"} <= fused


def test_optimised_models_are_saved_loaded_and_run_under_autocast(tmp_path: pathlib.Path) -> None:
    entry = ENTRIES["image_text_fusion"]
    plain, inputs = entry.make("torch").eval(), entry.inputs()
    model = interfuse.optimize(copy.deepcopy(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())

    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert len(interfuse.explain(again).fused) == len(interfuse.explain(model).fused) == 4
    with torch.no_grad():
        assert torch.equal(again(*inputs), model(*inputs))
        assert error(model(*inputs), plain(*inputs)) < MODEL
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = model(*inputs), plain(*inputs)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    # Either rounds what a dozen layers hand on, each time by up to 2^-8, in places of its own.
    assert error(ours.float(), theirs.float()) < 6 * 2.0**-8


def test_gradients_of_more_than_32_mib() -> None:
    """Whose memory malloc maps anew at every step."""
    ours, theirs = (models.cnn((3, 112, 112), 4, layers=layers) for layers in ("fused", "torch"))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 112, 112)
    for model in (ours, theirs):
        model(x).logsumexp(1).sum().backward()
    found, expected = (max(m.parameters(), key=Tensor.numel).grad for m in (ours, theirs))
    assert found.numel() * found.element_size() >= 32 * 2**20
    assert error(found, expected) < MODEL_GRADIENT


@pytest.mark.parametrize("name", ["rnn", "lstm", "three", "hierarchical", "transformer"])
def test_what_is_beyond_the_length_counts_for_nothing(name: str) -> None:
    entry = ENTRIES[name]
    ours, _ = twins(entry)
    inputs, named = entry.inputs(), entry.named()
    given = named["lengths"] if isinstance(named["lengths"], tuple) else (named["lengths"],)
    sequences = [x for x in inputs if x.dim() < 4]
    with torch.no_grad():
        before = ours(*inputs, **named)
        for x, n in zip(sequences, given, strict=True):
            x[torch.arange(x.shape[1]) >= n[:, None]] = 2 if x.dtype == torch.int64 else 1e3
        assert torch.equal(ours(*inputs, **named), before)


def test_predict_gives_probabilities_and_leaves_the_modes() -> None:
    model = text_model("fused").train()
    model.head.eval()
    inputs = (image(), ids())
    found = model.predict(*inputs, lengths=lengths())
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.softmax(model(*inputs, lengths=lengths()), -1))
    assert model.training
    assert not model.head.training


def test_the_smallest_inputs_work_and_smaller_ones_are_refused() -> None:
    assert models.smallest_size(3) == 22
    models.cnn((3, 22, 22), 5, channels=CHANNELS)(torch.randn(1, 3, 22, 22))
    models.cnn3d((3, 22, 22, 22), 5, channels=CHANNELS)(torch.randn(1, 3, 22, 22, 22))
    with pytest.raises(ValueError, match=re.escape("The smallest is (3, 22, 40).")):
        models.image_text_fusion((3, 21, 40), 5)
    with pytest.raises(ValueError, match=re.escape("The smallest is (3, 22, 112, 112).")):
        models.video_audio_fusion((3, 16, 112, 112), 5)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: models.cnn((3, 9, 64, 64), 5), "cnn takes an input_shape of 3 numbers"),
        (lambda: models.cnn3d((3, 64, 64), 5), "cnn3d takes an input_shape of 4 numbers"),
        (lambda: models.rnn((64, 40), 5), "there is lstm"),
        (lambda: models.lstm((64,), 5), "there is rnn"),
        (lambda: models.image_text_fusion((64,), 5), "the images' shape"),
        (lambda: models.video_audio_fusion((3, 64, 64), 5), "the videos' shape"),
        (lambda: text_model("fused", fusion="middle"), "fusion must be one of early, late, attention"),
        (lambda: text_model("keras"), 'layers must be "fused" or "torch"'),
        (lambda: text_model("fused", cell="mgu"), "cell must be one of rnn, lstm, gru"),
        (lambda: models.SiameseNetwork(encoders("fused")), "compares two inputs; got 3"),
        (lambda: models.CrossModalTransformer(encoders("fused")[:1], 5), "at least two encoders"),
        (lambda: models.CrossModalTransformer(encoders("fused"), 5, 30, 4), "a multiple of heads"),
        (lambda: models.ConvEncoder((24,)), "without the batch; got"),
        (lambda: models.cnn(24, 5), "3 numbers, channels first, without the batch; got 24"),
        (lambda: models.lstm("64", 5), "lstm takes feature vectors"),
        (lambda: models.cnn((3, 24, 24), 5, channels=()), "channels must name at least one block"),
        (lambda: models.cnn((-3, 24, 24), 5), "channels must be a whole number of at least 1; got -3"),
        (lambda: models.cnn((3, 24, 24), 0), "num_classes must be a whole number of at least 1; got 0"),
        (lambda: models.rnn((None,), 5, vocabulary=0), "vocabulary must be a whole number of at least 1"),
        (lambda: models.rnn((None,), 5.0), "num_classes must be a whole number of at least 1; got 5.0"),
        (lambda: models.Fusion(encoders("fused"), 5, width=0), "width must be a whole number of at least 1"),
        (lambda: text_model("fused")(image(40), ids()),
         "made for inputs of shape (batch, 3, 24, 24); got (3, 3, 40, 40)"),
        (lambda: text_model("fused")(ids(), image()), "of shape (batch, 3, 24, 24); got (3, 7)"),
        (lambda: text_model("fused")(image().movedim(1, -1), ids()), "got (3, 24, 24, 3)"),
        (lambda: text_model("fused")(image()), "takes 2 inputs, one for each modality; got 1"),
        (lambda: text_model("fused")(image(), ids(), lengths=(None, None)), "1 are, and 2 were given"),
        (lambda: encoders("fused")[0](image(40), lengths()), "an image or a video has none"),
        (lambda: tri_modal("fused", positions=0)(image(), ids(), audio(), time=torch.rand(3)), "positions=0"),
        (lambda: autoencoder("fused").generate(image(), beams=0), "beams and max_steps must be at least 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()


def test_lengths_are_tensors() -> None:
    with pytest.raises(TypeError, match=r"got \[7, 1, 3\]. torch.tensor\(...\) makes a tensor"):
        text_model("fused")(image(), ids(), lengths=[7, 1, 3])


def test_a_batch_of_none_has_no_captions() -> None:
    assert autoencoder("fused").generate(image()[:0], max_steps=4, beams=2).shape == (0, 2)


def test_explain_says_that_a_fused_model_is_fused() -> None:
    text = str(interfuse.explain(text_model("fused")))
    assert re.fullmatch(r"Fusion: nothing to replace; \d+ of its modules are interfuse's own", text)


def test_one_modality_twice_shares_one_encoder() -> None:
    encoder = models.SequenceEncoder(6, 12, 1, 30)
    model = models.SiameseNetwork([encoder, encoder], 16)
    x = ids()
    torch.testing.assert_close(model.embed(0, x), model.embed(1, x), rtol=0, atol=0)
    assert model.adapters[0] is model.adapters[1]


def test_hierarchical_weights_are_shares_of_what_is_there() -> None:
    entry = ENTRIES["hierarchical"]
    model, _ = twins(entry)
    within, across = model.weights(*entry.inputs(), **entry.named())
    assert [tuple(w.shape) for w in within] == [(BATCH, 9), (BATCH, 7), (BATCH, 9)]
    for weights in (*within, across):
        torch.testing.assert_close(weights.sum(1), torch.ones(BATCH))
    assert not within[1][torch.arange(7) >= lengths()[:, None]].any()


def test_metadata_near_the_ends_of_a_period_is_near() -> None:
    model = tri_modal("fused")
    inputs = (image(), ids(), audio())
    at = {t: model(*inputs, time=torch.full((BATCH,), t)) for t in (0.0, 0.999, 0.4)}
    assert error(at[0.999], at[0.0]) < error(at[0.4], at[0.0]) / 10


def test_late_fusion_adds_what_each_modality_says() -> None:
    """No pair of inputs can matter together: the mixed difference of two and two inputs is nothing."""
    model = text_model("fused", fusion="late").double()
    pictures, words = image().double(), ids()
    a, b = pictures[:1], pictures[1:2]
    c, d = words[:1], words[1:2]
    mixed = model(a, c) - model(a, d) - model(b, c) + model(b, d)
    torch.testing.assert_close(mixed, torch.zeros_like(mixed), rtol=0, atol=1e-12)


# --- transfer ----------------------------------------------------------------------------------------------


def test_an_image_encoder_moves_into_a_video_model() -> None:
    """A film of one picture gives, inside the first block, what the picture gave."""
    source = models.ConvEncoder((3, 24, 24), CHANNELS)
    target = models.ConvEncoder((3, 22, 24, 24), CHANNELS)
    done = models.transfer(source, target)
    assert done.inflated == [f"blocks.{i}.0.weight" for i in range(3)]
    assert done.copied[:3] == [f"blocks.{i}.0.bias" for i in range(3)]
    x = image()
    still = x.unsqueeze(2).expand(-1, -1, 22, -1, -1)
    theirs, ours = source.blocks(x), target.blocks(still)
    torch.testing.assert_close(ours, theirs.unsqueeze(2).expand_as(ours), rtol=1e-4, atol=1e-5)


def test_recurrent_layers_move_from_text_to_audio() -> None:
    source, target = models.SequenceEncoder(5, 12, 2, 30), models.SequenceEncoder(5, 12, 2)
    assert not models.transfer(source, target).left
    x = torch.randint(1, 30, (BATCH, 7))
    torch.testing.assert_close(target(source.recurrent.embedding(x)), source(x))
    wider = models.transfer(source, models.SequenceEncoder(9, 12, 2))
    assert list(wider.left) == ["recurrent.rnn.weight_ih_l0"]
    assert "(48, 5)" in wider.left["recurrent.rnn.weight_ih_l0"]


def test_a_transfer_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing of the source fits"):
        models.transfer(models.SequenceEncoder(5), models.ConvEncoder((3, 24, 24)))


def test_freeze_and_thaw() -> None:
    model = text_model("fused")
    models.freeze(model.encoders[0])
    model(image(), ids()).sum().backward()
    assert all(p.grad is None for p in model.encoders[0].parameters())
    assert all(p.grad is not None for p in model.encoders[1].parameters())
    models.thaw(model.encoders[0])
    model(image(), ids()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# --- captions ----------------------------------------------------------------------------------------------


def all_sentences(model: nn.Module, x: Tensor, steps: int, vocabulary: int) -> tuple[Tensor, float]:
    """The likeliest sentence of one image by trying them all, and its log probability."""
    from interfuse.models.autoencoder import END, PAD, START

    grid = torch.cartesian_prod(*[torch.arange(vocabulary)] * steps)
    ended = (grid == END).cumsum(1) - (grid == END).int() > 0
    grid = grid[((grid == PAD) | ~ended).all(1)]  # behind the end nothing but PAD
    whole = torch.cat([torch.full((len(grid), 1), START), grid], 1)
    likely = torch.log_softmax(model(x.expand(len(grid), -1, -1, -1), whole), -1)
    words = likely.gather(2, grid[..., None])[..., 0]
    after = (grid == END).cumsum(1) - (grid == END).int() > 0
    total = words.masked_fill(after, 0.0).sum(1)
    return whole[total.argmax()], float(total.max())


def test_a_beam_as_wide_as_all_sentences_finds_the_likeliest() -> None:
    torch.manual_seed(4)
    vocabulary, steps = 5, 3
    model = models.MultimodalAutoencoder((3, 24, 24), vocabulary, embedding=6, **SMALL)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)  # as made, all sentences are about equally likely
        for x in image().split(1):
            right, _ = all_sentences(model, x, steps, vocabulary)
            found = model.generate(x, max_steps=steps, beams=vocabulary**2)[0]
            padded = torch.nn.functional.pad(found, (0, steps + 1 - len(found)))
            assert torch.equal(padded, right)


def test_greedy_takes_the_likeliest_word_each_time_and_stops_at_the_end() -> None:
    from interfuse.models.autoencoder import END, START

    torch.manual_seed(0)
    model = autoencoder("fused")
    x, text = image(), ids()
    with torch.no_grad():
        found = model.generate(x, text, max_steps=6)
        logits = model(x, found, text)
    assert (found[:, 0] == START).all()
    for row, choice in zip(found[:, 1:], logits.argmax(2), strict=True):
        live = (row == END).cumsum(0) - (row == END).int() == 0
        assert torch.equal(row[live], choice[live])
        assert not row[~live].any()


@pytest.mark.parametrize("layers", ["fused", "torch"])
def test_the_loss_leaves_padding_out(layers: str) -> None:
    model = autoencoder(layers)
    x, caption = image(), torch.tensor([[1, 5, 6, 2], [1, 5, 2, 0], [1, 2, 0, 0]])
    logits = torch.log_softmax(model(x, caption), 2)
    target = caption[:, 1:]
    each = -logits.gather(2, target[..., None])[..., 0]
    right = each[target != 0].mean()
    loss = model.loss(x, caption)
    torch.testing.assert_close(loss, right)
    parameters = [p for p in model.parameters() if p is not model.no_text]
    found, wanted = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, right))
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
