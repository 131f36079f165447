"""What all classifiers share: logits from forward, probabilities from predict, encoders and their lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interfuse.models.layers import Layers, chosen

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# One tensor where one modality is a sequence, else one for each that is, in the modalities' order.
Lengths = Tensor | tuple[Tensor | None, ...] | list[Tensor | None] | None


class Encoder(nn.Module):
    """One modality's: forward gives (batch, width) features, `tokens` (batch, steps, token_width)."""

    width: int
    token_width: int
    is_sequence: bool

    def tokens(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class Predicting(nn.Module):
    """A model whose forward gives logits, for losses to take."""

    def predict(self, *inputs: Any, **named: Any) -> Tensor:
        """The probabilities: softmax of the logits, in evaluation mode and without gradients."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                return torch.softmax(self(*inputs, **named), -1)
        finally:
            for module, mode in modes:
                module.training = mode


class Classifier(Predicting):
    """One modality: an encoder and a dense head."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, lengths))


def with_head(encoder: Encoder, num_classes: int, layers: str | Layers) -> Classifier:
    """The encoder with a dense layer of the classes behind it."""
    check_sizes(num_classes=num_classes)
    return Classifier(encoder, chosen(layers).dense([encoder.width], [num_classes]))


def check_sizes(**sizes: int | None) -> None:
    """That each is a number of at least 1; None where there is no such thing."""
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"{name} must be a whole number of at least 1; got {size!r}.")


def is_shape(shape: object, dimensions: int) -> bool:
    return isinstance(shape, (tuple, list)) and len(shape) == dimensions


def lengths_of(encoders: Iterable[Any], lengths: Lengths) -> list[Tensor | None]:
    """Each encoder's lengths; None for those of no sequence."""
    sequences = [encoder.is_sequence for encoder in encoders]
    if lengths is None:
        return [None] * len(sequences)
    given = [lengths] if isinstance(lengths, Tensor) else lengths
    if not isinstance(given, (tuple, list)) or not all(n is None or isinstance(n, Tensor) for n in given):
        raise TypeError(
            "lengths must be one tensor, or a tuple of one for each modality that is a sequence; got "
            f"{lengths!r}. torch.tensor(...) makes a tensor of a list."
        )
    if len(given) != sum(sequences):
        raise ValueError(
            f"lengths must be one tensor for each modality that is a sequence; of {len(sequences)} "
            f"modalities {sum(sequences)} are, and {len(given)} were given."
        )
    left = iter(given)
    return [next(left) if is_sequence else None for is_sequence in sequences]


def check_count(encoders: nn.ModuleList, inputs: Sequence[Tensor]) -> None:
    if len(encoders) != len(inputs):
        raise ValueError(
            f"this model takes {len(encoders)} inputs, one for each modality; got {len(inputs)}."
        )


def features_of(encoders: nn.ModuleList, inputs: Sequence[Tensor], lengths: Lengths) -> list[Tensor]:
    """Each input's features."""
    check_count(encoders, inputs)
    each = zip(encoders, inputs, lengths_of(encoders, lengths), strict=True)
    return [encoder(x, n) for encoder, x, n in each]


def tokens_of(
    encoders: nn.ModuleList, inputs: Sequence[Tensor], lengths: Lengths
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each input's tokens, and how many of them are real (None: all)."""
    check_count(encoders, inputs)
    each = lengths_of(encoders, lengths)
    modules: list[Any] = list(encoders)
    return [module.tokens(x, n) for module, x, n in zip(modules, inputs, each, strict=True)], each
