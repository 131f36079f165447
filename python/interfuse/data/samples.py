"""What a data set is here: tensors by the names of a model's arguments, and the labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """`inputs` in the order of a model's positional arguments, `named` for its keyword arguments, `labels`
    (samples,) or whatever the loss takes. `names` are the inputs'; `classes` counts the labels' values."""

    inputs: tuple[Tensor, ...]
    labels: Tensor
    names: tuple[str, ...]
    classes: int
    named: Mapping[str, Tensor | tuple[Tensor, ...]]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> Samples:
        named = {
            name: tuple(t[rows] for t in value) if isinstance(value, tuple) else value[rows]
            for name, value in self.named.items()
        }
        return replace(
            self, inputs=tuple(x[rows] for x in self.inputs), labels=self.labels[rows], named=named
        )

    def only(self, *names: str) -> Samples:
        """These inputs alone, for a model of fewer modalities; `lengths` go with those that have some."""
        unknown = set(names) - set(self.names)
        if unknown:
            raise ValueError(
                f"there are the inputs {', '.join(self.names)}; got {', '.join(sorted(unknown))}."
            )
        places = [self.names.index(name) for name in names]
        lengths = {
            name: value
            for name, value in zip(_sequences(self.names), _as_tuple(self.named.get("lengths")), strict=False)
            if name in names
        }
        kept: dict[str, Tensor | tuple[Tensor, ...]] = {}
        if len(lengths) == 1:
            kept["lengths"] = next(iter(lengths.values()))
        elif lengths:
            kept["lengths"] = tuple(lengths[name] for name in names if name in lengths)
        return replace(self, inputs=tuple(self.inputs[i] for i in places), names=names, named=kept)

    def split(self, first: int) -> tuple[Samples, Samples]:
        """The first so many samples, and the rest."""
        if not 0 < first < len(self):
            raise ValueError(f"a split of {len(self)} samples needs at least one on each side; got {first}.")
        return self[:first], self[first:]


SEQUENCES = ("text", "audio")


def _sequences(names: Sequence[str]) -> list[str]:
    return [name for name in names if name in SEQUENCES]


def _as_tuple(value: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    return () if value is None else (value,) if isinstance(value, torch.Tensor) else value
