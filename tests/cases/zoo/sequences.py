"""Text and sound: CRNN, DeepSpeech 2, an audio tagger, TextCNN, hierarchical attention, a translator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class BidirectionalLSTM(nn.Module):
    def __init__(self, inside: int, hidden: int, outside: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inside, hidden, bidirectional=True)
        self.embedding = nn.Linear(hidden * 2, outside)

    def forward(self, x: Tensor) -> Tensor:
        recurrent, _ = self.rnn(x)
        t, b, h = recurrent.size()
        t_rec = recurrent.view(t * b, h)
        output = self.embedding(t_rec)
        return output.view(t, b, -1)


class CRNN(nn.Module):
    """Text in pictures: layers added by name, rectangular pools, two recurrent layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        cnn = nn.Sequential()
        sizes = (1, width, 2 * width, 2 * width)

        def conv_relu(i: int, normalised: bool = False) -> None:
            cnn.add_module(f"conv{i}", nn.Conv2d(sizes[i], sizes[i + 1], 3, 1, 1))
            if normalised:
                cnn.add_module(f"batchnorm{i}", nn.BatchNorm2d(sizes[i + 1]))
            cnn.add_module(f"relu{i}", nn.ReLU(True))

        conv_relu(0)
        cnn.add_module("pooling0", nn.MaxPool2d(2, 2))
        conv_relu(1, normalised=True)
        cnn.add_module("pooling1", nn.MaxPool2d((2, 2), (2, 1), (0, 1)))
        conv_relu(2)
        cnn.add_module("pooling2", nn.MaxPool2d((4, 1)))
        self.cnn = cnn
        self.rnn = nn.Sequential(
            BidirectionalLSTM(2 * width, width, width), BidirectionalLSTM(width, width, 11)
        )

    def forward(self, x: Tensor) -> Tensor:
        conv = self.cnn(x)
        _, _, h, _ = conv.size()
        if h != 1:
            raise ValueError("the height of conv must be 1")
        conv = conv.squeeze(2)
        conv = conv.permute(2, 0, 1)
        return self.rnn(conv)


class MaskConv(nn.Module):
    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.seq_module = layers

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        for module in self.seq_module:
            x = module(x)
            mask = torch.arange(x.size(3)) >= lengths.view(-1, 1)
            x = x.masked_fill(mask.view(len(lengths), 1, 1, -1), 0)
        return x, lengths


class BatchRNN(nn.Module):
    def __init__(self, inside: int, hidden: int, normalised: bool) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(inside) if normalised else None
        self.rnn = nn.LSTM(input_size=inside, hidden_size=hidden, bidirectional=True, bias=True)

    def forward(self, x: Tensor, output_lengths: Tensor) -> Tensor:
        if self.batch_norm is not None:
            x = self.batch_norm(x.flatten(0, 1)).view(x.shape)
        x = pack_padded_sequence(x, output_lengths)
        x, _h = self.rnn(x)
        x, _ = pad_packed_sequence(x)
        return x.view(x.size(0), x.size(1), 2, -1).sum(2).view(x.size(0), x.size(1), -1)


class DeepSpeech2(nn.Module):
    """Masked convolutions over a spectrogram, packed bidirectional layers whose directions are summed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = MaskConv(
            nn.Sequential(
                nn.Conv2d(1, width, (11, 5), (2, 1), (5, 2)),
                nn.BatchNorm2d(width),
                nn.Hardtanh(0, 20, inplace=True),
                nn.Conv2d(width, width, (5, 5), (2, 1), (2, 2)),
                nn.ReLU(),
            )
        )
        self.rnns = nn.Sequential(BatchRNN(5 * width, 2 * width, False), BatchRNN(2 * width, 2 * width, True))
        self.fc = nn.Sequential(nn.BatchNorm1d(2 * width), nn.Linear(2 * width, 9, bias=False))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x, output_lengths = self.conv(x, lengths)
        sizes = x.size()
        x = x.view(sizes[0], sizes[1] * sizes[2], sizes[3])
        x = x.transpose(1, 2).transpose(0, 1).contiguous()
        for rnn in self.rnns:
            x = rnn(x, output_lengths)
        t, n = x.size(0), x.size(1)
        x = self.fc(x.view(t * n, -1)).view(t, n, -1)
        return x.transpose(0, 1).log_softmax(-1)


class ConvBlock(nn.Module):
    """The audio tagging networks' block: what kind of pool is told at the call."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, kernel_size=3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm2d(outside)

    def forward(self, input: Tensor, pool_size: tuple[int, int] = (2, 2), pool_type: str = "avg") -> Tensor:  # noqa: A002
        x = input
        x = F.relu_(self.bn1(self.conv1(x)))
        x = F.relu_(self.conv2(x))
        if pool_type == "max":
            x = F.max_pool2d(x, kernel_size=pool_size)
        elif pool_type == "avg":
            x = F.avg_pool2d(x, kernel_size=pool_size)
        return x


