"""What the models are built of: the same five layers in interfuse and in plain torch.

Every model takes `layers="fused"` or `layers="torch"`. Parameters have the same names and shapes either way,
so that a state_dict moves between a model and its twin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import interfuse.nn as fused
from interfuse.ops import linear_cross_entropy

if TYPE_CHECKING:
    from collections.abc import Sequence

CELLS = ("rnn", "lstm", "gru")


class Layers(Protocol):
    def conv(self, spatial: int, inputs: int, outputs: int) -> nn.Module:
        """A convolution of kernel 3, ReLU and max pooling of size 2, in 1, 2 or 3 dimensions."""

    def recurrent(self, cell: str, inputs: int, hidden: int, layers: int, ids: int | None) -> nn.Module:
        """Called with (batch, steps, inputs) or, where there is a vocabulary of `ids`, with (batch, steps) of
        them, `hx` and `lengths`; gives (y, state)."""

    def dense(self, inputs: Sequence[int], widths: Sequence[int], last: str | None = None) -> nn.Module:
        """Dense layers of these widths over all inputs together: ReLU between them, `last` (None, "relu" or
        "tanh") behind the last. Called with one tensor for each entry of `inputs`."""

    def attention(self, width: int, context: int, heads: int) -> nn.Module:
        """Called with (batch, n, width), (batch, m, context) `context_lengths`; gives the first's shape."""

    def attention_pool(self, width: int) -> nn.Module:
        """Called with (batch, steps, width), `lengths` and `return_weights`; gives (batch, width)."""

    def cross_entropy(self, linear: nn.Linear, x: Tensor, target: Tensor, ignored: int) -> Tensor:
        """The mean loss of linear(x), (..., classes), over the entries of `target` that are not `ignored`."""


class Fused:
    """The layers in interfuse's modules."""

    def conv(self, spatial: int, inputs: int, outputs: int) -> nn.Module:
        kind = (fused.ConvPool1d, fused.ConvPool2d, fused.ConvPool3d)[spatial - 1]
        return nn.Sequential(kind(inputs, outputs, 3, activation="relu", pool="max"))

    def recurrent(self, cell: str, inputs: int, hidden: int, layers: int, ids: int | None) -> nn.Module:
        if ids is None:
            kind: Any = {"rnn": fused.RNN, "lstm": fused.LSTM, "gru": fused.GRU}[cell]
            return FusedRecurrent(kind(inputs, hidden, layers, batch_first=True))
        kind = {"rnn": fused.EmbeddingRNN, "lstm": fused.EmbeddingLSTM, "gru": fused.EmbeddingGRU}[cell]
        return kind(ids, inputs, hidden, layers, batch_first=True)

    def dense(self, inputs: Sequence[int], widths: Sequence[int], last: str | None = None) -> nn.Module:
        chain = []
        for i, after in enumerate(widths):
            activation = "relu" if i + 1 < len(widths) else last
            before = inputs if i == 0 else widths[i - 1]
            chain.append(fused.FusionLinear(before, after, activation=activation))
        return FusedDense(fused.DenseChain(*chain))

    def attention(self, width: int, context: int, heads: int) -> nn.Module:
        return fused.CrossAttention(width, context, heads)

    def attention_pool(self, width: int) -> nn.Module:
        return fused.AttentionPool(width)

    def cross_entropy(self, linear: nn.Linear, x: Tensor, target: Tensor, ignored: int) -> Tensor:
        return linear_cross_entropy(
            x, linear.weight, target, linear_bias=linear.bias, ignore_index=ignored
        )


class Torch:
    """The layers in plain torch, of exactly torch's own modules, which optimize() recognises."""

    def conv(self, spatial: int, inputs: int, outputs: int) -> nn.Module:
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
        pool: Any = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[spatial - 1]
        return nn.Sequential(conv(inputs, outputs, 3), nn.ReLU(), pool(2))

    def recurrent(self, cell: str, inputs: int, hidden: int, layers: int, ids: int | None) -> nn.Module:
        kind: Any = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell]
        embedding = None if ids is None else nn.Embedding(ids, inputs)
        return TorchRecurrent(embedding, kind(inputs, hidden, layers, batch_first=True))

    def dense(self, inputs: Sequence[int], widths: Sequence[int], last: str | None = None) -> nn.Module:
        chain = nn.Sequential()
        for i, (before, after) in enumerate(zip((sum(inputs), *widths), widths, strict=False)):
            chain.add_module(str(i), nn.Linear(before, after))
            activation = "relu" if i + 1 < len(widths) else last
            if activation is not None:
                chain.add_module(f"activation{i}", {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]())
        return TorchDense(chain)

    def attention(self, width: int, context: int, heads: int) -> nn.Module:
        return TorchAttention(width, context, heads)

    def attention_pool(self, width: int) -> nn.Module:
        return TorchAttentionPool(width)

    def cross_entropy(self, linear: nn.Linear, x: Tensor, target: Tensor, ignored: int) -> Tensor:
        return F.cross_entropy(linear(x).flatten(0, -2), target.flatten(), ignore_index=ignored)


class FusedRecurrent(nn.Module):
    """A recurrent module under the name that it has beside an embedding."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, hx: Any = None, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        return self.rnn(x, hx, lengths)


class TorchRecurrent(nn.Module):
    """An optional embedding and a recurrent module; ragged sequences are packed."""

    def __init__(self, embedding: nn.Embedding | None, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.embedding, self.rnn = embedding, rnn

    def forward(self, x: Tensor, hx: Any = None, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        if self.embedding is not None:
            x = self.embedding(x)
        if lengths is None:
            return self.rnn(x, hx)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        y, state = self.rnn(packed, hx)
        y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])
        return y, state


class FusedDense(nn.Module):
    """A chain under the name that it has behind a concatenation."""

    def __init__(self, layers: fused.DenseChain) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layers(*inputs)


class TorchDense(nn.Module):
    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layers(inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1))


def _beyond(lengths: Tensor, steps: int) -> Tensor:
    """(batch, steps): which steps are padding."""
    return torch.arange(steps, device=lengths.device) >= lengths.unsqueeze(1)


class TorchAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(context, width)
        self.v_proj, self.out_proj = nn.Linear(context, width), nn.Linear(width, width)

    def forward(self, query: Tensor, context: Tensor, *, context_lengths: Tensor | None = None) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.q_proj(query), self.k_proj(context), self.v_proj(context))
        )
        mask = None if context_lengths is None else ~_beyond(context_lengths, k.shape[2])[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class TorchAttentionPool(nn.Module):
    """softmax(context . tanh(projection(x))) over the steps, and the sum of x with these weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, width)
        self.context = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.context, std=width**-0.5)

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, *, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        scores = torch.tanh(self.projection(x)) @ self.context
        if lengths is not None:
            scores = scores.masked_fill(_beyond(lengths, x.shape[1]), float("-inf"))
        weights = torch.softmax(scores, 1)
        pooled = (weights.unsqueeze(1) @ x).squeeze(1)
        return (pooled, weights) if return_weights else pooled


FUSED, TORCH = Fused(), Torch()


def chosen(layers: str | Layers) -> Layers:
    """The layers of this name; a Layers object is taken as it is."""
    if not isinstance(layers, str):
        return layers
    if layers not in ("fused", "torch"):
        raise ValueError(f'layers must be "fused" or "torch"; got {layers!r}.')
    return FUSED if layers == "fused" else TORCH
