"""Public architectures written again in plain torch, small: what optimize() meets in models nobody here made.

An entry makes its model and its inputs at a scale (1 for tests, more for timing), and says which sites
optimize() fuses in it, by the names of their first modules (once for each place), and a part of the reason
for some that it leaves alone. Every model returns one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from interfuse.cases.zoo import fusion, sequences, vision
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Entry:
    model: Callable[[int], nn.Module]  # takes the width of its first layers
    inputs: Callable[[int], tuple[Any, ...]]  # takes the batch
    fused: list[str]
    left: dict[str, str] = field(default_factory=dict)
    own_in_training: list[str] = field(default_factory=list)  # torch's own functions are faster there
    idle: list[str] = field(default_factory=list)  # fused in a Sequential whose own forward nobody calls
    in_inference: list[str] = field(default_factory=list)  # fused there alone

    def build(self, scale: int = 1) -> tuple[nn.Module, tuple[Any, ...]]:
        """The model at 8 channels and a batch of 3, times the scale."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.model(8 * scale), self.inputs(3 * scale)


def floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape)


def tokens(vocabulary: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randint(1, vocabulary, (batch, *shape))


def falling(longest: int, least: int = 2) -> Callable[[int], Tensor]:
    """Lengths, sorted as packing wants them, the first of them the longest."""
    return lambda batch: torch.linspace(longest, least, batch).long()


def mixed(longest: int, *shape: int) -> Callable[[int], Tensor]:
    def lengths(batch: int) -> Tensor:
        made = torch.randint(1, longest + 1, (batch, *shape))
        made.view(-1)[-1] = longest
        return made

    return lengths


def each(*makers: Callable[[int], Tensor]) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: tuple(make(batch) for make in makers)


NORMALISED = "BatchNorm2d follows"
ONE_STEP = "one step"

ENTRIES: dict[str, Entry] = {
    "lenet": Entry(vision.LeNet, each(floats(1, 28, 28)), ["conv1"], {"conv2": "Dropout2d follows"}),
    "squeezenet": Entry(
        vision.SqueezeNet,
        each(floats(3, 29, 29)),
        ["classifier.1", "features.0"]
        + [f"features.{i}.{name}" for i in (3, 4) for name in ("expand1x1", "expand3x3", "squeeze")],
    ),
    "resnet": Entry(
        vision.ResNet,
        each(floats(3, 32, 32)),
        ["stem.0"],
        {"conv1": NORMALISED, "layer1.0.conv1": NORMALISED},
    ),
    "unet": Entry(
        vision.UNet,
        each(floats(1, 16, 16)),
        [*(f"{name}.{i}" for name in ("down1", "down2", "merge") for i in (0, 2)), "last"],
        {"up": "transposed"},
    ),
    "c3d": Entry(vision.C3D, each(floats(3, 8, 16, 16)), ["conv1", "conv2", "conv3a", "conv3b"]),
    "two_stream": Entry(
        vision.TwoStream,
        each(floats(2, 3, 48, 48), floats(2, 10, 48, 48)),
        [f"{name}.features.{i}" for name in ("spatial", "temporal") for i in (0, 3, 5)],
    ),
    "conv_lstm": Entry(
        vision.ConvLSTM,
        each(floats(4, 1, 16, 16)),
        ["decoder.1", "decoder.3", "encoder"],
        {"cell.conv": "split"},
    ),
    "siamese": Entry(
        vision.Siamese, each(floats(1, 36, 36), floats(1, 36, 36)), ["conv.0", "conv.3", "conv.6"]
    ),
    "crnn": Entry(
        sequences.CRNN,
        each(floats(1, 16, 24)),
        ["cnn.conv0", "cnn.conv2", "rnn.0.rnn", "rnn.1.rnn"],
        {"cnn.conv1": NORMALISED},
    ),
    "deep_speech": Entry(
        sequences.DeepSpeech2,
        each(floats(1, 20, 18), falling(18, 5)),
        ["rnns.0.rnn", "rnns.1.rnn"],
        {"conv.seq_module.0 ... conv.seq_module.3": "also read in line"},
        idle=["conv.seq_module.3"],
    ),
    "audio_crnn": Entry(
        sequences.AudioCRNN,
        each(floats(1, 20, 16)),
        ["att", "cla", "conv_block1.conv2", "conv_block2.conv2", "gru"],
        {"conv_block1.conv1": NORMALISED},
    ),
    "text_cnn": Entry(
        sequences.TextCNN,
        each(tokens(30, 9)),
        ["convs.0 ... convs.2"],
        own_in_training=["convs.0 ... convs.2"],
    ),
    "hierarchical_attention": Entry(
        sequences.HierarchicalAttention,
        each(tokens(40, 4, 6), mixed(6, 4)),
        ["sentence_rnn", "word_rnn"],
    ),
    "translator": Entry(
        sequences.Translator,
        each(tokens(30, 8), tokens(25, 5)),
        ["decoder", "encoder"],
        {"embedding": "Dropout follows"},
    ),
    "vqa": Entry(fusion.VQA, each(floats(3, 16, 16), tokens(30, 7)), ["cnn.0", "cnn.3", "qst_encoder.lstm"]),
    "show_attend_tell": Entry(
        fusion.ShowAttendTell,
        each(floats(3, 16, 16), tokens(20, 7), falling(7, 3)),
        ["encoder.0"],
        {"decode_step": ONE_STEP, "encoder.2": NORMALISED},
    ),
    "tensor_fusion": Entry(
        fusion.TensorFusion, each(floats(5), floats(7), floats(6, 16)), ["text_subnet.rnn"]
    ),
    "low_rank_fusion": Entry(fusion.LowRankFusion, each(floats(5), floats(6, 16)), ["text_subnet.rnn"]),
    "gated_unit": Entry(
        fusion.GatedMultimodalUnit, each(floats(3, 12, 12), floats(12)), ["image.0"], in_inference=["gate"]
    ),
    "film": Entry(
        fusion.FiLM,
        each(floats(3, 16, 16), tokens(20, 6)),
        ["blocks.0.conv1", "blocks.1.conv1", "classifier.0", "gru", "stem.0", "stem.2"],
        {"blocks.0.conv2": NORMALISED},
        in_inference=["embedding"],
    ),
    "mult": Entry(
        fusion.MulT,
        each(floats(7, 10), floats(9, 6)),
        ["trans_a_with_l.self_attn", "trans_l_with_a.self_attn", "trans_mem.self_attn"],
    ),
    "memory_fusion": Entry(
        fusion.MemoryFusion,
        lambda n: (torch.randn(5, n, 12),),
        [],
        {"lstm_l": ONE_STEP, "lstm_a": ONE_STEP},
        in_inference=["out"],
    ),
    "late_fusion": Entry(
        fusion.LateFusion,
        each(floats(3, 16, 16), tokens(25, 8), mixed(8), floats(4, 20)),
        ["audio.0", "image.conv", "text"],
        in_inference=["text_head"],
    ),
    "early_fusion": Entry(fusion.EarlyFusion, each(floats(7, 10), floats(7, 6), floats(3)), ["lstm"]),
    "autoencoder": Entry(
        fusion.BimodalAutoencoder,
        each(floats(1, 16, 16), floats(20)),
        ["image_encoder.0", "image_encoder.2"],
        {"image_decoder.0": "transposed"},
    ),
    "clip": Entry(
        fusion.CLIP,
        each(floats(3, 16, 16), tokens(30, 7)),
        [f"{tower}.{i}.attn" for tower in ("transformer", "visual") for i in (0, 1)],
    ),
}
