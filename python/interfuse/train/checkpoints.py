"""Checkpoints: everything that the next step depends on, in one file that is either whole or not there."""

from __future__ import annotations

import os
import pathlib
import pickle
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import nn

FORMAT = 2


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
        "random": _random_states(),
        **progress,
    }
    path = pathlib.Path(path)
    # Always of the same name: what a killed process leaves of it is overwritten by the next one.
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            torch.save(whole, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | pathlib.Path, state: State) -> dict[str, Any] | None:
    """Puts everything back and returns the rest; None where there is no such file."""
    path = pathlib.Path(path)
    if not path.exists():
        return None
    try:
        whole: Any = torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is no checkpoint of interfuse.train: it cannot be read.") from error
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of interfuse.train, or one of another version.")
    if whole["settings"] != state.settings:
        raise ValueError(
            f"{path} is of a training with {whole['settings']}, and this one has {state.settings}: it cannot "
            "go on from there. Take the same settings, or another file."
        )
    theirs, ours = ({k: getattr(v, "shape", None) for k, v in d.items()}
                    for d in (whole["model"], state.model.state_dict()))  # fmt: skip
    different = [name for name in {**theirs, **ours} if theirs.get(name, 0) != ours.get(name, 0)]
    if different:
        raise ValueError(
            f"{path} is of another model: {different[0]} is not the same there. Make the model as it was, or "
            "take another file."
        )
    state.model.load_state_dict(whole["model"])
    state.optimizer.load_state_dict(whole["optimizer"])
    if state.scheduler is not None:
        state.scheduler.load_state_dict(whole["scheduler"])
    _set_random_states(whole["random"])
    return whole


def _random_states() -> dict[str, Any]:
    """Torch's, and those of Python and NumPy, which a loss of one's own may draw from."""
    state: Any = np.random.get_state()  # noqa: NPY002 (the global one)
    kind, keys, *rest = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
