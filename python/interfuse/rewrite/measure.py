"""Verifies and times the sites of a model while it runs on example inputs.

Each site is tried at the moment the model reaches it, on the value it is given there: the plain calls and the
fused call are run side by side, compared with each other and with float64, and timed in turns. So every site
meets the shapes, strides and settings that it will meet in use, and only one site's tensors are held at a
time. Then the model as a whole is compared and timed, with and without what was put on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from interfuse.rewrite.site import Call, LiveLink, Site, run_plainly, wants_gradient

# What rounding may do, in relative Frobenius norm against float64, where torch's own error is smaller.
# float32 may go through Winograd. In gradients a maximum may win over another that equals it but for
# rounding, which moves whole entries.
VALUE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}
# The model must take less than this share of its own time; a site, with IN_A_MODEL added to each call, of
# the plain calls'.
FASTER = 0.98
# Seconds that a call takes more in a model than where it is timed: between two calls there, Python's code for
# it leaves the caches. Measured 8 to 15 us in inference, and in training 30 and more.
IN_A_MODEL = {"inference": 10e-6, "training": 30e-6}


@dataclass
class Outcome:
    """What was measured at one site, summed over its calls in one run of the model. Times in seconds."""

    calls: int = 0
    inference: tuple[float, float] | None = None  # plain, fused
    training: tuple[float, float] | None = None
    error: float = 0.0  # largest relative error against float64
    refusal: str | None = None

    def add(self, kind: str, plain: float, fused: float) -> None:
        before = getattr(self, kind) or (0.0, 0.0)
        setattr(self, kind, (before[0] + plain, before[1] + fused))

    def faster(self, kind: str) -> bool:
        times = getattr(self, kind)
        if self.refusal is not None or times is None:
            return False
        return times[1] + self.calls * IN_A_MODEL[kind] < FASTER * times[0]


@dataclass
class Examples:
    """Example inputs as a call of the model. Cloned for every call, since a model may write to its inputs."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(inputs: Any) -> Examples:
        if isinstance(inputs, Mapping):
            return Examples(kwargs=inputs)
        return Examples(args=tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,))

    def run(self, model: nn.Module) -> Any:
        def fresh(t: Any) -> Any:
            return t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

        return model(*tree_map(fresh, self.args), **tree_map(fresh, dict(self.kwargs)))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts buffers (running statistics) and the random state back to what they were."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)


