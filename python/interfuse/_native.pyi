# The native core, bound by pointers: addresses of dense memory go in unchecked, so use interfuse.ops instead.

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

_Strides: TypeAlias = tuple[int, int, int]  # of (batch, head, row), in elements; the last axis is dense

class ConvPoolDesc:
    # A checked conv_pool problem with its kernel chosen. Sequences have one entry per spatial dimension,
    # padding two (low, high); x_strides are those of batch, channel, depth, height and width, in elements.
    def __init__(
        self,
        spatial: int,
        dtype: str,
        channels_last: bool,
        weight_channels_last: bool,
        batch: int,
        in_channels: int,
        out_channels: int,
        groups: int,
        input: Sequence[int],  # noqa: A002
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        x_strides: Sequence[int],
        activation: str,
        negative_slope: float,
        pool: str,
        pool_size: Sequence[int],
        pool_stride: Sequence[int],
        pool_padding: Sequence[int],
        ceil_mode: bool,
        count_include_pad: bool,
        precision: str,
        save: bool,
    ) -> None: ...
    @property
    def conv_sizes(self) -> list[int]: ...
    @property
    def out_sizes(self) -> list[int]: ...
    @property
    def algorithm(self) -> str: ...
    @property
    def why(self) -> str: ...

def conv_pool_forward(
    desc: ConvPoolDesc, x: int, weight: int, bias: int, y: int, index: int, pre: int, threads: int
) -> None: ...
def conv_pool_backward(
    desc: ConvPoolDesc,
    grad_y: int,
    x: int,
    weight: int,
    y: int,
    index: int,
    pre: int,
    grad_x: int,
    grad_weight: int,
    grad_bias: int,
    threads: int,
) -> None: ...

# An inference call as a function for tensors like the given ones, each of one of the two types:
# run(x, weight, bias, threads) -> y, or None where they differ in type, shape, strides, dtype or device, or
# where one of the watchers returns something true. They are looked at through DLPack's exchange table, the
# capsule __dlpack_c_exchange_api__ of torch.Tensor. size and strides are those of y.
def conv_pool_call(
    exchange: Any,
    watchers: tuple[Callable[[], Any], ...],
    types: tuple[type, type],
    desc: ConvPoolDesc,
    x: Any,
    weight: Any,
    bias: Any,
    size: tuple[int, ...],
    strides: tuple[int, ...],
) -> Callable[[Any, Any, Any, int], Any]: ...

class RnnDesc:
    # A checked recurrent problem. cell: "rnn_tanh", "rnn_relu", "lstm" or "gru"; x_strides are those of
    # steps and batch, in elements.
    def __init__(
        self,
        cell: str,
        directions: int,
        bias: bool,
        save: bool,
        weight_dtype: str,
        batch_first: bool,
        batch: int,
        steps: int,
        input_size: int,
        hidden_size: int,
        proj_size: int,
        layers: int,
        x_strides: tuple[int, int],
        vocabulary: int,
    ) -> None: ...
    @property
    def reserve(self) -> int: ...

# Weights are five addresses for each layer and direction: w_ih, w_hh, b_ih, b_hh, w_hr, 0 for none.
def rnn_forward(
    desc: RnnDesc,
    x: int,
    ids: int,
    lengths: int,
    h0: int,
    c0: int,
    weights: Sequence[int],
    y: int,
    hn: int,
    cn: int,
    reserve: int,
    threads: int,
) -> None: ...

# As conv_pool_call: run(x, table, lengths, h0, c0, weights, threads) -> (y, hn, cn) or None, for tensors like
# the given ones (x, table, lengths, h0, c0) and a list of weights. places: for each address that rnn_forward
# takes, which weight it is, -1 for none. outputs: size and strides of y, hn and cn, or None.
def rnn_call(
    exchange: Any,
    watchers: tuple[Callable[[], Any], ...],
    types: tuple[type, type],
    desc: RnnDesc,
    given: tuple[Any, ...],
    weights: list[Any],
    places: Sequence[int],
    outputs: tuple[Any, ...],
) -> Callable[[Any, Any, Any, Any, Any, Any, int], Any]: ...
def rnn_backward(
    desc: RnnDesc,
    x: int,
    ids: int,
    lengths: int,
    h0: int,
    c0: int,
    weights: Sequence[int],
    reserve: int,
    grad_y: int,
    grad_hn: int,
    grad_cn: int,
    grad_x: int,
    grad_h0: int,
    grad_c0: int,
    grad_weights: Sequence[int],
    threads: int,
) -> None: ...
class LinearDesc:
    # A checked linear problem. weight_dtype: as dtype, or "bfloat16" or "int8" beside float32 (inference);
    # row_strides are those of the inputs, in elements.
    def __init__(
        self,
        dtype: str,
        weight_dtype: str,
        rows: int,
        out_features: int,
        widths: Sequence[int],
        row_strides: Sequence[int],
        activation: str,
        negative_slope: float,
        save: bool,
    ) -> None: ...

