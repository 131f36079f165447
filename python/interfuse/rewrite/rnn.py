"""How optimize() recognises rnn: torch's own recurrent modules, whole, wherever they are called from; and
with the embedding before them, where a method or an nn.Sequential calls the one on what the other gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from interfuse.autocast import autocast_dtype
from interfuse.nn.rnn import run_module
from interfuse.nn.rnn_embedding import why_not_embedding
from interfuse.ops._dtypes import DTYPES, KERNEL_DTYPES
from interfuse.ops._rnn_problem import RnnProblem
from interfuse.ops.rnn import IMPLEMENTATIONS
from interfuse.rewrite.bound import ModuleForward, PlainForward
from interfuse.rewrite.known import (
    FORWARDS,
    PLAIN_TENSORS,
    RECURRENT,
    is_ours,
    is_quantised,
    why_not_module,
    why_not_type,
)
from interfuse.rewrite.site import Call, LiveLink, Match, Pattern, StaticLink, choose_kernel, wants_gradient
from interfuse.torch_state import (
    current_parameters,
    has_hooks,
    is_untouched,
    let_compile_see_recurrent_modules,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)


class Rnn(Pattern):
    """rnn's part in optimize()."""

    op = "rnn"
    whole = True

    def stands(self) -> None:
        let_compile_see_recurrent_modules()

    def anchors(self, module: nn.Module) -> bool:
        return is_quantised(module, "rnn") or (
            isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and not is_ours(module)
        )

    def leads(self, callee: object) -> bool:
        return isinstance(callee, nn.Embedding) and not is_ours(callee)

    def refuse(self, module: nn.Module) -> str | None:
        name = type(module).__name__
        if type(module) in CELLS:
            return f"{name} is one step; interfuse.nn.{name} runs it, but only a whole sequence pays"
        reason = why_not_type(module, RECURRENT, "nn.RNN, LSTM or GRU")
        if reason is not None:
            return reason
        dtype = module.weight_hh_l0.dtype
        if dtype not in DTYPES:
            return f"its weights are {dtype}; the kernels take float32, bfloat16 and float16"
        return None

    def match(self, links: Sequence[StaticLink], end: str) -> Match | str:
        embeddings = [callee for callee in links[0].callees if self.leads(callee)]
        if not embeddings:
            return Match(1, links[0].text, enabled=True, reason=end)
        for module in embeddings:
            reason = _why_not_embedding(module)
            if reason is not None:
                return reason
        for module in links[1].callees:
            watched = has_hooks(module)
            if watched:
                return f"{links[1].text}, which reads its rows, has hooks"
        # A training step takes as long with rows gathered outside the kernel, give or take: measuring tells.
        return Match(2, f"{links[0].text} -> {links[1].text}", enabled=True, reason=end, trains=False)

    def prepare(self, links: Sequence[LiveLink], value: Any) -> Call | None:
        callee, arguments, keywords = links[-1]
        embedding = links[0][0] if len(links) > 1 else None
        module: nn.RNNBase = callee.owner if embedding is None else callee
        if type(module) not in RECURRENT or len(arguments) + len(keywords) > 1 or keywords.keys() - {"hx"}:
            return None
        if embedding is not None and (
            links[0][1] or links[0][2] or not _is_read(embedding) or not _calls_its_forward(module)
        ):
            return None
        hx = arguments[0] if arguments else keywords.get("hx")
        states = () if hx is None else tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        packed = value if type(value) is PackedSequence else None
        x = value if packed is None else packed.data
        weights = current_parameters(module, module._flat_weights_names)  # noqa: SLF001
        (table,) = (None,) if embedding is None else current_parameters(embedding, ["weight"])
        if table is None:
            if not _fits(module, x, states, weights, (2, 3) if packed is None else (2,)):
                return None
        elif packed is not None or not _fits(module, table, states, weights, (2,)) or not _are_ids(x, table):
            return None
        h0, c0 = (*states, None, None)[:2]
        settings = {"module": module, "embedding": embedding, "packed": packed, "weight_dtype": None}
        tensors = (x, table, h0, c0, *weights)
        if packed is None:
            return Call(tensors, settings)
        rest = tuple(packed)[1:]
        return Call(tensors, settings, lambda tensors: PackedSequence(tensors[0], *rest))

    def run(self, call: Call) -> Any:
        _, table, h0, c0, *weights = call.tensors
        module, embedding = call.settings["module"], call.settings["embedding"]
        x, hx = call.wrap(call.tensors), h0 if c0 is None else (h0, c0)
        weight_dtype = call.settings["weight_dtype"]
        if embedding is None:
            return run_module(module, x, hx, weight_dtype=weight_dtype, weights=weights)
        padding_idx = embedding.padding_idx
        try:
            return run_module(
                module, x, hx, None, weight_dtype, table=table, padding_idx=padding_idx, weights=weights
            )
        except ValueError:
            F.embedding(x, table, padding_idx)  # of an id outside the table torch speaks in its own words
            raise

    def calm(self, links: Sequence[LiveLink], call: Call) -> tuple[Sequence[LiveLink], Call]:
        """Without dropout between the layers: the same parameters in a module beside the user's."""
        module = call.settings["module"]
        if not module.dropout:
            return links, call
        twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__, dropout=0.0)
        _, arguments, keywords = links[-1]
        calm_call = call._replace(settings={**call.settings, "module": twin})
        return [*links[:-1], (PlainForward(twin), arguments, keywords)], calm_call

    def describe(self, call: Call) -> RnnProblem:
        x, table, h0 = call.tensors[:3]
        module, packed = call.settings["module"], call.settings["packed"]
        if packed is not None:
            batch, steps = int(packed.batch_sizes[0]), len(packed.batch_sizes)
        else:
            shape = x.shape if table is not None else x.shape[:-1]
            sizes = shape if len(shape) == 2 else (1, shape[0])
            batch, steps = sizes if len(shape) == 1 or module.batch_first else reversed(sizes)
        return RnnProblem(
            cell=module.mode.lower(),
            layers=module.num_layers,
            directions=1 + module.bidirectional,
            bias=module.bias,
            batch_first=module.batch_first,
            batch=batch,
            steps=steps,
            input_size=module.input_size,
            hidden_size=module.hidden_size,
            proj_size=module.proj_size,
            vocabulary=0 if table is None else table.shape[0],
            dtype=autocast_dtype(x.device) or call.tensors[-1].dtype,
            device=x.device,
            ragged=packed is not None,
            states=h0 is not None,
            weight_dtype=call.settings["weight_dtype"],
            save=wants_gradient(call),
        )

    def kernel(self, seen: RnnProblem) -> tuple[str | None, tuple[str, ...]]:
        return choose_kernel(IMPLEMENTATIONS, seen)