class TrySite:
    """A trial for a site (see Site.trial): measures, then gives the model what the plain calls give."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.outcomes: dict[int, Outcome] = {}
        self.within = False  # a site that is being measured, whose plain calls may hold sites of their own

    def __call__(self, site: Site, links: Sequence[LiveLink], value: Any) -> Any:
        if self.within:
            return self._as_found(site, links, value)
        result = run_plainly(links, value)  # first, so that a site inside it is known
        self.within = True
        try:
            self._measure(site, links, value)
        finally:
            self.within = False
        return result

    def _as_found(self, site: Site, links: Sequence[LiveLink], value: Any) -> Any:
        """What a site does as far as it has been measured."""
        outcome = self.outcomes.get(id(site), Outcome())
        call = site.pattern.prepare(links, value)
        if call is None:
            return run_plainly(links, value)
        gradient = wants_gradient(call)
        if not outcome.faster("training" if gradient else "inference"):
            return run_plainly(links, value)
        return site.run(call, gradient)

    def _measure(self, site: Site, links: Sequence[LiveLink], value: Any) -> None:
        outcome = self.outcomes.setdefault(id(site), Outcome())
        call = site.pattern.prepare(links, value)
        if call is None:  # in a loop over modules, others of its calls may be
            return
        outcome.calls += 1
        trained = wants_gradient(call)
        if trained and not site.serves(call, True):
            trained = False  # torch's own functions train faster; the kernel may still pay in inference
        with torch.set_grad_enabled(trained):
            if not site.serves(call, trained):
                outcome.refusal = "no kernel takes it: " + " ".join(site.pattern.kernel(site.seen)[1])
            if not outcome.refusal:
                calm_links, call = _on_leaves(*site.pattern.calm(links, call))
                outcome.refusal = self._differs(site, calm_links, call, outcome)
                if outcome.refusal is None:
                    self._time(site, calm_links, call, outcome)

    def _differs(self, site: Site, links: Sequence[LiveLink], call: Call, outcome: Outcome) -> str | None:
        leaves = call.tensors
        exact_leaves = {id(t): _exact_leaf(t) for t in leaves if t is not None}
        double = call._replace(tensors=tuple(exact_leaves.get(id(t)) for t in leaves))
        plain = tensors_of(run_plainly(links, call.wrap(leaves)))
        fused, truth = tensors_of(site.pattern.run(call)), tensors_of(site.pattern.run(double))
        for own, mine, exact in zip(plain, fused, truth, strict=True):
            # A module may give a contiguous tensor in the place of a transposed one; a chain keeps the
            # layout, which the model's next layers go by.
            laid_out = mine.stride() == own.stride() or (site.pattern.whole and mine.is_contiguous())
            if mine.shape != own.shape or mine.dtype != own.dtype or not laid_out:
                return (
                    f"the kernel gives {_form(mine)} where the model gives {_form(own)}, which later code "
                    "could notice"
                )
            ours, theirs = relative_error(mine, exact), relative_error(own, exact)
            outcome.error = max(outcome.error, ours)
            if ours > max(2 * theirs, VALUE_TOLERANCE[own.dtype]):
                return f"its error against float64 is {ours:.1e}, the model's own {theirs:.1e}"
        coarse = site.rounded(call)
        if coarse is not call:
            with torch.no_grad():
                rounded = tensors_of(site.pattern.run(coarse))
            ours = max(map(relative_error, rounded, truth))
            outcome.error = max(outcome.error, ours)
            if ours > VALUE_TOLERANCE[torch.bfloat16]:
                return f"its error against float64 is {ours:.1e} with weights rounded to {site.weight_dtype}"
        wanted = [i for i, t in enumerate(leaves) if t is not None and t.requires_grad]
        if not wanted or not torch.is_grad_enabled():
            return None
        grads = [torch.randn_like(t) for t in plain]
        tolerance = GRADIENT_TOLERANCE[plain[0].dtype]
        for mine, own, exact in zip(
            _gradients(fused, leaves, wanted, grads),
            _gradients(plain, leaves, wanted, grads),
            _gradients(truth, double.tensors, wanted, [grad.double() for grad in grads]),
            strict=True,
        ):
            ours, theirs = relative_error(mine, exact), relative_error(own, exact)
            if ours > max(2 * theirs, tolerance):
                return f"its gradient's error against float64 is {ours:.1e}, the model's own {theirs:.1e}"
        return None

    def _time(self, site: Site, links: Sequence[LiveLink], call: Call, outcome: Outcome) -> None:
        value = call.tensors[0]

        def fused(gradient: bool) -> Any:
            """With what a site does before the call."""
            made = site.pattern.prepare(links, call.wrap(call.tensors)) or call
            return site.run(made, gradient)

        with torch.no_grad():
            outcome.add(
                "inference",
                *in_turns(
                    lambda: run_plainly(links, call.wrap(call.tensors)),
                    lambda: fused(gradient=False),
                    self.seconds,
                    value,
                ),
            )
        if not wants_gradient(call):
            return
        leaves = call.tensors
        wanted = [i for i, t in enumerate(leaves) if t is not None and t.requires_grad]

        def plain() -> Any:
            return tensors_of(run_plainly(links, call.wrap(leaves)))

        grads = [torch.ones_like(t) for t in plain()]
        outcome.add(
            "training",
            *in_turns(
                lambda: _gradients(plain(), leaves, wanted, grads),
                lambda: _gradients(tensors_of(fused(gradient=True)), leaves, wanted, grads),
                self.seconds,
                value,
            ),
        )


def _on_leaves(links: Sequence[LiveLink], call: Call) -> tuple[Sequence[LiveLink], Call]:
    """Both on leaves of their own in the place of what the model computed. Gradients end there: they neither
    take the time of what came before, nor free its graph. A tensor that is given twice stays one."""
    handed = [call.wrap(call.tensors), *(arguments for _, *arguments in links)]
    given = [call.tensors[0], *tree_leaves(handed)]
    leaves = {id(t): t.detach().requires_grad_(t.requires_grad) for t in given if isinstance(t, Tensor)}

    def leaf(t: Any) -> Any:
        return leaves.get(id(t), t)

    moved = [(callee, *tree_map(leaf, arguments)) for callee, *arguments in links]
    return moved, call._replace(tensors=tuple(map(leaf, call.tensors)))


def _exact_leaf(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t
    return t.detach().double().requires_grad_(t.requires_grad)


def _gradients(
    ys: Sequence[Tensor], leaves: Sequence[Tensor | None], wanted: Sequence[int], grads: Sequence[Tensor]
) -> Sequence[Tensor]:
    return torch.autograd.grad(ys, [t for i in wanted if (t := leaves[i]) is not None], grads)


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors that a call gave, alone or in a structure."""
    leaves = (leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in tree_leaves(output))
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _form(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} with strides {t.stride()}"