def linear_forward(
    desc: LinearDesc,
    inputs: Sequence[int],
    weight: int,
    scale: int,
    bias: int,
    y: int,
    pre: int,
    threads: int,
) -> None: ...

# Layer after layer; weights are (weight, scale, bias) of each, 0 for none.
def linear_chain(
    descs: Sequence[LinearDesc],
    inputs: Sequence[int],
    weights: Sequence[tuple[int, int, int]],
    y: int,
    threads: int,
) -> None: ...
# As conv_pool_call: run(inputs, layers, threads) for inputs and layers like the given ones; a layer is
# (weight, bias, scale, arguments). Instead of layers, run takes the dictionary of modules that they are of;
# untouched is (their type, its forward, the dictionaries of all modules' hooks, and where their tensors are:
# "_parameters" or "_buffers").
def linear_call(
    exchange: Any,
    watchers: tuple[Callable[[], Any], ...],
    types: tuple[type, type],
    descs: list[LinearDesc],
    inputs: tuple[Any, ...],
    layers: list[Any],
    size: tuple[int, ...],
    strides: tuple[int, ...],
    untouched: tuple[type, Any, tuple[dict[Any, Any], ...], str],
) -> Callable[[Any, Any, int], Any]: ...
# A training step's forward and backward for tensors like the given ones, each None for others. A layer is
# (weight, bias, arguments, whether backward reads what it gave, that tensor's size and strides).
# forward(inputs and each layer's weight and bias, arguments, threads): what each layer gives, and the values
# before activations that backward reads. backward(gradient, all the tensors that it reads, a mask, threads).
def linear_training(
    exchange: Any,
    watchers: tuple[Callable[[], Any], ...],
    types: tuple[type, type],
    descs: list[LinearDesc],
    inputs: tuple[Any, ...],
    layers: list[Any],
) -> tuple[Callable[..., Any], Callable[..., Any]]: ...
def linear_backward(
    desc: LinearDesc,
    grad_y: int,
    inputs: Sequence[int],
    weight: int,
    y: int,
    pre: int,
    grad_inputs: Sequence[int],
    grad_weight: int,
    grad_bias: int,
    threads: int,
) -> None: ...

class AttentionDesc:
    # A checked attention problem. dtype: "float32" or "bfloat16"; mask: "none", "boolean" or "additive".
    # grad_y has y's strides.
    def __init__(
        self,
        dtype: str,
        mask: str,
        causal: bool,
        scale: float,
        batch: int,
        heads: int,
        kv_heads: int,
        queries: int,
        keys: int,
        head_dim: int,
        value_dim: int,
        q: _Strides,
        k: _Strides,
        v: _Strides,
        y: _Strides,
        mask_strides: _Strides,
        grad_q: _Strides,
        grad_k: _Strides,
        grad_v: _Strides,
    ) -> None: ...

# inputs: addresses of q, k, v, mask, q_lengths and kv_lengths, 0 for none of the last three.
def attention_forward(
    desc: AttentionDesc, inputs: Sequence[int], y: int, lse: int, weights: int, threads: int
) -> None: ...
def attention_backward(
    desc: AttentionDesc,
    inputs: Sequence[int],
    y: int,
    lse: int,
    grad_y: int,
    grad_q: int,
    grad_k: int,
    grad_v: int,
    threads: int,
) -> None: ...

class AttentionBlockDesc:
    # A checked block: projections, attention and the output's projection, in float32 for inference.
    # sizes: batch, heads, kv_heads, queries, keys, head_dim, query_dim, context_dim, out_dim.
    def __init__(
        self,
        mask: str,
        causal: bool,
        scale: float,
        sizes: Sequence[int],
        query_row: int,
        context_row: int,
        mask_strides: _Strides,
    ) -> None: ...

