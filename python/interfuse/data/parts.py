"""One modality each: inputs that show which of `kinds` kinds a sample is, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

WORDS_A_KIND = 3  # synonyms
FRAMES_A_TURN = 8


def pictures(kind: Tensor, kinds: int, size: int, draw: torch.Generator, noise: float = 0.3) -> Tensor:
    """(samples, 3, size, size): stripes whose direction is the kind, of any phase and colour, and noise."""
    samples = len(kind)
    angle = kind.float() * (torch.pi / kinds)
    line = torch.arange(size, dtype=torch.float32)
    along = (
        line[None, None, :] * torch.cos(angle)[:, None, None]
        + line[None, :, None] * torch.sin(angle)[:, None, None]
    )
    phase = torch.rand(samples, 1, 1, generator=draw) * 2 * torch.pi
    stripes = torch.sin(along * 1.6 + phase)
    colour = 0.5 + torch.rand(samples, 3, 1, 1, generator=draw)
    return stripes[:, None] * colour + noise * torch.randn(samples, 3, size, size, generator=draw)


def sentences(
    kind: Tensor, kinds: int, steps: int, vocabulary: int, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(samples, steps) ids and their lengths: words of the kind, among as many that mean nothing."""
    samples = len(kind)
    filler = kinds * WORDS_A_KIND + 1
    if vocabulary <= filler:
        raise ValueError(f"{kinds} kinds of words need a vocabulary of more than {filler}; got {vocabulary}.")
    nothing = torch.randint(filler, vocabulary, (samples, steps), generator=draw)
    word = 1 + kind[:, None] * WORDS_A_KIND + torch.randint(WORDS_A_KIND, (samples, steps), generator=draw)
    counts = torch.rand(samples, steps, generator=draw) < 0.5
    lengths = torch.randint(max(1, steps // 2), steps + 1, (samples,), generator=draw)
    surely = (torch.rand(samples, generator=draw) * lengths).long()  # so that there is one at least
    counts[torch.arange(samples), surely] = True
    ids = torch.where(counts, word, nothing)
    ids[torch.arange(steps) >= lengths[:, None]] = 0
    return ids, lengths


def sounds(
    kind: Tensor, kinds: int, steps: int, features: int, draw: torch.Generator, noise: float = 0.3
) -> tuple[Tensor, Tensor]:
    """(samples, steps, features) and their lengths: a tone that swells in the kind's band, and noise."""
    samples, width = len(kind), features // kinds
    if width < 1:
        raise ValueError(f"{kinds} kinds of sounds need at least as many features; got {features}.")
    lengths = torch.randint(max(1, steps // 2), steps + 1, (samples,), generator=draw)
    rate = 0.3 + 0.5 * torch.rand(samples, 1, generator=draw)
    loudness = torch.sin(torch.arange(steps) * rate).square()
    band = torch.arange(features)[None] // width == kind[:, None]
    x = loudness[:, :, None] * band[:, None] + noise * torch.randn(samples, steps, features, generator=draw)
    x[torch.arange(steps) >= lengths[:, None]] = 0.0
    return x, lengths


def films(kind: Tensor, frames: int, size: int, draw: torch.Generator, noise: float = 0.3) -> Tensor:
    """(samples, 3, frames, size, size): stripes that drift right, left, down or up, which is the kind.

    A single frame does not tell right from left, nor down from up.
    """
    samples = len(kind)
    sign = 1.0 - 2.0 * (kind % 2)
    line = torch.arange(size, dtype=torch.float32)
    across = torch.where((kind < 2)[:, None, None], line[None, None, :], line[None, :, None])
    turn = sign[:, None] * torch.arange(frames) * (2 * torch.pi / FRAMES_A_TURN)
    phase = torch.rand(samples, 1, generator=draw) * 2 * torch.pi + turn
    stripes = torch.sin(across[:, None] * 1.2 - phase[:, :, None, None])
    colour = 0.5 + torch.rand(samples, 3, 1, 1, 1, generator=draw)
    return stripes[:, None] * colour + noise * torch.randn(samples, 3, frames, size, size, generator=draw)
