"""torch.compile(model, backend="interfuse"): fused ops in the graphs of Dynamo, the rest to Inductor.

A graph shows what a source does not: helper functions, modules' forwards and loops are all gone into one list
of calls, with every reader of every value. A chain is replaced where each value between is read once, by the
call that comes right behind it: nothing can be written to, and no mode can change, in between. What follows
from shapes alone is left to the ops, which are traced with the sizes that Dynamo found to vary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from interfuse.ops.conv_pool import conv_pool
from interfuse.ops.linear import linear
from interfuse.ops.losses import linear_cross_entropy
from interfuse.rewrite.conv_pool import fits
from interfuse.rewrite.known import Activation, Pool, activation_of, pool_of, tried
from interfuse.rewrite.linear import fits as fits_linear
from interfuse.rewrite.losses import fits as fits_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
# Methods that change nothing but a tensor's shape, so that it does not matter when they are called.
RESHAPES = ("view", "reshape", "flatten", "contiguous")


def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
    """What torch.compile calls: rewrites the graph, then compiles it with Inductor."""
    from torch._inductor.compile_fx import compile_fx

    fuse(graph_module)
    return compile_fx(graph_module, example_inputs, **options)


def fuse(graph_module: fx.GraphModule) -> int:
    """Puts fused ops into a graph of torch's functions, and says how many."""
    graph, made = graph_module.graph, 0
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in CONVOLUTIONS:
            made += _fuse_convolution(graph, node)
        elif node.target is F.linear:
            made += _fuse_linear(graph, node)
        elif node.target is F.cross_entropy:
            made += _fuse_cross_entropy(graph, node)
    if made:
        graph.lint()
        graph_module.recompile()
    return made


def _conv_arguments(
    input: fx.Node,  # noqa: A002  (torch's own name)
    weight: fx.Node,
    bias: fx.Node | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> dict[str, Any]:
    return locals()


def _fuse_convolution(graph: fx.Graph, conv: Any) -> bool:
    given = _conv_arguments(*conv.args, **conv.kwargs)
    tensors = [given.pop(name) for name in ("input", "weight", "bias")]
    x, weight, bias = map(_value, tensors)
    spatial = CONVOLUTIONS[conv.target]
    if len(conv.all_input_nodes) != len({t for t in tensors if t is not None}):
        return False  # a size that is computed
    if not isinstance(x, Tensor) or not fits(x, weight, bias, given["groups"], spatial):
        return False
    last = conv
    activation = pool = None
    while (reader := _reader(last)) is not None:
        found = _read(activation_of, reader)
        if activation is None and isinstance(found, Activation) and found.is_constant:
            if pool is not None and not (pool.kind == "max" and found.increasing):
                break
            activation, last = found, reader
            continue
        pooling = _read(pool_of, reader)
        if pool is not None or not isinstance(pooling, Pool) or pooling.spatial != spatial:
            break
        pool, last = pooling, reader
    if last is conv:
        return False
    if activation is not None:
        given |= activation.settings()
    if pool is not None:
        given |= pool.settings()
    _replace(graph, conv, last, conv_pool, (*tensors,), given)
    return True


def _fuse_linear(graph: fx.Graph, product: fx.Node) -> bool:
    """A product of a concatenation that nobody else reads. Any other is as fast in Inductor's hands."""
    x, weight, bias = (*product.args, *product.kwargs.values(), None)[:3]
    if len(product.args) < 2 or product.kwargs.keys() - {"bias"} or not isinstance(x, fx.Node):
        return False
    if (
        x.op != "call_function"
        or x.target not in (torch.cat, torch.concat)
        or _reader(x, beside_parameters=True) is not product
    ):
        return False
    parts = x.args[0] if x.args else None
    dim = x.args[1] if len(x.args) > 1 else x.kwargs.get("dim", 0)
    if not isinstance(parts, (list, tuple)) or x.kwargs.keys() - {"dim"}:
        return False
    whole, values = _value(x), [_value(part) for part in parts]
    if not isinstance(whole, Tensor) or dim not in (-1, whole.dim() - 1):
        return False
    if not fits_linear(whole, _value(weight), _value(bias)):
        return False
    if not all(isinstance(t, Tensor) and t.dim() == whole.dim() and t.dtype is whole.dtype for t in values):
        return False
    settings: dict[str, Any] = {}
    last = product
    reader = _reader(product)
    found = None if reader is None else _read(activation_of, reader)
    if reader is not None and found is not None and found.is_constant:
        settings = found.settings()
        last = reader
    _replace(graph, product, last, linear, (list(parts), weight, bias), settings)
    graph.erase_node(x)
    return True


def _loss_arguments(
    input: fx.Node,  # noqa: A002  (torch's own name)
    target: fx.Node,
    weight: fx.Node | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> dict[str, Any]:
    return locals()


def _fuse_cross_entropy(graph: fx.Graph, loss: Any) -> bool:
    """A linear layer's logits that nothing but a cross-entropy reads, as they are or in another shape."""
    given = _loss_arguments(*loss.args, **loss.kwargs)
    logits, target = given.pop("input"), given.pop("target")
    if given.pop("size_average") is not None or given.pop("reduce") is not None:
        return False
    product = logits.args[0] if _reshapes(logits) else logits
    if not isinstance(product, fx.Node) or product.target is not F.linear or product.kwargs.keys() - {"bias"}:
        return False
    if list(logits.users) != [loss] or list(product.users) != [loss if logits is product else logits]:
        return False
    between = product.next
    while between is not loss:
        if between.op not in ("placeholder", "get_attr") and not _reshapes(between):
            return False
        between = between.next
    x, linear_weight, linear_bias = (*product.args, *product.kwargs.values(), None)[:3]
    values = [_value(node) for node in (x, linear_weight, linear_bias, target, given["weight"], logits)]
    if not fits_linear(*values[:3]) or not fits_loss(*values):
        return False
    with graph.inserting_before(loss):
        if values[0].dim() != 2:
            x = graph.call_method("reshape", (x, -1, values[1].shape[1]))
        settings = {"linear_bias": linear_bias, **given}
        fused = graph.call_function(linear_cross_entropy, (x, linear_weight, target), settings)
    fused.meta = dict(loss.meta)
    loss.replace_all_uses_with(fused)
    for node in (loss, logits, product) if logits is not product else (loss, product):
        graph.erase_node(node)
    return True


def _reshapes(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target in RESHAPES


def _value(node: Any) -> Any:
    """The tensor, without its data, that Dynamo saw there."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _reader(node: fx.Node, beside_parameters: bool = False) -> fx.Node | None:
    """The one call that reads a value: the next in the graph, which takes no other value, or none but what
    the graph is given."""
    following = node.next
    while following.op in ("placeholder", "get_attr"):
        following = following.next
    if list(node.users) != [following] or following.op not in ("call_function", "call_method"):
        return None
    if not following.args or following.args[0] is not node:
        return None
    rest = [n for n in following.all_input_nodes if n is not node]
    allowed = ("placeholder", "get_attr") if beside_parameters else ()
    return following if all(n.op in allowed for n in rest) else None


def _read(read: Callable[..., Any], node: fx.Node) -> Any:
    return tried(read, node.target, node.args[1:], node.kwargs)


def _replace(
    graph: fx.Graph,
    first: fx.Node,
    last: Any,
    op: Callable[..., Any],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
) -> None:
    """One call in the place of a chain's first, for all that read its last."""
    with graph.inserting_before(first):
        fused = graph.call_function(op, arguments, keywords)
    fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)
    while last is not first:
        before = last.args[0]
        graph.erase_node(last)
        last = before
    graph.erase_node(first)
