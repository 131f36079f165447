"""Trained encoders in other models: moved, frozen, thawed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Transfer:
    """What became of each of the target's parameters, by name; `left` with the reason."""

    copied: list[str] = field(default_factory=list)
    inflated: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def transfer(source: nn.Module, target: nn.Module) -> Transfer:
    """Moves the weights of a trained encoder into another modality's, by name, and says which.

    Where shapes agree they are copied: an image encoder becomes one of spectrograms, a text encoder's
    recurrent layers become those of audio. A two-dimensional kernel becomes a three-dimensional one by
    repetition along the frames, divided by their number, so that a video of one picture that stands still
    gives what the picture gave. What does not fit stays as it was.
    """
    given = dict(source.named_parameters())
    done = Transfer()
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if name not in given:
                done.left[name] = "the source has no parameter of this name"
                continue
            value = given[name]
            if value.shape == parameter.shape:
                parameter.copy_(value)
                done.copied.append(name)
            elif _is_inflated(value, parameter):
                frames = parameter.shape[2]
                parameter.copy_((value / frames).unsqueeze(2).expand_as(parameter))
                done.inflated.append(name)
            else:
                done.left[name] = f"the source's is {tuple(value.shape)}, this one {tuple(parameter.shape)}"
    if not done.copied and not done.inflated:
        raise ValueError(
            "nothing of the source fits the target: no parameter has the same name and shape. Pass the two "
            "encoders themselves, not the models around them."
        )
    return done


def _is_inflated(value: Tensor, parameter: Tensor) -> bool:
    """Whether a convolution's weight has one more dimension, the frames, behind the channels."""
    return (
        value.dim() >= 3
        and parameter.dim() == value.dim() + 1
        and parameter.shape[:2] == value.shape[:2]
        and parameter.shape[3:] == value.shape[2:]
    )


def freeze(module: nn.Module) -> None:
    """Its parameters stay as they are in training."""
    module.requires_grad_(False)


def thaw(module: nn.Module) -> None:
    """Its parameters learn again."""
    module.requires_grad_(True)
