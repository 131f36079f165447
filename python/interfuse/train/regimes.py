"""Which parts of a model learn in which epoch."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

REGIMES = ("simultaneous", "serial", "mixed")


def parts_of(model: nn.Module) -> list[str]:
    """The children that can learn, by name; those of a ModuleList one by one."""
    names: list[str] = []
    for name, child in model.named_children():
        within = isinstance(child, nn.ModuleList)
        members = [(f"{name}.{i}", c) for i, c in child.named_children()] if within else [(name, child)]
        names += [member for member, module in members if _can_learn(module)]
    return names


def _can_learn(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


class Regime:
    """The parts that learn in each epoch of a training."""

    def __init__(self, model: nn.Module, kind: str, parts: Sequence[str] | None, epochs: int) -> None:
        if kind not in REGIMES:
            raise ValueError(f"regime must be one of {', '.join(REGIMES)}; got {kind!r}.")
        self._model, self._kind = model, kind
        self._parts = parts_of(model) if parts is None else list(parts)
        known = {name for name, _ in model.named_modules()}
        unknown = [name for name in self._parts if name not in known]
        if unknown:
            raise ValueError(
                f"parts are names of the model's modules, as {', '.join(parts_of(model))}; got "
                f"{unknown[0]!r}."
            )
        frozen = [name for name in self._parts if not _can_learn(model.get_submodule(name))]
        if frozen:
            raise ValueError(
                f"every part must have something to learn; {frozen[0]!r} is frozen, or has none."
            )
        self._alone = {"simultaneous": 0, "serial": epochs, "mixed": epochs // 2}[kind]
        if kind != "simultaneous" and not 0 < len(self._parts) <= self._alone:
            raise ValueError(
                f"{kind} training of {len(self._parts)} parts ({', '.join(self._parts)}) needs an epoch for "
                f"each in its serial part, which has {self._alone} here. Raise epochs, or name fewer parts."
            )

    def name(self, epoch: int) -> str:
        """What learns in this epoch, in a word."""
        if epoch >= self._alone:
            return "all"
        return self._parts[epoch * len(self._parts) // self._alone]

    @contextmanager
    def learning(self, epoch: int) -> Iterator[None]:
        """Inside, only what learns in this epoch requires gradients; what was frozen before stays frozen."""
        if epoch >= self._alone:
            yield
            return
        part = self._model.get_submodule(self.name(epoch))
        learns = {id(p) for p in part.parameters()}
        rest = [p for p in self._model.parameters() if p.requires_grad and id(p) not in learns]
        for p in rest:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in rest:
                p.requires_grad_(True)
