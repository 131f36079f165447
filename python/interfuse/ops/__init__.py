"""The public functions. Importing this package registers the ops `torch.ops.interfuse.*`."""

from interfuse.ops._attention_pool import attention_pool
from interfuse.ops.attention import attention
from interfuse.ops.conv_pool import conv_pool
from interfuse.ops.linear import linear, quantize_weight
from interfuse.ops.losses import linear_cross_entropy
from interfuse.ops.rnn import rnn

__all__ = [
    "attention",
    "attention_pool",
    "conv_pool",
    "linear",
    "linear_cross_entropy",
    "quantize_weight",
    "rnn",
]
