"""Checkpoints: everything that the next step depends on, in one file that is either whole or not there."""

from __future__ import annotations

import os
import pathlib
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1


@dataclass(frozen=True)
class State:
    """What is saved and loaded; `settings` must be the same when training goes on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    settings: dict[str, Any]


def save(path: str | pathlib.Path, state: State, **progress: Any) -> None:
    """Writes beside the file first, and renames: a crash leaves the file before, or this one, never half."""
    whole = {
        "format": FORMAT,
        "settings": state.settings,
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": None if state.scheduler is None else state.scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        **progress,
    }
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(whole, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: str | pathlib.Path, state: State) -> dict[str, Any] | None:
    """Puts everything back and returns the rest; None where there is no such file."""
    path = pathlib.Path(path)
    if not path.exists():
        return None
    whole: dict[str, Any] = torch.load(path, weights_only=True)
    if whole.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of interfuse.train, or one of another version.")
    if whole["settings"] != state.settings:
        raise ValueError(
            f"{path} is of a training with {whole['settings']}, and this one has {state.settings}: it cannot "
            "go on from there. Take the same settings, or another file."
        )
    if (whole["scheduler"] is None) != (state.scheduler is None):
        raise ValueError(f"{path} was written {'without' if state.scheduler else 'with'} a scheduler.")
    state.model.load_state_dict(whole["model"])
    state.optimizer.load_state_dict(whole["optimizer"])
    if state.scheduler is not None:
        state.scheduler.load_state_dict(whole["scheduler"])
    torch.set_rng_state(whole["random"])
    if whole["random_cuda"]:
        torch.cuda.set_rng_state_all(whole["random_cuda"])
    return whole