def relative_error(got: Tensor, exact: Tensor) -> float:
    """In the Frobenius norm, over the finite entries; infinite where the two are not finite in the same
    places."""
    got, exact = got.detach().double(), exact.detach().double()
    finite = exact.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return float("inf")
    got, exact = got[finite], exact[finite]
    scale = exact.norm().item()
    difference = (got - exact).norm().item()
    return difference / scale if scale else difference


def in_turns(
    plain: Callable[[], object], fused: Callable[[], object], seconds: float, like: Tensor | None
) -> tuple[float, float]:
    """Median times of two ways to do the same, run alternately so that both meet the same disturbances."""
    device = like.device if like is not None else torch.device("cpu")
    for _ in range(2):
        timed(plain, device)
        timed(fused, device)
    pairs: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(pairs) < 5 or (time.perf_counter() - start < seconds and len(pairs) < 200):
        pairs.append((timed(plain, device), timed(fused, device)))
    return median(p for p, _ in pairs), median(f for _, f in pairs)


def timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def try_sites(
    model: nn.Module, sites: Sequence[Site], examples: Examples, seconds: float
) -> dict[int, Outcome]:
    """Runs the model once, measuring every site on the way; sets what each site may do; gives what was
    found."""
    trial = TrySite(seconds / max(1, 2 * len(sites)))
    for site in sites:
        site.trial = trial
    try:
        with undisturbed(model), torch.enable_grad():
            examples.run(model)
    finally:
        for site in sites:
            site.trial = None
    for site in sites:
        outcome = trial.outcomes.setdefault(id(site), Outcome(refusal="the example inputs did not reach it"))
        if not outcome.calls:
            outcome.refusal = (
                outcome.refusal or "with the example inputs it is not a call that the kernels take"
            )
        site.inference, site.training = outcome.faster("inference"), outcome.faster("training")
    return trial.outcomes


class WholeModel:
    """A model as it is and with what is put on it: are the answers the same, and which is faster."""

    def __init__(
        self, model: nn.Module, examples: Examples, put: Callable[[], None], take: Callable[[], None]
    ):
        self.model, self.examples, self.put, self.take = model, examples, put, take
        tensors = [t for t in tree_leaves((examples.args, dict(examples.kwargs))) if isinstance(t, Tensor)]
        self.like = torch.empty(0, device=tensors[0].device if tensors else "cpu")

    def differs(self, weight_dtype: torch.dtype | None) -> str | None:
        """How the output changes, if by more than rounding explains."""
        with undisturbed(self.model), torch.no_grad():
            plain, again, fused = (
                [t.detach().clone() for t in self._outputs(switch)]
                for switch in (self.take, self.take, self.put)
            )
        for one, two, ours in zip(plain, again, fused, strict=True):
            tolerance = VALUE_TOLERANCE.get(weight_dtype or one.dtype, 0.0)
            error = relative_error(ours, one)
            if error > 10 * tolerance + 2 * relative_error(two, one):
                return f"the model's output changes by {error:.1e} (relative) with the fused sites"
        return None

    def slower(self, seconds: float) -> str | None:
        """Whether inference is, and by how much."""
        with undisturbed(self.model), torch.no_grad():
            return self._timed("", self._outputs, seconds)

    def slower_training(self, seconds: float) -> str | None:
        """Whether forward and backward are."""
        wanted = [p for p in self.model.parameters() if p.requires_grad]

        def step(switch: Callable[[], None]) -> None:
            outputs = [t for t in self._outputs(switch) if t.requires_grad]
            if outputs and wanted:
                grads = [torch.ones_like(t) for t in outputs]
                torch.autograd.grad(outputs, wanted, grads, allow_unused=True)

        with undisturbed(self.model), torch.enable_grad():
            try:
                step(self.take)
            except RuntimeError:  # the model's own, which may not be made to be trained as it is called here
                return None
            try:
                step(self.put)
            except RuntimeError as error:  # code that overwrites what only the fused call keeps
                return f"with the fused sites a training step fails: {str(error).splitlines()[0]}"
            return self._timed(" in training", step, seconds)

    def _outputs(self, switch: Callable[[], None]) -> list[Tensor]:
        switch()
        torch.manual_seed(0)
        return tensors_of(self.examples.run(self.model))

    def _timed(self, mode: str, run: Callable[[Callable[[], None]], object], seconds: float) -> str | None:
        for _ in range(2):  # what others do on the machine meanwhile rarely looks like a loss twice
            before, after = in_turns(lambda: run(self.take), lambda: run(self.put), seconds, self.like)
            if after < FASTER * before:
                return None
        return (
            f"the model as a whole is not faster{mode} with the fused sites ({1e3 * after:.3g} ms against "
            f"{1e3 * before:.3g} ms)"
        )
