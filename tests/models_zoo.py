"""Plain torch models, small but shaped like those that people have, for the tests of optimize().

Each entry of ZOO makes a model and its inputs, and says which chains optimize() should fuse (by the names of
their convolutions, with repetitions), and a part of the reason for some that it should leave alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Entry:
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    fused: list[str]
    left: dict[str, str] = field(default_factory=dict)

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        torch.manual_seed(0)
        return self.make(), self.inputs()


def images(channels: int = 3, size: int = 24, batch: int = 2) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(batch, channels, size, size),)


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(400, 5),
    )


class Functional(nn.Module):
    """The tutorial's net: pool(relu(conv)), and in the second block relu(pool(conv)) with dropout further
    on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.dropout(x, 0.25, self.training)
        x = self.conv3(x)
        x = torch.tanh(x)
        x = F.avg_pool2d(x, 2, ceil_mode=True)
        return self.fc(torch.flatten(x, 1))


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (8, "M", 12, "M", 16, 16, "M"):
            if width == "M":
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(channels, int(width), 3, padding=1), nn.ReLU(inplace=True)]
                channels = int(width)
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(64, 10), nn.ReLU(True), nn.Dropout(), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class C3D(nn.Module):
    """Three dimensions, pooling of different windows, one shared activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 4, 3, padding=1)
        self.pool1 = nn.MaxPool3d((1, 2, 2), (1, 2, 2))
        self.conv2 = nn.Conv3d(4, 6, 3, padding=1)
        self.pool2 = nn.MaxPool3d(2)
        self.conv3a = nn.Conv3d(6, 6, 3, padding=1)
        self.conv3b = nn.Conv3d(6, 6, 3, padding=1)
        self.pool3 = nn.MaxPool3d(2, padding=(0, 1, 1))
        self.fc = nn.Linear(6 * 1 * 3 * 3, 4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.conv1(x))
        h = self.pool1(h)
        h = self.relu(self.conv2(h))
        h = self.pool2(h)
        h = self.relu(self.conv3a(h))
        h = self.relu(self.conv3b(h))
        h = self.pool3(h)
        return self.fc(h.view(h.size(0), -1))


class CRNN(nn.Module):
    """Convolutions by named modules, rectangular pools, then a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential()
        for i, (inside, outside) in enumerate([(1, 6), (6, 8), (8, 8)]):
            self.cnn.add_module(f"conv{i}", nn.Conv2d(inside, outside, 3, 1, 1))
            if i == 1:
                self.cnn.add_module(f"norm{i}", nn.BatchNorm2d(outside))
            self.cnn.add_module(f"relu{i}", nn.LeakyReLU(0.2, inplace=True))
            self.cnn.add_module(
                f"pool{i}", nn.MaxPool2d((2, 2), (2, 1), (0, 1)) if i == 2 else nn.MaxPool2d(2, 2)
            )
        self.rnn = nn.LSTM(8, 6, bidirectional=True)
        self.embedding = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        features = self.cnn(x)
        sequence, _ = self.rnn(features.mean(2).permute(2, 0, 1))
        return self.embedding(sequence)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(2, 6, 5),
            nn.SiLU(),
            nn.AvgPool1d(2),
            nn.Conv1d(6, 6, 3),
            nn.Sigmoid(),
            nn.MaxPool1d(3, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).flatten(1)


class Siamese(nn.Module):
    """One encoder, called twice; it stands under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.same_encoder = self.encoder
        self.stem = nn.Conv1d(2, 2, 3, padding="same")
        self.fc = nn.Linear(18, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a = self.encoder(F.gelu(self.stem(a)))
        b = self.same_encoder(F.gelu(self.stem(b), approximate="tanh"))
        return self.fc((a - b).abs())


class Residual(nn.Module):
    """Values that are read twice: by the sum, by a stash, by a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv4 = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.stash: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = F.relu(y)
        z = z + y
        w = F.relu(self.conv2(z))
        z = F.max_pool2d(w, 2)
        self.stash = self.conv3(z)
        z = self.relu(self.stash)
        u = self.conv4(z)
        v = F.relu(u)
        return F.max_pool2d(v, u.shape[-1]).flatten(1) + w.mean()


