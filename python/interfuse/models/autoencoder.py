"""Image and text to one joint code, and from the code to words: captioning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from interfuse.models.cnn import CHANNELS, ConvEncoder
from interfuse.models.layers import Layers, chosen
from interfuse.models.recurrent import SequenceEncoder

if TYPE_CHECKING:
    from collections.abc import Sequence

PAD, START, END = 0, 1, 2  # the first three token ids


class MultimodalAutoencoder(nn.Module):
    """An image encoder, a text encoder, a joint encoder, and a decoder that writes words.

    The text (a question, a beginning, the caption itself) may be left out: a learned vector stands for it.
    Sentences are token ids that start with START, end with END and are filled up with PAD.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        vocabulary: int,
        *,
        embedding: int = 64,
        hidden: int = 128,
        num_layers: int = 1,
        channels: Sequence[int] = CHANNELS,
        width: int = 512,
        layers: str | Layers = "fused",
    ) -> None:
        super().__init__()
        made = chosen(layers)
        self._layers = made
        self.vocabulary, self.hidden, self.num_layers = vocabulary, hidden, num_layers
        self.image_encoder = ConvEncoder(image_shape, channels, width, layers)
        self.text_encoder = SequenceEncoder(embedding, hidden, num_layers, vocabulary, layers=layers)
        self.no_text = nn.Parameter(torch.zeros(hidden))
        self.joint_encoder = made.dense([width, hidden], [width, 2 * num_layers * hidden], "tanh")
        self.decoder = made.recurrent("lstm", embedding, hidden, num_layers, vocabulary)
        # Every word sees the code itself too: what the recurrent layers forget of it, or never read.
        self.mix = made.dense([hidden, 2 * num_layers * hidden], [hidden], "relu")
        self.words = nn.Linear(hidden, vocabulary)

    def encode(self, image: Tensor, text: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """The joint code (batch, 2 * num_layers * hidden), from which the decoder starts."""
        seen = self.image_encoder(image)
        if text is None:
            read = self.no_text.expand(image.shape[0], -1)
        else:
            read = self.text_encoder(text, lengths)
        return self.joint_encoder(seen, read)

    def forward(
        self,
        image: Tensor,
        sentence: Tensor,
        text: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Teacher forcing: logits (batch, steps - 1, vocabulary) of every word of the sentence (batch, steps)
        but the first, from those before it. `text` and its `lengths` are the encoder's."""
        return self.words(self._decoded(image, sentence, text, lengths))

    def loss(
        self,
        image: Tensor,
        sentence: Tensor,
        text: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """The cross-entropy of each word, PAD left out, with teacher forcing. The logits are never kept."""
        decoded = self._decoded(image, sentence, text, lengths)
        return self._layers.cross_entropy(self.words, decoded, sentence[:, 1:], PAD)

    @torch.no_grad()
    def generate(
        self,
        image: Tensor,
        text: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        max_steps: int = 32,
        beams: int = 1,
    ) -> Tensor:
        """Sentences (batch, steps): with one beam the likeliest word each time (greedy), with more the
        sentence of the highest probability among so many that are followed."""
        if beams < 1 or max_steps < 1:
            raise ValueError(f"beams and max_steps must be at least 1; got {beams} and {max_steps}.")
        batch = image.shape[0]
        code = self.encode(image, text, lengths).repeat_interleave(beams, 0)
        state = self._state(code)
        written = torch.full((batch * beams, 1), START, device=image.device)
        # All beams of an image are alike at first: only the first one counts.
        scores = torch.full((batch, beams), float("-inf"), device=image.device, dtype=state[0].dtype)
        scores[:, 0] = 0.0
        first_row = torch.arange(batch, device=image.device).unsqueeze(1) * beams
        finished = torch.zeros(batch * beams, dtype=torch.bool, device=image.device)
        after_end = torch.full((self.vocabulary,), float("-inf"), device=image.device, dtype=scores.dtype)
        after_end[PAD] = 0.0  # a finished sentence goes on with PAD, at no cost
        for _ in range(max_steps):
            y, state = self.decoder(written[:, -1:], state)
            likely = torch.log_softmax(self.words(self.mix(y[:, 0], code)), -1)
            likely = torch.where(finished.unsqueeze(1), after_end, likely)
            total = scores.unsqueeze(2) + likely.view(batch, beams, self.vocabulary)
            scores, best = total.flatten(1).topk(beams, 1)
            rows = (first_row + best // self.vocabulary).flatten()
            word = (best % self.vocabulary).flatten()
            written = torch.cat([written[rows], word.unsqueeze(1)], 1)
            finished = finished[rows] | (word == END)
            state = tuple(t[:, rows] for t in state)
            if bool(finished.all()):
                break
        return written.view(batch, beams, written.shape[1])[:, 0]

    def _decoded(
        self, image: Tensor, sentence: Tensor, text: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        """(batch, steps - 1, hidden): what the words are chosen from."""
        code = self.encode(image, text, lengths)
        y, _ = self.decoder(sentence[:, :-1], self._state(code))
        return self.mix(y, code.unsqueeze(1).expand(-1, y.shape[1], -1))

    def _state(self, code: Tensor) -> tuple[Tensor, ...]:
        h, c = code.view(-1, 2, self.num_layers, self.hidden).permute(1, 2, 0, 3).contiguous()
        return h, c
