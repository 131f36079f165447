"""How optimize() recognises rnn: torch's own recurrent modules, whole, wherever they are called from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from interfuse.autocast import autocast_dtype
from interfuse.dispatch import choose, refusals
from interfuse.nn.rnn import run_module
from interfuse.ops._rnn_problem import DTYPES, RnnProblem
from interfuse.ops.rnn import IMPLEMENTATIONS
from interfuse.rewrite.bound import PlainForward
from interfuse.rewrite.known import PLAIN_TENSORS
from interfuse.rewrite.site import Call, LiveLink, Match, StaticLink, wants_gradient
from interfuse.torch_state import current_parameters, let_compile_see_recurrent_modules

if TYPE_CHECKING:
    from collections.abc import Sequence

MODULES: dict[type[nn.Module], Any] = {m: m.forward for m in (nn.RNN, nn.LSTM, nn.GRU)}
CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
# What kernels compute in; anything else is for the reference, and torch's own modules are faster than that.
HALVES_TOO = (torch.float32, torch.bfloat16, torch.float16)


class Rnn:
    """rnn's part in optimize()."""

    op = "rnn"
    whole = True

    def stands(self) -> None:
        let_compile_see_recurrent_modules()

    def anchors(self, module: nn.Module) -> bool:
        where = type(module).__module__
        return (
            isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and not where.startswith("interfuse.")
        ) or (where.startswith("torch.ao.nn") and where.endswith("rnn"))

    def refuse(self, module: nn.Module) -> str | None:
        name, forward = type(module).__name__, MODULES.get(type(module))
        if type(module) in CELLS:
            return f"{name} is one step; interfuse.nn.{name} runs it, but only a whole sequence pays"
        if nn.utils.parametrize.is_parametrized(module):
            return "its weights are parametrised, so that they are computed anew at every call"
        if type(module).__module__.startswith("torch.ao."):
            return f"{name} is a quantised module, or one being prepared for it"
        if forward is None:
            return f"its type {name} is not exactly nn.RNN, LSTM or GRU, so it may compute something else"
        if type(module).forward is not forward or not forward.__module__.startswith("torch."):
            return f"{name} is of a class whose forward was replaced"
        dtype = module.weight_hh_l0.dtype
        if dtype not in DTYPES:
            return f"its weights are {dtype}; the kernels take float32, bfloat16 and float16"
        return None

    def match(self, links: Sequence[StaticLink], end: str) -> Match | str:
        return Match(1, links[0].text, enabled=True, reason=end)

    def prepare(self, links: Sequence[LiveLink], value: Any) -> Call | None:
        forward, arguments, keywords = links[0]
        module: nn.RNNBase = forward.owner
        if type(module) not in MODULES or len(arguments) + len(keywords) > 1 or keywords.keys() - {"hx"}:
            return None
        hx = arguments[0] if arguments else keywords.get("hx")
        states = () if hx is None else tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        packed = value if type(value) is PackedSequence else None
        x = value if packed is None else packed.data
        weights = current_parameters(module, module._flat_weights_names)  # noqa: SLF001
        if not _fits(module, x, states, weights, packed is not None):
            return None
        h0, c0 = (*states, None, None)[:2]
        settings = {"module": module, "packed": packed, "weight_dtype": None}
        if packed is None:
            return Call((x, h0, c0, *weights), settings)
        rest = tuple(packed)[1:]
        return Call((x, h0, c0, *weights), settings, lambda data: PackedSequence(data, *rest))

    def run(self, call: Call) -> Any:
        x, h0, c0, *weights = call.tensors
        module, weight_dtype = call.settings["module"], call.settings["weight_dtype"]
        hx = h0 if c0 is None else (h0, c0)
        return run_module(module, call.wrap(x), hx, weight_dtype=weight_dtype, weights=weights)

    def calm(self, links: Sequence[LiveLink], call: Call) -> tuple[Sequence[LiveLink], Call]:
        """Without dropout between the layers: the same parameters in a module beside the user's."""
        module = call.settings["module"]
        twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__, dropout=0.0)
        _, arguments, keywords = links[0]
        calm_call = call._replace(settings={**call.settings, "module": twin})
        return [(PlainForward(twin), arguments, keywords)], calm_call

    def describe(self, call: Call) -> RnnProblem:
        x, h0 = call.tensors[:2]
        module, packed = call.settings["module"], call.settings["packed"]
        if packed is not None:
            batch, steps = int(packed.batch_sizes[0]), len(packed.batch_sizes)
        else:
            sizes = x.shape[:-1] if x.dim() == 3 else (1, x.shape[0])
            batch, steps = sizes if x.dim() == 2 or module.batch_first else reversed(sizes)
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
            vocabulary=0,
            dtype=autocast_dtype(x.device) or x.dtype,
            device=x.device,
            ragged=packed is not None,
            states=h0 is not None,
            weight_dtype=call.settings["weight_dtype"],
            save=wants_gradient(call),
        )

    def kernel(self, seen: RnnProblem) -> tuple[str | None, tuple[str, ...]]:
        chosen = choose(IMPLEMENTATIONS, seen)
        before = IMPLEMENTATIONS[: IMPLEMENTATIONS.index(chosen)]
        why_not = tuple(f"{r.name}: {r.reason}" for r in refusals(before, seen))
        return None if chosen.name == "reference" else chosen.name, why_not


def _fits(
    module: nn.RNNBase, x: Any, states: Sequence[Any], weights: Sequence[Any], packed: bool
) -> bool:
    """Whether the op computes this. What it does not, the module itself computes, or says what is wrong."""
    if any(type(t) not in PLAIN_TENSORS for t in (x, *states, *weights)):
        return False
    if len(states) not in (0, 2 if module.mode == "LSTM" else 1):
        return False
    if x.dim() not in ((2,) if packed else (2, 3)) or x.shape[-1] != module.input_size or not x.numel():
        return False
    if any(t.device != x.device or t.layout is not torch.strided for t in (x, *states, *weights)):
        return False
    if autocast_dtype(x.device) is not None:
        # torch's LSTM takes part in autocast on the CPU, its other modules do not.
        return module.mode == "LSTM" and x.dtype in HALVES_TOO and weights[0].dtype in HALVES_TOO
    return x.dtype in HALVES_TOO and all(t.dtype is x.dtype for t in (*states, *weights))