class Unpool(nn.Module):
    """An autoencoder whose pool returns indices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)
        self.deconv = nn.ConvTranspose2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x, indices = self.pool(x)
        return self.deconv(self.unpool(x, indices))


class ControlFlow(nn.Module):
    """Branches on arguments, types, shapes and modes; loops; another method; a context manager."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in range(3)])
        self.acts = nn.ModuleList([nn.ReLU(), nn.Tanh(), nn.ReLU()])
        self.__head = nn.Conv2d(6, 4, 1)
        self.frozen = nn.Conv2d(3, 3, 3, padding=1)
        self.calls = 0

    def encode(self, x: Tensor, small: bool) -> Tensor:
        if small and isinstance(x, Tensor):
            return F.max_pool2d(self.stem(x).relu_(), 4)
        x = self.stem(x)
        return torch.sigmoid(x)

    def forward(self, x: Tensor, small: bool = True) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            x = x + F.relu(self.frozen(x))
        x = self.encode(x, small)
        for conv, act in zip(self.blocks, self.acts, strict=True):
            x = act(conv(x))
            if x.shape[-1] > 100:
                break
        if self.training:
            x = x * 2
        return F.leaky_relu(self.__head(x), 0.1)


class TextCNN(nn.Module):
    """A comprehension over convolutions, with max over time whose window is the value's own length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.convs = nn.ModuleList([nn.Conv1d(8, 4, k) for k in (2, 3, 4)])
        self.fc = nn.Linear(12, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).transpose(1, 2)
        pooled = [F.max_pool1d(h, h.shape[2]).squeeze(2) for h in [F.relu(conv(x)) for conv in self.convs]]
        return self.fc(torch.cat(pooled, 1))


def add_one(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 1


class Twice:
    """A forward that somebody put on an instance."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * type(self.module).forward(self.module, x)


class Hooked(nn.Module):
    """Things that watch or change modules: hooks, weight norm of both kinds, a forward on the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.b = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)), nn.ReLU()
        )
        self.c = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)), nn.ReLU())
        self.d = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.d[0].forward = Twice(self.d[0])  # type: ignore[method-assign]
        self.e = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.a[1].register_forward_hook(add_one)

    def forward(self, x: Tensor) -> Tensor:
        return self.e(self.d(self.c(self.b(self.a(x)))))


class Quirks(nn.Module):
    """Strides, dilation, groups, padding by name and by mode, a pool's own divisor, a subclass of Conv2d."""

    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=2),
            nn.ReLU(),
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", bias=False),
            nn.Tanh(),
            nn.AvgPool2d(2, divisor_override=3),
            Quirks.Scaled(8, 4, 1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def sequences(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape), torch.randn(*shape))


ZOO: dict[str, Entry] = {
    "sequential": Entry(sequential, images(), ["0", "6"], {"3": "BatchNorm2d follows"}),
    "functional": Entry(Functional, images(), ["conv1", "conv2", "conv3"]),
    "vgg": Entry(VGG, images(size=32), ["features.0", "features.3", "features.6", "features.8"]),
    "c3d": Entry(C3D, lambda: (torch.randn(2, 3, 4, 16, 16),), ["conv1", "conv2", "conv3a", "conv3b"]),
    "crnn": Entry(
        CRNN, images(1, 16), ["cnn.conv0", "cnn.conv2", "rnn"], {"cnn.conv1": "BatchNorm2d follows"}
    ),
    "siamese": Entry(Siamese, sequences(2, 2, 24), ["encoder.net.0", "encoder.net.3", "stem", "stem"]),
    "residual": Entry(
        Residual,
        images(size=12),
        ["conv2"],
        {"conv1": "kept as y", "conv3": "stored as self.stash", "conv4": "kept as u"},
    ),
    "unpool": Entry(Unpool, images(size=12), ["conv"], {"deconv": "transposed"}),
    "control_flow": Entry(
        ControlFlow,
        images(size=16),
        ["_ControlFlow__head", "blocks.0 ... blocks.2", "frozen", "stem", "stem"],
    ),
    "text_cnn": Entry(TextCNN, lambda: (torch.randint(20, (3, 10)),), ["convs.0 ... convs.2", "fc"]),
    "hooked": Entry(
        Hooked,
        images(size=12),
        ["e.0"],
        {
            "a.0": "ReLU, which follows, has hooks",
            "b.0": "parametrised",
            "c.0": "has hooks",
            "d.0": "forward of its own",
        },
    ),
    "quirks": Entry(Quirks, images(4, 20), ["net.0", "net.3"], {"net.6": "not exactly nn.Conv1d"}),
}
