"""Text and other sequences: recurrent layers over token ids or feature vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interfuse.models.classifier import Classifier, Encoder, check_sizes, is_shape, with_head
from interfuse.models.layers import CELLS, Layers, chosen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class SequenceEncoder(Encoder):
    """Recurrent layers over feature vectors of `inputs` elements or, with a `vocabulary`, over token ids
    embedded in so many. forward gives the last layer's last state; `tokens` all of its states."""

    is_sequence = True

    def __init__(
        self,
        inputs: int,
        hidden: int = 128,
        num_layers: int = 2,
        vocabulary: int | None = None,
        cell: str = "lstm",
        layers: str | Layers = "fused",
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}; got {cell!r}.")
        check_sizes(inputs=inputs, hidden=hidden, num_layers=num_layers, vocabulary=vocabulary)
        self.cell, self.width, self.token_width = cell, hidden, hidden
        self.recurrent = chosen(layers).recurrent(cell, inputs, hidden, num_layers, vocabulary)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        _, state = self.recurrent(x, lengths=lengths)
        return (state[0] if self.cell == "lstm" else state)[-1]

    def tokens(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(batch, steps, token_width); zero beyond a sequence's length."""
        return self.recurrent(x, lengths=lengths)[0]


def rnn(
    input_shape: Sequence[int | None],
    num_classes: int,
    *,
    vocabulary: int = 10_000,
    embedding: int = 64,
    hidden: int = 128,
    num_layers: int = 2,
    cell: str = "lstm",
    layers: str | Layers = "fused",
) -> Classifier:
    """Token ids (steps,): an embedding, recurrent layers, the classes. Any number of steps will do."""
    if not is_shape(input_shape, 1):
        raise ValueError(
            "rnn takes token ids, an input_shape of (steps,) without the batch (None: any number); for "
            f"feature vectors (steps, features) there is lstm. Got {input_shape!r}."
        )
    encoder = SequenceEncoder(embedding, hidden, num_layers, vocabulary, cell, layers)
    return with_head(encoder, num_classes, layers)


def lstm(
    input_shape: Sequence[int | None],
    num_classes: int,
    *,
    hidden: int = 128,
    num_layers: int = 2,
    cell: str = "lstm",
    layers: str | Layers = "fused",
) -> Classifier:
    """Feature vectors (steps, features), as of audio: recurrent layers, the classes."""
    if not is_shape(input_shape, 2) or input_shape[1] is None:
        raise ValueError(
            "lstm takes feature vectors, an input_shape of (steps, features) without the batch (steps None: "
            f"any number); for token ids (steps,) there is rnn. Got {input_shape!r}."
        )
    encoder = SequenceEncoder(input_shape[1], hidden, num_layers, None, cell, layers)
    return with_head(encoder, num_classes, layers)
