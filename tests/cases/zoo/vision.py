"""Pictures and videos: LeNet, SqueezeNet, ResNet, U-Net, C3D, two streams, a convolutional LSTM, twins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """The tutorial's: functional activations and pools, numbered layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 5)
        self.conv2 = nn.Conv2d(width, 2 * width, 5)
        self.drop = nn.Dropout2d()
        self.fc1 = nn.Linear(2 * width * 4 * 4, 8 * width)
        self.fc2 = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.drop(self.conv2(x)), 2))
        x = x.view(-1, self.num_flat_features(x))
        x = F.relu(self.fc1(x))
        x = F.dropout(x, 0.0, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)

    def num_flat_features(self, x: Tensor) -> int:
        features = 1
        for size in x.size()[1:]:
            features *= size
        return features


class Fire(nn.Module):
    def __init__(self, inside: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inside, squeeze, kernel_size=1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeeze, expand, kernel_size=1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeeze, expand, kernel_size=3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat(
            [self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1
        )


class SqueezeNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4 * width, kernel_size=3, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(4 * width, width, 2 * width),
            Fire(4 * width, width, 2 * width),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(p=0.5), nn.Conv2d(4 * width, 7, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.classifier(x)
        return torch.flatten(x, 1)


class BasicBlock(nn.Module):
    def __init__(self, inside: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or inside != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """The stem of ResNet-D, which has a convolution without normalisation, then two stages."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(inplace=True))
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._make_layer(width, width, 1)
        self.layer2 = self._make_layer(width, 2 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2 * width, 10)

    def _make_layer(self, inside: int, planes: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(inside, planes, stride), BasicBlock(planes, planes))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(self.stem(x)))))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


class UNet(nn.Module):
    """Double convolutions whose values are also read by the way up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down1 = self.double_conv(1, width)
        self.down2 = self.double_conv(width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge = self.double_conv(2 * width, width)
        self.last = nn.Conv2d(width, 1, 1)

    @staticmethod
    def double_conv(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inside, outside, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(outside, outside, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        x = self.down2(self.pool(skip))
        x = torch.cat([self.up(x), skip], dim=1)
        return torch.sigmoid(self.last(self.merge(x)))


class C3D(nn.Module):
    """One activation object for all, views, dropout between dense layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, width, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.pool1 = nn.MaxPool3d(kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.conv2 = nn.Conv3d(width, 2 * width, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.pool2 = nn.MaxPool3d(kernel_size=(2, 2, 2), stride=(2, 2, 2))
        self.conv3a = nn.Conv3d(2 * width, 2 * width, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.conv3b = nn.Conv3d(2 * width, 2 * width, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.pool3 = nn.MaxPool3d(kernel_size=(2, 2, 2), stride=(2, 2, 2), padding=(0, 1, 1))
        self.fc6 = nn.Linear(2 * width * 2 * 3 * 3, 4 * width)
        self.fc7 = nn.Linear(4 * width, 5)
        self.dropout = nn.Dropout(p=0.5)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.conv1(x))
        h = self.pool1(h)
        h = self.relu(self.conv2(h))
        h = self.pool2(h)
        h = self.relu(self.conv3a(h))
        h = self.relu(self.conv3b(h))
        h = self.pool3(h)
        h = h.view(-1, h.shape[1] * 18)
        h = self.relu(self.fc6(h))
        h = self.dropout(h)
        return self.fc7(h)


class Stream(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for outside, kernel, stride in ((width, 7, 2), (2 * width, 5, 2), (2 * width, 3, 1)):
            layers += [nn.Conv2d(channels, outside, kernel, stride, kernel // 2), nn.ReLU(inplace=True)]
            if len(layers) < 5:
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            channels = outside
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(2 * width, 8 * width), nn.ReLU(True), nn.Dropout(0.9))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.mean(dim=(2, 3)))


class TwoStream(nn.Module):
    """A picture and a stack of optical flow; the scores are averaged over segments, then over streams."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = Stream(3, width)
        self.temporal = Stream(10, width)
        self.score = nn.ModuleDict({"spatial": nn.Linear(8 * width, 6), "temporal": nn.Linear(8 * width, 6)})

    def forward(self, frames: Tensor, flow: Tensor) -> Tensor:
        segments = frames.size(1)
        scores = []
        for name, x in (("spatial", frames), ("temporal", flow)):
            stream = self.spatial if name == "spatial" else self.temporal
            y = self.score[name](stream(x.flatten(0, 1)))
            scores.append(F.softmax(y.view(-1, segments, y.size(-1)).mean(1), dim=-1))
        return (scores[0] + 1.5 * scores[1]) / 2.5


class ConvLSTMCell(nn.Module):
    def __init__(self, inside: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.conv = nn.Conv2d(inside + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h_cur, c_cur = state
        combined = torch.cat([x, h_cur], dim=1)
        combined_conv = self.conv(combined)
        cc_i, cc_f, cc_o, cc_g = torch.split(combined_conv, self.hidden, dim=1)
        c_next = torch.sigmoid(cc_f) * c_cur + torch.sigmoid(cc_i) * torch.tanh(cc_g)
        return torch.sigmoid(cc_o) * torch.tanh(c_next), c_next


class ConvLSTM(nn.Module):
    """Frames that are encoded, remembered and predicted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, width, 3, 2, 1)
        self.cell = ConvLSTMCell(width, width)
        self.decoder = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 1, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, video: Tensor) -> Tensor:
        h = c = torch.zeros_like(self.encoder(video[:, 0]))
        for t in range(video.size(1)):
            frame = F.leaky_relu(self.encoder(video[:, t]), negative_slope=0.2)
            h, c = self.cell(frame, (h, c))
        return self.decoder(h)


class Siamese(nn.Module):
    """One-shot verification: one encoder called for two pictures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, width, 6),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3),
            nn.ReLU(),
        )
        self.liner = nn.Sequential(nn.Linear(2 * width * 3 * 3, 8 * width), nn.Sigmoid())
        self.out = nn.Linear(8 * width, 1)

    def forward_one(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x.view(x.size()[0], -1)
        return self.liner(x)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        out1 = self.forward_one(x1)
        out2 = self.forward_one(x2)
        return self.out(torch.abs(out1 - out2))
