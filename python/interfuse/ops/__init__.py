"""The public functions. Importing this package registers the ops `torch.ops.interfuse.*`."""

from interfuse.ops._attention_pool import attention_pool
from interfuse.ops.attention import attention
from interfuse.ops.conv_pool import conv_pool
from interfuse.ops.linear import linear, quantize_weight
from interfuse.ops.losses import (
    binary_cross_entropy_with_logits,
    contrastive_loss,
    info_nce,
    linear_cross_entropy,
    reconstruction_loss,
)
from interfuse.ops.rnn import rnn

__all__ = [
    "attention",
    "attention_pool",
    "binary_cross_entropy_with_logits",
    "contrastive_loss",
    "conv_pool",
    "info_nce",
    "linear",
    "linear_cross_entropy",
    "quantize_weight",
    "reconstruction_loss",
    "rnn",
]
