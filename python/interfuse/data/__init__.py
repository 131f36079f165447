"""Data made on the spot, the same for the same seed: tasks that need every modality, scenes to describe."""

from interfuse.data.samples import Samples
from interfuse.data.scenes import WORDS, scenes, sentence
from interfuse.data.tasks import image_text, image_text_audio, matching, video_audio

__all__ = [
    "WORDS",
    "Samples",
    "image_text",
    "image_text_audio",
    "matching",
    "scenes",
    "sentence",
    "video_audio",
]
