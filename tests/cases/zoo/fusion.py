"""Several modalities: VQA, captioning, tensor and low-rank fusion, gated units, FiLM, MulT, memory fusion,
early and late fusion, an autoencoder of two modalities, CLIP."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence


class QuestionEncoder(nn.Module):
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.word2vec = nn.Embedding(words, width)
        self.tanh = nn.Tanh()
        self.lstm = nn.LSTM(width, width, 2)
        self.fc = nn.Linear(2 * 2 * width, 2 * width)

    def forward(self, question: Tensor) -> Tensor:
        vectors = self.tanh(self.word2vec(question))
        vectors = vectors.transpose(0, 1)
        _, (hidden, cell) = self.lstm(vectors)
        feature = torch.cat((hidden, cell), 2)
        feature = feature.transpose(0, 1)
        feature = feature.reshape(feature.size()[0], -1)
        return self.fc(self.tanh(feature))


class VQA(nn.Module):
    """The deeper LSTM Q + norm I: a normalised picture times a question."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2),
        )  # fmt: skip
        self.img_fc = nn.Linear(2 * width * 16, 2 * width)
        self.qst_encoder = QuestionEncoder(30, width)
        self.tanh = nn.Tanh()
        self.dropout = nn.Dropout(0.5)
        self.fc1 = nn.Linear(2 * width, 2 * width)
        self.fc2 = nn.Linear(2 * width, 12)

    def forward(self, img: Tensor, qst: Tensor) -> Tensor:
        img_feature = self.img_fc(self.cnn(img).flatten(1))
        img_feature = img_feature.div(img_feature.norm(p=2, dim=1, keepdim=True).detach())
        qst_feature = self.qst_encoder(qst)
        combined = torch.mul(img_feature, qst_feature)
        combined = self.dropout(self.tanh(combined))
        combined = self.fc1(combined)
        combined = self.dropout(self.tanh(combined))
        return self.fc2(combined)