# tensors: addresses of query, context, mask, kv_lengths, the weights of q, k, v and the output, and their
# biases; 0 for a mask, lengths or a bias that is none.
def attention_block_forward(
    desc: AttentionBlockDesc, tensors: Sequence[int], y: int, threads: int
) -> None: ...

# The call made again for tensors like the given ones, None for others: run(tensors, threads). places: for
# each of the addresses above (number of the tensor, floats from its start), -1 for none.
def attention_block_call(
    exchange: Any,
    watchers: tuple[Callable[[], Any], ...],
    types: tuple[type, type],
    desc: AttentionBlockDesc,
    tensors: tuple[Any, ...],
    places: Sequence[tuple[int, int]],
    size: tuple[int, ...],
    strides: tuple[int, ...],
) -> Callable[[Any, int], Any]: ...

# sizes: batch, steps, width, hidden; strides: x's of (batch, step), then hidden's.
def attention_pool_forward(
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    x: int,
    hidden: int,
    context: int,
    lengths: int,
    y: int,
    weights: int,
    threads: int,
) -> None: ...
def attention_pool_backward(
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    x: int,
    hidden: int,
    context: int,
    lengths: int,
    grad_y: int,
    grad_weights: int,
    grad_x: int,
    grad_hidden: int,
    grad_context: int,
    threads: int,
) -> None: ...

class CrossEntropyDesc:
    def __init__(
        self,
        dtype: str,
        rows: int,
        classes: int,
        features: int,
        input_row_stride: int,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
    ) -> None: ...

# Tensors are the addresses of input, weight, bias, class weights and targets, gradients those of input,
# weight and bias; 0 for none.
def cross_entropy_forward(
    desc: CrossEntropyDesc,
    tensors: Sequence[int],
    loss: int,
    lse: int,
    gradients: Sequence[int],
    threads: int,
) -> None: ...
def cross_entropy_backward(
    desc: CrossEntropyDesc,
    tensors: Sequence[int],
    lse: int,
    grad_loss: int,
    gradients: Sequence[int],
    threads: int,
) -> None: ...

# Tensors are the addresses of input, target, weight, pos_weight, grad_loss, loss and grad; 0 for none.
def elementwise_loss(
    kind: str,
    dtype: str,
    reduction: str,
    rows: int,
    columns: int,
    weight_strides: Sequence[int],
    pos_weight_strides: Sequence[int],
    tensors: Sequence[int],
    threads: int,
) -> None: ...

# Tensors are the addresses of the two matrices, target, loss and slope.
def contrastive_loss(
    dtype: str, rows: int, columns: int, margin: float, tensors: Sequence[int], threads: int
) -> None: ...

# Tensors are the addresses of the two matrices, slope, grad_loss, and the gradients of the two.
def contrastive_loss_backward(
    dtype: str, rows: int, columns: int, tensors: Sequence[int], threads: int
) -> None: ...
# Tensors are the addresses of the two matrices, the loss, both directions' sums, what is kept.
def info_nce(
    dtype: str,
    reduction: str,
    symmetric: bool,
    normalize: bool,
    rows: int,
    features: int,
    temperature: float,
    tensors: Sequence[int],
    threads: int,
) -> None: ...

# Tensors are the addresses of the two matrices, both directions' logarithms and losses, what was kept,
# grad_loss and the gradients. The gradient by the temperature, where that is wanted, else 0.
def info_nce_backward(
    dtype: str,
    reduction: str,
    symmetric: bool,
    normalize: bool,
    rows: int,
    features: int,
    temperature: float,
    tensors: Sequence[int],
    by_temperature: bool,
    threads: int,
) -> float: ...
def info() -> dict[str, Any]: ...
def machine_peak(threads: int) -> dict[str, float]: ...

def kept_from() -> int: ...
def kept_empty(
    exchange: object, shape: Sequence[int], strides: Sequence[int], code: int, bits: int
) -> Any: ...  # a tensor
def kept_state() -> dict[str, int]: ...
def release_kept() -> int: ...
def set_kept_limit(bytes: int) -> None: ...  # noqa: A002
