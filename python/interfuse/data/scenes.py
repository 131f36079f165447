"""Captions of drawn scenes: two coloured shapes, lying or standing, and where they are to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from interfuse.data.samples import Samples

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}
SHAPES = ("bar", "post")
RELATIONS = ("beside", "above")
WORDS = ("<pad>", "<start>", "<end>", "a", *COLOURS, *SHAPES, *RELATIONS)  # as MultimodalAutoencoder has them
LIGHT = 3.0  # of a shape; makes the variance of a picture about 1, since most of it is dark
STEPS = 9  # <start> a red post beside a blue bar <end>


def scenes(samples: int, *, size: int = 32, noise: float = 0.1, seed: int = 0) -> Samples:
    """Pictures (samples, 3, size, size), and as labels their captions' ids (samples, STEPS), of the
    vocabulary WORDS. The first shape is the left or the upper one."""
    if samples < 1 or size < 16:
        raise ValueError(f"scenes needs at least 1 sample and a size of 16; got {samples} and {size}.")
    draw = torch.Generator().manual_seed(seed)

    def any_of(count: int) -> list[int]:
        return torch.randint(count, (samples,), generator=draw).tolist()

    colours = list(zip(any_of(len(COLOURS)), any_of(len(COLOURS)), strict=True))
    shapes = list(zip(any_of(len(SHAPES)), any_of(len(SHAPES)), strict=True))
    relations = any_of(len(RELATIONS))
    shift = torch.randint(-1, 2, (samples, 2, 2), generator=draw).tolist()
    image = noise * torch.randn(samples, 3, size, size, generator=draw)
    drawn = [shape_mask(shape, 3 * size // 8) for shape in SHAPES]
    named, captions = list(COLOURS), []
    for i, relation in enumerate(relations):
        words = ["<start>"]
        for k in (0, 1):
            colour, shape = colours[i][k], shapes[i][k]
            near, middle = size // 4 + k * size // 2, size // 2
            row, column = (middle, near) if relation == 0 else (near, middle)
            _paint(image[i], drawn[shape], row + shift[i][k][0], column + shift[i][k][1], named[colour])
            words += ["a", named[colour], SHAPES[shape], *((RELATIONS[relation],) if k == 0 else ())]
        captions.append([WORDS.index(word) for word in [*words, "<end>"]])
    return Samples((image,), torch.tensor(captions), ("image",), len(WORDS), {})


def shape_mask(shape: str, size: int) -> Tensor:
    line = torch.arange(size) - (size - 1) / 2
    across, down = line.abs()[None, :], line.abs()[:, None]
    thin = (down if shape == "bar" else across) < size / 6
    return thin.expand(size, size)


def _paint(image: Tensor, mask: Tensor, row: int, column: int, colour: str) -> None:
    size = mask.shape[0]
    top, left = row - size // 2, column - size // 2
    part = image[:, top : top + size, left : left + size]
    part[:, mask] += LIGHT * torch.tensor(COLOURS[colour])[:, None]


def sentence(ids: Tensor) -> str:
    """The words of one caption, up to <end>."""
    words = [WORDS[i] for i in ids.tolist()]
    words = words[: words.index("<end>")] if "<end>" in words else words
    return " ".join(word for word in words if word not in ("<pad>", "<start>"))
