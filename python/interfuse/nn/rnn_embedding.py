"""EmbeddingRNN, EmbeddingLSTM and EmbeddingGRU: token ids in, recurrent layers over their embeddings out.

The rows of the table are gathered inside the kernel: the embedded sequence is never written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from interfuse.nn.rnn import GRU, LSTM, RNN, Sequence, rounding_of, run_module

if TYPE_CHECKING:
    from typing_extensions import Self

    from interfuse.ops._rnn_checks import State


def why_not_embedding(embedding: nn.Module) -> str | None:
    """Why the table of this module cannot be read inside the kernel, or None."""
    if type(embedding) is not nn.Embedding:
        kind = f"{type(embedding).__module__}.{type(embedding).__qualname__}"
        return f"the embedding must be a torch.nn.Embedding and no subclass; got {kind}."
    if embedding.max_norm is not None:
        return f"max_norm writes to the table in every forward; got an embedding with {embedding.max_norm}."
    if embedding.sparse:
        return "the table's gradient is dense; got an embedding with sparse=True."
    if embedding.scale_grad_by_freq:
        return "the table's gradient is not scaled; got an embedding with scale_grad_by_freq=True."
    return None


class _EmbeddingRecurrent(nn.Module):
    """Shared by the three: holds a torch.nn.Embedding, `embedding`, and a recurrent module, `rnn`."""

    _rnn_type: ClassVar[Any]

    embedding: nn.Embedding
    rnn: Any

    def __init__(self, embedding: nn.Embedding, rnn: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.rnn = rnn

    @classmethod
    def from_torch(cls, embedding: nn.Module, rnn: nn.Module) -> Self:
        """The two in one, sharing their Parameters. rnn is torch's module or interfuse's."""
        reason = why_not_embedding(embedding)
        if reason is not None:
            raise ValueError(f"{cls.__name__}: {reason}")
        recurrent = cls._rnn_type.from_torch(rnn)
        if embedding.embedding_dim != recurrent.input_size:
            raise ValueError(
                f"{cls.__name__}: the embedding's rows have {embedding.embedding_dim} elements, but the "
                f"recurrent layers take {recurrent.input_size}."
            )
        made = cls.__new__(cls)
        _EmbeddingRecurrent.__init__(made, embedding, recurrent)  # type: ignore[arg-type]
        return made.train(rnn.training)

    def forward(
        self,
        input: Sequence,  # noqa: A002
        hx: State | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Sequence, State]:
        """input: int64 ids (steps, batch), with batch_first (batch, steps), (steps,) or packed."""
        embedding = self.embedding
        reason = why_not_embedding(embedding)
        if reason is not None:
            raise ValueError(f"{type(self).__name__}: {reason}")
        rnn = self.rnn
        return run_module(rnn, input, hx, lengths, rounding_of(rnn), embedding.weight, embedding.padding_idx)


class EmbeddingRNN(_EmbeddingRecurrent):
    """torch.nn.Embedding and torch.nn.RNN in one kernel: the arguments of both."""

    _rnn_type = RNN

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype),
            RNN(embedding_dim, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout,
                bidirectional, device=device, dtype=dtype))  # fmt: skip


class EmbeddingLSTM(_EmbeddingRecurrent):
    """torch.nn.Embedding and torch.nn.LSTM in one kernel: the arguments of both."""

    _rnn_type = LSTM

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype),
            LSTM(embedding_dim, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                proj_size, device=device, dtype=dtype))  # fmt: skip


class EmbeddingGRU(_EmbeddingRecurrent):
    """torch.nn.Embedding and torch.nn.GRU in one kernel: the arguments of both."""

    _rnn_type = GRU

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype),
            GRU(embedding_dim, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                device=device, dtype=dtype))  # fmt: skip