class AudioCRNN(nn.Module):
    """Sound events: blocks over a spectrogram, a recurrence over time, attention over the frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(16)
        self.conv_block1 = ConvBlock(1, width)
        self.conv_block2 = ConvBlock(width, 2 * width)
        self.gru = nn.GRU(2 * width, width, 1, batch_first=True, bidirectional=True)
        self.att = nn.Conv1d(2 * width, 5, 1)
        self.cla = nn.Conv1d(2 * width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 3)
        x = self.bn0(x)
        x = x.transpose(1, 3)
        x = self.conv_block1(x, pool_size=(2, 2), pool_type="avg")
        x = F.dropout(x, p=0.0, training=self.training)
        x = self.conv_block2(x, pool_size=(1, 2), pool_type="max")
        x = torch.mean(x, dim=3)
        self.gru.flatten_parameters()
        x, _ = self.gru(x.transpose(1, 2))
        x = x.transpose(1, 2)
        norm_att = torch.softmax(torch.tanh(self.att(x)), dim=-1)
        cla = torch.sigmoid(self.cla(x))
        return torch.sum(norm_att * cla, dim=2)


class TextCNN(nn.Module):
    """Convolutions over words as pictures one word wide, max over time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 2 * width)
        self.convs = nn.ModuleList([nn.Conv2d(1, width, (k, 2 * width)) for k in (2, 3, 4)])
        self.dropout = nn.Dropout(0.5)
        self.fc1 = nn.Linear(3 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x.unsqueeze(1)
        x = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        x = [F.max_pool1d(i, i.size(2)).squeeze(2) for i in x]
        x = torch.cat(x, 1)
        x = self.dropout(x)
        return self.fc1(x)


class Attention(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(size, size)
        self.context = nn.Linear(size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u = torch.tanh(self.dense(x))
        weights = F.softmax(self.context(u).squeeze(-1), dim=1)
        return (weights.unsqueeze(-1) * x).sum(dim=1)


class HierarchicalAttention(nn.Module):
    """Documents of sentences of words: packed words, then sentences."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(40, width)
        self.word_rnn = nn.GRU(width, width, bidirectional=True, batch_first=True)
        self.word_attention = Attention(2 * width)
        self.sentence_rnn = nn.GRU(2 * width, width, bidirectional=True, batch_first=True)
        self.sentence_attention = Attention(2 * width)
        self.fc = nn.Linear(2 * width, 3)

    def forward(self, documents: Tensor, words: Tensor) -> Tensor:
        batch, sentences, length = documents.shape
        x = self.embeddings(documents.view(-1, length))
        packed = pack_padded_sequence(x, words.view(-1), batch_first=True, enforce_sorted=False)
        packed, _ = self.word_rnn(packed)
        x, _ = pad_packed_sequence(packed, batch_first=True)
        x = self.word_attention(x).view(batch, sentences, -1)
        x, _ = self.sentence_rnn(x)
        return self.fc(self.sentence_attention(x))


class BahdanauAttention(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.Wa = nn.Linear(hidden, hidden)
        self.Ua = nn.Linear(hidden, hidden)
        self.Va = nn.Linear(hidden, 1)

    def forward(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.Va(torch.tanh(self.Wa(query) + self.Ua(keys)))
        weights = F.softmax(scores.squeeze(2).unsqueeze(1), dim=-1)
        return torch.bmm(weights, keys), weights


class Translator(nn.Module):
    """Sequence to sequence: an encoder over the sentence, a decoder that attends, a word at a time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.target = nn.Embedding(25, width)
        self.attention = BahdanauAttention(width)
        self.decoder = nn.GRU(2 * width, width, batch_first=True)
        self.out = nn.Linear(width, 25)
        self.dropout = nn.Dropout(0.1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        encoder_outputs, hidden = self.encoder(self.dropout(self.embedding(source)))
        outputs = []
        for i in range(target.size(1)):
            output, hidden, _ = self.forward_step(target[:, i : i + 1], hidden, encoder_outputs)
            outputs.append(output)
        return F.log_softmax(torch.cat(outputs, dim=1), dim=-1)

    def forward_step(self, word: Tensor, hidden: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embedded = self.dropout(self.target(word))
        query = hidden.permute(1, 0, 2)
        context, weights = self.attention(query, outputs)
        input_gru = torch.cat((embedded, context), dim=2)
        output, hidden = self.decoder(input_gru, hidden)
        return self.out(output), hidden, weights
