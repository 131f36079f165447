"""Tasks that no modality decides alone.

Each modality shows one number, and the label is the sum of all, modulo the number of classes. Whatever all
but one of them show, every label is equally likely.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from interfuse.data import parts
from interfuse.data.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

MOST = 4  # the kinds of pictures and films


def _check(samples: int, classes: int) -> None:
    if samples < 1:
        raise ValueError(f"samples must be at least 1; got {samples}.")
    if not 2 <= classes <= MOST:
        raise ValueError(f"classes must be from 2 to {MOST}, as there are kinds of pictures; got {classes}.")


def image_text(
    samples: int,
    *,
    classes: int = 2,
    size: int = 24,
    steps: int = 12,
    vocabulary: int = 64,
    seed: int = 0,
) -> Samples:
    """Striped pictures and sentences with one word that counts: inputs image and text, named lengths."""
    _check(samples, classes)
    draw = torch.Generator().manual_seed(seed)
    shown, said = torch.randint(classes, (2, samples), generator=draw)
    image = parts.pictures(shown, classes, size, draw)
    text, lengths = parts.sentences(said, classes, steps, vocabulary, draw)
    return Samples((image, text), (shown + said) % classes, ("image", "text"), classes, {"lengths": lengths})


def video_audio(
    samples: int,
    *,
    classes: int = 2,
    frames: int = 22,
    size: int = 22,
    steps: int = 20,
    features: int = 8,
    seed: int = 0,
) -> Samples:
    """Films of drifting stripes and sounds in one band: inputs video and audio, named lengths."""
    _check(samples, classes)
    draw = torch.Generator().manual_seed(seed)
    shown, heard = torch.randint(classes, (2, samples), generator=draw)
    video = parts.films(shown, frames, size, draw)
    audio, lengths = parts.sounds(heard, classes, steps, features, draw)
    return Samples(
        (video, audio), (shown + heard) % classes, ("video", "audio"), classes, {"lengths": lengths}
    )


def image_text_audio(
    samples: int,
    *,
    classes: int = 2,
    size: int = 24,
    steps: int = 12,
    vocabulary: int = 64,
    features: int = 8,
    metadata: bool = False,
    seed: int = 0,
) -> Samples:
    """Three numbers, of which no two decide: inputs image, text and audio, named lengths (of the last two).

    With `metadata`, the category of named semantics adds a fourth; named position and time say nothing.
    """
    _check(samples, classes)
    draw = torch.Generator().manual_seed(seed)
    shown, said, heard, about = torch.randint(classes, (4, samples), generator=draw)
    image = parts.pictures(shown, classes, size, draw)
    text, text_lengths = parts.sentences(said, classes, steps, vocabulary, draw)
    audio, audio_lengths = parts.sounds(heard, classes, steps, features, draw)
    named: Mapping[str, Tensor | tuple[Tensor, ...]] = {"lengths": (text_lengths, audio_lengths)}
    label = shown + said + heard
    if metadata:
        label = label + about
        position, time = torch.rand(samples, 2, generator=draw), torch.rand(samples, generator=draw)
        named = {"position": position, "semantics": about, "time": time, **named}
    return Samples((image, text, audio), label % classes, ("image", "text", "audio"), classes, named)


def matching(
    samples: int,
    *,
    kinds: int = 4,
    size: int = 24,
    steps: int = 12,
    vocabulary: int = 64,
    seed: int = 0,
) -> Samples:
    """Does the sentence name what the picture shows? Label 1 where it does, which is half of the time: for
    siamese networks and retrieval. Inputs image and text, named lengths."""
    _check(samples, kinds)
    draw = torch.Generator().manual_seed(seed)
    shown = torch.randint(kinds, (samples,), generator=draw)
    other = (shown + torch.randint(1, kinds, (samples,), generator=draw)) % kinds
    same = torch.randint(2, (samples,), generator=draw)
    image = parts.pictures(shown, kinds, size, draw)
    text, lengths = parts.sentences(torch.where(same == 1, shown, other), kinds, steps, vocabulary, draw)
    return Samples((image, text), same, ("image", "text"), 2, {"lengths": lengths})
