"""The documented models, in plain torch: interfuse.optimize() makes them fast like any other model."""

from interfuse.models.cnn import cnn_blocks

__all__ = ["cnn_blocks"]