class ShowAttendTell(nn.Module):
    """Captions word by word, each looking at the picture anew; the batch shrinks, since it is sorted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width)
        )
        self.encoder_att = nn.Linear(width, width)
        self.decoder_att = nn.Linear(width, width)
        self.full_att = nn.Linear(width, 1)
        self.relu = nn.ReLU()
        self.softmax = nn.Softmax(dim=1)
        self.embedding = nn.Embedding(20, width)
        self.decode_step = nn.LSTMCell(2 * width, width, bias=True)
        self.init_h = nn.Linear(width, width)
        self.init_c = nn.Linear(width, width)
        self.f_beta = nn.Linear(width, width)
        self.sigmoid = nn.Sigmoid()
        self.fc = nn.Linear(width, 20)

    def attend(self, encoder_out: Tensor, hidden: Tensor) -> Tensor:
        att1 = self.encoder_att(encoder_out)
        att2 = self.decoder_att(hidden)
        att = self.full_att(self.relu(att1 + att2.unsqueeze(1))).squeeze(2)
        alpha = self.softmax(att)
        return (encoder_out * alpha.unsqueeze(2)).sum(dim=1)

    def forward(self, images: Tensor, captions: Tensor, lengths: Tensor) -> Tensor:
        encoder_out = self.encoder(images).flatten(2).transpose(1, 2)
        embeddings = self.embedding(captions)
        mean_encoder_out = encoder_out.mean(dim=1)
        h, c = self.init_h(mean_encoder_out), self.init_c(mean_encoder_out)
        decode_lengths = (lengths - 1).tolist()
        predictions = encoder_out.new_zeros(len(decode_lengths), max(decode_lengths), 20)
        for t in range(max(decode_lengths)):
            size = sum(length > t for length in decode_lengths)
            awe = self.attend(encoder_out[:size], h[:size])
            gate = self.sigmoid(self.f_beta(h[:size]))
            awe = gate * awe
            h, c = self.decode_step(torch.cat([embeddings[:size, t, :], awe], dim=1), (h[:size], c[:size]))
            predictions[:size, t, :] = self.fc(h)
        return predictions


class SubNet(nn.Module):
    def __init__(self, inside: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(inside)
        self.linear_1 = nn.Linear(inside, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        y_1 = F.relu(self.linear_1(normed))
        return F.relu(self.linear_2(y_1))


class TextSubNet(nn.Module):
    def __init__(self, inside: int, hidden: int, outside: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inside, hidden, num_layers=1, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.linear_1 = nn.Linear(hidden, outside)

    def forward(self, x: Tensor) -> Tensor:
        _, final_states = self.rnn(x)
        h = self.dropout(final_states[0].squeeze(0))
        return self.linear_1(h)


class TensorFusion(nn.Module):
    """TFN: the outer product of all three, each with a one appended."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.audio_subnet = SubNet(5, width // 2)
        self.video_subnet = SubNet(7, width // 2)
        self.text_subnet = TextSubNet(16, 2 * width, width)
        self.post_fusion_layer_1 = nn.Linear((width + 1) * (width // 2 + 1) ** 2, 2 * width)
        self.post_fusion_layer_2 = nn.Linear(2 * width, 1)
        self.output_range = nn.Parameter(torch.tensor([6.0]), requires_grad=False)

    def forward(self, audio: Tensor, video: Tensor, text: Tensor) -> Tensor:
        audio_h = self.audio_subnet(audio)
        video_h = self.video_subnet(video)
        text_h = self.text_subnet(text)
        one = audio_h.new_ones(audio_h.size(0), 1)
        _audio_h = torch.cat((one, audio_h), dim=1)
        _video_h = torch.cat((one, video_h), dim=1)
        _text_h = torch.cat((one, text_h), dim=1)
        fusion = torch.bmm(_audio_h.unsqueeze(2), _video_h.unsqueeze(1))
        fusion = fusion.view(-1, _audio_h.size(1) * _video_h.size(1), 1)
        fusion = torch.bmm(fusion, _text_h.unsqueeze(1)).view(audio.size(0), -1)
        y_1 = F.relu(self.post_fusion_layer_1(fusion))
        y_2 = torch.sigmoid(self.post_fusion_layer_2(y_1))
        return y_2 * self.output_range - 3.0


class LowRankFusion(nn.Module):
    """LMF: the tensor fusion of a weight of low rank, with its factors as bare parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        rank = 4
        self.audio_subnet = SubNet(5, width)
        self.text_subnet = TextSubNet(16, width, width)
        self.audio_factor = nn.Parameter(torch.randn(rank, width + 1, 3))
        self.text_factor = nn.Parameter(torch.randn(rank, width + 1, 3))
        self.fusion_weights = nn.Parameter(torch.randn(1, rank))
        self.fusion_bias = nn.Parameter(torch.zeros(1, 3))

    def forward(self, audio: Tensor, text: Tensor) -> Tensor:
        audio_h, text_h = self.audio_subnet(audio), self.text_subnet(text)
        one = audio_h.new_ones(audio_h.shape[0], 1)
        fusion_audio = torch.matmul(torch.cat((one, audio_h), dim=1), self.audio_factor)
        fusion_text = torch.matmul(torch.cat((one, text_h), dim=1), self.text_factor)
        fusion_zy = fusion_audio * fusion_text
        output = torch.matmul(self.fusion_weights, fusion_zy.permute(1, 0, 2)).squeeze() + self.fusion_bias
        return output.view(-1, 3)


class GatedMultimodalUnit(nn.Module):
    """GMU: a gate read from both modalities chooses between them; maxout classifiers behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AvgPool2d(2))
        self.visual_mlp = nn.Linear(width, width)
        self.textual_mlp = nn.Linear(12, width)
        self.gate = nn.Linear(2 * width, width)
        self.bn = nn.BatchNorm1d(width)
        self.maxout = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.classifier = nn.Linear(width, 6)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        visual = torch.tanh(self.visual_mlp(self.image(image).mean((2, 3))))
        textual = torch.tanh(self.textual_mlp(text))
        z = torch.sigmoid(self.gate(torch.cat([visual, textual], dim=-1)))
        fused = self.bn(z * visual + (1 - z) * textual)
        fused = torch.stack([linear(fused) for linear in self.maxout]).amax(0)
        return self.classifier(fused)


class FiLMBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 1, 1, 0)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(width, affine=False)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.relu1(x)
        identity = x
        x = self.conv2(x)
        x = self.norm2(x)
        x = (1 + gamma.view(x.size(0), x.size(1), 1, 1)) * x + beta.view(x.size(0), x.size(1), 1, 1)
        x = self.relu2(x)
        return x + identity


class FiLM(nn.Module):
    """A question's GRU scales and shifts the channels of a picture's blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 2), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()
        )
        self.embedding = nn.Embedding(20, width)
        self.gru = nn.GRU(width, 2 * width, batch_first=True)
        self.film_generator = nn.Linear(2 * width, 2 * 2 * width)
        self.blocks = nn.ModuleList([FiLMBlock(width) for _ in range(2)])
        self.classifier = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1), nn.ReLU(inplace=True), nn.AdaptiveMaxPool2d((1, 1)), nn.Flatten(),
            nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 5),
        )  # fmt: skip

    def forward(self, image: Tensor, question: Tensor) -> Tensor:
        x = self.stem(image)
        film = self.film_generator(self.gru(self.embedding(question))[1][-1]).chunk(2, 1)
        for i, block in enumerate(self.blocks):
            beta, gamma = film[i][:, : self.width], film[i][:, self.width :]
            x = block(x, beta, gamma)
        return self.classifier(x)


class CrossmodalLayer(nn.Module):
    """Pre-norm; where there is no other modality, it attends to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(embed_dim=width, num_heads=heads, dropout=0.0)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.layer_norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        residual = x
        x = self.layer_norms[0](x)
        if other is None:
            mask = torch.triu(torch.full((x.size(0), x.size(0)), -torch.inf, dtype=x.dtype), 1)
            x, _ = self.self_attn(query=x, key=x, value=x, attn_mask=mask)
        else:
            other = self.layer_norms[0](other)
            x, _ = self.self_attn(x, other, other)
        x = residual + x
        residual = x
        x = self.layer_norms[1](x)
        x = F.relu(self.fc1(x))
        x = self.fc2(x)
        return residual + x


class MulT(nn.Module):
    """Two modalities that are not aligned, each seen through the other, then remembered."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_l = nn.Conv1d(10, width, kernel_size=1, padding=0, bias=False)
        self.proj_a = nn.Conv1d(6, width, kernel_size=3, padding=1, bias=False)
        self.trans_l_with_a = CrossmodalLayer(width, 4)
        self.trans_a_with_l = CrossmodalLayer(width, 4)
        self.trans_mem = CrossmodalLayer(2 * width, 4)
        self.proj1 = nn.Linear(2 * width, 2 * width)
        self.proj2 = nn.Linear(2 * width, 2 * width)
        self.out_layer = nn.Linear(2 * width, 1)

    def forward(self, x_l: Tensor, x_a: Tensor) -> Tensor:
        x_l, x_a = x_l.transpose(1, 2), x_a.transpose(1, 2)
        proj_l = self.proj_l(x_l).permute(2, 0, 1)
        proj_a = self.proj_a(x_a).permute(2, 0, 1)
        h_l = self.trans_l_with_a(proj_l, proj_a)
        h_a = self.trans_a_with_l(proj_a, proj_l)
        h = torch.cat([h_l[-1:], h_a[-1:], h_l[:1] * 0 + h_a[:1]], 0)
        last = self.trans_mem(torch.cat([h, h.flip(0)], dim=2))[-1]
        projected = self.proj2(F.dropout(F.relu(self.proj1(last)), p=0.0, training=self.training))
        projected += last
        return self.out_layer(projected)


class MemoryFusion(nn.Module):
    """MFN: a cell for each modality, attention over what changed, a gated memory that runs along."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm_l = nn.LSTMCell(8, width)
        self.lstm_a = nn.LSTMCell(4, width)
        self.att1_fc1 = nn.Linear(4 * width, width)
        self.att1_fc2 = nn.Linear(width, 4 * width)
        self.att2_fc = nn.Sequential(nn.Linear(4 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.gamma1 = nn.Linear(5 * width, width)
        self.gamma2 = nn.Linear(5 * width, width)
        self.out = nn.Linear(3 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x_l, x_a = x[:, :, :8], x[:, :, 8:]
        width = self.lstm_l.hidden_size
        h_l, c_l, h_a, c_a, mem = (x.new_zeros(x.shape[1], width) for _ in range(5))
        for i in range(x.shape[0]):
            new_h_l, new_c_l = self.lstm_l(x_l[i], (h_l, c_l))
            new_h_a, new_c_a = self.lstm_a(x_a[i], (h_a, c_a))
            c_star = torch.cat([torch.cat([c_l, c_a], dim=1), torch.cat([new_c_l, new_c_a], dim=1)], dim=1)
            attention = F.softmax(self.att1_fc2(F.relu(self.att1_fc1(c_star))), dim=1)
            attended = attention * c_star
            c_hat = torch.tanh(self.att2_fc(attended))
            both = torch.cat([attended, mem], dim=1)
            gamma1 = torch.sigmoid(self.gamma1(both))
            gamma2 = torch.sigmoid(self.gamma2(both))
            mem = gamma1 * mem + gamma2 * c_hat
            h_l, c_l, h_a, c_a = new_h_l, new_c_l, new_h_a, new_c_a
        return self.out(torch.cat([h_l, h_a, mem], dim=1))


class LateFusion(nn.Module):
    """A model for each modality; the decisions are weighted. Text is packed, unsorted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, width, 3), act=nn.GELU(), pool=nn.AvgPool2d(2), flat=nn.Flatten(),
                head=nn.Linear(width * 49, 4),
            )
        )  # fmt: skip
        self.embedding = nn.Embedding(25, width, padding_idx=0)
        self.text = nn.LSTM(width, width, num_layers=2, bidirectional=True, batch_first=True, dropout=0.3)
        self.text_head = nn.Linear(2 * width, 4)
        self.audio = nn.Sequential(
            nn.Conv1d(4, width, 5), nn.Tanh(), nn.MaxPool1d(2), nn.AdaptiveMaxPool1d(1)
        )
        self.audio_head = nn.Linear(width, 4)
        self.weights = nn.Parameter(torch.ones(3))

    def forward(self, image: Tensor, tokens: Tensor, lengths: Tensor, audio: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, (h, _) = self.text(packed)
        logits = torch.stack(
            [
                self.image(image),
                self.text_head(torch.cat([h[-2], h[-1]], 1)),
                self.audio_head(self.audio(audio).squeeze(-1)),
            ]
        )
        return (F.softmax(self.weights, 0)[:, None, None] * logits).sum(0)


class EarlyFusion(nn.Module):
    """EF-LSTM: the modalities of every step side by side, through one recurrence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(10 + 6, width, batch_first=True)
        self.regressor = nn.Sequential(nn.Linear(width + 3, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, text: Tensor, audio: Tensor, person: Tensor) -> Tensor:
        output, _ = self.lstm(torch.cat((text, audio), dim=-1))
        return self.regressor(torch.cat((output[:, -1], person), dim=1))


class BimodalAutoencoder(nn.Module):
    """Pictures and sound into one code, both out of it again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image_encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.ReLU(True),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(True),
            nn.Flatten(),
        )
        self.sound_encoder = nn.Sequential(nn.Linear(20, 2 * width), nn.ReLU())
        self.code = nn.Sequential(nn.Linear(2 * width * 16 + 2 * width, 2 * width), nn.Sigmoid())
        self.to_image = nn.Linear(2 * width, 2 * width * 16)
        self.image_decoder = nn.Sequential(
            nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU(True),
            nn.ConvTranspose2d(width, 1, 3, stride=2, padding=1, output_padding=1),
            nn.Sigmoid(),
        )
        self.sound_decoder = nn.Linear(2 * width, 20)

    def encode(self, image: Tensor, sound: Tensor) -> Tensor:
        return self.code(torch.cat([self.image_encoder(image), self.sound_encoder(sound)], 1))

    def forward(self, image: Tensor, sound: Tensor) -> Tensor:
        z = self.encode(image, sound)
        picture = self.image_decoder(F.relu(self.to_image(z)).view(z.size(0), -1, 4, 4))
        return torch.cat([picture.flatten(1), self.sound_decoder(z)], 1)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int, attn_mask: Tensor | None = None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                [
                    ("c_fc", nn.Linear(width, width * 4)),
                    ("gelu", QuickGELU()),
                    ("c_proj", nn.Linear(width * 4, width)),
                ]
            )
        )
        self.ln_2 = nn.LayerNorm(width)
        self.attn_mask = attn_mask

    def attention(self, x: Tensor) -> Tensor:
        self.attn_mask = self.attn_mask.to(dtype=x.dtype) if self.attn_mask is not None else None
        return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CLIP(nn.Module):
    """Two towers of transformers, and the cosines between all pairs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 4, 4, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.visual_position = nn.Parameter(scale * torch.randn(17, width))
        self.visual = nn.Sequential(*[ResidualAttentionBlock(width, 4) for _ in range(2)])
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, width))
        self.token_embedding = nn.Embedding(30, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(7, width))
        mask = torch.full((7, 7), float("-inf")).triu_(1)
        self.transformer = nn.Sequential(*[ResidualAttentionBlock(width, 4, mask) for _ in range(2)])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(scale * torch.randn(width, width))
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))

    def encode_image(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x.reshape(x.shape[0], x.shape[1], -1)
        x = x.permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)
        x = x + self.visual_position
        x = self.visual(x.permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x[:, 0, :]) @ self.proj

    def encode_text(self, text: Tensor) -> Tensor:
        x = self.token_embedding(text) + self.positional_embedding
        x = self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = self.ln_final(x)
        return x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        image_features = self.encode_image(image)
        text_features = self.encode_text(text)
        image_features = image_features / image_features.norm(dim=1, keepdim=True)
        text_features = text_features / text_features.norm(dim=1, keepdim=True)
        return self.logit_scale.exp() * image_features @ text_features.t()
