"""optimize(), restore() and explain(): fused ops in models that people already have."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from interfuse.rewrite.attention import Attention
from interfuse.rewrite.bound import (
    WHOLE,
    Bound,
    ModuleForward,
    RewrittenMethod,
    SequentialForward,
    bound_methods,
)
from interfuse.rewrite.conv_pool import ConvPool
from interfuse.rewrite.linear import Linear
from interfuse.rewrite.losses import Losses
from interfuse.rewrite.measure import Examples, Outcome, WholeModel, try_sites
from interfuse.rewrite.plan import Candidate, Plan, make_plan
from interfuse.rewrite.report import Explanation, Row
from interfuse.rewrite.rnn import Rnn
from interfuse.rewrite.site import Pattern, Site

__all__ = ["Explanation", "Row", "explain", "optimize", "restore"]

Model = TypeVar("Model", bound=nn.Module)
Identity = tuple[str, str, Hashable]

# What optimize() looks for. An op joins by adding its pattern.
PATTERNS: tuple[Pattern, ...] = (ConvPool(), Rnn(), Linear(), Attention(), Losses())

REPORT = "_interfuse_report"  # on the model that optimize() was given: what was measured, by site


def optimize(
    model: Model,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    seconds: float = 5.0,
) -> Model:
    """Puts fused ops in the model's place of chains such as convolution, activation, pool, and returns the
    model.

    The model itself is changed: the modules whose methods contain such a chain get a `forward` of their own
    on the instance. Parameters, state_dict, types, hooks, deepcopy, pickling and training go on as before,
    and `restore(model)` takes everything off again. `explain(model)` says what was done and why the rest was
    not.

    Without example inputs, every chain is fused of which it can be shown that nothing else reads the values
    between. With them, each of those, and each lone convolution, is verified and timed in the running model,
    and kept only where it is faster, separately for inference and for training.

    Args:
        model: any module. Optimise before torch.compile, torch.export, DDP or FSDP.
        example_inputs: a tensor, a sequence of positional arguments, or a mapping of keyword arguments.
        dtype: torch.bfloat16 lets kernels that are bound by the bytes of their weights read them rounded to
            it, in inference alone; sums stay in float32 and the parameters as they are.
        seconds: about how long to spend on timing.
    """
    _check_model("optimize", model)
    if example_inputs is not None and not isinstance(example_inputs, (Tensor, list, tuple, Mapping)):
        raise TypeError(
            "optimize: example_inputs must be a tensor, a tuple or list of positional arguments, or a dict "
            f"of keyword arguments for the model; got {type(example_inputs).__name__}."
        )
    if dtype not in (None, torch.bfloat16):
        raise ValueError(
            f"optimize: dtype must be None or torch.bfloat16, to which weights are rounded; got {dtype}."
        )
    if seconds < 0:
        raise ValueError(f"optimize: seconds, for timing, must be at least 0; got {seconds}.")
    plan = make_plan(model, PATTERNS)
    if example_inputs is None:
        known = _sites(plan)
        rejected = {
            identity for identity, outcome in model.__dict__.get(REPORT, {}).items() if outcome.refusal
        }
        chosen = {
            c.identity: known.get(c.identity) or Site(c.pattern, training=c.match.trains)
            for c in plan.candidates
            if c.identity in known or (c.match.enabled and c.identity not in rejected)
        }
        for site in chosen.values():
            site.weight_dtype = dtype
        _bind(plan, chosen)
        return model
    restore(model)
    every = {c.identity: Site(c.pattern, weight_dtype=dtype, measured=True) for c in plan.candidates}
    try:
        model.__dict__[REPORT] = _measured(model, plan, every, Examples.of(example_inputs), seconds)
    except BaseException:  # the model's own error, or an interruption
        _unbind(model)
        raise
    return model


def _measured(
    model: nn.Module, plan: Plan, sites: dict[Identity, Site], examples: Examples, seconds: float
) -> dict[Identity, Outcome]:
    """Binds the sites that pay, and returns what was found of each."""
    _bind(plan, sites)
    outcomes = try_sites(model, list(sites.values()), examples, seconds)
    report = {identity: outcomes[id(site)] for identity, site in sites.items()}
    _unbind(model)
    paying = {identity: site for identity, site in sites.items() if site.inference or site.training}
    for identity in sites.keys() - paying.keys():
        report[identity].refusal = report[identity].refusal or "the model's own calls are as fast, or faster"
    if paying:
        methods = _bind(plan, paying)  # once: rewriting them anew would be timed too

        def put() -> None:
            for method in methods:
                method.bind()

        def take() -> None:
            for method in methods:
                method.unbind()

        whole = WholeModel(model, examples, put, take)
        reason = whole.differs(next(iter(paying.values())).weight_dtype)
        kept = {} if reason else paying
        for kind, slower in (("inference", whole.slower), ("training", whole.slower_training)):
            if any(getattr(site, kind) for site in kept.values()):
                loss = slower(seconds / 4)
                if loss is not None:
                    reason = reason or loss
                    for site in kept.values():
                        setattr(site, kind, False)
        kept = {identity: site for identity, site in kept.items() if site.inference or site.training}
        take()
        _bind(plan, kept)
        for identity in paying.keys() - kept.keys():
            report[identity].refusal = reason
    return report


def restore(model: Model) -> Model:
    """Takes off everything that optimize() put on the model or on a part of it; a model without is left as it
    is."""
    _check_model("restore", model)
    _unbind(model)
    for module in model.modules():
        module.__dict__.pop(REPORT, None)
    return model


def explain(model: nn.Module) -> Explanation:
    """What optimize() has done, or would do, with each module it has a fused op for, and why not with the
    others.

    Print it for a table, or look at its `rows`. Which kernel runs a site is known once the model has been
    called.
    """
    _check_model("explain", model)
    plan = make_plan(model, PATTERNS)
    sites = _sites(plan)
    outcomes: dict[Identity, Outcome] = model.__dict__.get(REPORT, {})
    rows = [_row(c, sites.get(c.identity), outcomes.get(c.identity)) for c in plan.candidates]
    rows += [Row(r.name or "(the model)", r.text, "", False, "", r.reason) for r in plan.refused]
    own = sum(type(module).__module__.startswith("interfuse.nn.") for module in model.modules())
    return Explanation(type(model).__name__, rows, own)


def _row(c: Candidate, site: Site | None, outcome: Outcome | None) -> Row:
    times = (outcome.inference, outcome.training) if outcome is not None else (None, None)

    def left(reason: str, why_not: tuple[str, ...] = ()) -> Row:
        return Row(c.name, c.match.text, c.where, False, "", reason, why_not, *times)

    if site is None:
        if outcome is not None and outcome.refusal:
            return left(outcome.refusal)
        return left("optimize() has not been called" if c.match.enabled else c.match.reason)
    bound = c.owner.__dict__[c.method]
    stopped = bound.why_stopped() if isinstance(bound, RewrittenMethod) else None
    if bound.lengths[c.key] > c.match.length:
        stopped = c.match.reason
    if stopped:
        return left(stopped)
    kernel: str | None = "kernel chosen at the first call"
    why_not: tuple[str, ...] = ()
    if site.seen is not None:
        kernel, why_not = c.pattern.kernel(site.seen)
        better_left = site.rather_not()
        if kernel is not None and better_left is not None:
            return left(better_left, why_not)
    elif site.declined:
        return left("what it was called with is not what the kernels take")
    if kernel is None:
        return left("no kernel takes it", why_not)
    only = ""
    if not (site.inference and site.training):
        only = "in inference only" if site.inference else "in training only"
    return Row(c.name, c.match.text, c.where, True, kernel, only, why_not, *times)


def _sites(plan: Plan) -> dict[Identity, Site]:
    """The sites that stand in the model now, as the plan names them."""
    found: dict[Identity, Site] = {}
    for c in plan.candidates:
        bound = c.owner.__dict__.get(c.method)
        if isinstance(bound, Bound) and c.key in bound.sites:
            found[c.identity] = bound.sites[c.key]
    return found


def _bind(plan: Plan, sites: Mapping[Identity, Site]) -> list[Bound]:
    """Puts methods with these sites on their owners."""
    made: list[Bound] = []
    methods: dict[tuple[int, str], list[Candidate]] = {}
    for c in plan.candidates:
        if c.identity in sites:
            methods.setdefault((id(c.owner), c.method), []).append(c)
    for group in methods.values():
        owner, method = group[0].owner, group[0].method
        mine: dict[Any, Site] = {c.key: sites[c.identity] for c in group}
        lengths: dict[Any, int] = {c.key: c.match.length for c in group}
        if group[0].key is WHOLE:
            made.append(ModuleForward(owner, mine[WHOLE]))
        elif isinstance(group[0].key, str):
            made.append(SequentialForward(owner, lengths, mine))
        else:
            made.append(RewrittenMethod(owner, method, lengths, mine))
    for bound in made:
        bound.bind()
    return made


def _unbind(model: nn.Module) -> None:
    for module in model.modules():
        for bound in bound_methods(module):
            del module.__dict__[bound.method]


def _check_model(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: the model must be a torch.nn.Module; got {type(model).__name__}.")
