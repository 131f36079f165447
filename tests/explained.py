"""What optimize() says of a model, by site."""

from __future__ import annotations

from typing import TYPE_CHECKING

import interfuse

if TYPE_CHECKING:
    from torch import nn


def rows(model: nn.Module) -> dict[str, interfuse.optimize.Row]:
    return {row.site: row for row in interfuse.explain(model).rows}
