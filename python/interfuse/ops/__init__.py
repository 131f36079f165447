"""The public functions. Importing this package registers the ops `torch.ops.interfuse.*`."""

from interfuse.ops.conv_pool import conv_pool
from interfuse.ops.linear import linear, quantize_weight
from interfuse.ops.rnn import rnn

__all__ = ["conv_pool", "linear", "quantize_weight", "rnn"]