def _why_not_embedding(module: nn.Module) -> str | None:
    return why_not_module(module, (nn.Embedding,), "nn.Embedding") or why_not_embedding(module)


def _is_read(module: Any) -> bool:
    """Whether calling the module means reading rows of its table, with nothing looking on."""
    return why_not_embedding(module) is None and is_untouched(module, FORWARDS[nn.Embedding])


def _calls_its_forward(module: nn.Module) -> bool:
    """Whether calling the module means calling torch's forward, or the one that we have put there."""
    forward = module.__dict__.get("forward")
    return not has_hooks(module) and (forward is None or isinstance(forward, ModuleForward))


def _are_ids(ids: Any, table: Tensor) -> bool:
    """Whether these are ids of a table's rows, in a batch or of one sequence."""
    return (
        type(ids) in PLAIN_TENSORS
        and ids.dtype in (torch.int64, torch.int32)
        and ids.dim() in (1, 2)
        and ids.numel() > 0
        and ids.layout is torch.strided
        and ids.device == table.device
    )


def _fits(
    module: nn.RNNBase, x: Any, states: Sequence[Any], weights: Sequence[Any], dimensions: Sequence[int]
) -> bool:
    """Whether the op computes this. What it does not, the module itself computes, or says what is wrong. x is
    the module's input, or the table that its rows come from."""
    if any(type(t) not in PLAIN_TENSORS for t in (x, *states, *weights)):
        return False
    if len(states) not in (0, 2 if module.mode == "LSTM" else 1):
        return False
    if x.dim() not in dimensions or x.shape[-1] != module.input_size or not x.numel():
        return False
    if any(t.device != x.device or t.layout is not torch.strided for t in (x, *states, *weights)):
        return False
    if autocast_dtype(x.device) is not None:
        # torch's LSTM takes part in autocast on the CPU, its other modules do not.
        return module.mode == "LSTM" and x.dtype in KERNEL_DTYPES and weights[0].dtype in KERNEL_DTYPES
    return x.dtype in KERNEL_DTYPES and all(t.dtype is x.dtype for t in (*states, *weights))
