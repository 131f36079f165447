"""How optimize() recognises losses: torch's own nn.LinearCrossEntropyLoss, whole.

An nn.Linear whose logits go to an nn.CrossEntropyLoss is not recognised there: the two are rarely called by
one module, and nothing proves that nobody else reads the logits. In a graph of Dynamo it is proved (graph.py
asks `fits` here), and interfuse.nn.LinearCrossEntropyLoss.from_torch joins the two by hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interfuse.autocast import autocast_dtype
from interfuse.ops._dtypes import KERNEL_DTYPES
from interfuse.ops._losses_problem import CrossEntropyParams, CrossEntropyProblem
from interfuse.ops.losses import IMPLEMENTATIONS, linear_cross_entropy
from interfuse.rewrite.known import LINEAR_LOSS, PLAIN_TENSORS, why_not_type
from interfuse.rewrite.site import Call, LiveLink, Match, Pattern, StaticLink, choose_kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

# In a graph: with fewer, Inductor's own two passes over the logits take no longer than a call of the op.
LEAST_CLASSES = 4096
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Losses(Pattern):
    """losses' part in optimize()."""

    op = "losses"
    whole = True

    def anchors(self, module: nn.Module) -> bool:
        return LINEAR_LOSS is not None and isinstance(module, LINEAR_LOSS)

    def refuse(self, module: nn.Module) -> str | None:
        loss: Any = module
        reason = why_not_type(module, (LINEAR_LOSS,), "nn.LinearCrossEntropyLoss")
        if reason is not None:
            return reason
        if loss.out_features != ():
            return f"its out_features are {loss.out_features}; the op takes one label for each row"
        reason = why_not_type(loss.linear, (nn.Linear,), "nn.Linear")
        if reason is not None:
            return f"of its linear layer: {reason}"
        if loss.linear.weight.dtype not in KERNEL_DTYPES:
            return (
                f"its weights are {loss.linear.weight.dtype}; the kernels take float32, bfloat16 and float16"
            )
        return None

    def match(self, links: Sequence[StaticLink], end: str) -> Match | str:
        return Match(1, links[0].text, enabled=True, reason=end)

    def prepare(self, links: Sequence[LiveLink], value: Any) -> Call | None:
        forward, arguments, keywords = links[0]
        module: Any = forward.owner
        if type(module) is not LINEAR_LOSS or self.refuse(module) is not None:
            return None
        if len(arguments) + len(keywords) != 1 or keywords.keys() - {"target"}:
            return None
        target = arguments[0] if arguments else keywords["target"]
        tensors = (value, module.linear.weight, target, module.linear.bias, module.weight)
        if not _fits(*tensors):
            return None
        settings = {
            "reduction": module.reduction,
            "ignore_index": -100 if module.ignore_index is None else module.ignore_index,
            "label_smoothing": module.label_smoothing,
        }
        return Call(tensors, settings)

    def run(self, call: Call) -> Any:
        x, linear_weight, target, linear_bias, weight = call.tensors
        return linear_cross_entropy(
            x, linear_weight, target, linear_bias=linear_bias, weight=weight, **call.settings
        )

    def describe(self, call: Call) -> CrossEntropyProblem:
        x, linear_weight, _, linear_bias, _ = call.tensors
        return CrossEntropyProblem(
            params=CrossEntropyParams(**call.settings),
            rows=x.numel() // x.shape[-1],
            classes=linear_weight.shape[0],
            features=x.shape[-1],
            dtype=autocast_dtype(x.device) or x.dtype,
            device=x.device,
            has_bias=linear_bias is not None,
        )

    def kernel(self, seen: CrossEntropyProblem) -> tuple[str | None, tuple[str, ...]]:
        return choose_kernel(IMPLEMENTATIONS, seen)


def fits(x: Any, linear_weight: Any, linear_bias: Any, target: Any, weight: Any, logits: Any) -> bool:
    """Whether the cross-entropy of a linear layer's logits (rows, classes) is worth the op, and the op's."""
    if autocast_dtype(x.device) is not None or x.dtype is not torch.float32 or not x.is_cpu:
        return False
    if not isinstance(target, Tensor) or target.dtype not in INTEGERS or target.dim() != 1:
        return False
    if weight is not None and not isinstance(weight, Tensor):
        return False
    classes = linear_weight.shape[0]
    return logits.dim() == 2 and logits.shape[1] == classes >= LEAST_CLASSES


def _fits(x: Any, linear_weight: Any, target: Any, linear_bias: Any, weight: Any) -> bool:
    """Whether the op computes this. What it does not, the module itself computes, or says what is wrong."""
    tensors: list[Tensor] = [t for t in (x, linear_weight, target, linear_bias, weight) if t is not None]
    if len(tensors) < 3 or any(type(t) not in PLAIN_TENSORS for t in tensors):
        return False
    if any(t.device != x.device or t.layout is not torch.strided for t in tensors):
        return False
    if x.dim() not in (1, 2) or x.shape[-1] != linear_weight.shape[1] or target.shape != x.shape[:-1]:
        return False
    if target.dtype not in INTEGERS or (weight is not None and weight.requires_grad):
        return False
    floats = (x, linear_weight) if linear_bias is None else (x, linear_weight, linear_bias)
    if autocast_dtype(x.device) is not None:
        return all(t.dtype in KERNEL_DTYPES for t in floats)
    return x.dtype in KERNEL_DTYPES and all(t.dtype is x.dtype for t in floats)
