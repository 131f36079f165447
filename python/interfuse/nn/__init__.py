"""Modules with torch.nn's signatures and state_dict."""

from interfuse.nn.attention import AttentionPool, CrossAttention, MultiheadAttention
from interfuse.nn.compact import compact
from interfuse.nn.conv_pool import ConvPool1d, ConvPool2d, ConvPool3d
from interfuse.nn.linear import CompactLinear, DenseChain, FusionLinear
from interfuse.nn.losses import (
    BCEWithLogitsLoss,
    ContrastiveLoss,
    InfoNCELoss,
    LinearCrossEntropyLoss,
    ReconstructionLoss,
)
from interfuse.nn.rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from interfuse.nn.rnn_embedding import EmbeddingGRU, EmbeddingLSTM, EmbeddingRNN

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AttentionPool",
    "BCEWithLogitsLoss",
    "CompactLinear",
    "ContrastiveLoss",
    "ConvPool1d",
    "ConvPool2d",
    "ConvPool3d",
    "CrossAttention",
    "DenseChain",
    "EmbeddingGRU",
    "EmbeddingLSTM",
    "EmbeddingRNN",
    "FusionLinear",
    "GRUCell",
    "InfoNCELoss",
    "LSTMCell",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RNNCell",
    "ReconstructionLoss",
    "compact",
]
