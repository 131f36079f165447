"""The documented models, on interfuse's modules or, with layers="torch", on torch's: docs/models.md."""

from interfuse.models.autoencoder import MultimodalAutoencoder
from interfuse.models.cnn import ConvEncoder, cnn, cnn3d, cnn_blocks, smallest_size
from interfuse.models.fusion import Fusion, image_text_fusion, video_audio_fusion
from interfuse.models.hierarchical import HierarchicalAttentionNetwork
from interfuse.models.keras import load_keras
from interfuse.models.recurrent import SequenceEncoder, lstm, rnn
from interfuse.models.siamese import SiameseNetwork
from interfuse.models.transfer import Transfer, freeze, thaw, transfer
from interfuse.models.transformer import CrossModalTransformer
from interfuse.models.trimodal import TriModalFusion

__all__ = [
    "ConvEncoder",
    "CrossModalTransformer",
    "Fusion",
    "HierarchicalAttentionNetwork",
    "MultimodalAutoencoder",
    "SequenceEncoder",
    "SiameseNetwork",
    "Transfer",
    "TriModalFusion",
    "cnn",
    "cnn3d",
    "cnn_blocks",
    "freeze",
    "image_text_fusion",
    "load_keras",
    "lstm",
    "rnn",
    "smallest_size",
    "thaw",
    "transfer",
    "video_audio_fusion",
]
